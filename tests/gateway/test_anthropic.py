"""Anthropic's official client on the gateway."""

from __future__ import annotations

import asyncio
from typing import Any

import anthropic
import pytest
from anthropic import Anthropic, AsyncAnthropic
from anthropic.types import Usage
from openai import OpenAI
from pydantic import BaseModel

from sollol_nb.gateway import access_log
from sollol_nb.settings import config
from tests.support.engines import ENDLESS_CONTEXT_TOKENS, eventually
from tests.support.gateway import GatewayProcess, running_gateway

pytestmark = pytest.mark.engine

QUESTION: list[Any] = [{"role": "user", "content": "What is a worker?"}]
GREEDY: dict[str, Any] = {"temperature": 0}  # the client has no argument for it
WEATHER: Any = {
    "name": "weather",
    "description": "The weather in a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


class Verdict(BaseModel):
    is_far: bool


@pytest.fixture(scope="module")
def client(gateway: GatewayProcess) -> Anthropic:
    return Anthropic(base_url=gateway.url, api_key="none", max_retries=0)


def prompt_tokens(usage: Usage) -> int:
    return usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_a_streamed_message_equals_the_whole_message(client: Anthropic) -> None:
    asked: dict[str, Any] = {"model": "demo", "max_tokens": 100, "messages": QUESTION, "extra_body": GREEDY}
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        streamed = stream.get_final_message()
    raw = [event.type for event in client.messages.create(**asked, stream=True)]

    assert len(text) > 20
    assert text == streamed.content[0].text == whole.content[0].text  # type: ignore[union-attr]
    assert whole.stop_reason == streamed.stop_reason == "end_turn"
    assert whole.usage.output_tokens == streamed.usage.output_tokens
    assert prompt_tokens(whole.usage) == prompt_tokens(streamed.usage) > 0
    assert whole.usage.output_tokens > 20
    assert raw[0] == "message_start"
    assert raw[-2:] == ["message_delta", "message_stop"]


def test_an_async_client_streams_several_answers_at_the_same_time(gateway: GatewayProcess) -> None:
    async def texts() -> list[str]:
        async with AsyncAnthropic(base_url=gateway.url, auth_token="none", max_retries=0) as client:

            async def text() -> str:
                async with client.messages.stream(
                    model="demo", max_tokens=40, messages=QUESTION, extra_body=GREEDY
                ) as stream:
                    return await stream.get_final_text()

            return await asyncio.gather(*(text() for _ in range(4)))

    first, *others = asyncio.run(texts())
    assert len(first) > 20
    assert others == [first] * 3


def test_what_claude_code_sends_besides_messages_is_accepted(client: Anthropic) -> None:
    answer = client.beta.messages.create(
        model="demo",
        max_tokens=5,
        betas=["context-management-2025-06-27", "interleaved-thinking-2025-05-14"],
        system=[
            {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=1f2e3;"},
            {"type": "text", "text": "You are brief.", "cache_control": {"type": "ephemeral"}},
        ],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "Hi!", "cache_control": {"type": "ephemeral"}}]}
        ],
        metadata={"user_id": "someone"},
        thinking={"type": "adaptive"},
        output_config={"effort": "high"},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        extra_headers={"X-Sollol-Priority": "high"},
    )
    assert answer.stop_reason == "max_tokens"
    assert answer.context_management is not None
    assert answer.context_management.applied_edits == []


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_tool_is_called_and_its_result_leads_to_an_answer(
    client: Anthropic, tool_model: str, choice: Any
) -> None:
    asked: dict[str, Any] = {"model": tool_model, "max_tokens": 100, "tools": [WEATHER]}
    with client.messages.stream(**asked, messages=QUESTION, tool_choice=choice) as stream:
        called = stream.get_final_message()
    assert called.stop_reason == "tool_use"
    (call,) = called.content
    assert call.type == "tool_use"
    assert call.name == "weather"
    assert call.input["city"] in ("Rome", "Oslo")
    result: Any = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "Rain."}]}
    messages: list[Any] = [*QUESTION, called.to_param(), {"role": "user", "content": [result]}]
    answer = client.messages.create(**{**asked, "max_tokens": 5}, messages=messages)
    assert answer.content


def test_thinking_has_its_own_block_and_is_accepted_back(client: Anthropic, thinking_model: str) -> None:
    asked: dict[str, Any] = {"model": thinking_model, "max_tokens": 100, "extra_body": GREEDY}
    with client.messages.stream(
        **asked, messages=QUESTION, thinking={"type": "enabled", "budget_tokens": 1024}
    ) as stream:
        streamed = stream.get_final_message()
    whole = client.messages.create(
        **asked, messages=QUESTION, thinking={"type": "enabled", "budget_tokens": 1024, "display": "omitted"}
    )
    thinking, text = streamed.content
    assert thinking.type == "thinking"
    assert thinking.thinking == "Workers compute."
    assert thinking.signature
    assert text.type == "text"
    assert text.text == "A worker computes."
    assert [block.type for block in whole.content] == ["thinking", "text"]
    assert whole.content[0].thinking == ""  # type: ignore[union-attr]
    again = client.messages.create(**asked, messages=[*QUESTION, streamed.to_param(), *QUESTION])
    assert again.stop_reason == "end_turn"


def test_the_text_that_stops_an_answer_is_named(client: Anthropic) -> None:
    asked: dict[str, Any] = {"model": "demo", "max_tokens": 100, "messages": QUESTION, "extra_body": GREEDY}
    answer = client.messages.create(**asked, stop_sequences=["never said", " server"])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", " server")
    assert answer.content[0].text.endswith("small")  # type: ignore[union-attr]


def test_a_pydantic_class_describes_the_answer(client: Anthropic) -> None:
    parsed = client.messages.parse(model="demo", max_tokens=100, messages=QUESTION, output_format=Verdict)
    assert isinstance(parsed.parsed_output, Verdict)


def test_the_answer_continues_a_given_beginning(client: Anthropic) -> None:
    asked: dict[str, Any] = {"model": "demo", "max_tokens": 100, "extra_body": GREEDY}
    whole = client.messages.create(**asked, messages=QUESTION).content[0].text  # type: ignore[union-attr]
    begin = whole[: whole.index(" server")]
    messages: list[Any] = [*QUESTION, {"role": "assistant", "content": begin}]
    rest = client.messages.create(**asked, messages=messages).content[0].text  # type: ignore[union-attr]
    assert begin + rest == whole


def test_tokens_are_counted_as_they_are_used(client: Anthropic, tool_model: str) -> None:
    asked: dict[str, Any] = {"model": tool_model, "messages": QUESTION, "system": "Be brief.", "tools": [WEATHER]}
    counted = client.messages.count_tokens(**asked)
    assert counted.input_tokens == prompt_tokens(client.messages.create(**asked, max_tokens=1).usage)
    without_tools = client.messages.count_tokens(**asked, tool_choice={"type": "none"})
    assert without_tools.input_tokens < counted.input_tokens


def test_the_models_are_listed_page_by_page(client: Anthropic) -> None:
    names = [model.id for model in client.models.list()]
    assert "demo" in names
    assert len(names) > 1
    assert [model.id for model in client.models.list(limit=1)] == names
    assert client.models.list(limit=1).has_more
    assert client.models.retrieve("demo").type == "model"
    with pytest.raises(anthropic.NotFoundError) as caught:
        client.models.retrieve("claude-sonnet-5")
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["error"]["type"] == "not_found_error"


# --- errors ---------------------------------------------------------------------------------------


def test_errors_raise_the_classes_of_the_client(client: Anthropic) -> None:
    asked: dict[str, Any] = {"model": "demo", "max_tokens": 5, "messages": QUESTION}
    with pytest.raises(anthropic.NotFoundError, match="claude-sonnet-5 is not available") as unknown:
        client.messages.create(**{**asked, "model": "claude-sonnet-5"}, stream=True)
    assert unknown.value.type == "not_found_error"
    request_id = unknown.value.request_id or "none"
    log = config.log_dir() / access_log.FILE_NAME
    eventually(lambda: log.exists() and request_id in log.read_text(), "the log has the request by its id")
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        client.messages.create(**{**asked, "messages": [{"role": "user", "content": "worker " * 20_000}]})
    with pytest.raises(anthropic.BadRequestError, match="web_search_20250305") as refused:
        client.messages.create(**asked, tools=[{"type": "web_search_20250305", "name": "web_search"}])
    assert refused.value.type == "invalid_request_error"
    with pytest.raises(anthropic.NotFoundError, match="/v1/messages/batches"):
        client.messages.batches.list()


def test_streams_that_a_stopped_gateway_ends_have_an_error(engine: object, endless: str) -> None:
    # A large context, so that the two answers do not fill it before the gateway is stopped.
    variables = {"SOLLOL_CONTEXT_TOKENS": str(ENDLESS_CONTEXT_TOKENS)}
    with running_gateway("--drain", "0", variables=variables) as gateway:
        client = Anthropic(base_url=gateway.url, api_key="none", max_retries=0)
        responses = OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0).responses
        greedy: dict[str, Any] = {"extra_body": {"temperature": 0}}  # a sampled answer may end
        message = client.messages.create(
            model=endless, max_tokens=30_000, messages=QUESTION, stream=True, **greedy
        )
        response = responses.create(model=endless, max_output_tokens=30_000, input=QUESTION, stream=True, **greedy)
        for _ in range(5):
            next(message)
            next(response)
        gateway.process.terminate()
        with pytest.raises(anthropic.APIStatusError) as ended:
            list(message)
        *_, last = response
    assert ended.value.type == "overloaded_error"
    assert last.type == "response.failed"
    assert last.response.error is not None
    assert last.response.error.code == "server_error"
