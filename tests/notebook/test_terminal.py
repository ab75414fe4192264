"""The magics in a real IPython in a terminal: the tests type keys and read the screen."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest

from tests.support.engines import HANG_GUARD_S, write_endless
from tests.support.held_answers import holding

pytestmark = pytest.mark.engine

_CONTROL = re.compile(r"\x1b(?:\[[0-9;?]*[a-zA-Z]|[>=]|\][^\x07]*\x07)|[\r\x07]")
ENTER, TAB = "\r", "\t"
RUN_CELL = "\x1b\r"  # Alt and Enter


class Terminal:
    """IPython on a separate terminal."""

    def __init__(self, folder: Path) -> None:
        own = {
            "IPYTHONDIR": str(folder / "ipython"),
            "SOLLOL_STATE_DIR": str(folder / "state"),
            "SOLLOL_KEEP_ALIVE": "5s",
            "TERM": "xterm",
            "PROMPT_TOOLKIT_NO_CPR": "1",  # pexpect does not report the cursor's position
        }
        self._cells = 1
        self._child = pexpect.spawn(
            sys.executable,
            ["-m", "IPython", "--no-banner", "--no-confirm-exit", "--colors=nocolor"],
            env=os.environ | own,
            dimensions=(50, 200),
            encoding="utf-8",
            timeout=HANG_GUARD_S,
        )
        self.wait_prompt()

    def type(self, *keys: str) -> None:
        self._child.send("".join(keys))

    def press_ctrl_c(self) -> None:
        self._child.sendintr()

    def wait_for(self, pattern: str) -> None:
        """Wait until unread output matches this regular expression."""
        self._child.expect(pattern)

    def wait_prompt(self) -> str:
        """Wait for the next prompt; returns the output before it, without control sequences."""
        self._child.expect_exact(f"In [{self._cells}]:")
        self._cells += 1
        return _CONTROL.sub("", self._child.before)

    def run(self, line: str) -> str:
        """Run one line; returns its output, its own echo included."""
        self.type(line, ENTER)
        return self.wait_prompt()

    def leave(self) -> None:
        self.type("%sollol_stop --all", ENTER)
        self.wait_prompt()
        self.type("exit", ENTER)
        self._child.expect(pexpect.EOF)
        self._child.close()


@pytest.fixture(scope="module")
def terminal(engine: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Terminal]:
    """A terminal with the extension loaded and two workers started."""
    opened = Terminal(tmp_path_factory.mktemp("terminal"))
    opened.run("%load_ext sollol_nb")
    assert "2 workers" in opened.run("%sollol_cluster start 2")
    yield opened
    opened.leave()


def test_a_cell_is_answered(terminal: Terminal) -> None:
    terminal.type("%%sollol demo:sharded --temperature 0 --out answer", ENTER)
    terminal.type("What is a worker?", RUN_CELL)
    shown = terminal.wait_prompt()
    assert "A worker" in shown
    assert re.search(r"\[demo:sharded · llama\.cpp-distributed · layers \d/\d · .* tokens/s", shown)
    assert "True" in terminal.run("print(_ is answer, answer.finish_reason)")


def test_text_streams_and_ctrl_c_keeps_it(terminal: Terminal, tmp_path: Path) -> None:
    endless = write_endless(tmp_path)
    may_continue, held = tmp_path / "may-continue", tmp_path / "held.py"
    held.write_text(holding(100, until=may_continue))
    terminal.run(f"exec(open({str(held)!r}).read())")
    terminal.type(f"%%sollol {endless} --temperature 0 --max-tokens 30000", ENTER, "go", RUN_CELL)
    terminal.wait_for(r"w\d+ w\d+")
    terminal.press_ctrl_c()
    shown = terminal.wait_prompt()
    may_continue.touch()
    assert "stopped; the partial answer is kept" in shown
    assert "('cancelled', True)" in terminal.run("_.finish_reason, len(_.text) > 0")
    assert "A worker" in terminal.run("%sollol demo:sharded --temperature 0 --max-tokens 9 'What is a worker?'")


def test_a_model_name_is_completed_by_tab(terminal: Terminal) -> None:
    terminal.type("%%sollol demo:s", TAB)
    terminal.wait_for("harded")
    terminal.type(" --max-tokens 3", ENTER, "Hello!", RUN_CELL)
    assert "[demo:sharded · llama.cpp-distributed" in terminal.wait_prompt()
