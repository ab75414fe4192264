"""Settings: one table, one order of precedence, and one line for an invalid value, with its source."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sollol_nb.chat.option_checks import CHAT_OPTIONS, SAMPLING_OPTIONS
from sollol_nb.errors import ConfigError
from sollol_nb.hybrid_router import HybridRouter
from sollol_nb.settings import config, consent
from sollol_nb.settings.file import read_settings
from sollol_nb.settings.table import FILE_NAME, SETTINGS, Setting, as_markdown
from tests.support.engines import posix_only

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
EACH = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with files switched on, and neither a variable nor a file of the user's."""
    here = tmp_path / "project"
    here.mkdir()
    monkeypatch.chdir(here)
    for setting in SETTINGS.values():
        monkeypatch.delenv(setting.variable, raising=False)
    monkeypatch.delenv("SOLLOL_CONFIG", raising=False)
    monkeypatch.setattr(config, "user_settings_file", lambda: tmp_path / "user" / FILE_NAME)
    monkeypatch.setattr(config, "consent_folder", lambda: tmp_path / "state" / "trusted")
    return here


def write(folder: Path, text: str) -> Path:
    """A settings file in this folder."""
    folder.mkdir(exist_ok=True)
    path = folder / FILE_NAME
    path.write_text(text, encoding="utf-8")
    return path


def allowed(path: Path) -> Path:
    """This settings file, with the user's consent."""
    consent.give(read_settings(path), config.consent_folder())
    return path


# --- the table --------------------------------------------------------------------------------


@EACH
def test_each_setting_has_texts_for_users(setting: Setting) -> None:
    assert len(setting.help) > 10
    assert setting.help.endswith(".")
    assert setting.kind.description
    assert setting.default_text not in ("", "[]")


@EACH
def test_each_built_in_default_is_valid(setting: Setting) -> None:
    if setting.default is None:
        assert setting.default_description
    else:
        assert setting.kind.checked(setting.default, "default") == setting.default


def test_each_variable_belongs_to_one_setting() -> None:
    assert len({setting.variable for setting in SETTINGS.values()}) == len(SETTINGS)


def test_settings_of_the_router_are_its_arguments() -> None:
    arguments = inspect.signature(HybridRouter).parameters
    assert {setting.argument for setting in SETTINGS.values() if setting.side == "router"} <= set(arguments)
    assert "timeout" in arguments


def test_settings_of_requests_are_options_of_the_router() -> None:
    options = {*SAMPLING_OPTIONS, *CHAT_OPTIONS, *inspect.signature(HybridRouter.stream).parameters}
    assert {setting.argument for setting in SETTINGS.values() if setting.side == "request"} - {"system"} <= options


def test_the_table_is_printed_as_markdown() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "sollol_nb.settings"], capture_output=True, text=True, check=True
    )
    assert printed.stdout == as_markdown() + "\n"
    assert printed.stderr == ""
    assert len(printed.stdout.splitlines()) == 2 + len(SETTINGS)
    assert "| `model` | `Sollol.model` | `SOLLOL_MODEL` | none (name it in the cell) |" in printed.stdout
    assert "| `state_dir` |  | `SOLLOL_STATE_DIR` |" in printed.stdout


# --- values -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("model", "llama3.1:70b", "llama3.1:70b"),
        ("temperature", 0, 0),
        ("temperature", 1.5, 1.5),
        ("top_p", 1, 1),
        ("max_tokens", 1, 1),
        ("seed", 0, 0),
        ("system", "Be brief.", "Be brief."),
        ("priority", 10, 10),
        ("priority", "high", 7),
        ("priority", "Below-Normal", 4),
        ("priority", "below normal", 4),
        ("timeout", 0.5, 0.5),
        ("format", "html", "html"),
        ("strategy", "even", "even"),
        ("keep_alive", 600, 600),
        ("keep_alive", "1h30m", "1h30m"),
        ("keep_alive", {"llama3.1:70b": "forever", "*": 0}, {"llama3.1:70b": "forever", "*": 0}),
        ("workers", [], []),
        ("workers", ["10.0.0.1", " [::1]:50053 "], ["10.0.0.1:50052", "[::1]:50053"]),
        ("workers", "10.0.0.1:1, 10.0.0.2:2,", ["10.0.0.1:1", "10.0.0.2:2"]),
        ("workers", ("a:1",), ["a:1"]),
        ("ollama_hosts", ["http://a:1", "b"], ["http://a:1", "b"]),
        ("auto_setup", True, True),
        ("slots", 1, 1),
        ("threshold_params", 7.5, 7.5),
        ("on_unload", "keep", "keep"),
        ("llama_cpp", "~/llama.cpp", Path.home() / "llama.cpp"),
        ("llama_cpp", Path("/opt"), Path("/opt")),
    ],
    ids=repr,
)
def test_valid_values_get_their_one_form(name: str, given: Any, value: Any) -> None:
    assert SETTINGS[name].kind.checked(given, name) == value


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("model", "", "model='' must be a model's name, such as llama3.1:70b"),
        ("model", 3, "model=3 must be a model's name"),
        ("temperature", "hot", "temperature='hot' must be a number of 0 or more, such as 0.7"),
        ("temperature", -0.1, "temperature=-0.1 must be a number of 0 or more"),
        ("temperature", True, "temperature=True must be"),
        ("temperature", float("nan"), "temperature=nan must be"),
        ("temperature", float("inf"), "temperature=inf must be"),
        ("top_p", 0, "top_p=0 must be a number above 0, at most 1"),
        ("top_p", 1.1, "top_p=1.1 must be"),
        ("max_tokens", 0, "max_tokens=0 must be a whole number of 1 or more, such as 512"),
        ("max_tokens", 5.0, "max_tokens=5.0 must be a whole number"),
        ("seed", -1, "seed=-1 must be a whole number of 0 or more"),
        ("seed", False, "seed=False must be"),
        ("priority", 0, "priority=0 must be a number from 1 (batch) to 10 (critical), or a name such as high"),
        ("priority", 11, "priority=11 must be"),
        ("priority", "soon", "priority='soon' must be"),
        ("priority", True, "priority=True must be"),
        ("timeout", 0, "timeout=0 must be a number of seconds above 0"),
        ("format", "pdf", "format='pdf' must be one of markdown, text, json, html, code"),
        ("format", ["text"], "format=['text'] must be one of"),
        (
            "strategy",
            "evn",
            "strategy: 'evn' is not a layer strategy; use one of auto, latency_aware, throughput, memory_aware, "
            "even",
        ),
        ("strategy", [], "strategy=[] must be the name of a layer strategy"),
        ("keep_alive", "soon", 'keep_alive=\'soon\' must be a time (seconds, "10m", 0, or "forever")'),
        ("keep_alive", {"*": "soon"}, "keep_alive={'*': 'soon'} must be a time"),
        ("keep_alive", {"": 5}, "keep_alive={'': 5} must be a time"),
        ("workers", ["a:b"], "workers: 'a:b' is not an endpoint; use host:port, such as 192.168.1.10:50052"),
        ("workers", [50052], "workers=[50052] must be a list of host:port"),
        ("workers", 50052, "workers=50052 must be a list of host:port"),
        ("ollama_hosts", [""], "ollama_hosts=[''] must be a list of host:port or URLs"),
        ("auto_setup", 1, "auto_setup=1 must be true or false"),
        ("auto_setup", "yes", "auto_setup='yes' must be true or false"),
        ("on_unload", "end", "on_unload='end' must be one of stop, keep"),
        ("llama_cpp", 1, "llama_cpp=1 must be the path of a folder"),
        ("llama_cpp", " ", "llama_cpp=' ' must be the path of a folder"),
        ("system", ["two\nlines"], r"system=['two\nlines'] must be a text"),
    ],
    ids=repr,
)
def test_invalid_values_are_refused_in_one_line(name: str, given: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        SETTINGS[name].kind.checked(given, name)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_an_invalid_value_is_shown_as_far_as_it_fits_on_a_line() -> None:
    with pytest.raises(ConfigError) as caught:
        SETTINGS["seed"].kind.checked("x" * 1000, "seed")
    assert len(str(caught.value)) < 150


def test_a_password_is_refused_without_showing_it() -> None:
    with pytest.raises(ConfigError, match="must not contain a password") as caught:
        SETTINGS["ollama_hosts"].kind.checked(["http://me:secret@host"], "ollama_hosts")
    assert "secret" not in str(caught.value)


# --- variables --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("model", " llama3.2 ", "llama3.2"),
        ("temperature", "0", 0),
        ("temperature", "0.7", 0.7),
        ("max_tokens", "512", 512),
        ("priority", "7", 7),
        ("priority", "batch", 1),
        ("timeout", "90", 90),
        ("keep_alive", "600", "600"),
        ("workers", "a:1,b:2", ["a:1", "b:2"]),
        ("auto_setup", "1", True),
        ("auto_setup", "No", False),
        ("short_errors", "off", False),
        ("threshold_params", "30", 30),
        ("slots", "", 4),
    ],
)
def test_variables_are_read_as_text(
    folder: Path, name: str, text: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SETTINGS[name].variable, text)

    assert config.default(name) == value


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("temperature", "hot", "SOLLOL_TEMPERATURE='hot' must be a number of 0 or more"),
        ("slots", "1.5", "SOLLOL_SLOTS=1.5 must be a whole number"),
        ("auto_setup", "maybe", "SOLLOL_AUTO_SETUP='maybe' must be true or false (1 or 0 in a variable)"),
        ("workers", "a:b", "RPC_BACKENDS: 'a:b' is not an endpoint"),
    ],
)
def test_an_invalid_variable_is_named(
    folder: Path, name: str, text: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SETTINGS[name].variable, text)

    with pytest.raises(ConfigError) as caught:
        config.default(name)
    assert str(caught.value).startswith(message)


# --- precedence -------------------------------------------------------------------------------


def test_variable_wins_over_nearest_file_over_the_users_file_over_built_in(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert config.find("slots") == config.Found(4, config.BUILT_IN)
    users = write(config.user_settings_file().parent, "slots = 5\nseed = 50")
    assert config.find("slots") == config.Found(5, str(users))
    above = write(folder.parent, "slots = 6")
    assert config.find("slots") == config.Found(6, str(above))
    nearest = write(folder, "slots = 7\nsystem = 'Be brief.'")
    assert config.find("slots") == config.Found(7, str(nearest))
    monkeypatch.setenv("SOLLOL_SLOTS", "8")
    assert config.find("slots") == config.Found(8, "SOLLOL_SLOTS")
    assert config.find("seed") == config.Found(50, str(users)), "what the nearest file leaves open"
    assert config.settings_files() == [nearest, users], "of the folders above only the nearest"


def test_files_set_values_of_all_kinds(folder: Path) -> None:
    path = write(
        folder,
        'workers = ["10.0.0.1"]\nollama_hosts = ["http://a:1"]\nnest_asyncio = false\nollama_num_parallel = 3\n'
        'llama_cpp = "engine"\ncache_dir = "cache"\nstate_dir = "/state"\nollama_models = "~/models"\n'
        'keep_alive = "1h"',
    )
    allowed(path)

    assert config.default("workers") == ["10.0.0.1:50052"]
    assert config.default("ollama_hosts") == ["http://a:1"]
    assert config.default("nest_asyncio") is False
    assert config.default("ollama_num_parallel") == 3
    assert config.default("llama_cpp") == folder / "engine"
    assert config.cache_dir() == folder / "cache"
    assert config.default("state_dir") == folder / "/state"
    assert config.default("ollama_models") == Path.home() / "models"
    assert config.default_keep_alive_s() == 3600


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ('{"*" = "5m", "llama3.1:70b" = "forever"}', 300),
        ('{"llama3.1:70b" = "forever"}', 600),
        ('"forever"', None),
    ],
)
def test_keep_alive_of_models_without_their_own(folder: Path, text: str, seconds: float | None) -> None:
    write(folder, f"keep_alive = {text}")

    assert config.default_keep_alive_s() == seconds


@pytest.mark.parametrize(("given", "slots"), [(None, 2), (0, 0), (8, 8)])
def test_an_argument_wins_over_all_of_them(folder: Path, given: int | None, slots: int) -> None:
    write(folder, "slots = 2")

    assert config.or_default(given, "slots") == slots


def test_an_empty_list_in_a_file_is_a_value(folder: Path) -> None:
    write(config.user_settings_file().parent, 'workers = ["10.0.0.1"]')
    allowed(write(folder, "workers = []"))

    assert config.default("workers") == []


def test_a_caller_cannot_change_the_value_of_others(folder: Path) -> None:
    for name in ("workers", "ollama_hosts"):
        config.default(name).append("x")
    allowed(write(folder, 'workers = ["a:1"]'))
    config.default("workers").append("x")

    assert config.default("workers") == ["a:1"]
    assert config.default("ollama_hosts") == []


# --- files ------------------------------------------------------------------------------------


def test_an_edit_takes_effect_immediately(folder: Path) -> None:
    for slots in (2, 3, 2):
        write(folder, f"slots = {slots}")
        assert config.default("slots") == slots
    (folder / FILE_NAME).unlink()
    assert config.default("slots") == 4


def test_a_file_is_found_from_the_folders_below(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, "slots = 2")
    below = folder / "a" / "b"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)

    assert config.default("slots") == 2


def test_paths_are_relative_to_the_folder_of_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed(write(folder, 'llama_cpp = "../llama.cpp"\nmodel = "models/small.gguf"'))
    (folder / "below").mkdir()
    monkeypatch.chdir(folder / "below")

    assert config.default("llama_cpp") == folder / ".." / "llama.cpp"
    assert config.default("model") == str(folder / "models" / "small.gguf")
    allowed(write(folder, 'model = "models/SMALL.GGUF"'))
    assert config.default("model") == str(folder / "models" / "SMALL.GGUF")


def test_a_byte_order_mark_is_accepted(folder: Path) -> None:
    (folder / FILE_NAME).write_text("slots = 2", encoding="utf-8-sig")

    assert config.default("slots") == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slots = 'two'", ": slots='two' must be a whole number of 1 or more, such as 4"),
        ("slots = '2'", ": slots='2' must be a whole number"),
        ("temprature = 1", ": there is no setting 'temprature'; did you mean temperature?"),
        ("rpc_backends = []", ": there is no setting 'rpc_backends'; did you mean workers?"),
        ("OLLAMA_HOST = 'a'", ": there is no setting 'OLLAMA_HOST'; did you mean ollama_hosts?"),
        ("xyz = 1", ": there is no setting 'xyz'; known settings: model, temperature, top_p"),
        ("[router]\nslots = 2", ": there is no setting 'router'; "),
        ("workers = ['a:b']", ": workers: 'a:b' is not an endpoint; use host:port"),
        ("slots 2", " is not TOML: "),
        ("slots = 2\nslots = 3", " is not TOML: "),
    ],
)
def test_an_invalid_file_is_refused_in_one_line_for_every_setting(folder: Path, text: str, message: str) -> None:
    path = write(folder, text)

    with pytest.raises(ConfigError) as caught:
        config.default("seed")
    assert str(caught.value).startswith(f"{path}{message}")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_text_is_refused(folder: Path) -> None:
    (folder / FILE_NAME).write_bytes(b"model = '\xff'")

    with pytest.raises(ConfigError, match="is not UTF-8 text; save it as UTF-8"):
        config.default("seed")


def test_a_variable_names_the_only_file_or_switches_files_off(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(config.user_settings_file().parent, "seed = 5")
    write(folder, "slots = 2")
    other = tmp_path / "other.toml"
    other.write_text("top_p = 0.5\nllama_cpp = 'engine'")

    monkeypatch.setenv("SOLLOL_CONFIG", os.path.relpath(other))
    assert config.default("top_p") == 0.5
    assert (config.default("slots"), config.default("seed")) == (4, None)
    assert config.default("llama_cpp") == config.settings_files()[0].parent / "engine"

    monkeypatch.setenv("SOLLOL_CONFIG", "0")
    assert config.settings_files() == []
    assert config.default("top_p") is None

    monkeypatch.setenv("SOLLOL_CONFIG", str(tmp_path / "nosuch.toml"))
    with pytest.raises(ConfigError, match=r"cannot read .*nosuch\.toml \(No such file or directory\)"):
        config.default("slots")


def test_a_file_of_another_user_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(folder.parent, "slots = 2")
    if os.name == "posix":
        if os.getuid() == 0:
            os.chown(path, 12345, -1)
        else:
            monkeypatch.setattr(os, "getuid", lambda: 12345)
        with pytest.raises(ConfigError, match=r"belongs to another user \(uid \d+\), so it is not used"):
            config.default("slots")
    monkeypatch.setenv("SOLLOL_CONFIG", str(path))
    assert config.default("slots") == 2


def test_a_deleted_working_folder_has_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> Path:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "cwd", gone)
    write(config.user_settings_file().parent, "slots = 2")

    assert config.default("slots") == 2


def test_the_readme_has_the_table_of_settings() -> None:
    assert as_markdown().strip() in README


def test_the_readme_names_the_settings_that_need_consent() -> None:
    told = re.search(r"in the file of a folder \(4\) the settings(.*?)are ignored until", README, re.DOTALL)
    assert told is not None
    patterns = [name.replace("...", ".*") for name in re.findall(r"`(\S+)`", told[1])]
    matched = {name for name in SETTINGS if any(re.fullmatch(pattern, name) for pattern in patterns)}
    assert matched == {name for name, setting in SETTINGS.items() if setting.guarded}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("seed = " + "9" * 5000, "is not TOML"),
        ("seed = 0x" + "f" * 5000, "must be a whole number"),
        ("timeout = " + "9" * 400, "must be a number of seconds"),
        ("a." * 100_000 + "b = 1", "has a key of more than 64 parts"),
        ("[" + "'a' . " * 100_000 + "b]", "has a key of more than 64 parts"),
        ("seed = " + "[" * 100_000, "is not TOML"),
    ],
    ids=["digits", "a huge number", "no float", "a deep key", "a deep table", "a deep list"],
)
def test_absurd_files_are_refused_in_a_line(text: str, reason: str, folder: Path) -> None:
    write(folder, text)
    with pytest.raises(ConfigError, match=reason) as caught:
        config.default("slots")
    assert len(str(caught.value)) < 500


@posix_only
def test_a_pipe_is_refused_without_waiting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(folder / "pipe")
    monkeypatch.setenv("SOLLOL_CONFIG", str(folder / "pipe"))
    with pytest.raises(ConfigError, match="is not a regular file"):
        config.default("slots")
