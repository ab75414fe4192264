"""The notebook face: `%load_ext sollol_nb` registers the magics; one router serves the kernel.

The only floor that knows of IPython. What loading puts into IPython, unloading takes out again (IPython itself
does not): magics, completion, short errors, the nested event loop, and the router with all that it started.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sollol_nb import config
from sollol_nb.notebook import completer, errors_in_cells, nested_loop
from sollol_nb.sync_wrapper import HybridRouter

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

__all__ = ["load_ipython_extension", "router", "unload_ipython_extension", "use_router"]

_router: HybridRouter | None = None
_MAGICS = ("sollol", "sollol_cluster", "sollol_latency", "sollol_route", "sollol_stop")


def router(**settings: Any) -> HybridRouter:
    """The kernel's router, made on first use.

    Args:
        **settings: make it anew with these settings of `HybridRouter`; the one before is closed.
    """
    if settings or _router is None:
        return use_router(HybridRouter(**settings))
    return _router


def use_router(new: HybridRouter | None) -> HybridRouter:
    """Let the magics use this router from now on; the one before is closed. None makes a fresh one."""
    global _router
    before, _router = _router, new if new is not None else HybridRouter()
    if before is not None and before is not _router:
        before.close()
    return _router


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Register the magics, make errors short, and let `asyncio.run` work in cells. Loading twice is fine."""
    from sollol_nb.notebook.magics import SollolMagics

    shell.register_magics(SollolMagics)
    completer.install(shell, _running_models)
    errors_in_cells.shorten()
    if config.nested_loop_wanted():
        nested_loop.allow()


def unload_ipython_extension(shell: InteractiveShell) -> None:
    """Take out all that loading put in, and stop what the kernel's router started."""
    global _router
    if _router is not None:
        _router.close()
        _router = None
    nested_loop.forbid()
    errors_in_cells.restore()
    completer.remove(shell)
    for kind in ("line", "cell"):
        for name in _MAGICS:
            shell.magics_manager.magics[kind].pop(name, None)
    shell.magics_manager.registry.pop("SollolMagics", None)


def _running_models() -> list[str]:
    return [one.model for one in _router.coordinators] if _router is not None else []
