"""Calls that a request requires, on real engines: the model has never learned to call a function."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from sollol_nb.chat.completion import Completion
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.models.routing import OLLAMA
from sollol_nb.sync_wrapper import HybridRouter, OllamaPool
from tests.support.engines import QUESTION
from tests.support.mid_answer import read_and_kill
from tests.support.ollama_server import OllamaServer
from tests.support.scripted_model import write_scripted
from tests.support.tool_model import TEMPLATE, write_tool_model

pytestmark = pytest.mark.engine

PARAMETERS = {
    "type": "object",
    "properties": {"zone": {"$ref": "#/$defs/Zone"}},
    "required": ["zone"],
    "$defs": {"Zone": {"enum": ["UTC", "CET"]}},
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "The time.", "parameters": PARAMETERS}}
STOP = {"type": "function", "function": {"name": "stop"}}
TOOLS = [CLOCK, STOP]
NAMED = {"type": "function", "function": {"name": "clock"}}
OLLAMA_TEMPLATE = """{{ if .Tools }}<|im_start|>system
{{ range .Tools }}{{ . }}
{{ end }}<|im_end|>
{{ end }}{{ range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}{{ range .ToolCalls }}<tool_call>{"name": "{{ .Function.Name }}", "args": {{ .Function.Arguments }}}
</tool_call>{{ end }}<|im_end|>
{{ end }}<|im_start|>assistant
"""


@pytest.fixture(scope="module")
def tool_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tool_model(tmp_path_factory.mktemp("models") / "tools.gguf"))


@pytest.fixture(scope="module")
def local(engine: Engine) -> Iterator[HybridRouter]:
    with HybridRouter(auto_discover_rpc=False, rpc_port=51152) as router:
        yield router


@pytest.mark.parametrize(("choice", "names"), [(NAMED, {"clock"}), ("required", {"clock", "stop"})])
def test_a_required_call_comes_with_the_last_chunk(
    local: HybridRouter, tool_model: str, choice: Any, names: set[str]
) -> None:
    asked = {"tools": TOOLS, "tool_choice": choice, "temperature": 0, "max_tokens": 200}
    chunks = list(local.stream(tool_model, QUESTION, backend="local", **asked))
    (call,) = chunks[-1]["message"]["tool_calls"]
    assert call["function"]["name"] in names
    if call["function"]["name"] == "clock":
        assert call["function"]["arguments"]["zone"] in ("UTC", "CET")
    assert all(not chunk["message"]["content"] for chunk in chunks)
    assert chunks[-1]["done_reason"] == "tool_calls"
    answered = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "12:00", "tool_call_id": call["id"]},
    ]
    after = local.route_request(tool_model, answered, tools=TOOLS, tool_choice="none", max_tokens=5)
    assert after.text
    assert "tool_calls" not in after["message"]


def test_a_required_call_survives_its_coordinator(local: HybridRouter, tool_model: str) -> None:
    # So many that the call is not complete before its coordinator is killed. The schema leaves no choice, since
    # the model does not know what it says, and with fast recovery would waver between two zones.
    zones = {"type": "array", "items": {"enum": ["UTC"]}, "minItems": 100, "maxItems": 100}
    parameters = {"type": "object", "properties": {"zones": zones}, "required": ["zones"]}
    tools = [{"type": "function", "function": {"name": "clocks", "parameters": parameters}}]
    asked: Any = {"tools": tools, "tool_choice": "required", "temperature": 0, "backend": "local"}
    whole = local.route_request(tool_model, QUESTION, **asked)
    engine = psutil.Process(local.own_coordinators[-1].pid)
    stream = local.stream_async(tool_model, QUESTION, **asked)
    answer = Completion.from_chunks(read_and_kill(stream, 0, engine.kill))
    (call,), (undisturbed,) = answer["message"]["tool_calls"], whole["message"]["tool_calls"]
    assert call["function"] == undisturbed["function"]
    assert call["function"]["arguments"] == {"zones": ["UTC"] * 100}
    assert answer.routing["failovers"]


@pytest.mark.parametrize("parallel", [True, False])
def test_calls_that_the_model_decides_on_have_ids(local: HybridRouter, tmp_path: Path, parallel: bool) -> None:
    script = ["<tool_call>\n", '{"name": "clock", "arguments": {"zone": "UTC"}}', "\n</tool_call>"]
    script += ["\n<tool_call>\n", '{"name": "clock", "arguments": {"zone": "CET"}}', "\n</tool_call> "]
    specials = ("<|im_start|>", "<|im_end|>")
    path = write_scripted(tmp_path / "calls.gguf", script, template=TEMPLATE, specials=specials)
    answer = local.route_request(
        path, QUESTION, tools=TOOLS, parallel_tool_calls=parallel, backend="local", temperature=0, max_tokens=60
    )
    calls = answer["message"]["tool_calls"]
    assert [call["function"]["arguments"]["zone"] for call in calls] == ["UTC", "CET"][: 1 + parallel]
    assert all(call["id"] for call in calls)
    assert len({call["id"] for call in calls}) == len(calls)


def test_tools_may_be_given_to_any_model_that_must_not_call_them(local: HybridRouter) -> None:
    assert local.route_request("demo", QUESTION, tools=TOOLS, tool_choice="none", max_tokens=5).text


@pytest.mark.ollama
def test_a_required_call_comes_from_ollama_too(ollama: OllamaServer) -> None:
    ollama.create("tool-choice", template=OLLAMA_TEMPLATE)
    with HybridRouter(OllamaPool([ollama.base_url]), auto_discover_rpc=False) as router:
        answer = router.route_request(
            "tool-choice", QUESTION, tools=TOOLS, tool_choice=NAMED, parallel_tool_calls=False, temperature=0
        )
    assert answer.routing["backend"] == OLLAMA
    (call,) = answer["message"]["tool_calls"]
    assert call["function"]["name"] == "clock"
    assert call["function"]["arguments"]["zone"] in ("UTC", "CET")
    assert (answer.text, answer.finish_reason) == ("", "tool_calls")
