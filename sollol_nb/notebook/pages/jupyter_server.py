"""The Jupyter server that has started this kernel: how many pages are connected, and the notebook as it is saved.

A server writes its address and its token into a private file in Jupyter's runtime folder; a kernel knows the
server's process id from its environment. A server that wants a password, or whose token is not there (JupyterHub),
is not used.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sollol_nb.errors import HttpStatusError, SollolError, TransportError
from sollol_nb.runtime.http_client import JsonClient
from sollol_nb.runtime.private_files import read_private

LIMIT_S = 10.0
NOTEBOOK_LIMIT_BYTES = 16 * 2**20
"""Of a notebook that is read: the server answers nobody else while it reads or writes one."""
_NOT_FOUND = 404
_EVERYWHERE = ("", "*", "0.0.0.0", "::")  # noqa: S104  # never listened on here


@dataclass(frozen=True)
class Page:
    """The notebook of this kernel: its path for the server, and how many pages are connected to the kernel."""

    path: str
    connections: int


class JupyterServer:
    """The server's REST API. Belongs to one event loop.

    Args:
        url: where it listens.
        token: of the server.
        kernel_id: this kernel's, as the server calls it.
    """

    def __init__(self, url: str, token: str, kernel_id: str) -> None:
        self._kernel_id = kernel_id
        self._client = JsonClient(url, api_key=token, read_timeout_s=LIMIT_S)

    async def page(self) -> Page | None:
        """The notebook of this kernel; None if it has none any more or several, or if the server does not count
        the pages.

        Raises:
            TransportError: the server does not answer as it should.
        """
        pages = []
        # A server that ends when nobody uses it does not count this request.
        for session in _list(await self._client.get("/api/sessions?no_track_activity=1")):
            kernel = session.get("kernel")
            if session.get("type") != "notebook" or not isinstance(kernel, dict):
                continue
            if kernel.get("id") == self._kernel_id:
                path, connections = session.get("path"), kernel.get("connections")
                if not isinstance(path, str) or not isinstance(connections, int):
                    return None
                pages.append(Page(path, connections))
        return pages[0] if len(pages) == 1 else None

    async def holds_notebooks(self) -> bool:
        """Whether the server has notebooks in its memory and writes their files by itself (jupyter-collaboration).

        Raises:
            TransportError: the server does not answer as it should.
        """
        try:
            await self._client.get("/api/collaboration/room/none")  # a websocket, if there is one
        except HttpStatusError as error:
            return error.status != _NOT_FOUND
        return True

    async def read(self, path: str) -> dict[str, Any]:
        """The saved notebook.

        Raises:
            TransportError: it cannot be read.
        """
        document = await self._content(path, "type=notebook")
        if not isinstance(document, dict) or not isinstance(document.get("cells"), list):
            raise TransportError(f"the Jupyter server has no notebook at {path}")
        return document

    async def read_text(self, path: str) -> str:
        """The text of the notebook's file.

        Raises:
            TransportError: it cannot be read, or is too long.
        """
        model = await self._client.get(f"/api/contents/{quote(path)}?content=0")
        size = model.get("size") if isinstance(model, dict) else None
        if not isinstance(size, int) or size > NOTEBOOK_LIMIT_BYTES:
            raise TransportError(f"the notebook {path} is longer than {NOTEBOOK_LIMIT_BYTES >> 20} MiB")
        text = await self._content(path, "type=file&format=text")
        if not isinstance(text, str):
            raise TransportError(f"the Jupyter server has no text of {path}")
        return text

    async def write(self, path: str, document: dict[str, Any]) -> None:
        """Save the notebook, as a page does: the server trusts it if it did before.

        Raises:
            TransportError: it cannot be written.
        """
        model = {"type": "notebook", "format": "json", "content": document}
        await self._client.put(f"/api/contents/{quote(path)}", model)

    async def write_text(self, path: str, text: str) -> None:
        """Replace the notebook's file by this text.

        Raises:
            TransportError: it cannot be written.
        """
        await self._client.put(f"/api/contents/{quote(path)}", {"type": "file", "format": "text", "content": text})

    async def _content(self, path: str, form: str) -> Any:
        model = await self._client.get(f"/api/contents/{quote(path)}?{form}&content=1")
        return model.get("content") if isinstance(model, dict) else None

    async def close(self) -> None:
        """Close its connections."""
        await self._client.aclose()


def find_server(connection_file: str | None) -> JupyterServer | None:
    """The Jupyter server that has started the kernel with this connection file; None if there is none, or no token
    of it."""
    from jupyter_core.paths import jupyter_runtime_dir

    parent, name = os.environ.get("JPY_PARENT_PID", ""), Path(connection_file or "").stem
    if not parent.isdigit() or not name.startswith("kernel-"):
        return None
    try:
        told = json.loads(read_private(Path(jupyter_runtime_dir()) / f"jpserver-{parent}.json") or "null")
        if not isinstance(told, dict) or not told.get("token") or told.get("sock"):
            return None
        host = told["hostname"]
        if not isinstance(host, str):
            return None
        host = "127.0.0.1" if host in _EVERYWHERE else f"[{host}]" if ":" in host else host
        scheme = "https" if told.get("secure") else "http"
        url = f"{scheme}://{host}:{int(told['port'])}{str(told.get('base_url') or '/').rstrip('/')}"
        return JupyterServer(url, str(told["token"]), name.removeprefix("kernel-"))
    except (SollolError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _list(answer: Any) -> list[dict[str, Any]]:
    return [each for each in answer if isinstance(each, dict)] if isinstance(answer, list) else []
