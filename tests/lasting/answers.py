"""An answer outlives its page and its kernel: whole, and as it would have been undisturbed.

In half of the trials the page is closed at 30 % of the answer. Then the end must be in the saved notebook, and a
page that is opened later must show the answer with `%sollol_answers show`. In the other half the kernel is killed
(SIGKILL) at 30 %, and `%sollol_answers resume` in the next kernel of the notebook must give the whole answer.
Models and kinds take turns. Most pages are clients of the websocket of a real Jupyter server, without a browser;
every tenth page is one of JupyterLab in Chromium, if there is one.
"""

from __future__ import annotations

import json
import os
import re
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import nbformat
import psutil

from sollol_nb.chat.journal import Journal
from tests.lab.bare_page import BarePage, read_notebook, write_notebook
from tests.lab.lab import HeadlessLab, find_chromium, headless_lab
from tests.lab.server import LabServer
from tests.lasting.goals import Goal, Show, all_of
from tests.support.engines import eventually
from tests.support.held_answers import holding
from tests.support.smollm2 import smollm2_path

N = 30
SHARE = 0.3
"""How much of the answer has arrived when it is disturbed."""
BROWSER_EVERY = 10
MAX_TOKENS = 160
LOAD = "%load_ext sollol_nb"
FOOTER_LINE = "tokens/s"
FOOTER = re.compile(r"\n\n\[[^\n]*\]\s*$")


@dataclass(frozen=True, slots=True)
class Question:
    """A question, and its undisturbed answer."""

    model: str
    prompt: str
    whole: str

    @property
    def cell(self) -> str:
        """The cell that asks."""
        return asking(self.model, self.prompt)


def asking(model: str, prompt: str) -> str:
    """The cell that asks; `--deterministic` includes exact recovery, and undisturbed answers are the same, too."""
    return f"%%sollol {model} --temperature 0 --deterministic --max-tokens {MAX_TOKENS}\n{prompt}"


def run(n: int, seed: int, show: Show) -> list[Goal]:
    """Disturb answers, and show how each of them ended."""
    closed: list[bool] = []
    killed: list[bool] = []
    with (
        tempfile.TemporaryDirectory(prefix="answers-", ignore_cleanup_errors=True) as folder,
        jupyter(folder) as lab,
    ):
        questions = undisturbed(lab, seed, (n + 1) // 2)
        for number in range(n):
            question = questions[number // 2 % len(questions)]
            if number % 2:
                ended, how = kill_kernel(lab, number, question), "kernel killed"
                killed.append(ended)
            elif number % BROWSER_EVERY == 0 and lab.browser is not None:
                ended, how = close_browser_page(lab.browser, question), "page closed (JupyterLab in Chromium)"
                closed.append(ended)
            else:
                ended, how = close_page(lab.server, number, question), "page closed"
                closed.append(ended)
            model, is_same = Path(question.model).stem, "identical" if ended else "NOT IDENTICAL"
            show(f"{number + 1}: {model}, {len(question.whole)} characters, {how}: {is_same}")
    goals = [all_of("page closed at 30 %: complete and identical", closed)]
    if n > 1:
        goals.append(all_of("kernel killed at 30 %: complete and identical", killed))
    return goals


@dataclass(frozen=True, slots=True)
class Jupyter:
    """A running server, and a browser in front of another one; None without a Chromium."""

    server: LabServer
    browser: HeadlessLab | None


@contextmanager
def jupyter(folder: str) -> Iterator[Jupyter]:
    """Start both; end both, with their kernels."""
    own = {"LLAMA_ARG_THREADS": "1"}
    chromium = find_chromium()
    server = LabServer(Path(folder) / "bare", **own)
    server.start()
    try:
        if chromium is None:
            yield Jupyter(server, None)
        else:
            with headless_lab(chromium, Path(folder) / "lab", Path(folder), **own) as browser:
                yield Jupyter(server, browser)
    finally:
        server.stop()


def undisturbed(lab: Jupyter, seed: int, most: int) -> list[Question]:
    """At most so many questions, one to each model, with their answers."""
    write_notebook(lab.server, "whole.ipynb", [])
    page = BarePage(lab.server, "whole.ipynb")
    page.run(LOAD)
    asked = [
        ("demo", "Tell me everything about sharding."),
        (str(smollm2_path()), f"Write a story about {3 + seed} lighthouses."),
    ]
    questions = []
    for model, prompt in asked[:most]:
        page.run(asking(model, prompt))
        whole = page.run("print(_.text, end='')").stream
        questions.append(Question(model, prompt, whole))
    page.close()
    lab.server.end_kernel("whole.ipynb")
    return questions


def disturbed(page: BarePage, question: Question, cell_id: str, until: Path) -> None:
    """Ask, and return when the share of the answer has arrived and is journaled; the rest waits for a file."""
    share = int(SHARE * len(question.whole))
    page.run(f"{LOAD}\n{holding(share, until)}")
    run = page.start(question.cell, cell_id=cell_id)
    page.read_until(run, lambda run: len(run.text) >= share or run.is_idle)
    assert not run.is_idle, f"the answer has ended before it was disturbed: {run}"
    eventually(
        lambda: any(row.is_running and len(row.text) >= share for row in Journal().newest(limit=1)),
        "the share is journaled",
    )


def close_page(server: LabServer, number: int, question: Question) -> bool:
    """Close the page; whether the saved notebook and the journal have the whole answer."""
    name = f"closed{number}.ipynb"
    cell_id = write_notebook(server, name, [question.cell])[0]
    page, is_closed = BarePage(server, name), server.notebooks / f"{name}.is-closed"
    disturbed(page, question, cell_id, is_closed)
    page.close()
    is_closed.touch()
    eventually(lambda: is_complete(page.saved()), "the end is in the saved notebook")
    opened = BarePage(server, name)
    again = opened.run("%sollol_answers show")
    opened.close()
    saved = output_of(page.saved())
    server.end_kernel(name)
    return text_of(saved) == text_of(again.text) == question.whole


def close_browser_page(browser: HeadlessLab, question: Question) -> bool:
    """The same with JupyterLab in Chromium."""
    share, is_closed = int(SHARE * len(question.whole)), browser.pictures / "answers.is-closed"
    is_closed.unlink(missing_ok=True)
    page = browser.open([question.cell, f"{LOAD}\n{holding(share, is_closed)}"])
    page.run(1)
    page.save()
    page.start(0)
    page.wait_for_text(0, question.whole[:share].split("\n")[0][:40])
    page.close_page()
    is_closed.touch()
    eventually(lambda: is_complete(read_notebook(page.notebook)), "the end is in the saved notebook")
    page.open_again()
    is_shown = FOOTER_LINE in page.output_text(0)
    page.ask("answer = %sollol_answers show")
    again = json.loads(page.ask("import json; print(json.dumps(answer.text))"))
    page.close()
    return is_shown and text_of(output_of(read_notebook(page.notebook))) == again == question.whole


def kill_kernel(lab: Jupyter, number: int, question: Question) -> bool:
    """Kill the kernel; whether the next one of the notebook completes the answer."""
    server, name = lab.server, f"killed{number}.ipynb"
    cell_id = write_notebook(server, name, [question.cell])[0]
    page = BarePage(server, name)
    pid = int(page.run("import os; print(os.getpid())").stream)
    disturbed(page, question, cell_id, until=server.notebooks / "never")
    os.kill(pid, signal.SIGKILL)
    page.close()
    eventually(lambda: not psutil.pid_exists(pid), "the kernel is gone")
    eventually(lambda: has_no_kernel(server, name), "the notebook has no kernel")
    opened = BarePage(server, name)
    opened.run(LOAD)
    opened.run("answer = %sollol_answers resume")
    text = opened.run("print(answer.text, end='')").stream
    opened.close()
    server.end_kernel(name)
    return text == question.whole


def has_no_kernel(server: LabServer, name: str) -> bool:
    """Whether a notebook has no kernel any more; ends the one that the server may be starting for it again."""
    with suppress(HTTPError):
        server.end_kernel(name)
    return all(session["path"] != name for session in server.ask("GET", "api/sessions"))


def is_complete(notebook: nbformat.NotebookNode) -> bool:
    """Whether the first cell of a saved notebook shows an answer with its footer."""
    return FOOTER.search(output_of(notebook)) is not None


def output_of(notebook: nbformat.NotebookNode) -> str:
    """What its first cell shows, as plain text."""
    outputs: list[Any] = notebook.cells[0].outputs
    return "".join(output.get("data", {}).get("text/plain", "") for output in outputs)


def text_of(shown: str) -> str:
    """The text of an answer without its footer."""
    return FOOTER.sub("", shown)
