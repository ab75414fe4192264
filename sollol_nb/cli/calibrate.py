"""The workers of this user measured from outside of any notebook, for `sollol-nb calibrate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sollol_nb.cli.status import known_workers
from sollol_nb.hybrid_router import HybridRouter
from sollol_nb.llama_cpp.coordinators.calibrator import Calibrated
from sollol_nb.runtime.events import Event, EventKind
from sollol_nb.settings.endpoints import worker_target


async def calibrate_workers(workers: Sequence[str], show: Callable[[str], None]) -> list[Calibrated]:
    """Measure these workers, or this machine and all workers of this user. Machines named for ssh are connected.

    Args:
        workers: each as `host:port`, or those of a machine as `ssh://host`.
        show: gets a line for each as soon as it is measured.

    Raises:
        ConfigError: one is neither.
        EngineError: llama.cpp cannot be used here.
    """

    def on_event(event: Event) -> None:
        if event.kind == EventKind.WORKER_CALIBRATED:
            show(event.message)

    named = [worker_target(worker) for worker in workers]
    workers = named or await known_workers()
    async with HybridRouter(gateway="local", rpc_backends=workers, auto_discover_rpc=False) as router:
        router.events.subscribe(on_event)
        return await router.calibrate(named or None)
