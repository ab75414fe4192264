"""A model made by `ollama create` answers the same where it is sharded: system message, messages, options,
template, adapter, projector. A real Ollama makes the models; real workers run them."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sollol_nb.errors import ConfigError, ContextOverflowError
from sollol_nb.models.files import DEMO_MODEL_PATH
from sollol_nb.ollama.pool import OllamaPool
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import QUESTION
from tests.support.gguf_files import write_adapter, write_llama, write_projector
from tests.support.go_templates import CHATML, TURNS
from tests.support.ollama_server import OllamaServer

pytestmark = [pytest.mark.engine, pytest.mark.ollama]

GREEDY = ("PARAMETER temperature 0", "PARAMETER repeat_penalty 1")


@pytest.fixture(scope="module")
def mine(scratch_ollama: OllamaServer) -> Iterator[HybridRouter]:
    """A router that knows this Ollama and its storage, over one worker started here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OLLAMA_MODELS", str(scratch_ollama.models_folder))
        with HybridRouter(
            OllamaPool([scratch_ollama.base_url]),
            auto_setup_rpc=True,
            auto_discover_rpc=False,
            num_rpc_backends=1,
            rpc_port=51252,
        ) as router:
            yield router


def both(router: HybridRouter, model: str, messages: Any = QUESTION, **options: Any) -> tuple[Any, Any]:
    """The answer of Ollama, and that of a sharded coordinator."""
    answers = [
        router.route_request(model, messages, backend=backend, **options) for backend in ("ollama", "sharded")
    ]
    return answers[0], answers[1]


def test_a_custom_model_answers_the_same_in_ollama_and_sharded(
    scratch_ollama: OllamaServer, mine: HybridRouter
) -> None:
    lines = [
        'SYSTEM """You only know sharding.\nAnd sollol_nb."""',
        "MESSAGE user What is a worker?",
        "MESSAGE assistant A worker computes layers.",
        'PARAMETER stop "machine"',
        'PARAMETER stop "coordinator"',
        "PARAMETER num_predict 40",
    ]
    scratch_ollama.create("mario:70b", DEMO_MODEL_PATH, TURNS, *GREEDY, *lines)

    there, here = both(mine, "mario:70b")

    assert here["message"]["content"] == there["message"]["content"]
    assert here["prompt_eval_count"] == there["prompt_eval_count"]
    applied = "Modelfile: SYSTEM, MESSAGE, temperature, repeat_penalty, stop, num_predict, TEMPLATE"
    reason = here["_routing"]["reason"]
    assert all(part in reason for part in applied.removeprefix("Modelfile: ").split(", "))
    assert reason.endswith("left out: num_thread")
    assert mine.route("mario:70b", backend="sharded").reason == reason


def test_what_the_caller_gives_wins_over_the_modelfile(scratch_ollama: OllamaServer, mine: HybridRouter) -> None:
    scratch_ollama.create(
        "terse:70b", DEMO_MODEL_PATH, CHATML, *GREEDY, "SYSTEM You are terse.", "PARAMETER num_predict 3"
    )
    scratch_ollama.create("plain:70b", DEMO_MODEL_PATH, CHATML, *GREEDY)
    system = [{"role": "system", "content": "Be loud and clear."}, {"role": "user", "content": QUESTION}]

    terse = mine.route_request("terse:70b", QUESTION, backend="sharded")
    longer = mine.route_request("terse:70b", QUESTION, backend="sharded", max_tokens=9)
    in_options = mine.route_request("terse:70b", QUESTION, backend="sharded", options={"num_predict": 7})
    other_system = mine.route_request("terse:70b", system, backend="sharded")
    plain = mine.route_request("plain:70b", system, backend="sharded", max_tokens=3)

    assert [answer["eval_count"] for answer in (terse, longer, in_options)] == [3, 9, 7]
    assert other_system["prompt_eval_count"] == plain["prompt_eval_count"]
    assert other_system["message"]["content"] == plain["message"]["content"]


def test_names_of_one_file_share_the_coordinator_and_a_larger_context_replaces_it(
    scratch_ollama: OllamaServer, mine: HybridRouter
) -> None:
    long_question = "What is a worker? " * 120
    scratch_ollama.create("base:70b", DEMO_MODEL_PATH, CHATML, "PARAMETER num_ctx 512")
    scratch_ollama.create("luigi:70b", DEMO_MODEL_PATH, CHATML, "SYSTEM You are Luigi.", "PARAMETER num_ctx 256")
    scratch_ollama.create("wide:70b", DEMO_MODEL_PATH, CHATML, "PARAMETER num_ctx 1024")
    mine.stop_coordinator()

    mine.route_request("base:70b", QUESTION, backend="sharded", max_tokens=2)
    (first,) = mine.coordinators
    mine.route_request("luigi:70b", QUESTION, backend="sharded", max_tokens=2)
    assert mine.coordinators == [first]
    assert first.settings.context_tokens == 512
    with pytest.raises(ContextOverflowError):
        mine.route_request("base:70b", long_question, backend="sharded", max_tokens=2)

    mine.route_request("wide:70b", long_question, backend="sharded", max_tokens=2)

    (second,) = mine.coordinators
    assert second.settings.context_tokens == 1024
    assert not first.is_running()


def test_an_adapter_is_applied_over_workers(
    scratch_ollama: OllamaServer, mine: HybridRouter, tmp_path: Path
) -> None:
    model = write_llama(tmp_path / "model.gguf")
    adapter = write_adapter(tmp_path / "adapter.gguf")
    wrong = write_adapter(tmp_path / "wrong.gguf", embedding=32)
    short = ("PARAMETER num_predict 6", *GREEDY)
    scratch_ollama.create("bare:70b", model, CHATML, *short)
    scratch_ollama.create("tuned:70b", model, CHATML, f"ADAPTER {adapter}", *short)
    scratch_ollama.create("mistuned:70b", model, CHATML, f"ADAPTER {wrong}", *short)

    bare = mine.route_request("bare:70b", QUESTION, backend="sharded")
    there, tuned = both(mine, "tuned:70b")
    mistuned = mine.route_request("mistuned:70b", QUESTION, backend="sharded")

    assert tuned["message"]["content"] != bare["message"]["content"]
    assert tuned["message"]["content"] == there["message"]["content"]
    assert ", ADAPTER, TEMPLATE" in tuned["_routing"]["reason"]
    assert mistuned["message"]["content"] == bare["message"]["content"]
    assert (
        "left out: num_thread, ADAPTER (blk.0.attn_output.weight has another shape in the model)"
        in (mistuned["_routing"]["reason"])
    )


def test_images_are_read_where_the_model_is_sharded(
    scratch_ollama: OllamaServer, mine: HybridRouter, tmp_path: Path
) -> None:
    model, projector = write_llama(tmp_path / "model.gguf"), write_projector(tmp_path / "projector.gguf")
    scratch_ollama.create("seeing:70b", model, CHATML, f"FROM {projector}", *GREEDY)

    def asked(*images: bytes) -> Any:
        message = {
            "role": "user",
            "content": "What is it?",
            "images": [base64.b64encode(i).decode() for i in images],
        }
        return mine.route_request("seeing:70b", [message], backend="sharded", max_tokens=8)

    blind, red, white = asked(), asked(png(255, 0, 0)), asked(png(255, 255, 255))

    assert red["prompt_eval_count"] >= blind["prompt_eval_count"] + 4  # the image's tokens
    assert red["message"]["content"] != white["message"]["content"]
    assert "projector" in red["_routing"]["reason"]


def test_a_template_without_a_place_for_tools_refuses_them_as_ollama_does(
    scratch_ollama: OllamaServer, mine: HybridRouter
) -> None:
    scratch_ollama.create("toolless:70b", DEMO_MODEL_PATH, CHATML)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]

    with pytest.raises(ConfigError, match="toolless:70b does not support tools: its chat template does"):
        mine.route_request("toolless:70b", QUESTION, backend="sharded", tools=tools)


def png(*color: int) -> bytes:
    """A picture of 28 x 28 pixels of one colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + bytes(color) * 28) * 28
    head = struct.pack(">IIBBBBB", 28, 28, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
