"""The notebook face: `%load_ext sollol_nb` registers the magics; one router serves the kernel.

The only floor that knows of IPython. What loading puts into IPython, unloading takes out again (IPython itself
does not): magics, completion, settings, short errors, the frame accessor, the nested event loop, answers in the
background, and the router with all that it started (or not, see `%config Sollol.on_unload`).
"""

from __future__ import annotations

import threading
from importlib import import_module
from typing import TYPE_CHECKING, Any

from sollol_nb import frame_accessor
from sollol_nb.chat.conversation import ChatBook
from sollol_nb.notebook import errors_in_cells, nested_loop
from sollol_nb.notebook import settings_traits as traits
from sollol_nb.notebook import tab_completion as completer
from sollol_nb.notebook.answers import background
from sollol_nb.notebook.displays import is_kernel
from sollol_nb.runtime import io_loop
from sollol_nb.runtime.progress_bars import use_bars
from sollol_nb.sync_wrapper import HybridRouter

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from sollol_nb.notebook.settings_traits import Sollol

__all__ = ["chats", "load_ipython_extension", "router", "settings", "unload_ipython_extension", "use_router"]

_MAGICS = {
    "ask": "AskMagics",
    "cluster": "ClusterMagics",
    "models": "ModelMagics",
    "latency": "RecordMagics",
    "bench": "BenchMagics",
}
"""Module of this package: its class of magics."""

_LAST_WORK_S = 5.0
"""How long unloading waits for answers in the background to stop, and for the last work on the I/O loop to end."""

_router_lock = threading.RLock()
"""Held while the router is made or replaced, since several threads may ask at once."""
_router: HybridRouter | None = None
_router_is_stale = False
_settings: Sollol | None = None
_chats = ChatBook()


def settings() -> Sollol:
    """The kernel's settings, those of `%config Sollol`.

    Raises:
        RuntimeError: the extension is not loaded.
    """
    if _settings is None:
        raise RuntimeError("the extension is not loaded; run %load_ext sollol_nb")
    return _settings


def chats() -> ChatBook:
    """The kernel's conversations."""
    return _chats


def router(**router_settings: Any) -> HybridRouter:
    """The kernel's router, made on first use, and anew when a setting of it has changed.

    Args:
        **router_settings: make it anew with these settings of `HybridRouter`; the one before is closed.
    """
    with _router_lock:
        if _router is None or router_settings or _router_is_stale:
            configured = _settings.router_settings() if _settings is not None else {}
            # One that only has old settings leaves its engines to the next, which adopts those that still fit.
            return _replace_router(HybridRouter(**{**configured, **router_settings}), keep=not router_settings)
        return _router


def use_router(new: HybridRouter | None) -> HybridRouter:
    """Let the magics use this router from now on; the one before is closed. None makes a fresh one."""
    with _router_lock:
        return _replace_router(new if new is not None else HybridRouter(), keep=False)


def _replace_router(new: HybridRouter, *, keep: bool) -> HybridRouter:
    global _router, _router_is_stale
    before, _router, _router_is_stale = _router, new, False
    if before is not None and before is not new:
        if keep and (_settings is None or _settings.own("workers") is None):
            new.take_workers(before.worker_endpoints)  # what was started, found or added by hand is not forgotten
        before.close(keep=keep)
    return new


def _settings_changed() -> None:
    global _router_is_stale
    _router_is_stale = _router is not None


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Register the magics, make errors short, and let `asyncio.run` work in cells. Loading twice is fine."""
    global _settings
    _settings = traits.install(shell)
    _settings.on_router_change(_settings_changed)
    for module, name in _MAGICS.items():
        shell.register_magics(getattr(import_module(f"{__name__}.magics.{module}"), name))
    completer.install(
        shell,
        _running_models,
        chats=lambda: list(_chats),
        workers=lambda: _router.worker_endpoints if _router is not None else (),
    )
    errors_in_cells.shorten(lambda: _settings is None or bool(_settings.or_built_in("short_errors")))
    frame_accessor.register(router)
    if is_kernel(shell):
        from sollol_nb.notebook.text_bar import TextBar

        use_bars(TextBar)
    if _settings.nest_asyncio:
        nested_loop.allow()


def unload_ipython_extension(shell: InteractiveShell) -> None:
    """Take out all that loading put in, and stop what the kernel's router started, or keep it running."""
    global _router, _settings, _chats
    keep = _settings is not None and _settings.or_built_in("on_unload") == "keep"
    background.cancel_all(wait_s=_LAST_WORK_S)
    if _router is not None:
        _router.close(keep=keep)
        _router = None
    _chats = ChatBook()
    nested_loop.forbid()
    frame_accessor.unregister()
    use_bars(None)
    errors_in_cells.restore()
    completer.remove(shell)
    for name in _MAGICS.values():
        magics = shell.magics_manager.registry.pop(name, None)
        for kind, functions in magics.magics.items() if magics is not None else ():
            for function in functions:
                shell.magics_manager.magics[kind].pop(function, None)
    shell.configurables[:] = [one for one in shell.configurables if type(one).__name__ not in _MAGICS.values()]
    traits.remove(shell)
    _settings = None
    io_loop.stop_if_unused(wait_s=_LAST_WORK_S)


def _running_models() -> list[str]:
    return [one.model for one in _router.coordinators] if _router is not None else []
