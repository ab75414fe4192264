"""A real Jupyter kernel, and what its cells showed."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jupyter_client.manager import start_new_kernel

CELL_TIMEOUT_S = 120
MAGICS = (
    "sollol",
    "sollol_answers",
    "sollol_bench",
    "sollol_chat",
    "sollol_cluster",
    "sollol_connect",
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
    """

    status: str = ""
    stream: str = ""
    error: list[str] = field(default_factory=list)
    displays: list[dict[str, str]] = field(default_factory=list)
    updates: int = 0

    @property
    def markdown(self) -> str:
        """The last display as Markdown."""
        return self.displays[-1]["text/markdown"]

    @property
    def text(self) -> str:
        """The last display as plain text."""
        return self.displays[-1]["text/plain"]


class Kernel:
    """A kernel that runs cells one after another."""

    def __init__(self, manager: Any, client: Any) -> None:
        self.manager = manager
        self.client = client
        self._shown: dict[str, tuple[Shown, dict[str, int]]] = {}

    @property
    def pid(self) -> int:
        """Process id of the kernel."""
        return int(self.manager.provisioner.pid)

    def run(self, code: str) -> Shown:
        """Run a cell to its end."""
        return self.collect(self.client.execute(code))

    def value(self, expression: str) -> str:
        """The repr of an expression."""
        shown = self.run(f"print(repr(({expression})))")
        assert shown.status == "ok", shown.error
        return shown.stream.strip()

    def reply(self, kind: str) -> dict[str, Any]:
        """The next reply of a kind on the shell channel."""
        while True:
            message: dict[str, Any] = self.client.get_shell_msg(timeout=CELL_TIMEOUT_S)
            if message["msg_type"] == kind:
                return message

    def collect_updates(self, *, until: str) -> dict[str, str]:
        """The next update of any display, whichever cell made it, that contains `until`."""
        deadline = time.monotonic() + CELL_TIMEOUT_S
        while time.monotonic() < deadline:
            message = self.client.get_iopub_msg(timeout=CELL_TIMEOUT_S)
            if message["msg_type"] == "update_display_data":
                data: dict[str, str] = message["content"]["data"]
                if any(until in text for text in data.values()):
                    return data
        raise AssertionError(f"no display showed {until!r} within {CELL_TIMEOUT_S} s")

    def collect(self, message_id: str, *, until_shown: str | None = None) -> Shown:
        """What a cell shows until it is done, or until its displayed Markdown contains `until_shown`."""
        shown, places = self._shown.setdefault(message_id, (Shown(), {}))
        deadline = time.monotonic() + CELL_TIMEOUT_S
        while time.monotonic() < deadline:
            message = self.client.get_iopub_msg(timeout=CELL_TIMEOUT_S)
            if message["parent_header"].get("msg_id") != message_id:
                continue
            content, kind = message["content"], message["msg_type"]
            if kind == "stream":
                shown.stream += content["text"]
            elif kind == "error":
                shown.error = _COLORS.sub("", "\n".join(content["traceback"])).splitlines()
            elif kind in ("display_data", "execute_result"):
                places[content.get("transient", {}).get("display_id", "")] = len(shown.displays)
                shown.displays.append(content["data"])
            elif kind == "update_display_data":
                place = places.get(content["transient"]["display_id"])
                if place is not None:  # with ipykernel 6, answers in the background update through any cell
                    shown.updates += 1
                    shown.displays[place] = content["data"]
            elif kind == "status" and content["execution_state"] == "idle":
                reply = self.client.get_shell_msg(timeout=CELL_TIMEOUT_S)
                while reply["parent_header"].get("msg_id") != message_id:
                    reply = self.client.get_shell_msg(timeout=CELL_TIMEOUT_S)
                shown.status = reply["content"]["status"]
                return shown
            if until_shown and shown.displays and until_shown in shown.displays[-1].get("text/markdown", ""):
                return shown
        raise AssertionError(f"the cell was not done after {CELL_TIMEOUT_S} s")


@contextmanager
def kernel(**variables: str) -> Iterator[Kernel]:
    """A fresh kernel with these environment variables, shut down at the end."""
    manager, client = start_new_kernel(kernel_name="python3", env={**os.environ, **variables})
    try:
        yield Kernel(manager, client)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


@contextmanager
def notebook_kernel(state_folder: Path, *cells: str) -> Iterator[Kernel]:
    """A kernel with the extension loaded that has run these cells; its engines are stopped at the end."""
    with kernel(SOLLOL_STATE_DIR=str(state_folder), SOLLOL_KEEP_ALIVE="5s") as fresh:
        for cell in ("%load_ext sollol_nb", *cells):
            shown = fresh.run(cell)
            assert shown.status == "ok", shown.error
        yield fresh
        assert fresh.run("%sollol_stop --all").status == "ok"
