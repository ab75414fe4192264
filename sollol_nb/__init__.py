"""Run models that are too big for one machine from a notebook.

`%load_ext sollol_nb`, then `%%sollol MODEL` in a cell. In Python: `HybridRouter` and `OllamaPool` here are async;
their blocking twins are in `sollol_nb.sync_wrapper`.

Modules for programs:

- `hybrid_router.py`: `HybridRouter` (async).
- `sync_wrapper.py`: the blocking `HybridRouter` and `OllamaPool`.
- `frame_accessor.py`: `df.sollol.map(...)`.
- `plots/`: plots of the cluster and of the latency log.
- `priority_helpers.py`, `rpc_discovery.py`, `ollama_gguf_resolver.py`: priorities, worker discovery, GGUF files of
  models.
- `errors.py`: all exceptions.

Packages, each over the next (`CONTRIBUTING.md` says which imports which):

- `notebook/`: the extension and its magics.
- `cli/`: the command `sollol-nb`.
- `batch/`, `bench/`, `widget/`: what is done with a router: batches, benchmarks, the live view.
- `dask_workers/`: the machines of a Dask cluster as workers.
- `router/`: where a request goes, its life, its record.
- `cluster/`: the state of the whole cluster.
- `llama_cpp/`, `ollama/`: the two backends.
- `chat/`: requests, answers and conversations.
- `models/`: names, files, profiles and routes of models.
- `latency/`: the latency log.
- `settings/`: the table of settings, and where their values come from.
- `layers/`: which worker runs how many layers.
- `schema/`: structured answers.
- `gguf/`: what a GGUF file says about its model.
- `runtime/`: the I/O loop, events, priorities, HTTP, SQLite files.
- `text/`: values as text, safe Markdown, tables, colours.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sollol_nb._version import __version__

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from sollol_nb.chat.completion import Completion
    from sollol_nb.dask_workers.start import workers_from_dask
    from sollol_nb.hybrid_router import HybridRouter
    from sollol_nb.models.profiles import MODEL_PROFILES
    from sollol_nb.ollama.pool import OllamaPool
    from sollol_nb.runtime.priority import Priority

__all__ = [
    "MODEL_PROFILES",
    "Completion",
    "HybridRouter",
    "OllamaPool",
    "Priority",
    "__version__",
    "workers_from_dask",
]

_LAZY_NAMES = {
    "Completion": "sollol_nb.chat.completion",
    "HybridRouter": "sollol_nb.hybrid_router",
    "MODEL_PROFILES": "sollol_nb.models.profiles",
    "OllamaPool": "sollol_nb.ollama.pool",
    "Priority": "sollol_nb.runtime.priority",
    "workers_from_dask": "sollol_nb.dask_workers.start",
}
"""Name -> its module, which is imported on first use, so that the command line loads no more than it needs."""


def __getattr__(name: str) -> Any:
    if name in _LAZY_NAMES:
        return getattr(import_module(_LAZY_NAMES[name]), name)
    raise AttributeError(f"module 'sollol_nb' has no attribute {name!r}")


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Called by `%load_ext sollol_nb`."""
    from sollol_nb import notebook

    notebook.load_ipython_extension(shell)


def unload_ipython_extension(shell: InteractiveShell) -> None:
    """Called by `%unload_ext sollol_nb`."""
    from sollol_nb import notebook

    notebook.unload_ipython_extension(shell)
