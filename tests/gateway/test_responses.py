"""OpenAI's official client on the gateway's Responses API."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from tests.support.gateway import GatewayProcess

pytestmark = pytest.mark.engine

QUESTION = "What is a worker?"
WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Rome", "Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}


class Verdict(BaseModel):
    is_far: bool


@pytest.fixture(scope="module")
def client(gateway: GatewayProcess) -> OpenAI:
    return OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)


def test_a_streamed_response_equals_the_whole_response(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "demo", "input": QUESTION, "temperature": 0}
    whole = client.responses.create(**asked)
    with client.responses.stream(**asked) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        streamed = stream.get_final_response()

    assert len(text) > 20
    assert text == streamed.output_text == whole.output_text
    assert whole.status == streamed.status == "completed"
    assert whole.usage is not None
    assert streamed.usage is not None
    assert whole.usage.input_tokens == streamed.usage.input_tokens
    assert whole.usage.output_tokens == streamed.usage.output_tokens
    assert whole.usage.total_tokens == whole.usage.input_tokens + whole.usage.output_tokens > 30


def test_an_async_client_streams_several_responses_at_the_same_time(gateway: GatewayProcess) -> None:
    async def texts() -> list[str]:
        async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:

            async def text() -> str:
                async with client.responses.stream(model="demo", input=QUESTION, temperature=0) as stream:
                    return (await stream.get_final_response()).output_text

            return await asyncio.gather(*(text() for _ in range(4)))

    first, *others = asyncio.run(texts())
    assert len(first) > 20
    assert others == [first] * 3


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_a_function_is_called_and_its_output_leads_to_an_answer(
    client: OpenAI, tool_model: str, choice: Any
) -> None:
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    with client.responses.stream(
        model=tool_model, input=messages, tools=[WEATHER], tool_choice=choice, max_output_tokens=100
    ) as stream:
        called = stream.get_final_response()
    (call,) = called.output
    assert call.type == "function_call"
    assert call.name == "weather"
    assert json.loads(call.arguments)["city"] in ("Rome", "Oslo")
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "Rain."}
    messages += [call.to_dict(), output]
    answer = client.responses.create(model=tool_model, input=messages, tools=[WEATHER], max_output_tokens=5)
    assert answer.output_text


def test_reasoning_is_an_item_and_is_accepted_back(client: OpenAI, thinking_model: str) -> None:
    messages: list[Any] = [{"role": "user", "content": QUESTION}]
    response = client.responses.create(model=thinking_model, input=messages, temperature=0)
    reasoning, message = response.output
    assert reasoning.type == "reasoning"
    assert reasoning.content is not None
    assert reasoning.content[0].text == "Workers compute."
    assert response.output_text == "A worker computes."
    messages += [reasoning.to_dict(), message.to_dict(), *messages]
    again = client.responses.create(model=thinking_model, input=messages, temperature=0)
    assert again.status == "completed"


def test_a_pydantic_class_describes_the_answer(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "demo", "input": QUESTION, "text_format": Verdict, "max_output_tokens": 100}
    assert isinstance(client.responses.parse(**asked).output_parsed, Verdict)
    with client.responses.stream(**asked) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Verdict)


def test_tokens_are_counted_as_they_are_used(client: OpenAI) -> None:
    counted = client.responses.input_tokens.count(model="demo", input=QUESTION, instructions="Be brief.")
    used = client.responses.create(model="demo", input=QUESTION, instructions="Be brief.", max_output_tokens=1)
    assert used.usage is not None
    assert counted.input_tokens == used.usage.input_tokens


def test_errors_raise_the_classes_of_the_client(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.responses.create(model="nobody/has:this", input=QUESTION, stream=True)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as too_long:
        client.responses.create(model="demo", input="worker " * 20_000)
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="demo", input=QUESTION, previous_response_id="resp_1")
    assert refused.value.param == "previous_response_id"
    with pytest.raises(openai.NotFoundError, match="keeps no responses"):
        client.responses.retrieve("resp_1")
