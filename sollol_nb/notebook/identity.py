"""Which notebook a kernel belongs to, as far as frontends say so."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sollol_nb.notebook.displays import is_kernel
from sollol_nb.settings import config

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell


def notebook_of(shell: InteractiveShell) -> str | None:
    """What identifies the notebook of a kernel, also after a restart: the notebook's path, which Jupyter's server
    and VS Code tell the kernel, or else the kernel's connection file, which a restart keeps. None in a terminal.
    """
    if not is_kernel(shell):
        return None
    return notebook_path(shell) or _connection(shell)


def notebook_path(shell: InteractiveShell) -> str | None:
    """The path of the notebook of a kernel, if the frontend tells it; None in a terminal."""
    path = shell.user_ns.get("__vsc_ipynb_file__") or config.session_path() if is_kernel(shell) else None
    return str(path) if path else None


def _connection(shell: InteractiveShell) -> str | None:
    # Only kernels of ipykernel have one.
    parent = getattr(getattr(shell, "kernel", None), "parent", None)
    file = getattr(parent, "abs_connection_file", None) or getattr(parent, "connection_file", None)
    return f"kernel {Path(file).stem}" if file else None
