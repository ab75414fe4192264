"""Run models too big for one machine from a notebook.

`%load_ext sollol_nb`, then `%%sollol MODEL` in a cell. In Python: `HybridRouter` and `OllamaPool` here are
async; their blocking twins are in `sollol_nb.sync_wrapper`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sollol_nb._version import __version__

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from sollol_nb.chat.completion import Completion
    from sollol_nb.hybrid_router import HybridRouter
    from sollol_nb.models.profiles import MODEL_PROFILES
    from sollol_nb.ollama.pool import OllamaPool
    from sollol_nb.runtime.priority import Priority

__all__ = ["MODEL_PROFILES", "Completion", "HybridRouter", "OllamaPool", "Priority", "__version__"]

_LAZY_NAMES = {
    "Completion": "sollol_nb.chat.completion",
    "HybridRouter": "sollol_nb.hybrid_router",
    "MODEL_PROFILES": "sollol_nb.models.profiles",
    "OllamaPool": "sollol_nb.ollama.pool",
    "Priority": "sollol_nb.runtime.priority",
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
