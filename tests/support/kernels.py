"""A real Jupyter kernel, and what its cells showed."""

from __future__ import annotations

import os
import queue
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from jupyter_client.manager import start_new_kernel

from tests.support.engines import eventually, is_alive

CELL_TIMEOUT_S = 120
ONE_THREAD = {"LLAMA_ARG_THREADS": "1"}
"""Of an engine: threads that wait for each other crawl on a busy machine."""
MAGICS = (
    "sollol",
    "sollol_answers",
    "sollol_bench",
    "sollol_chat",
    "sollol_cluster",
    "sollol_connect",
    "sollol_insert",
    "sollol_last",
    "sollol_latency",
    "sollol_log",
    "sollol_models",
    "sollol_profile",
    "sollol_route",
    "sollol_stop",
    "sollol_trust",
)
"""All magics of the extension."""
_COLORS = re.compile(r"\x1b\[[0-9;]*m")


@dataclass
class Shown:
    """The output of one cell.

    Attributes:
        status: `ok` or `error`.
        stream: text of stdout and stderr.
        error: the traceback's lines, without colours.
        displays: mime bundles of `display_data` and `execute_result`, after all updates.
        updates: how often a display was updated.
        comms: what was sent to widgets: the content of each `comm_open` and `comm_msg`.
    """

    status: str = ""
    stream: str = ""
    error: list[str] = field(default_factory=list)
    displays: list[dict[str, str]] = field(default_factory=list)
    updates: int = 0
    comms: list[dict[str, Any]] = field(default_factory=list)

    @property
    def markdown(self) -> str:
        """The last display as Markdown."""
        return self.displays[-1]["text/markdown"]

    @property
    def text(self) -> str:
        """The last display as plain text."""
        return self.displays[-1]["text/plain"]


class Kernel:
    """A kernel that runs cells one after another.

    Whatever is waited for, each message goes to the cell that it belongs to, so that none is missed.
    """

    def __init__(self, manager: Any, client: Any) -> None:
        self.manager = manager
        self.client = client
        self._cells: dict[str, Shown] = {}
        self._idle: set[str] = set()
        self._places: dict[str, tuple[Shown, int]] = {}  # of displays, by their ids
        self._replies: dict[str, dict[str, Any]] = {}

    @property
    def pid(self) -> int:
        """Process id of the kernel."""
        return int(self.manager.provisioner.pid)

    def kill(self) -> None:
        """End it without warning."""
        process = psutil.Process(self.pid)
        process.kill()
        eventually(lambda: not is_alive(process), "the kernel is dead")

    def run(self, code: str) -> Shown:
        """Run a cell to its end."""
        return self.collect(self.client.execute(code))

    def value(self, expression: str) -> str:
        """The repr of an expression."""
        shown = self.run(f"print(repr(({expression})))")
        assert shown.status == "ok", shown.error
        return shown.stream.strip()

    def reply(self, message_id: str) -> dict[str, Any]:
        """The content of the reply to a request on the shell channel."""
        while message_id not in self._replies:
            message = self.client.get_shell_msg(timeout=CELL_TIMEOUT_S)
            self._replies[message["parent_header"].get("msg_id", "")] = message["content"]
        return self._replies.pop(message_id)

    def collect(self, message_id: str, *, until_shown: str | None = None) -> Shown:
        """What a cell shows until it is done, or until Markdown that it displays from now on matches this regular
        expression."""
        shown = self._shown(message_id)
        deadline = time.monotonic() + CELL_TIMEOUT_S
        while message_id not in self._idle:
            if self._take(deadline, f"the cell was not done after {CELL_TIMEOUT_S} s: {shown}") is not shown:
                continue
            markdown = shown.displays[-1].get("text/markdown", "") if shown.displays else ""
            if until_shown and message_id not in self._idle and re.search(until_shown, markdown):
                return shown
        shown.status = self.reply(message_id)["status"]
        return shown

    def wait_shown(self, shown: Shown, text: str) -> dict[str, str]:
        """Wait until the last display of a cell, which may be done, contains this; returns the display."""
        deadline = time.monotonic() + CELL_TIMEOUT_S
        while not any(text in each for each in shown.displays[-1].values()):
            self._take(deadline, f"the cell did not show {text!r} within {CELL_TIMEOUT_S} s: {shown}")
        return shown.displays[-1]

    def takes_update(self, shown: Shown, message_id: str) -> bool:
        """Whether a display of this cell is updated by a message that belongs to the cell of this id."""
        return True

    def _shown(self, message_id: str) -> Shown:
        return self._cells.setdefault(message_id, Shown())

    def _take(self, deadline: float, complaint: str) -> Shown | None:
        """Note the next message; the cell that it belongs to, or whose display it updates."""
        try:
            message = self.client.get_iopub_msg(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise AssertionError(complaint) from None
        message_id = message["parent_header"].get("msg_id", "")
        shown, content, kind = self._shown(message_id), message["content"], message["msg_type"]
        if kind == "stream":
            shown.stream += content["text"]
        elif kind == "error":
            shown.error = _COLORS.sub("", "\n".join(content["traceback"])).splitlines()
        elif kind in ("display_data", "execute_result"):
            self._places[content.get("transient", {}).get("display_id", "")] = shown, len(shown.displays)
            shown.displays.append(content["data"])
        elif kind == "update_display_data":
            # Answers in the background update through any cell (ipykernel 6), and after the end of theirs.
            shown, place = self._places[content["transient"]["display_id"]]
            if self.takes_update(shown, message_id):
                shown.updates += 1
                shown.displays[place] = content["data"]
        elif kind in ("comm_open", "comm_msg"):
            shown.comms.append(content)
        elif kind == "status" and content["execution_state"] == "idle":
            self._idle.add(message_id)
        return shown


@contextmanager
def kernel(frontend: type[Kernel] = Kernel, /, **variables: str) -> Iterator[Kernel]:
    """A fresh kernel with these environment variables, shut down at the end."""
    manager, client = start_new_kernel(kernel_name="python3", env={**os.environ, **variables})
    try:
        yield frontend(manager, client)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@contextmanager
def notebook_kernel(
    state_folder: Path, *cells: str, frontend: type[Kernel] = Kernel, **variables: str
) -> Iterator[Kernel]:
    """A kernel with the extension loaded that has run these cells; its engines are stopped at the end."""
    own = {"SOLLOL_STATE_DIR": str(state_folder), "SOLLOL_KEEP_ALIVE": "60s", **ONE_THREAD}
    with kernel(frontend, **own, **variables) as fresh:
        for cell in ("%load_ext sollol_nb", *cells):
            shown = fresh.run(cell)
            assert shown.status == "ok", shown.error
        yield fresh
        assert fresh.run("%sollol_stop --all").status == "ok"
