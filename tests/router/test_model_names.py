"""What a caller may give as a model: names, and files as text or `Path`; and what is refused, with what to do."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sollol_nb.errors import ConfigError, ModelFileError
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.models.files import DEMO_MODEL_PATH
from sollol_nb.sync_wrapper import HybridRouter
from sollol_nb.text.short_names import is_file_name
from tests.support.engines import unused_ports
from tests.support.gguf_files import write_llama

BLOB = f"sha256-{'ab' * 32}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with the same model as files of different names."""
    (tmp_path / "blobs").mkdir()
    for name in ("Demo.GGUF", "plain", f"blobs/{BLOB}"):
        shutil.copy(DEMO_MODEL_PATH, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def idle_router() -> Iterator[HybridRouter]:
    """A router that starts nothing."""
    with HybridRouter(llama_cpp="/nowhere", auto_discover_rpc=False) as router:
        yield router


@pytest.mark.parametrize(
    ("model", "file"),
    [
        ("Demo.GGUF", "Demo.GGUF"),
        (Path("Demo.GGUF"), "Demo.GGUF"),
        ("./plain", "plain"),
        (Path("plain"), "plain"),
        (f"blobs/{BLOB}", f"blobs/{BLOB}"),
        (Path("blobs") / BLOB, f"blobs/{BLOB}"),
    ],
)
def test_a_file_is_found_however_it_is_named(
    folder: Path, idle_router: HybridRouter, model: str | Path, file: str
) -> None:
    route = idle_router.route(model)

    assert route.model_path == folder / file
    assert not idle_router.should_use_distributed(model)
    assert idle_router.profile(model).parameter_count_b == pytest.approx(0.00274, rel=0.01)


@pytest.mark.parametrize("part", ["00001", "00002", "00004"])
def test_any_part_of_a_split_model_loads_the_first(tmp_path: Path, idle_router: HybridRouter, part: str) -> None:
    first = write_llama(tmp_path / "split.gguf", tensors_per_part=12)
    named = tmp_path / f"split-{part}-of-00004.gguf"
    assert named.is_file()

    assert idle_router.route(named).model_path == first


def test_a_missing_part_of_a_split_model_is_named(tmp_path: Path, idle_router: HybridRouter) -> None:
    first = write_llama(tmp_path / "split.gguf", tensors_per_part=12)
    first.unlink()

    with pytest.raises(ModelFileError, match=r"00001-of-00004.gguf does not exist; the model has 4 parts"):
        idle_router.route(tmp_path / "split-00002-of-00004.gguf")


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("", ConfigError, "is not a model name; try demo or llama3.2"),
        (5, ConfigError, "model=5 is not a model name"),
        (None, ConfigError, "model=None is not a model name"),
        (b"demo.gguf", ConfigError, "is not a model name"),
        ("a\0.gguf", ConfigError, "contains a NUL character"),
        ("\udcff.gguf", ConfigError, "has characters that are not Unicode; rename the file"),
        (Path("/tmp/\udcff.gguf"), ConfigError, "rename the file"),
        ("no.gguf", ModelFileError, "no.gguf does not exist; give the path of a GGUF file"),
        (Path("no"), ModelFileError, "no does not exist; give the path"),
        (f"{'x' * 5000}.gguf", ModelFileError, "cannot read .*too long"),
        ("./", ModelFileError, "is a folder; name the .gguf file in it"),
        ("https://example.org/a.gguf", ModelFileError, "is a web address; download the file"),
        ("/dev/null", ModelFileError, "is not a regular file"),
        (__file__, ModelFileError, "is not a GGUF file"),
    ],
)
def test_what_is_no_model_is_refused_in_one_line(
    folder: Path, idle_router: HybridRouter, model: Any, error: type[Exception], message: str
) -> None:
    for ask in (idle_router.route, idle_router.profile, lambda model: idle_router.route_request(model, "hi")):
        with pytest.raises(error, match=message) as caught:
            ask(model)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "is_file"),
    [("llama3.2", False), ("user/model:tag", False), ("hf.co/user/repo:Q4", False), ("demo:sharded", False),
     ("sha256-abc", False), ("model.gguf:latest", False), ("C:\\models\\a", True), ("~/a", True)],
)  # fmt: skip
def test_names_of_ollama_models_are_no_files(model: str, is_file: bool) -> None:
    assert is_file_name(model) is is_file


@pytest.mark.engine
def test_a_path_is_asked_like_any_model(folder: Path, engine: Engine) -> None:
    with HybridRouter(coordinator_port=unused_ports(1), keep_alive=0) as router:
        answer = router.route_request(folder / "blobs" / BLOB, "What is a worker?", temperature=0, max_tokens=5)
        rows = router.map(
            ["a worker"], "What is {{ item }}?", model=Path("Demo.GGUF"), max_tokens=3, progress=False
        )

    assert answer.text
    assert list(rows["status"]) == ["ok"]
