"""The setting `models`: names for GGUF files, read from all files, written without harm to the rest of a file."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from sollol_nb.errors import ConfigError
from sollol_nb.settings import config, edit
from sollol_nb.settings.table import FILE_NAME, SETTINGS

KIND = SETTINGS["models"].kind


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with files switched on; the user's own file lies in the folder `user` beside it."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("SOLLOL_CONFIG", raising=False)
    monkeypatch.setattr(config, "user_settings_file", lambda: tmp_path / "user" / FILE_NAME)
    return folder


def user_file(project: Path) -> Path:
    return project.parent / "user" / FILE_NAME


# --- what an entry may say ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "checked"),
    [
        ("models/a.gguf", {"gguf": Path("models/a.gguf")}),
        ("A.GGUF", {"gguf": Path("A.GGUF")}),
        ("~/a.gguf", {"gguf": Path.home() / "a.gguf"}),
        ("/ollama/blobs/sha256-0123", {"gguf": Path("/ollama/blobs/sha256-0123")}),
        ({"sharded": True, "parameters": 70}, {"sharded": True, "parameters": 70}),
        (
            {"gguf": "a.gguf", "temperature": 0, "system": "Hi"},
            {"gguf": Path("a.gguf"), "temperature": 0, "system": "Hi"},
        ),
        ({}, {}),
    ],
)
def test_an_entry_is_a_path_or_a_table(given: Any, checked: dict[str, Any]) -> None:
    assert KIND.checked({"smol": given}, "models") == {"smol": checked}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"smol": {"ggfu": "a.gguf"}}, "models: smol has an unknown key 'ggfu'; did you mean gguf?"),
        ({"smol": {"temperature": -1}}, "models: smol: temperature=-1 must be a number of 0 or more"),
        ({"smol": {"sharded": 1}}, "models: smol: sharded=1 must be true or false"),
        ({"smol": {"gguf": 3}}, "models: smol: gguf=3 must be the path of a .gguf file"),
        ({"smol": "llama3.2"}, "models: smol: gguf='llama3.2' must be the path of a .gguf file"),
        ({"smol": 3}, "models: smol must be the path of a .gguf file, or a table such as"),
        ({"": "a.gguf"}, "models: '' cannot be the name of a model"),
        ({"a\nb": "a.gguf"}, r"models: 'a\nb' cannot be the name of a model"),
        ({"demo": "a.gguf"}, "models: demo is the built-in model and cannot name another file"),
        ({"a.gguf": "b.gguf"}, "models: a.gguf is a path and cannot name another file"),
        ("smol", "models='smol' must be a table of models by name"),
    ],
    ids=repr,
)
def test_an_invalid_entry_is_refused_in_one_line(given: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        KIND.checked(given, "models")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


# --- read --------------------------------------------------------------------------------------


def test_a_name_gets_each_key_from_the_first_file_that_has_it(project: Path) -> None:
    (project / FILE_NAME).write_text('[models]\nsmol = { temperature = 0 }\nlocal = "sub/local.gguf"\n')
    user_file(project).parent.mkdir()
    user_file(project).write_text('[models]\nsmol = { gguf = "s.gguf", temperature = 1 }\nown = "/m/own.gguf"\n')
    saved = config.saved_models()
    assert dict(saved["smol"].values) == {"gguf": user_file(project).parent / "s.gguf", "temperature": 0}
    assert saved["smol"].source == str(project / FILE_NAME)
    assert saved["local"].gguf == project / "sub/local.gguf"
    assert saved["own"].gguf == Path("/m/own.gguf")
    assert config.saved_model("own:latest").gguf == Path("/m/own.gguf")
    assert config.saved_model("other").values == {}


def test_a_variable_names_files_too(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLLOL_MODELS", "a=/m/a.gguf, b=/m/b.gguf")
    assert config.saved_model("b").gguf == Path("/m/b.gguf")
    monkeypatch.setenv("SOLLOL_MODELS", "/m/a.gguf")
    with pytest.raises(ConfigError, match=r"SOLLOL_MODELS=.* must be a table of models by name"):
        config.saved_model("b")


# --- written -----------------------------------------------------------------------------------


def test_a_saved_model_is_in_the_users_own_file_which_only_the_user_can_read(project: Path) -> None:
    path = user_file(project)
    assert config.save_model("smol", {"gguf": "s.gguf", "sharded": True}) == str(path)
    assert config.save_model("smol", {"temperature": 0}) == str(path)
    assert config.saved_model("smol").values == {"gguf": project / "s.gguf", "sharded": True, "temperature": 0}
    assert path.stat().st_mode & 0o777 == 0o600
    assert not (project / FILE_NAME).exists()
    assert config.forget_model("smol")
    assert config.saved_models() == {}
    assert not config.forget_model("smol")


def test_what_another_file_would_override_is_not_written(project: Path) -> None:
    nearer = project / FILE_NAME
    nearer.write_text('[models]\nsmol = "s.gguf"\n')
    with pytest.raises(ConfigError, match=rf"^{nearer} sets gguf of smol, and comes before "):
        config.save_model("smol", {"gguf": "t.gguf"})
    with pytest.raises(ConfigError, match=rf"^smol is set in {nearer}; remove it there$"):
        config.forget_model("smol")
    config.save_model("smol", {"sharded": True})
    assert config.saved_model("smol").values == {"gguf": project / "s.gguf", "sharded": True}


def test_without_files_a_model_is_kept_in_this_process(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLLOL_CONFIG", "0")
    assert config.save_model("smol", {"gguf": "s.gguf"}) == ""
    assert config.saved_model("smol").gguf == project / "s.gguf"
    assert not user_file(project).exists()
    assert config.forget_model("smol")


def test_the_chosen_file_is_written(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = project / "mine.toml"
    chosen.touch()
    monkeypatch.setenv("SOLLOL_CONFIG", str(chosen))
    assert config.save_model("smol", {"gguf": "s.gguf"}) == str(chosen)
    assert config.saved_model("smol").gguf == project / "s.gguf"


PATH = '/a b/"q"\\x#.gguf'
FILES = {
    "empty": "",
    "no line end": 'model = "a"',
    "other settings": '# mine\nmodel = "a"  # why\nworkers = [\n  "a:1",\n]\n\n[keep_alive]\n"*" = 0\n',
    "a path": '[models]\nsmol = "x.gguf"  # small\nother = { gguf = "b.gguf" }  # b\n',
    "a separate table": '[models.smol]\n# why\ngguf = "x.gguf"\n\n[models.b]\ngguf = "c.gguf"\n',
    "dotted keys": '[models]\nsmol.gguf = "x.gguf"\nsmol.seed = 3\nb = "c.gguf"\n',
    "a quoted name": "[ models ] # all\n  'smol' = { gguf = 'C:\\x#\\y.gguf' } # a # b\n",
    "Windows": 'model = "a"\r\n\r\n[models]\r\nsmol = "x.gguf"\r\n',
}


@pytest.mark.parametrize("text", FILES.values(), ids=FILES)
def test_the_rest_of_a_file_stays_as_it_is(tmp_path: Path, text: str) -> None:
    path = tmp_path / FILE_NAME
    path.write_bytes(text.encode())
    before = tomllib.loads(text)
    edit.save_entry(path, "smol", {"gguf": Path(PATH), "temperature": 0.5}, lock=tmp_path / "lock")
    written = path.read_bytes().decode()
    after = tomllib.loads(written)
    smol = after["models"].pop("smol")
    old = before.setdefault("models", {}).pop("smol", {})
    assert smol == ({} if isinstance(old, str) else old) | {"gguf": PATH, "temperature": 0.5}
    assert after == before
    kept = [line for line in text.splitlines(keepends=True) if "x.gguf" not in line and "smol" not in line]
    assert all(line.strip() in written for line in kept)
    assert ("\r\n" in text) == ("\r\n" in written)
    edit.remove_entry(path, "smol", lock=tmp_path / "lock")
    assert tomllib.loads(path.read_text()) == before


def test_a_comment_behind_an_entry_stays(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    path.write_text(FILES["a path"])
    edit.save_entry(path, "smol", {"seed": 1}, lock=tmp_path / "lock")
    assert path.read_text().splitlines()[1] == 'smol = { gguf = "x.gguf", seed = 1 }  # small'


UNUSUAL = ['models.smol = "x.gguf"\nmodels.b = "c.gguf"\n', 'system = """\n[models]\nsmol = "x"\n"""\n']


@pytest.mark.parametrize("text", UNUSUAL)
def test_a_layout_that_cannot_be_changed_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / FILE_NAME
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"because of its layout; write smol = \{ .*seed = 1 \} there$"):
        edit.save_entry(path, "smol", {"seed": 1}, lock=tmp_path / "lock")
    assert path.read_text() == text


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^cannot write "):
        edit.save_entry(tmp_path / "file" / FILE_NAME, "smol", {"seed": 1}, lock=tmp_path / "lock")
    broken = tmp_path / FILE_NAME
    broken.write_text("model = \n")
    with pytest.raises(ConfigError, match="is not TOML"):
        edit.save_entry(broken, "smol", {"seed": 1}, lock=tmp_path / "lock")


def test_a_lock_that_is_a_link_is_refused_and_its_target_stays(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOLLOL_STATE_DIR", str(project / "state"))
    (project / "precious").write_text("x")
    (config.state_dir() / "settings.lock").symlink_to(project / "precious")
    with pytest.raises(ConfigError, match=r"settings\.lock is not used, because it is a symbolic link"):
        config.save_model("smol", {"seed": 1})
    assert (project / "precious").read_text() == "x"


def test_a_linked_file_stays_a_link_and_keeps_its_mode(tmp_path: Path) -> None:
    target, link = tmp_path / "dotfiles.toml", tmp_path / FILE_NAME
    target.write_text('model = "a"\n')
    target.chmod(0o644)
    link.symlink_to(target)
    edit.save_entry(link, "smol", {"seed": 1}, lock=tmp_path / "lock")
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o644
    assert tomllib.loads(target.read_text())["models"] == {"smol": {"seed": 1}}
