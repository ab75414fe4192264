"""`%sollol_answers`: answers that outlive their kernel, in real kernels on real engines."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from sollol_nb.chat.journal import Journal, JournaledAnswer
from tests.support.engines import eventually, suspended
from tests.support.held_answers import PATIENT, holding
from tests.support.kernels import ONE_THREAD, Kernel, kernel, notebook_kernel

pytestmark = pytest.mark.engine

NOTEBOOK = "/notebooks/tour.ipynb"
QUESTION = "Tell me a short story about a fox and a river."


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("answers")


@pytest.fixture(scope="module")
def notebook(engine: object, state: Path) -> Iterator[Kernel]:
    """A kernel of the notebook; it is the next one after those that the tests kill."""
    with notebook_kernel(state, "%config Sollol.temperature = 0", JPY_SESSION_NAME=NOTEBOOK) as fresh:
        yield fresh


@contextmanager
def other_kernel(state: Path, name: str = NOTEBOOK) -> Iterator[Kernel]:
    """An earlier kernel of the notebook, or one of another."""
    variables = {"SOLLOL_STATE_DIR": str(state), "SOLLOL_KEEP_ALIVE": "60s", "JPY_SESSION_NAME": name}
    with kernel(**variables, **ONE_THREAD) as fresh:
        shown = fresh.run("%load_ext sollol_nb\n%config Sollol.temperature = 0")
        assert shown.status == "ok", shown.error
        yield fresh


def newest(state: Path) -> JournaledAnswer | None:
    path = state / "answers.sqlite"
    answers = Journal(path).newest(limit=1) if path.exists() else []
    return answers[0] if answers else None


def shows_again(notebook: Kernel) -> str:
    """The command that a page gets where it has missed the answer that was shown last."""
    notebook.run("from sollol_nb.notebook.pages import clients")
    return notebook.value("clients._clients[0].watch._answers[-1].command").strip("'")


def kill_in_mid_answer(state: Path, cell: str, *, at_chars: int) -> str:
    """The id of an answer whose kernel is killed when it has so much of it, which is journaled."""
    before = newest(state)
    with other_kernel(state) as doomed:
        assert doomed.run(holding(at_chars, until=state / "never")).error == []
        doomed.client.execute(cell)
        found = before

        def is_far_enough() -> bool:
            nonlocal found
            found = newest(state)
            is_new = found is not None and (before is None or found.id != before.id)
            return is_new and found is not None and len(found.text) >= at_chars

        eventually(is_far_enough, "enough of the answer is journaled")
        doomed.kill()
    assert found is not None
    assert found.is_running
    return found.id


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_an_answer_goes_on_in_the_next_kernel_and_in_its_conversation(
    notebook: Kernel, state: Path, smollm2: Path
) -> None:
    options = f"{smollm2} --deterministic --max-tokens 60"  # so that undisturbed answers are the same, too
    assert notebook.run(f"%%sollol {options} --no-journal --out undisturbed\n{QUESTION}").error == []
    length = int(notebook.value("len(undisturbed.text)"))
    answer_id = kill_in_mid_answer(state, f"%%sollol {options} --chat tale\n{QUESTION}", at_chars=length * 3 // 10)

    listed = notebook.run("%sollol_answers").text
    assert "interrupted" in listed
    assert QUESTION[:30] in listed
    shown = notebook.run("%sollol_answers show 1")
    assert f"%sollol_answers resume {answer_id} continues it" in shown.stream
    assert 0 < int(notebook.value("len(_.text)")) < length

    resumed = notebook.run("whole = %sollol_answers resume 1")
    assert resumed.error == []
    assert notebook.value("whole.text") == notebook.value("undisturbed.text")
    assert notebook.value("whole.routing['answer_id']") == repr(answer_id)
    assert shows_again(notebook) == f"%sollol_answers show {answer_id}"
    assert notebook.value(
        "[m['content'] for m in get_ipython().run_line_magic('sollol_chat', 'tale --messages')]"
    ) == notebook.value(f"[{QUESTION!r}, undisturbed.text]")
    assert "done" in notebook.run("%sollol_answers").text.splitlines()[1]
    assert notebook.run("again = %sollol_answers resume 1").error == [], "a complete one is shown"
    assert notebook.value("again.text == undisturbed.text and again.footer() == whole.footer()") == "True"


def engine_of(asking: Kernel, model: str) -> psutil.Process:
    """The engine of a model, which the kernel leaves alone however long it is silent."""
    asking.run(PATIENT)
    asking.run(f"%sollol {model} --max-tokens 1 --quiet --no-journal --out begun Go on.")
    asking.run("from sollol_nb.llama_cpp.processes import registry")
    pids = "{entry.about['url']: entry.pid for entry in registry.entries('coordinator')}"
    return psutil.Process(int(asking.value(f"{pids}[begun.routing['coordinator_url']]")))


def test_an_answer_of_another_kernel_is_followed_live(notebook: Kernel, state: Path, endless: str) -> None:
    with other_kernel(state, "/notebooks/other.ipynb") as other:
        with suspended(engine_of(other, endless)):
            other.client.execute(f"%sollol {endless} --max-tokens 150 Go on.")
            eventually(
                lambda: (
                    (found := newest(state)) is not None
                    and found.owner.endswith("other.ipynb")
                    and found.is_running
                ),
                "it is journaled",
            )
            assert "other.ipynb" not in notebook.run("%sollol_answers").text
            assert "other.ipynb" in notebook.run("%sollol_answers --all").text
            refused = notebook.run("%sollol_answers forget 1 --all")
            assert "streams" in " ".join(refused.error)
            following = notebook.client.execute("followed = %sollol_answers show 1 --all")
            notebook.collect(following, until_shown="waiting for endless")
        shown = notebook.collect(following)
        assert (shown.status, shown.error) == ("ok", [])
        found = newest(state)
        assert found is not None
        assert (found.status, len(found.text) > 0) == ("done", True)
        assert notebook.value("followed.text") == repr(found.text)


def test_following_ends_with_the_stop_button_and_the_answer_does_not(
    notebook: Kernel, state: Path, endless: str
) -> None:
    with suspended(engine_of(notebook, endless)):
        notebook.run(f"%sollol {endless} --max-tokens 50 --background --quiet --out handle Go on.")
        eventually(lambda: (found := newest(state)) is not None and found.is_running, "it is journaled")
        following = notebook.client.execute("%sollol_answers show 1")
        notebook.collect(following, until_shown="waiting for endless")
        os.kill(notebook.pid, signal.SIGINT)
        shown = notebook.collect(following)
        assert (shown.status, shown.error) == ("ok", [])
        assert "it goes on; %sollol_answers show" in shown.stream
        followed = newest(state)
        assert followed is not None
        assert shows_again(notebook) == f"%sollol_answers show {followed.id}"
        assert notebook.value("handle.done") == "False"
    assert notebook.value("len(handle.result().text) > 0") == "True"


def test_answers_are_forgotten(notebook: Kernel) -> None:
    notebook.run("%sollol_answers forget")
    for _ in range(2):
        notebook.run("%sollol demo --quiet What is a worker")
    assert notebook.run("%sollol_answers forget 1").stream == "deleted 1 answer\n"
    assert notebook.run("%sollol_answers forget").stream == "deleted 1 answer\n"
    notebook.run("%sollol demo --quiet --no-journal --out asked What is a worker")
    assert notebook.value("len(asked.text) > 0") == "True"
    assert "no answers in the journal" in notebook.run("%sollol_answers").text


@pytest.mark.parametrize("line", ["show 99", "resume", "show 0123456789abcdef"])
def test_an_answer_that_is_not_there_is_one_line(notebook: Kernel, line: str) -> None:
    notebook.run("%sollol_answers forget")
    shown = notebook.run(f"%sollol_answers {line}")
    assert shown.stream.startswith("UsageError: %sollol_answers: there is no")


@pytest.mark.parametrize("line", ["", "show", "resume", "forget"])
def test_an_interrupt_before_anything_is_shown_is_one_line(notebook: Kernel, line: str) -> None:
    notebook.run("from unittest.mock import patch")
    shown = notebook.run(
        "with patch('sollol_nb.chat.journaling.flush', side_effect=KeyboardInterrupt):\n"
        f"    get_ipython().run_line_magic('sollol_answers', '{line}')"
    )
    assert shown.error == ["RequestCancelledError: %sollol_answers: stopped"]
