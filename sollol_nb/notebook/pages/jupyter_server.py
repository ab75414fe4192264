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

from sollol_nb.errors import TransportError
from sollol_nb.runtime.http_client import JsonClient
from sollol_nb.runtime.private_files import read_private

LIMIT_S = 10.0
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
        """The notebook of this kernel; None if it has none any more.

        Raises:
            TransportError: the server does not answer as it should.
        """
        for session in _list(await self._client.get("/api/sessions")):
            kernel = session.get("kernel") or {}
            if kernel.get("id") == self._kernel_id and session.get("type") == "notebook":
                return Page(str(session.get("path")), int(kernel.get("connections") or 0))
        return None

    async def read(self, path: str) -> dict[str, Any]:
        """The saved notebook.

        Raises:
            TransportError: it cannot be read.
        """
        model = await self._client.get(f"/api/contents/{quote(path)}?type=notebook&content=1")
        document = model.get("content") if isinstance(model, dict) else None
        if not isinstance(document, dict) or not isinstance(document.get("cells"), list):
            raise TransportError(f"the Jupyter server has no notebook at {path}")
        return document

    async def write(self, path: str, document: dict[str, Any]) -> None:
        """Save the notebook; the server replaces its file in one step.

        Raises:
            TransportError: it cannot be written.
        """
        model = {"type": "notebook", "format": "json", "content": document}
        await self._client.put(f"/api/contents/{quote(path)}", model)

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
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _list(answer: Any) -> list[dict[str, Any]]:
    return [each for each in answer if isinstance(each, dict)] if isinstance(answer, list) else []
