"""Answers that llama-server itself fails on, or shows in different ways: what a model wrote is never lost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from sollol_nb.chat.completion import Completion
from sollol_nb.errors import ConfigError, ContextOverflowError, EngineError
from sollol_nb.llama_cpp.coordinators import pace
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.runtime.io_loop import run_blocking
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import eventually_async, suspended, unused_ports
from tests.support.scripted_model import CHATML, write_scripted

CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
# Any mention of other reasoning markup sends a request through llama-server's own parser.
PARSED = CHATML + "{# [THINK] #}"
HARMONY = (
    "{%- for m in messages -%}<|start|>{{ m['role'] }}<|message|>{{ m['content'] }}<|end|>{%- endfor -%}"
    "{# tools <|channel|>analysis<|message|> #}<|start|>assistant"
)
HARMONY_TOKENS = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>")
FUNCTIONARY = (
    "{% for m in messages %}{{ m.role }}>>>{{ m.content }}{% endfor %}{# tools #}"
    "{# >>>all >>>${recipient} #}assistant>>>"
)
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
TOOLS = {"tools": [TOOL]}
PREFILLED = [{"role": "user", "content": "What is sharding?"}, {"role": "assistant", "content": "Sharding is"}]


def words(count: int) -> list[str]:
    return [f" word{number}," for number in range(count)]


@pytest.fixture(scope="module")
def local(engine: Engine) -> Iterator[HybridRouter]:
    """A router for models that end with their request."""
    with HybridRouter(coordinator_port=unused_ports(1), keep_alive=0) as router:
        yield router


@pytest.mark.engine
def test_text_that_llama_server_cannot_parse_is_kept_with_a_note(local: HybridRouter, tmp_path: Path) -> None:
    script = ["<|channel|>", "final", *words(30)]
    path = write_scripted(tmp_path / "harmony.gguf", script, template=HARMONY, specials=HARMONY_TOKENS)

    chunks = list(local.stream(str(path), "hi", temperature=0))

    answer = Completion.from_chunks(chunks)
    assert answer.text == "".join(script)  # with its markup
    assert (answer["done_reason"], answer["eval_count"]) == ("stop", len(script) + 1)
    assert answer["_note"] in answer.footer()
    assert "could not parse what the model wrote" in answer["_note"]


@pytest.mark.engine
@pytest.mark.parametrize(
    ("template", "script", "options"),
    [
        (HARMONY, ["<|channel|>", "analysis", "<|message|>", *words(3), "<|end|>", " junk,", " more,"], {}),
        (HARMONY, ["<|channel|>", "commentary", " to=functions.now", "<|message|>", "{broken"], TOOLS),
        # The grammar for tool calls fails instead of the parser.
        (FUNCTIONARY, ["all\n", " some", ">>>now\n", "{broken"], TOOLS),
        (FUNCTIONARY, [" some", " text,", ">>>now\n", "{broken"], {}),
    ],
    ids=["thoughts", "tool call", "grammar", "no markup"],
)
def test_what_was_written_before_and_after_the_failure_is_kept(
    local: HybridRouter, tmp_path: Path, template: str, script: list[str], options: dict[str, Any]
) -> None:
    specials = HARMONY_TOKENS if template == HARMONY else ()
    path = write_scripted(tmp_path / "m.gguf", script, template=template, specials=specials)

    chunks = list(local.stream(str(path), "hi", temperature=0, max_tokens=40, **options))

    answer = Completion.from_chunks(chunks)
    assert answer.text == "".join(script)
    assert "could not parse" in answer["_note"]


@pytest.mark.engine
@pytest.mark.parametrize("template", [CHATML, PARSED], ids=["raw", "parsed"])
@pytest.mark.parametrize("broken", [[0xED, 0xA0, 0x80], [0xC0, 0x80], [0xFF]], ids=["surrogate", "overlong", "ff"])
def test_broken_utf8_does_not_lose_the_answer(
    local: HybridRouter, tmp_path: Path, template: str, broken: list[int]
) -> None:
    script = [" before,", *(bytes([byte]) for byte in broken), *words(5)]
    path = write_scripted(tmp_path / "bytes.gguf", script, template=template, specials=CHATML_TOKENS)

    answer = local.route_request(str(path), "hi", temperature=0)

    assert answer.text.startswith(" before,\ufffd")
    assert answer.text.endswith("".join(words(5)))
    assert answer["done_reason"] == "stop"


@pytest.mark.engine
def test_broken_utf8_that_fills_max_tokens_is_reported_as_cut(local: HybridRouter, tmp_path: Path) -> None:
    script = [b"\xc0", b"\x80", *words(9)]
    path = write_scripted(tmp_path / "bytes.gguf", script, specials=CHATML_TOKENS)

    answer = local.route_request(str(path), "hi", temperature=0, max_tokens=5)

    assert (answer["done_reason"], answer["eval_count"]) == ("length", 5)
    assert answer.text.endswith("".join(words(3)))


@pytest.mark.engine
@pytest.mark.parametrize("template", [CHATML, PARSED], ids=["raw", "parsed"])
@pytest.mark.parametrize("options", [{}, TOOLS], ids=["", "tools"])
def test_answer_that_continues_a_message_has_only_what_is_new(
    local: HybridRouter, tmp_path: Path, template: str, options: dict[str, Any]
) -> None:
    template += "{# tools #}" if options else ""
    path = write_scripted(tmp_path / "m.gguf", [" alpha,", " beta."], template=template, specials=CHATML_TOKENS)

    answer = local.route_request(str(path), PREFILLED, temperature=0, **options)

    assert answer.text == " alpha, beta."


@pytest.mark.engine
@pytest.mark.parametrize("template", [CHATML, PARSED], ids=["raw", "parsed"])
def test_value_that_follows_a_given_beginning_has_its_format(
    local: HybridRouter, tmp_path: Path, template: str
) -> None:
    path = write_scripted(tmp_path / "m.gguf", ['{"a":', " true", "}"], template=template, specials=CHATML_TOKENS)
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}

    answer = local.route_request(str(path), PREFILLED, temperature=0, max_tokens=40, schema=schema)

    assert answer.value == {"a": True}


@pytest.mark.engine
def test_text_before_a_refusal_in_mid_answer_is_kept(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patient: None
) -> None:
    """Two answers fill the context that they share, so llama-server ends both."""
    path = str(write_scripted(tmp_path / "m.gguf", words(2000), specials=CHATML_TOKENS))
    sent, on_sent = [], pace.Stream.on_sent

    def note(stream: pace.Stream) -> None:
        sent.append(stream)
        on_sent(stream)

    monkeypatch.setattr(pace.Stream, "on_sent", note)

    async def both() -> list[Any]:
        sent.clear()
        with suspended(psutil.Process(router.coordinators[-1].pid)):  # the first one has not ended before
            asked = [asyncio.create_task(router._async.route_request(path, "hi", temperature=0)) for _ in range(2)]
            await eventually_async(lambda: len(sent) == 2, "both are sent")
        return await asyncio.gather(*asked, return_exceptions=True)

    with HybridRouter(coordinator_port=unused_ports(1), keep_alive=60, context_tokens=1024, slots=2) as router:
        router.route_request(path, "hi", temperature=0, max_tokens=1)
        errors = run_blocking(both())
    for error in errors:
        assert isinstance(error, ContextOverflowError)
        assert error.partial is not None
        assert error.partial.text.startswith(" word0, word1,")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"options": {"num_ctx": 4096}}, "num_ctx=4096 is more than the 2,048 tokens of context with which demo"),
        ({"options": {"mirostat": 2}}, "does not take the option mirostat"),
        ({"think": "low"}, "demo does not know think='low': its chat template does not support reasoning"),
        ({"think": True}, "demo does not know think=True: its chat template does not support reasoning; leave"),
        (TOOLS, "demo does not support tools: its chat template does not use them; ask without tools"),
        ({"stop": ""}, "none of them empty"),
        ({"max_tokens": 3, "num_predict": 4}, "not both"),
    ],
)
def test_option_that_would_be_dropped_is_refused_before_anything_loads(
    options: dict[str, Any], message: str
) -> None:
    with HybridRouter(llama_cpp="/nowhere") as router, pytest.raises(ConfigError, match=message):
        router.route_request("demo", "hi", backend="local", **options)


def test_a_wanted_context_that_the_model_has_is_accepted() -> None:
    with HybridRouter(llama_cpp="/nowhere") as router, pytest.raises(EngineError):  # the engine is looked for
        router.route_request("demo", "hi", backend="local", options={"num_ctx": 2048})


def test_images_are_refused_before_a_model_without_a_projector_is_loaded() -> None:
    message = {"role": "user", "content": "What is it?", "images": ["aGVsbG8="]}
    refused = pytest.raises(ConfigError, match="demo does not read images or sound: llama")
    with HybridRouter(llama_cpp="/nowhere") as router, refused:
        router.route_request("demo", [message], backend="local")


def test_level_of_thinking_that_a_template_does_not_have_is_refused(tmp_path: Path) -> None:
    template = CHATML + "{% if enable_thinking %}<think>{% endif %}"
    path = write_scripted(tmp_path / "thinks.gguf", words(3), template=template, specials=CHATML_TOKENS)

    with HybridRouter(llama_cpp="/nowhere") as router:
        with pytest.raises(ConfigError, match=r"thinks does not know think='low': .* no levels of thinking; give"):
            router.route_request(str(path), "hi", backend="local", think="low")
        with pytest.raises(EngineError):  # think=True is accepted, and the engine is looked for
            router.route_request(str(path), "hi", backend="local", think=True)
