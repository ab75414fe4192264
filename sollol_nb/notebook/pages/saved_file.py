"""The file of a notebook, changed while no page has the notebook open, and restored.

The Jupyter server cannot write a file on condition that it is unchanged. So the file is read again right before it
is written.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sollol_nb.notebook.pages.jupyter_server import JupyterServer


@dataclass(frozen=True)
class FileChange:
    """The text of a file before and after it was changed here, once or several times in a row."""

    path: str
    before: str
    after: str


async def change(
    server: JupyterServer, path: str, edit: Callable[[dict[str, Any]], None], earlier: FileChange | None
) -> FileChange | None:
    """Change a notebook's file that no page shows.

    Args:
        edit: changes the notebook.
        earlier: what was done before.

    Returns:
        What has been done; `earlier` if the notebook stays as it is; None if it was not written, since a page was
        opened or the file was changed meanwhile.

    Raises:
        TransportError: it cannot be read or written.
    """
    text = await server.read_text(path)
    document = await server.read(path)
    before = copy.deepcopy(document)
    edit(document)
    if document == before:
        return earlier or FileChange(path, text, text)
    page = await server.page()
    if page is None or page.connections or page.path != path or await server.read_text(path) != text:
        return None
    await server.write(path, document)
    is_ours = earlier is not None and earlier.path == path and earlier.after == text  # else somebody changed it
    return FileChange(path, earlier.before if is_ours and earlier else text, await server.read_text(path))


async def restore(server: JupyterServer, done: FileChange) -> bool:
    """Undo what was done; returns whether the file was still as it was left.

    Raises:
        TransportError: it cannot be read or written.
    """
    if done.before == done.after or await server.read_text(done.path) != done.after:
        return False
    await server.write_text(done.path, done.before)
    return True
