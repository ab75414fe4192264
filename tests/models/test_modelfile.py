"""What a Modelfile adds to the weights, read from Ollama's storage; what is left out has a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sollol_nb.models.files import OllamaGGUFResolver
from sollol_nb.models.modelfile import NO_MODELFILE, Modelfile, modelfile_of, read_modelfile
from sollol_nb.router.finder import _checked_sampling_option
from tests.support.gguf_files import CHAT_TEMPLATE, write_adapter, write_keys, write_llama, write_projector
from tests.support.go_templates import CHATML, LLAMA_3_1
from tests.support.ollama_storage import Storage

IMAGE = "application/vnd.ollama.image."


@pytest.fixture
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    storage = Storage(tmp_path / "models")
    monkeypatch.setenv("OLLAMA_MODELS", str(storage.root))
    return storage


@pytest.fixture
def llama(tmp_path: Path) -> bytes:
    return write_llama(tmp_path / "llama.gguf").read_bytes()


def read(
    storage: Storage, model: bytes, *layers: tuple[str, bytes], config: dict[str, Any] | None = None
) -> Modelfile:
    """What a model of these layers has."""
    kinds = [(IMAGE + kind, content) for kind, content in [("model", model), *layers]]
    storage.model("registry.ollama.ai/library/mario/latest", *kinds, config=config)
    files = OllamaGGUFResolver(storage.root).files("mario")
    return read_modelfile(files, files.model, _checked_sampling_option)


def params(**options: Any) -> tuple[str, bytes]:
    return "params", json.dumps(options).encode()


def test_system_messages_and_options_are_read(storage: Storage, llama: bytes) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "It's me!"}]

    modelfile = read(
        storage,
        llama,
        ("system", "Du bist Mario\u00fc.".encode()),
        params(stop=["</s>", "x"], temperature=0, top_k=40.0, num_ctx=4096, num_predict=-1),
        ("messages", json.dumps(messages).encode()),
    )

    assert modelfile.system == "Du bist Mario\u00fc."
    assert modelfile.messages == tuple(messages)
    assert modelfile.options == {"stop": ["</s>", "x"], "temperature": 0, "top_k": 40, "num_predict": -1}
    assert modelfile.context_tokens == 4096
    assert modelfile.left_out == ()
    assert modelfile.describe() == "Modelfile: SYSTEM, MESSAGE, stop, temperature, top_k, num_predict, num_ctx"


def test_a_model_that_is_only_a_file_has_none(storage: Storage, llama: bytes) -> None:
    storage.model("registry.ollama.ai/library/plain/latest", (IMAGE + "model", llama))

    assert read(storage, llama) == NO_MODELFILE
    for model in ("demo", "demo:sharded", "/models/x.gguf", "absent", "plain"):
        assert modelfile_of(model, None, _checked_sampling_option) == NO_MODELFILE
    assert NO_MODELFILE.describe() == ""
    assert NO_MODELFILE.digest == ""


@pytest.mark.parametrize(
    ("layer", "left_out"),
    [
        (params(mirostat=2, tfs_z=1.0, num_gpu=10, num_keep=4), "mirostat, tfs_z, num_gpu, num_keep"),
        (params(temperature="hot", top_p=[1], num_ctx="big", stop=7), "temperature, top_p, num_ctx, stop"),
        (params(num_ctx=-5), "num_ctx"),
        (("params", b'{"temperature": NaN}'), "PARAMETER (not JSON)"),
        (("params", b'{"temperature": 1e999}'), "temperature"),
        (("params", b"[1]"), "PARAMETER (not an object)"),
        (("params", b"{"), "PARAMETER (not JSON)"),
        (("params", b"[" * 100_000), "PARAMETER (not JSON)"),
        (("messages", b'{"role": "user"}'), "MESSAGE (not messages)"),
        (("messages", b'[{"role": "root", "content": "x"}]'), "MESSAGE (not messages)"),
        (("messages", b'[{"role": "user", "content": ["x"]}]'), "MESSAGE (not messages)"),
        (("messages", b'[{"role": ["user"], "content": "x"}]'), "MESSAGE (not messages)"),
        (("messages", rb'[{"role": "user", "content": "\ud800"}]'), "MESSAGE (not messages)"),
        (("messages", b'[{"role": "user", "content": "x", "images": ["eA=="]}]'), "images of MESSAGE"),
        (("template", b"\xff{{ .Prompt }}"), "TEMPLATE (not UTF-8)"),
        (params(**{"a\nb\x1b": 1, "c" * 1000: 1}), f"a b?, {'c' * 299}…"),
        (params(**{f"p{number}": 1 for number in range(1000)}), "p0, p1, p2"),
        (("system", b"\xff\xfe"), "SYSTEM (not UTF-8)"),
        (("system", b"x" * 1_100_000), "SYSTEM (larger than 1 MiB)"),
        (("adapter", b"ggla" + bytes(100)), "ADAPTER (it is not a GGUF file"),
        (("projector", b"GGUF" + bytes(100)), "projector (it is a big-endian GGUF file"),
        (
            ("template", b"{{ toTypeScriptType . }}"),
            "TEMPLATE (the function toTypeScriptType; that of the GGUF file is used)",
        ),
    ],
)
def test_what_cannot_be_applied_is_named_and_the_rest_is_kept(
    storage: Storage, llama: bytes, layer: tuple[str, bytes], left_out: str
) -> None:
    kept = [("system", b"You are Mario.")] if layer[0] != "system" else [params(stop=["x"])]

    modelfile = read(storage, llama, layer, *kept)

    assert f"; left out: {left_out}" in modelfile.describe()
    assert modelfile.system == "You are Mario." or modelfile.options == {"stop": ["x"]}
    assert modelfile.chat_template == ""
    assert len(modelfile.describe()) < 500
    assert modelfile.describe().isprintable()


def test_of_an_adapter_for_another_model_the_reason_is_said(
    storage: Storage, llama: bytes, tmp_path: Path
) -> None:
    good = write_adapter(tmp_path / "good.gguf").read_bytes()
    others = {
        "made for qwen2, but the model is llama": write_adapter(tmp_path / "a.gguf", architecture="qwen2"),
        "has another shape in the model": write_adapter(tmp_path / "b.gguf", embedding=32),
        "blk.4.attn_output.weight is not a matrix of the model": write_adapter(tmp_path / "c.gguf", blocks=5),
        "not a LoRA adapter": write_llama(tmp_path / "d.gguf"),
    }
    for reason, path in others.items():
        modelfile = read(storage, llama, ("adapter", good), ("adapter", path.read_bytes()))
        assert [path.read_bytes() for path in modelfile.adapters] == [good]
        assert reason in modelfile.left_out[0]


def test_a_projector_is_the_first_one_that_llama_cpp_knows(storage: Storage, llama: bytes, tmp_path: Path) -> None:
    known = write_projector(tmp_path / "known.gguf").read_bytes()
    unknown = write_keys(tmp_path / "unknown.gguf", "mllama", {"mllama.block_count": 1}).read_bytes()

    modelfile = read(storage, llama, ("projector", known), ("projector", unknown))
    assert modelfile.projector is not None
    assert modelfile.projector.read_bytes() == known
    assert modelfile.left_out == ("projector (llama-server takes one)",)
    assert read(storage, llama, ("projector", unknown)).left_out == (
        "projector (llama.cpp does not know the kind mllama)",
    )


def test_the_template_of_the_file_is_used_only_where_ollama_has_none(storage: Storage, tmp_path: Path) -> None:
    own = write_llama(tmp_path / "own.gguf").read_bytes()
    none = own.replace(b"tokenizer.chat_template", b"tokenizer.hat_template_")
    assert CHAT_TEMPLATE.encode() in own

    assert read(storage, own).chat_template == ""
    assert "{{ t['prompt'] }}" in read(storage, none).chat_template  # the bare prompt, as in Ollama
    assert "<|im_start|>" in read(storage, own, ("template", CHATML.encode())).chat_template
    assert "<|im_start|>" in read(storage, none, ("prompt", CHATML.encode())).chat_template
    assert read(storage, own, ("template", CHATML.encode())).refuses_tools
    assert not read(storage, own, ("template", LLAMA_3_1.encode())).refuses_tools


def test_a_renderer_built_into_ollama_is_named(storage: Storage, llama: bytes) -> None:
    modelfile = read(
        storage, llama, ("template", b"{{ .Prompt }}"), config={"renderer": "qwen3-coder", "parser": "qwen3-coder"}
    )

    assert modelfile.chat_template == ""
    assert modelfile.describe() == "Modelfile: left out: RENDERER qwen3-coder, PARSER qwen3-coder"


def test_a_file_that_the_user_names_replaces_only_the_weights(
    storage: Storage, llama: bytes, tmp_path: Path
) -> None:
    not_for_llama_cpp = write_keys(tmp_path / "x.gguf", "gptoss", {"gptoss.block_count": 1}).read_bytes()
    layers = [(IMAGE + "model", not_for_llama_cpp), (IMAGE + "system", b"You are Mario.")]
    _, system = storage.model("registry.ollama.ai/library/mario/latest", *layers)

    named = str(tmp_path / "llama.gguf")
    assert modelfile_of("mario", named, _checked_sampling_option).system == "You are Mario."

    system.unlink()
    (left_out,) = modelfile_of("mario", named, _checked_sampling_option).left_out
    assert left_out.startswith("all of it (")


def test_what_answers_alike_has_the_same_digest(storage: Storage, llama: bytes) -> None:
    first = read(storage, llama, ("system", b"You are Mario."), params(mirostat=1))
    same = read(storage, llama, ("system", b"You are Mario."))
    other = read(storage, llama, ("system", b"You are Luigi."))

    assert first.digest == same.digest != other.digest
    assert first.of_engine == other.of_engine == NO_MODELFILE.of_engine
