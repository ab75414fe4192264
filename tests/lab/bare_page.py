"""A page without a browser: a client of a Jupyter server's websocket, which keeps what its cells show.

It does what JupyterLab does when a notebook is opened: a session of the server for the notebook's path, whose
kernel it gets, and a websocket with a session id of its own.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nbformat
from nbformat.reader import NotJSONError
from websocket import WebSocket, WebSocketTimeoutException, create_connection

from tests.lab.server import LabServer
from tests.support.engines import eventually

LIMIT_S = 180.0
_PIECE_S = 1.0


@dataclass
class Run:
    """What one run of a cell has shown so far."""

    request: str
    displays: dict[str, dict[str, Any]] = field(default_factory=dict)
    stream: str = ""
    error: str = ""
    is_idle: bool = False

    @property
    def text(self) -> str:
        """Its last display as plain text."""
        return str(list(self.displays.values())[-1].get("text/plain", "")) if self.displays else ""


class BarePage:
    """An open notebook.

    Args:
        server: runs already.
        name: of the notebook's file.
    """

    def __init__(self, server: LabServer, name: str) -> None:
        self._server = server
        self.name = name
        body = {"path": name, "name": name, "type": "notebook", "kernel": {"name": "python3"}}
        self.kernel_id = str(server.ask("POST", "api/sessions", body)["kernel"]["id"])
        self._session = uuid.uuid4().hex
        url = server.url.replace("http", "ws", 1)
        self._socket: WebSocket = create_connection(
            f"{url}api/kernels/{self.kernel_id}/channels?session_id={self._session}",
            header=[f"Authorization: token {server.token}"],
            timeout=LIMIT_S,
        )
        self._socket.settimeout(_PIECE_S)
        self._send("kernel_info_request", {})

    def start(self, code: str, *, cell_id: str = "") -> Run:
        """Run a cell; returns at once."""
        content = {
            "code": code,
            "silent": False,
            "store_history": True,
            "allow_stdin": False,
            "stop_on_error": True,
        }
        return Run(self._send("execute_request", content, {"cellId": cell_id} if cell_id else {}))

    def read_until(self, run: Run, condition: Callable[[Run], object]) -> None:
        """Read what the kernel sends until this is so of a run.

        Raises:
            AssertionError: not within `LIMIT_S`.
        """
        deadline = time.monotonic() + LIMIT_S
        while not condition(run):
            assert time.monotonic() < deadline, f"not within {LIMIT_S:g} s: {run}"
            try:
                message = json.loads(self._socket.recv())
            except WebSocketTimeoutException:
                continue
            if (message.get("parent_header") or {}).get("msg_id") == run.request:
                _take(run, message["msg_type"], message["content"])

    def run(self, code: str, *, cell_id: str = "") -> Run:
        """Run a cell to its end.

        Raises:
            AssertionError: it raised an error, or has not ended in time.
        """
        run = self.start(code, cell_id=cell_id)
        self.read_until(run, lambda run: run.is_idle)
        assert not run.error, run.error
        return run

    def close(self) -> None:
        """Close the page; the kernel runs on."""
        self._socket.close()

    def saved(self) -> nbformat.NotebookNode:
        """The notebook as it is on disk."""
        return read_notebook(self._server.notebooks / self.name)

    def _send(self, kind: str, content: dict[str, Any], metadata: dict[str, Any] | None = None) -> str:
        header = {
            "msg_id": uuid.uuid4().hex,
            "msg_type": kind,
            "session": self._session,
            "username": "",
            "version": "5.4",
            "date": datetime.now(UTC).isoformat(),
        }
        message = {"header": header, "parent_header": {}, "metadata": metadata or {}, "content": content}
        self._socket.send(json.dumps(message | {"channel": "shell", "buffers": []}))
        return header["msg_id"]


def _take(run: Run, kind: str, content: dict[str, Any]) -> None:
    if kind in ("display_data", "update_display_data", "execute_result"):
        name = (content.get("transient") or {}).get("display_id") or f"display {len(run.displays)}"
        if kind != "update_display_data" or name in run.displays:
            run.displays[name] = content["data"]
    elif kind == "stream":
        run.stream += content["text"]
    elif kind == "error":
        run.error = f"{content['ename']}: {content['evalue']}"
    elif kind == "status" and content["execution_state"] == "idle":
        run.is_idle = True


def write_notebook(server: LabServer, name: str, sources: list[str]) -> list[str]:
    """Write a notebook with these code cells into the server's folder; the ids of its cells."""
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), server.notebooks / name)
    return [cell.id for cell in cells]


def read_notebook(path: Path) -> nbformat.NotebookNode:
    """A notebook's file, also if the server is writing it: until it has, what is there is no JSON."""

    def read() -> nbformat.NotebookNode | None:
        with suppress(NotJSONError):
            return nbformat.read(path, as_version=4)
        return None

    notebook = eventually(read, "the notebook is written")
    assert notebook is not None
    return notebook
