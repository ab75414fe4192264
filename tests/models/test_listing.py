"""The list of models: where each is, what is known about it, and whether it runs."""

from __future__ import annotations

from pathlib import Path

from sollol_nb.errors import ModelFileError
from sollol_nb.models.listing import ListedModel, list_models, models_frame
from sollol_nb.models.profiles import MODEL_PROFILES, ModelProfile, profile_of
from sollol_nb.settings.models import SavedModel


def listed(**given: object) -> dict[str, ListedModel]:
    nothing = {"in_ollama": [], "loaded": [], "in_storage": [], "coordinators": {}}
    models = list_models(profile_of, **{**nothing, **given})  # type: ignore[arg-type]
    assert len({model.model for model in models}) == len(models)
    return {model.model: model for model in models}


def test_models_with_a_profile_are_listed_even_if_no_node_has_them() -> None:
    models = listed()

    assert set(models) == set(MODEL_PROFILES)
    assert models["llama3.1:70b"] == ListedModel(
        model="llama3.1:70b", where="", parameters_b=70.0, memory_gb=40.0, sharded=True, running=""
    )
    assert models["demo"].where == "built in"


def test_a_model_is_listed_once_with_all_its_nodes() -> None:
    entries = [
        {"name": "llama3.2:latest", "nodes": ["http://a:11434", "http://b:11434"]},
        {"name": "odd", "nodes": ["http://a:11434"]},
    ]
    models = listed(
        in_ollama=entries,
        loaded=[{"name": "llama3.2:latest"}],
        in_storage=["llama3.2", "stored:7b"],
        coordinators={"demo:sharded": "http://127.0.0.1:18080", "/models/x.gguf": "http://127.0.0.1:18081"},
    )

    assert models["llama3.2"].where == "http://a:11434, http://b:11434"
    assert models["llama3.2"].running == "loaded"
    assert models["stored:7b"] == ListedModel(
        model="stored:7b", where="this machine", parameters_b=7.0, memory_gb=4.27, sharded=False, running=""
    )
    assert (models["odd"].parameters_b, models["odd"].sharded) == (None, None)
    assert models["demo:sharded"].running == "http://127.0.0.1:18080"
    assert "/models/x.gguf" in models


def test_a_name_for_a_file_is_listed_and_a_running_model_says_how_it_runs(tmp_path: Path) -> None:
    (tmp_path / "smol.gguf").touch()
    models = listed(
        saved={
            "smol": SavedModel({"gguf": tmp_path / "smol.gguf"}),
            "gone": SavedModel({"gguf": tmp_path / "no.gguf"}),
        },
        coordinators={"demo": "on 3 workers (5/4/4 layers)"},
        are_sharded={"demo": True},
    )
    assert [models[name].where for name in ("smol", "gone")] == ["this machine", ""]
    assert (models["demo"].sharded, models["demo"].running) == (True, "on 3 workers (5/4/4 layers)")


def test_a_file_that_is_set_by_its_path_is_listed_with_what_is_known_of_it(tmp_path: Path) -> None:
    path = tmp_path / "big.gguf"
    path.touch()
    known = SavedModel({"parameters": 70, "sharded": True}, "sollol_nb.toml")

    def profile(model: str) -> ModelProfile:
        return profile_of(model, saved=known if model == str(path) else SavedModel())

    models = list_models(
        profile, in_ollama=[], loaded=[], in_storage=[], coordinators={}, saved={str(path): known}
    )
    big = {model.model: model for model in models}["big"]
    assert (big.where, big.parameters_b, big.sharded) == ("this machine", 70, True)


def test_a_damaged_model_is_listed_by_its_name() -> None:
    def refuse(model: str) -> ModelProfile:
        if model == "broken:7b":
            raise ModelFileError("it is damaged")
        return profile_of(model)

    models = list_models(refuse, in_ollama=[], loaded=[], in_storage=["broken:7b"], coordinators={})
    assert {model.model: model.parameters_b for model in models}["broken:7b"] == 7.0


def test_running_models_come_first_then_available_ones() -> None:
    models = list(listed(in_storage=["stored:7b"], coordinators={"demo:sharded": "http://127.0.0.1:18080"}))

    assert models[:3] == ["demo:sharded", "demo", "stored:7b"]
    assert models[3:] == sorted(models[3:])


def test_the_frame_has_a_column_for_each_fact() -> None:
    frame = models_frame(listed().values())

    assert [f"{name}:{dtype}" for name, dtype in frame.dtypes.items()] == [
        "model:string",
        "where:string",
        "parameters_b:Float64",
        "memory_gb:Float64",
        "sharded:boolean",
        "running:string",
    ]
    assert frame.set_index("model").loc["llama3.1:405b", "sharded"]
    assert len(models_frame([])) == 0
