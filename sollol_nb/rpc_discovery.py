"""Finding RPC workers, under the name that the guide uses. The code is in `llama_cpp/workers/probe.py`."""

from sollol_nb.llama_cpp.workers.probe import Probe, ProbeOutcome, discover, probe, probe_all, test_rpc_backend

__all__ = ["Probe", "ProbeOutcome", "discover", "probe", "probe_all", "test_rpc_backend"]
