"""Model files that other programs and the user keep: where they are searched, and their names."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from sollol_nb.errors import ConfigError
from sollol_nb.models import found_files
from sollol_nb.models.files import DEMO_MODEL_PATH, find_model_file
from sollol_nb.models.found_files import find_file, search
from sollol_nb.models.listing import list_models
from sollol_nb.models.modelfile import modelfile_of
from sollol_nb.models.profiles import profile_of
from sollol_nb.settings import config
from sollol_nb.settings.models import SavedModel
from tests.support.gguf_files import write_llama, write_projector


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with nothing in it; nothing found earlier counts."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    for name in ("HF_HOME", "LLAMA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(found_files, "MAX_FRESH_S", 0)
    return tmp_path


def put(path: Path) -> Path:
    """A model file there, which is another one than all others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(DEMO_MODEL_PATH, path)
    return path


def test_files_of_other_programs_are_found_by_their_names(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = put(home / "mine" / "deep" / "Own-Q8_0.gguf")
    studio = put(home / ".lmstudio" / "models" / "user" / "Studio-GGUF" / "Studio-Q4_K_M.gguf")
    cached = put(config.llama_cpp_cache() / "user_repo_cached.gguf")
    of_hub = put(config.hub_cache() / "models--user--Repo-GGUF" / "snapshots" / ("0" * 40) / "Repo-Q5_K_M.gguf")
    monkeypatch.setenv("SOLLOL_MODEL_DIRS", f"{home / 'mine'}")
    found = search()
    assert {name: (file.path, file.place) for name, file in found.by_name.items()} == {
        "Own-Q8_0": (own, str(home / "mine")),
        "Studio-Q4_K_M": (studio, "LM Studio"),
        "user_repo_cached": (cached, "llama.cpp"),
        "hf.co/user/Repo-GGUF:Q5_K_M": (of_hub, "Hugging Face cache"),
    }
    assert found.notes == ()
    assert find_model_file("Own-Q8_0") == own
    assert find_model_file("own-q8_0") == own
    assert find_model_file("hf.co/user/Repo-GGUF:q5_k_m") == of_hub
    assert find_model_file("llama3.2:3b") is None


def test_the_folder_that_lm_studio_s_settings_name_is_searched(home: Path) -> None:
    put(home / "elsewhere" / "a" / "b" / "There.gguf")
    (home / "studio").mkdir()
    (home / ".lmstudio-home-pointer").write_text(str(home / "studio"))
    (home / "studio" / "settings.json").write_text(json.dumps({"downloadsFolder": str(home / "elsewhere")}))
    assert list(search().by_name) == ["There"]
    (home / "studio" / "settings.json").write_text("[" * 100_000)
    assert search().by_name == {}


def test_only_models_are_found_and_a_split_one_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = home / "mine"
    folder.mkdir()
    first = write_llama(folder / "big-Q4_K_M.gguf", tensors_per_part=15)
    for name in ("mmproj-F16.gguf", "x.imatrix.gguf", "notes.txt", ".hidden.gguf", ".git/y.gguf"):
        put(folder / name)
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "gone.gguf").symlink_to(folder / "nowhere.gguf")
    (folder / "again.gguf").symlink_to(first)
    monkeypatch.setenv("SOLLOL_MODEL_DIRS", str(folder))
    ((name, found),) = search().by_name.items()
    assert name in ("big-Q4_K_M", "again")
    assert found.path.resolve() == first.resolve()
    assert found.projector is None  # a folder of many models


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_no_model_file(home: Path) -> None:
    model = put(config.llama_cpp_cache() / "model.gguf")
    os.mkfifo(model.with_name("pipe.gguf"))
    assert list(search().by_name) == ["model"]


def test_a_projector_belongs_to_the_model_in_its_folder(home: Path) -> None:
    folder = put(home / ".lmstudio" / "models" / "user" / "Eyes-GGUF" / "Eyes-Q4_K_M.gguf").parent
    projector = write_projector(folder / "mmproj-Eyes-F16.gguf")
    modelfile = modelfile_of("Eyes-Q4_K_M", None, lambda name, value: value)
    assert modelfile.projector == projector
    assert modelfile.left_out == ()


def test_the_projector_of_a_model_in_the_hub_s_cache_is_the_one_that_a_pull_would_choose(home: Path) -> None:
    snapshot = config.hub_cache() / "models--user--Eyes-GGUF" / "snapshots" / ("0" * 40)
    put(snapshot / "Q4_K_M" / "Eyes-Q4_K_M.gguf")
    for name in ("mmproj-BF16.gguf", "mmproj-Q8_0.gguf", "Q2_K/mmproj-Q4_0.gguf"):
        put(snapshot / name)
    found = find_file("hf.co/user/Eyes-GGUF:Q4_K_M")
    assert found is not None
    assert found.projector == snapshot / "mmproj-Q8_0.gguf"
    nearer = put(snapshot / "Q4_K_M" / "mmproj-F16.gguf")
    found = find_file("hf.co/user/Eyes-GGUF:Q4_K_M")
    assert found is not None
    assert found.projector == nearer


def test_files_with_the_same_name_are_told_apart_by_their_folders(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [put(home / "mine" / folder / "model.gguf") for folder in ("a", "b")]
    monkeypatch.setenv("SOLLOL_MODEL_DIRS", str(home / "mine"))
    assert {name: file.path for name, file in search().by_name.items()} == {
        "a/model": paths[0],
        "b/model": paths[1],
    }
    assert find_model_file("b/model") == paths[1]


def test_of_several_versions_in_the_hub_s_cache_the_newest_counts(home: Path) -> None:
    snapshots = config.hub_cache() / "models--user--Repo-GGUF" / "snapshots"
    old, new = (put(snapshots / (digit * 40) / "Repo-Q8_0.gguf") for digit in "10")
    os.utime(old, (1, 1))
    assert [file.path for file in search().by_name.values()] == [new]


def test_a_name_of_ollama_or_of_the_settings_comes_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {name: put(home / "mine" / f"{name}.gguf") for name in ("theirs", "named", "saved", "free")}
    monkeypatch.setenv("SOLLOL_MODEL_DIRS", str(home / "mine"))
    models = list_models(
        profile_of,
        in_ollama=[{"name": "Theirs:latest", "nodes": ["http://a:11434"]}],
        loaded=[],
        in_storage=[],
        coordinators={},
        saved={"saved": SavedModel({"gguf": DEMO_MODEL_PATH}), "short": SavedModel({"gguf": paths["named"]})},
        found=search().by_name,
    )
    where = {model.model: model.where for model in models if model.where}
    place = str(home / "mine")
    assert where == {
        "demo": "built in",
        "demo:sharded": "built in",
        "Theirs": "http://a:11434",
        str(paths["theirs"]): place,
        "saved": "this machine",
        str(paths["saved"]): place,
        "short": "this machine",
        "free": place,
    }


def test_what_cannot_be_searched_is_a_note(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(home / "mine" / "seen.gguf")
    locked = home / "mine" / "locked"
    locked.mkdir()
    real = os.scandir

    def scandir(path: Path) -> object:
        if Path(path) == locked:  # root may read everything
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setenv("SOLLOL_MODEL_DIRS", f"{home / 'mine'}, {home / 'missing'}")
    found = search()
    assert list(found.by_name) == ["seen"]
    assert found.notes == (
        f"cannot read {locked}; models there are not listed",
        f"{home / 'missing'} (setting model_dirs) is not a folder",
    )


def test_the_search_is_bounded(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for at in range(20):
        put(home / "mine" / f"m{at}.gguf")
    monkeypatch.setenv("SOLLOL_MODEL_DIRS", str(home / "mine"))
    deep = home.joinpath("mine", *"abcdefghijklm")
    put(deep / "deep.gguf")
    assert len(search().by_name) == 20
    monkeypatch.setattr(found_files, "MAX_FILES", 5)
    assert len(search().by_name) == 5
    assert "only the first 5 model files are listed" in search().notes[0]
    monkeypatch.setattr(found_files, "MAX_ENTRIES", 3)
    assert len(search().by_name) <= 3
    assert "only the first 3 files and folders were searched" in search().notes[0]
    monkeypatch.setattr(found_files, "TIME_LIMIT_S", -1)
    assert search().by_name == {}
    assert "the search for model files ended after" in search().notes[0]


def test_what_was_found_lately_counts_and_a_missing_name_does_not_search_again(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(found_files, "FRESH_FACTOR", 1e9)
    monkeypatch.setattr(found_files, "MAX_FRESH_S", 1e9)
    monkeypatch.setenv("SOLLOL_MODEL_DIRS", str(home / "mine"))
    found_files.found_files(fresh=True)
    put(home / "mine" / "late.gguf")
    assert find_file("late") is None
    assert found_files.found_files(fresh=True).get("late") is not None
    assert find_file("late") is not None


def test_folders_in_a_settings_file_are_seen_from_its_folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "mine.toml").write_text('model_dirs = ["models", "~/other"]\n')
    monkeypatch.setenv("SOLLOL_CONFIG", str(home / "mine.toml"))
    assert config.default("model_dirs") == [home / "models", home / "other"]
    (home / "mine.toml").write_text("model_dirs = 3\n")
    with pytest.raises(ConfigError, match="model_dirs=3 must be a list of folders"):
        config.default("model_dirs")
