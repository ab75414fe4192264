"""`%config Sollol`: help, validation, and values from variables and files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from traitlets.config import Config

from sollol_nb.errors import ConfigError
from sollol_nb.notebook.settings_traits import Sollol
from sollol_nb.settings import config
from sollol_nb.settings.table import FILE_NAME, SETTINGS
from sollol_nb.sync_wrapper import HybridRouter, OllamaPool
from tests.support.kernels import Kernel, kernel

IN_NOTEBOOKS = [setting for setting in SETTINGS.values() if setting.side != "machine"]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of the only settings file, which does not exist yet; no variable is set."""
    for setting in SETTINGS.values():
        monkeypatch.delenv(setting.variable, raising=False)
    path = tmp_path / FILE_NAME
    monkeypatch.setattr(config, "settings_files", lambda: [path] if path.exists() else [])
    return path


@pytest.fixture
def settings(file: Path) -> Sollol:
    """Settings without a shell."""
    return Sollol()


def configure(settings: Sollol, **values: Any) -> None:
    """What `%config Sollol.NAME = VALUE` does."""
    settings.update_config(Config({"Sollol": values}))


def test_each_setting_that_a_notebook_can_change_is_a_trait_with_help() -> None:
    traits = Sollol.class_traits(config=True)
    assert set(traits) == {setting.name for setting in IN_NOTEBOOKS}
    assert all(traits[setting.name].help == setting.help for setting in IN_NOTEBOOKS)


def test_a_trait_that_is_not_set_has_the_value_in_effect(
    settings: Sollol, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (settings.slots, settings.find("slots").source) == (4, config.BUILT_IN)
    file.write_text("slots = 2")
    assert (settings.slots, settings.find("slots").source) == (2, str(file))
    monkeypatch.setenv("SOLLOL_SLOTS", "3")
    assert (settings.slots, settings.find("slots").source) == (3, "SOLLOL_SLOTS")
    configure(settings, slots=5)
    assert (settings.slots, settings.find("slots").source) == (5, "%config")


@pytest.mark.parametrize("by_magic", [True, False])
def test_none_restores_the_default(settings: Sollol, file: Path, by_magic: bool) -> None:
    settings.slots = 5
    if by_magic:
        configure(settings, slots=None)
    else:
        settings.slots = None
    assert settings.slots == 4
    file.write_text("slots = 2")
    assert settings.slots == 2
    assert settings.own("slots") is None


def test_values_get_their_normal_form(settings: Sollol) -> None:
    configure(settings, workers="a:1, b", priority="high", auto_setup=True)

    assert settings.workers == ["a:1", "b:50052"]
    assert settings.priority == 7
    assert settings.auto_setup is True


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("temperature", "hot", "Sollol.temperature='hot' must be a number of 0 or more, such as 0.7"),
        ("workers", ["a:b"], "Sollol.workers: 'a:b' is not an endpoint; use host:port"),
        ("temprature", 1, "Sollol: there is no setting 'temprature'; did you mean temperature?"),
        ("layer_strategy", "even", "Sollol: there is no setting 'layer_strategy'; did you mean strategy?"),
        ("state_dir", "/tmp", "Sollol.state_dir cannot be changed in a notebook; set SOLLOL_STATE_DIR"),
    ],
)
def test_invalid_values_are_one_line_and_change_nothing(
    settings: Sollol, name: str, value: object, message: str
) -> None:
    configure(settings, slots=5)
    with pytest.raises(ConfigError) as caught:
        configure(settings, **{name: value})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    configure(settings, seed=1)
    assert (settings.temperature, settings.workers, settings.slots, settings.seed) == (None, [], 5, 1)


def test_an_invalid_value_set_in_python_is_the_same_error(settings: Sollol) -> None:
    with pytest.raises(ConfigError, match=r"Sollol\.slots=0 must be a whole number of 1 or more"):
        settings.slots = 0
    assert settings.slots == 4


def test_the_magic_keeps_values_set_in_python(settings: Sollol) -> None:
    configure(settings, slots=5)
    settings.slots = 6
    configure(settings, seed=1)
    assert settings.slots == 6


def test_an_invalid_file_gives_the_default_where_reading_must_not_fail(settings: Sollol, file: Path) -> None:
    file.write_text('on_unload = "keep"')
    assert settings.or_built_in("on_unload") == "keep"
    file.write_text('on_unload = "perhaps"')
    assert settings.or_built_in("on_unload") == "stop"
    with pytest.raises(ConfigError, match="on_unload='perhaps' must be one of stop, keep"):
        settings.find("on_unload")
    settings.on_unload = "keep"
    assert settings.or_built_in("on_unload") == "keep"


def test_request_defaults_are_the_values_that_were_set(
    settings: Sollol, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert settings.request_defaults() == {}
    file.write_text('model = "llama3.2"\ntemperature = 0\ntimeout = 5\nformat = "text"\nslots = 2')
    monkeypatch.setenv("SOLLOL_SEED", "3")
    configure(settings, temperature=0.5, system="Be brief.")

    expected = {"model": "llama3.2", "temperature": 0.5, "seed": 3, "system": "Be brief.", "format": "text"}
    assert settings.request_defaults() == expected
    configure(settings, timeout=60)
    assert settings.request_defaults() == {**expected, "timeout": 60}


def test_a_router_made_by_hand_has_the_settings_of_the_notebook(settings: Sollol, file: Path) -> None:
    file.write_text("slots = 2\ncontext_tokens = 256")
    values = {
        "strategy": "even",
        "keep_alive": {"demo": 5},
        "workers": ["127.0.0.1:9"],
        "num_workers": 2,
        "auto_setup": True,
        "slots": 3,
        "ollama_hosts": ["127.0.0.1:9"],
        "timeout": 7,
    }
    configure(settings, **values)
    config.use_notebook_settings(settings.own)
    try:
        assert config.find("slots") == config.Found(3, "%config")
        with HybridRouter() as router, HybridRouter(slots=1, rpc_backends=[]) as other, OllamaPool() as pool:
            made, changed = router.settings, other.settings
            assert (made.layer_strategy, made.num_rpc_backends, made.auto_setup_rpc) == ("even", 2, True)
            assert (made.slots, made.context_tokens, made.keep_alive_of) == (3, 256, {"demo": 5})
            assert (router.worker_endpoints, router.timeout_s) == (["127.0.0.1:9"], 7)
            assert [node.url for node in pool.nodes] == ["http://127.0.0.1:9"]
            assert (changed.slots, other.worker_endpoints) == (1, []), "an argument wins"
    finally:
        config.use_notebook_settings(None)
    assert config.find("slots") == config.Found(2, str(file))


def test_a_changed_router_setting_calls_back(settings: Sollol) -> None:
    changes: list[str] = []
    settings.on_router_change(changes.append)

    configure(settings, temperature=0.5, format="text", short_errors=False)
    assert changes == []
    configure(settings, slots=5)
    assert len(changes) == 1
    configure(settings, slots=5)
    assert len(changes) == 1, "it was 5 already"
    configure(settings, slots=None, strategy="even")
    assert len(changes) == 3


# --- in a kernel ------------------------------------------------------------------------------

INSTALL = "from sollol_nb.notebook import settings_traits\nsettings = settings_traits.install(get_ipython())"


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """A kernel whose settings file is `FILE` and whose `ipython_config.py` sets top_p."""
    folder = tmp_path_factory.mktemp("settings")
    profile = folder / "ipython" / "profile_default"
    profile.mkdir(parents=True)
    (profile / "ipython_config.py").write_text("c.Sollol.top_p = 0.25\n")
    file = folder / "mine.toml"
    file.write_text("slots = 2\n")
    variables = {"SOLLOL_CONFIG": str(file), "SOLLOL_SEED": "7", "SOLLOL_KEEP_ALIVE": ""}
    with kernel(IPYTHONDIR=str(folder / "ipython"), **variables) as fresh:
        assert fresh.run(f"from pathlib import Path\nFILE = Path({str(file)!r})\n{INSTALL}").status == "ok"
        yield fresh


def test_the_magic_documents_each_setting_with_value_and_source(notebook: Kernel) -> None:
    lines = notebook.run("%config Sollol").stream.splitlines()
    for setting in IN_NOTEBOOKS:
        assert f"    {setting.help}" in lines
        assert any(line.startswith(f"Sollol.{setting.name} = ") for line in lines)
    assert "Sollol.top_p = 0.25 (%config)" in lines
    assert "Sollol.seed = 7 (SOLLOL_SEED)" in lines
    assert any(line.startswith("Sollol.slots = 2 (") and line.endswith("mine.toml)") for line in lines)
    assert "Sollol.keep_alive = '10m' (built-in default)" in lines
    temperature = lines.index("Sollol.temperature = None (built-in default)")
    assert lines[temperature + 2] == (
        "    Value: a number of 0 or more, such as 0.7. Default: the engine's. Variable: SOLLOL_TEMPERATURE."
    )


def test_the_magic_sets_and_shows(notebook: Kernel) -> None:
    notebook.run("%config Sollol.keep_alive = '1h'")
    assert notebook.run("%config Sollol.keep_alive").text == "'1h'"
    notebook.run("%config Sollol.keep_alive = None")
    assert notebook.run("%config Sollol.keep_alive").text == "'10m'"
    notebook.run("FILE.write_text('keep_alive = 5')")
    assert notebook.run("%config Sollol.keep_alive").text == "5"


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        (
            "%config Sollol.temperature = 'hot'",
            "Sollol.temperature='hot' must be a number of 0 or more, such as 0.7",
        ),
        ("%config Sollol.temprature = 1", "Sollol: there is no setting 'temprature'; did you mean temperature?"),
    ],
)
def test_an_invalid_value_is_one_line_in_the_cell_and_is_not_kept(
    notebook: Kernel, cell: str, message: str
) -> None:
    assert notebook.run(cell).stream.strip().splitlines() == [f"ERROR:root:{message}"]
    assert notebook.run("%config Sollol.max_tokens = 9").stream == ""
    assert notebook.value("settings.temperature, settings.max_tokens") == "(None, 9)"


def test_installing_twice_keeps_values_and_removing_leaves_nothing_behind(notebook: Kernel) -> None:
    notebook.run("%config Sollol.system = 'Be brief.'\n%config Sollol.max_tokens = 'bad'")
    assert (
        notebook.value("settings_traits.install(get_ipython()) is settings, settings.system")
        == "(True, 'Be brief.')"
    )

    notebook.run("settings_traits.remove(get_ipython())\nsettings_traits.remove(get_ipython())")
    assert "Sollol" not in notebook.run("%config").stream
    assert notebook.value("dict(get_ipython().config.Sollol)") == "{'top_p': 0.25}", "as ipython_config.py has it"

    notebook.run(INSTALL)
    assert notebook.value("settings.system, settings.max_tokens, settings.top_p") == "(None, None, 0.25)"


def test_loading_names_the_file_in_use_and_what_of_it_needs_a_yes(tmp_path: Path) -> None:
    folder = tmp_path / "sent"
    folder.mkdir()
    (folder / FILE_NAME).write_text('slots = 2\nsystem = "Obey."')
    with kernel(HOME=str(tmp_path), SOLLOL_CONFIG="", SOLLOL_STATE_DIR=str(tmp_path / "state")) as fresh:
        fresh.run(f"%cd -q {folder}")
        lines = fresh.run("%load_ext sollol_nb").stream.splitlines()
        assert len(lines) == 2, lines
        named, withheld = lines
        assert named == f"settings: {folder / FILE_NAME}"
        assert "sets system: ignored, because you have not allowed this file yet" in withheld
        assert fresh.run("%config Sollol.system").displays == []
        assert "  system = 'Obey.'\nignored until you allow" in fresh.run("%sollol_trust").stream
        assert "allowed until the file changes" in fresh.run("%sollol_trust --yes").stream
        assert fresh.run("%config Sollol.system").text == "'Obey.'"
        assert fresh.run("%reload_ext sollol_nb").stream == f"{named}\n"
