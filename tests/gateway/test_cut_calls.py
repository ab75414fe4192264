"""A tool call that is incomplete because the answer reached its limit of tokens, for the clients of all APIs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from anthropic import Anthropic
from ollama import Client
from openai import OpenAI

from tests.support.gateway import GatewayProcess
from tests.support.scripted_model import write_scripted
from tests.support.tool_model import TEMPLATE

pytestmark = pytest.mark.engine

SCRIPT = ["I look. ", "<tool_call>\n", '{"name": "clock", "arguments": {"zone": ', '"UTC"', "}}", "\n</tool_call>"]
CUT = '{"zone":'
LIMIT = 3
SCHEMA = {"type": "object", "properties": {"zone": {"type": "string"}}, "required": ["zone"]}
MESSAGES: Any = [{"role": "user", "content": "What time is it?"}]
TOOLS: Any = [{"type": "function", "function": {"name": "clock", "parameters": SCHEMA}}]


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that calls a tool with a call of several tokens."""
    path: Path = tmp_path_factory.mktemp("models") / "slow_caller.gguf"
    return str(write_scripted(path, SCRIPT, template=TEMPLATE, specials=("<|im_start|>", "<|im_end|>")))


def test_ollamas_client_reads_it_and_the_reason(gateway: GatewayProcess, caller: str) -> None:
    answer = Client(gateway.url).chat(caller, MESSAGES, tools=TOOLS, options={"num_predict": LIMIT})
    (call,) = answer.message.tool_calls or ()
    assert call.function.arguments == {"arguments": CUT}
    assert answer.done_reason == "length"


def test_anthropics_client_is_not_asked_to_use_the_tool(gateway: GatewayProcess, caller: str) -> None:
    client = Anthropic(base_url=gateway.url, api_key="none", max_retries=0)
    tools: Any = [{"name": "clock", "input_schema": SCHEMA}]
    with client.messages.stream(model=caller, max_tokens=LIMIT, messages=MESSAGES, tools=tools) as stream:
        message = stream.get_final_message()
    assert [block.input for block in message.content if block.type == "tool_use"] == [{"arguments": CUT}]
    assert message.stop_reason == "max_tokens"


def test_openais_client_is_not_asked_to_use_the_tool(gateway: GatewayProcess, caller: str) -> None:
    client = OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)
    answer = client.chat.completions.create(model=caller, max_tokens=LIMIT, messages=MESSAGES, tools=TOOLS)
    (call,) = answer.choices[0].message.tool_calls or ()
    assert call.type == "function"
    assert call.function.arguments == CUT
    assert answer.choices[0].finish_reason == "length"
