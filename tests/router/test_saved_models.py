"""A name for a GGUF file in the settings: asked like any model, with the size and options that it was given."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from sollol_nb.chat.request import ChatRequest
from sollol_nb.errors import ModelFileError, ModelNotFoundError
from sollol_nb.models.files import DEMO_MODEL_PATH
from sollol_nb.models.profiles import MODEL_PROFILES, save_profile
from sollol_nb.settings import config
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import QUESTION


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The settings file that is read and written."""
    path = tmp_path / "sollol_nb.toml"
    path.touch()
    monkeypatch.setenv("SOLLOL_CONFIG", str(path))
    return path


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A model file."""
    path = tmp_path / "Tiny-Model.Q8_0.gguf"
    shutil.copyfile(DEMO_MODEL_PATH, path)
    return path


@pytest.fixture
def planner() -> Iterator[HybridRouter]:
    """A router that starts nothing."""
    with HybridRouter(auto_discover_rpc=False) as router:
        yield router


def test_a_name_decides_where_its_file_runs(planner: HybridRouter, file: Path, tiny: Path) -> None:
    file.write_text(f"[models]\ntiny = {{ gguf = '{tiny.name}', sharded = true }}\nplain = '{tiny.name}'\n")
    route = planner.route("tiny")
    assert (route.backend, route.model_path) == ("llama.cpp-distributed", tiny)
    assert str(route) == "tiny → sharded llama-server: listed in sollol_nb.toml as needing sharding"
    assert planner.route("plain").backend == "llama.cpp-local"
    assert planner.route("plain", backend="sharded").model_path == tiny


def test_one_stated_fact_leaves_the_others_to_the_file(planner: HybridRouter, file: Path, tiny: Path) -> None:
    before = planner.profile(str(tiny))
    save_profile(str(tiny), {"sharded": True})
    after = planner.profile(str(tiny))
    assert (after.memory_bytes, after.parameter_count_b) == (before.memory_bytes, before.parameter_count_b)
    assert after.source == before.source == f"GGUF header of {tiny.name}"
    assert after.requires_distributed


def test_a_name_is_not_looked_up_in_ollama(planner: HybridRouter, file: Path, tiny: Path) -> None:
    file.write_text(f"[models]\ntiny = '{tiny}'\n")
    with pytest.raises(ModelNotFoundError, match=r"^Ollama cannot run the file tiny; create a model from it"):
        planner.route("tiny", backend="ollama")


def test_a_name_whose_file_is_gone_says_where_it_is_written(planner: HybridRouter, file: Path) -> None:
    file.write_text("[models]\ntiny = 'gone.gguf'\n")
    with pytest.raises(ModelFileError) as caught:
        planner.route("tiny")
    assert str(caught.value) == (
        f"tiny stands for {file.parent / 'gone.gguf'}, which does not exist; correct its entry in {file}"
    )


def test_a_file_that_is_no_model_gets_no_name(file: Path) -> None:
    text = file.with_suffix(".gguf")
    text.write_text("not a model, but long enough to have a header")
    with pytest.raises(ModelFileError, match=f"^{text} is not a GGUF file"):
        save_profile("tiny", {"gguf": text})
    assert config.saved_models() == {}


def test_an_edit_of_the_table_in_a_cell_comes_first_until_the_profile_is_set_again(
    planner: HybridRouter, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for model in ("llama3.1:8b", "mine"):
        monkeypatch.setitem(MODEL_PROFILES, model, {**MODEL_PROFILES["llama3.1:8b"]})
        save_profile(model, {"sharded": True})
        assert planner.profile(model).requires_distributed
        MODEL_PROFILES.setdefault(model, {})["requires_distributed"] = None
        MODEL_PROFILES[model]["parameter_count"] = 9
        assert planner.profile(model).requires_distributed
        assert planner.profile(model).parameter_count_b == 9
        save_profile(model, {"parameters": 10})
        assert planner.profile(model).parameter_count_b == 10


def test_options_and_system_message_of_a_model_are_used_where_the_request_has_none() -> None:
    def request(messages: object, **options: object) -> ChatRequest:
        checked = ChatRequest.checked(
            messages,  # type: ignore[arg-type]
            priority=5,
            timeout_s=1,
            backend=None,
            schema=None,
            options=options,
        )
        return checked.with_defaults({"temperature": 0, "max_tokens": 9}, "Be brief.")

    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}
    assert request("Hi").messages == [system, user]
    assert request("Hi").options == {"temperature": 0, "max_tokens": 9}
    assert request("Hi", temperature=1, num_predict=3).options == {"temperature": 1, "num_predict": 3}
    assert request("Hi", options={"num_predict": 3}).options == {"options": {"num_predict": 3}, "temperature": 0}
    own = {"role": "system", "content": "Be long."}
    assert request([own, user]).messages == [own, user]


@pytest.mark.engine
def test_a_name_and_the_path_of_its_file_share_one_coordinator(
    engine: object, file: Path, tiny: Path, tmp_path: Path
) -> None:
    file.write_text(f"[models]\ntiny = {{ gguf = '{tiny}', temperature = 0, max_tokens = 3 }}\n")
    with HybridRouter(auto_discover_rpc=False) as router:
        answer = router.route_request("tiny", QUESTION)
        assert (answer["model"], answer["eval_count"]) == ("tiny", 3)
        assert answer["_routing"]["model_path"] == str(tiny)
        assert router.route_request("tiny", QUESTION, max_tokens=5)["eval_count"] == 5
        by_path = router.route_request(str(tiny), QUESTION, max_tokens=3, temperature=0)
        assert by_path["message"] == answer["message"]
        assert by_path["_routing"]["coordinator_url"] == answer["_routing"]["coordinator_url"]
        rows = router.map(["What is a worker?"], "{{ item }}", model="tiny", progress=False)
        file.write_text(f"[models]\ntiny = {{ gguf = '{tiny}', temperature = 0, max_tokens = 4 }}\n")
        longer = router.map(["What is a worker?"], "{{ item }}", model="tiny", progress=False)
        assert [*rows["completion_tokens"], *longer["completion_tokens"]] == [3, 4]
        assert longer["status"].tolist() == ["ok"]


def test_a_misspelt_name_gets_a_hint(planner: HybridRouter, file: Path, tiny: Path) -> None:
    file.write_text(f"[models]\ntiny = '{tiny}'\n")
    with pytest.raises(ModelNotFoundError, match=r"^tinyy is not available: .*; did you mean tiny\?$"):
        planner.route("tinyy")


def test_names_for_files_are_among_the_models(planner: HybridRouter, file: Path, tiny: Path) -> None:
    file.write_text(f"[models]\ntiny = '{tiny}'\n")
    models = planner.models().set_index("model")
    assert models.loc["tiny", "where"] == "this machine"
    assert models.loc["tiny", "parameters_b"] > 0
