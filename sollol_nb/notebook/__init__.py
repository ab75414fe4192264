"""The extension: `%load_ext sollol_nb` registers the magics. No other package knows of IPython's shell.

`from sollol_nb.notebook import router, use_router, chats, settings` gives what the magics work with.

- `magics/`: the magics, by subject.
- `session.py`: the kernel's router, conversations and settings.
- `answers/`: from the options of a cell to an answer that streams into it.
- `pages/`: answers whose page was closed, or opened again.
- `magic_line.py`: the line of a magic as options.
- `settings_traits.py`: `%config Sollol`.
- `tab_completion.py`, `tab_line.py`, `tab_expressions.py`: the Tab key in the lines of the magics, and in `{{ }}`.
- `preloading.py`: models that load in the background.
- `identity.py`: which notebook a kernel belongs to.
- `displays.py`: displays that are updated in place, the progress bar, and what links do.
- `kernel_hooks.py`: short errors, and `asyncio.run` in cells.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sollol_nb import frame_accessor
from sollol_nb.notebook import kernel_hooks, session, tab_completion
from sollol_nb.notebook.answers import background
from sollol_nb.notebook.displays import TextBar, is_kernel
from sollol_nb.notebook.magics.answers import AnswerMagics
from sollol_nb.notebook.magics.ask import AskMagics
from sollol_nb.notebook.magics.bench import BenchMagics
from sollol_nb.notebook.magics.cluster import ClusterMagics
from sollol_nb.notebook.magics.connect import ConnectMagics
from sollol_nb.notebook.magics.latency import LatencyMagics
from sollol_nb.notebook.magics.models import ModelMagics
from sollol_nb.notebook.magics.reuse import ReuseMagics
from sollol_nb.notebook.magics.trust import TrustMagics
from sollol_nb.notebook.pages import clients
from sollol_nb.notebook.session import chats, router, settings, use_router
from sollol_nb.runtime import io_loop
from sollol_nb.runtime.progress_bars import use_bars
from sollol_nb.settings.trust import describe_files

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

__all__ = ["chats", "load_ipython_extension", "router", "settings", "unload_ipython_extension", "use_router"]

_AFTER_EACH_CELL = (background.show_in_cell, session.check_preload)
_MAGICS = (
    AskMagics,
    AnswerMagics,
    ReuseMagics,
    ClusterMagics,
    ModelMagics,
    LatencyMagics,
    BenchMagics,
    ConnectMagics,
    TrustMagics,
)
_END_LIMIT_S = 5.0
"""How long unloading waits for answers in the background, and then for the I/O loop, to end."""


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Register the magics, tab completion, `%config Sollol` and `df.sollol`; shorten the package's errors, and let
    `asyncio.run` work in cells. Name the settings file in use. Begin to load the notebook's model (setting
    `preload`). Loading twice is fine.

    Raises:
        ConfigError: a setting that loading reads has an invalid value.
    """
    kernel_settings = session.start(shell)
    shell.register_magics(*_MAGICS)
    kernel_hooks.shorten_errors(session.has_short_errors, with_style=is_kernel(shell))
    for callback in _AFTER_EACH_CELL:
        shell.events.register("post_run_cell", callback)
    clients.follow(shell)
    frame_accessor.register(session.router, session.batch_defaults)
    if is_kernel(shell):
        use_bars(TextBar)
    for text in describe_files("%sollol_trust"):
        print(f"settings: {text}")
    # After these lines: its thread reads the settings, and would log what does not count of them.
    tab_completion.install(
        shell,
        session.running_models,
        chats=session.chats,
        workers=session.worker_targets,
        typed=session.note_typing,
    )
    session.check_preload()
    # Last, since this raises if the variable or the file has an invalid value.
    hint = kernel_hooks.allow_nested_loops() if kernel_settings.nest_asyncio else ""
    if hint:
        print(hint)


def unload_ipython_extension(shell: InteractiveShell) -> None:
    """Remove everything that loading added, since IPython does not. Stop the router's engines, or keep them
    running (`%config Sollol.on_unload`)."""
    background.cancel_all(wait_s=_END_LIMIT_S)
    for callback in _AFTER_EACH_CELL:
        if callback in shell.events.callbacks["post_run_cell"]:
            shell.events.unregister("post_run_cell", callback)
    clients.forget()
    session.end(shell)
    use_bars(None)
    frame_accessor.unregister()
    kernel_hooks.forbid_nested_loops()
    kernel_hooks.restore_errors()
    tab_completion.remove(shell)
    for magics in _MAGICS:
        registered = shell.magics_manager.registry.pop(magics.__name__, None)
        for kind, functions in registered.magics.items() if registered is not None else ():
            for function in functions:
                shell.magics_manager.magics[kind].pop(function, None)
    shell.configurables[:] = [part for part in shell.configurables if not isinstance(part, _MAGICS)]
    io_loop.stop_if_unused(wait_s=_END_LIMIT_S)
