"""What a user has set and said is there after a kernel restart: names for files, profiles, conversations."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from sollol_nb.models.files import DEMO_MODEL_PATH
from tests.support.kernels import CELL_TIMEOUT_S, Kernel, kernel

pytestmark = pytest.mark.engine

SHORT = "--temperature 0 --max-tokens 8"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a settings file and a model file."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "mine.toml").write_text("# my settings\n")
    shutil.copyfile(DEMO_MODEL_PATH, folder / "Tiny-Model.Q8_0.gguf")
    return folder


@pytest.fixture(scope="module")
def notebook(engine: object, folder: Path) -> Iterator[Kernel]:
    """A kernel with the extension loaded."""
    settings = {"SOLLOL_CONFIG": str(folder / "mine.toml"), "SOLLOL_STATE_DIR": str(folder / "state")}
    with kernel(**settings, SOLLOL_KEEP_ALIVE="60s", JPY_SESSION_NAME=str(folder / "a.ipynb")) as fresh:
        assert fresh.run("%load_ext sollol_nb").error == []
        yield fresh
        fresh.run("%sollol_stop --all")


def restart(notebook: Kernel) -> None:
    notebook.manager.restart_kernel()
    notebook.client.wait_for_ready(timeout=CELL_TIMEOUT_S)
    assert notebook.run("%load_ext sollol_nb").error == []


def test_a_short_name_and_its_profile_are_there_after_a_restart(notebook: Kernel, folder: Path) -> None:
    file = folder / "Tiny-Model.Q8_0.gguf"
    shown = notebook.run(f"%sollol_profile tiny --gguf '{file}' --not-sharded --max-tokens 3")
    assert shown.stream.splitlines()[0] == f"saved in {folder / 'mine.toml'}"
    assert (folder / "mine.toml").read_text().startswith("# my settings\n")
    restart(notebook)
    route = "tiny → local llama-server: listed in mine.toml as not needing sharding\n"
    assert notebook.run("%sollol_route tiny").stream == route
    assert notebook.run("answer = %sollol tiny 'What is a worker?'").error == []
    assert notebook.value("(answer['model'], answer['eval_count'])") == "('tiny', 3)"
    profile = notebook.run("%sollol_profile tiny").stream.splitlines()
    assert profile[1:] == [f"gguf: {file}", "sharded: False", "max_tokens: 3", f"set in {folder / 'mine.toml'}"]
    assert notebook.run("%sollol_profile tiny --forget").stream.startswith("tiny: size unknown")
    assert "tiny is not available" in notebook.run("%sollol_route tiny").error[0]


def test_a_model_asked_by_its_path_is_shown_by_its_name_everywhere(notebook: Kernel, folder: Path) -> None:
    file = folder / "Tiny-Model.Q8_0.gguf"
    notebook.run(f"%%sollol '{file}' {SHORT} --chat paths\nWhat is a worker?")
    notebook.run("from sollol_nb.notebook import router\nrouter = router()")
    events = "print(*[event.message for event in router.events.recent()])"
    cells = ("%sollol_cluster --text", "%sollol_chat paths", f"%sollol_route '{file}'", events)
    texts = [notebook.run(cell) for cell in cells]
    assert [each.error for each in texts] == [[]] * len(texts)
    shown = "\n".join(each.stream + "".join(display["text/plain"] for display in each.displays) for each in texts)
    assert "Tiny-Model.Q8_0" in shown
    assert str(folder) not in shown
    assert notebook.value("router.latency.frame()['model'].iloc[-1]") == "'Tiny-Model.Q8_0'"
    assert notebook.value(f"len(router.latency.frame(model={str(file)!r}))") == "1"
    assert notebook.value("len(router.latency.frame(model='Tiny-Model.Q8_0'))") == "1"
    assert notebook.run(f"%sollol_stop '{file}'").stream.startswith("stopped coordinator ")


def test_conversations_are_there_after_a_restart_until_they_are_forgotten(notebook: Kernel) -> None:
    notebook.run(f"%%sollol demo {SHORT} --chat talk\nWhat is a worker?")
    before = notebook.run("%sollol_chat talk").text
    restart(notebook)
    assert notebook.run("%sollol_chat talk").text == before
    shown = notebook.run(f"%%sollol demo {SHORT} --chat talk\nWhat is a coordinator?")
    assert shown.stream.startswith("continuing conversation talk: 1 turn, demo, ")
    assert notebook.run(f"%%sollol demo {SHORT} --chat talk\nWhat is a plan?").stream == ""
    assert notebook.run("%sollol_chat talk").text.count("\nassistant (demo") == 3
    notebook.run("%sollol_chat --forget")
    restart(notebook)
    assert notebook.run("%sollol_chat").text == "no conversations yet; start one with --chat NAME"


def test_conversations_are_not_kept_if_the_user_does_not_want_it(notebook: Kernel) -> None:
    restart(notebook)
    notebook.run("%config Sollol.keep_chats = False")
    notebook.run(f"%%sollol demo {SHORT} --chat secret\nWhat is a worker?")
    restart(notebook)
    assert "secret" not in notebook.run("%sollol_chat").text
