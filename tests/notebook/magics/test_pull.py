"""`%sollol_models pull` in a real kernel: from a server that speaks the Hub's API to an answer over a worker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sollol_nb.models.files import DEMO_MODEL_PATH
from tests.support.engines import eventually
from tests.support.hub import TOKEN, Hub, digest, running_hub
from tests.support.kernels import Kernel, notebook_kernel

pytestmark = pytest.mark.engine

DEMO = DEMO_MODEL_PATH.read_bytes()
PULL = "%sollol_models pull hf.co/user/Tiny-GGUF"


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    """A server with the demo model."""
    with running_hub(Tiny_GGUF={"README.md": b"# Tiny", "Tiny-Q4_K_M.gguf": DEMO}) as hub:
        yield hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a settings file."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "mine.toml").touch()
    return folder


@pytest.fixture(scope="module")
def notebook(engine: object, hub: Hub, folder: Path) -> Iterator[Kernel]:
    """A kernel with the extension loaded and a home of its own."""
    variables = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(folder / "hf"),
        "HF_TOKEN": TOKEN,
        "SOLLOL_CONFIG": str(folder / "mine.toml"),
        "SOLLOL_MODEL_DIRS": str(folder / "missing"),
    }
    with notebook_kernel(folder / "state", **variables) as fresh:
        yield fresh


def test_a_stopped_cell_is_continued_by_the_next_which_names_the_model(
    notebook: Kernel, hub: Hub, folder: Path
) -> None:
    hub.hold_after_bytes = 3_000_000
    cell = notebook.client.execute(PULL)
    partial = folder.joinpath("hf", "hub", "models--user--Tiny-GGUF", "blobs", f"{digest(DEMO)}.incomplete")
    eventually(lambda: partial.exists() and partial.stat().st_size > 0, "the download is under way")
    notebook.manager.interrupt_kernel()
    stopped = notebook.collect(cell)
    assert len(stopped.error) == 1
    assert stopped.error[0].startswith("PullInterrupted: stopped; ")
    assert stopped.error[0].endswith(" of 5.53 MB are kept, and the same command continues")

    hub.hold_after_bytes = None
    shown = notebook.run(PULL)
    assert shown.error == []
    first, second = shown.stream.splitlines()
    assert first == "pulled hf.co/user/Tiny-GGUF: Q4_K_M, 5.53 MB in 1 file, hashes verified"
    assert second.endswith("ask it with %%sollol tiny")
    assert "tiny Q4_K_M: 100" in shown.text
    assert len(hub.ranges()) == 2
    assert not hub.ranges()[1].startswith("bytes=0-")
    assert TOKEN not in repr((stopped, shown))


def test_the_name_is_asked_over_a_worker(notebook: Kernel) -> None:
    assert notebook.run("%sollol_cluster start 1").error == []
    shown = notebook.run("%%sollol tiny --backend sharded --temperature 0 --max-tokens 12\nWhat is a worker?")
    assert shown.error == []
    assert notebook.value("(_.routing['backend'], _['model'])") == "('llama.cpp-distributed', 'tiny')"
    notebook.run("from sollol_nb.notebook import router")
    answer = "router().route_request(model='tiny', messages='What is a worker?', backend='sharded', max_tokens=4)"
    assert notebook.value(f"{answer}['eval_count']") == "4"


def test_it_is_listed_by_its_name_only_and_what_could_not_be_searched_is_a_line(notebook: Kernel) -> None:
    shown = notebook.run("frame = %sollol_models\nprint(frame[['model', 'where']].values.tolist())")
    note, listed = shown.stream.splitlines()
    assert note.endswith("missing (setting model_dirs) is not a folder")
    assert "['tiny', 'this machine']" in listed
    assert "hf.co/" not in listed
    notebook.run("%sollol_profile tiny --forget")
    shown = notebook.run("frame = %sollol_models hf.co\nprint(frame[['model', 'where']].values.tolist())")
    assert shown.stream.splitlines()[1] == "[['hf.co/user/Tiny-GGUF:Q4_K_M', 'Hugging Face cache']]"
    route = notebook.run("%sollol_route hf.co/user/Tiny-GGUF:Q4_K_M")
    assert route.stream.startswith("hf.co/user/Tiny-GGUF:Q4_K_M → local llama-server: "), route


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("pull", "UsageError: %sollol_models: name one model to pull, as in: pull hf.co/user/repo:Q4_K_M"),
        ("a b", "UsageError: %sollol_models: unexpected 'b'; name one text, or use: pull MODEL"),
        ("pull llama3.2", "ModelNotFoundError: 'llama3.2' is not a repository of the Hugging Face Hub; use "
         "hf.co/user/repo or hf.co/user/repo:quant, or get a model of Ollama with ollama pull"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_one_line_of_help(notebook: Kernel, line: str, error: str) -> None:
    shown = notebook.run(f"%sollol_models {line}")
    assert "".join([*shown.error, shown.stream.strip()]).replace("`", "") == error, shown


def test_without_the_client_the_error_is_the_command_that_installs_it(notebook: Kernel) -> None:
    notebook.run("import sys\nkept = sys.modules['huggingface_hub']\nsys.modules['huggingface_hub'] = None")
    shown = notebook.run(PULL)
    notebook.run("sys.modules['huggingface_hub'] = kept")
    needed = "pulling a model needs the package huggingface_hub; run: pip install 'huggingface_hub>=0.34'"
    assert shown.error == [f"ModelPullError: {needed}"]
