"""OpenAI's official client on the gateway."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from tests.support.engines import ENDLESS_CONTEXT_TOKENS, eventually
from tests.support.gateway import GatewayProcess, busy_slots_at, own_gateway
from tests.support.scripted_model import write_scripted
from tests.support.tool_model import TEMPLATE

pytestmark = pytest.mark.engine

QUESTION: list[Any] = [{"role": "user", "content": "What is a worker?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}


class Verdict(BaseModel):
    place: Literal["here", "there"]
    is_far: bool


@pytest.fixture(scope="module")
def client(gateway: GatewayProcess) -> OpenAI:
    return OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)


def test_a_streamed_answer_equals_the_whole_answer(client: OpenAI) -> None:
    whole = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0)
    streamed = list(
        client.chat.completions.create(
            model="demo", messages=QUESTION, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    *answer, end, usage = streamed
    text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
    assert text == whole.choices[0].message.content
    assert len(text) > 20
    assert answer[0].choices[0].delta.role == "assistant"
    assert end.choices[0].finish_reason == whole.choices[0].finish_reason == "stop"
    assert usage.choices == []
    assert usage.usage is not None
    assert whole.usage is not None
    # What the second prompt took from the slot differs.
    details: Any = {"prompt_tokens_details": None}
    assert usage.usage.model_copy(update=details) == whole.usage.model_copy(update=details)
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens > 30
    assert {chunk.id for chunk in streamed} == {streamed[0].id}


def test_what_the_slot_holds_of_a_conversation_is_counted_as_cached(client: OpenAI) -> None:
    first = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0)
    reply: Any = {"role": "assistant", "content": first.choices[0].message.content}
    messages = [*QUESTION, reply, {"role": "user", "content": "What is a coordinator?"}]
    second = client.chat.completions.create(model="demo", messages=messages, temperature=0)
    assert first.usage is not None
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached is not None
    assert first.usage.prompt_tokens <= cached < second.usage.prompt_tokens


def test_the_headers_say_which_place_answered(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="demo:sharded", messages=QUESTION, max_tokens=5, extra_headers={"X-Sollol-Priority": "high"}
    )
    assert raw.headers["X-Sollol-Route"].startswith("llama.cpp-distributed http://127.0.0.1:")
    assert raw.headers["X-Sollol-Failovers"] == "0"
    assert raw.parse().choices[0].finish_reason == "length"


def test_an_async_client_streams_several_answers_at_the_same_time(gateway: GatewayProcess) -> None:
    async def texts() -> list[str]:
        async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:

            async def text() -> str:
                stream = await client.chat.completions.create(
                    model="demo", messages=QUESTION, temperature=0, stream=True, max_completion_tokens=40
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(text() for _ in range(8)))

    first, *others = asyncio.run(texts())
    assert len(first) > 20
    assert others == [first] * 7


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_tool_is_called_and_its_result_leads_to_an_answer(client: OpenAI, tool_model: str, choice: Any) -> None:
    messages = [*QUESTION]
    called = client.chat.completions.create(
        model=tool_model, messages=messages, tools=[WEATHER], tool_choice=choice, max_tokens=100
    )
    assert called.choices[0].finish_reason == "tool_calls"
    message = called.choices[0].message
    assert message.content is None
    (call,) = message.tool_calls or ()
    assert call.type == "function"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    messages += [message, {"role": "tool", "tool_call_id": call.id, "content": "Rain."}]
    answer = client.chat.completions.create(model=tool_model, messages=messages, tools=[WEATHER], max_tokens=5)
    assert answer.choices[0].message.content


def test_calls_that_a_model_decides_on_arrive_in_a_stream(client: OpenAI, tmp_path: Path) -> None:
    call = '{"name": "weather", "arguments": {"city": "Rome"}}'
    script = ["I will look.", "<tool_call>\n", call, "\n</tool_call>"]
    specials = ("<|im_start|>", "<|im_end|>")
    model = write_scripted(tmp_path / "calls.gguf", script, template=TEMPLATE, specials=specials)
    with client.chat.completions.stream(model=str(model), messages=QUESTION, tools=[WEATHER]) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    assert any(event.type == "tool_calls.function.arguments.done" for event in events)
    assert final.choices[0].finish_reason == "tool_calls"
    (called,) = final.choices[0].message.tool_calls or ()
    assert called.function.name == "weather"
    assert called.function.parsed_arguments == {"city": "Rome"}
    assert called.id
    assert final.choices[0].message.content == "I will look."


def test_thoughts_come_apart_from_the_answer(client: OpenAI, thinking_model: str) -> None:
    asked: Any = {"model": thinking_model, "messages": QUESTION, "temperature": 0, "max_tokens": 20}
    (whole,) = client.chat.completions.create(**asked).choices
    deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**asked, stream=True)]
    assert whole.message.content == "".join(delta.content or "" for delta in deltas) == "A worker computes."
    thoughts = "".join(getattr(delta, "reasoning_content", "") for delta in deltas)
    assert whole.message.reasoning_content == thoughts == "Workers compute."  # type: ignore[attr-defined]


def test_a_pydantic_class_describes_the_answer(client: OpenAI) -> None:
    parsed = client.chat.completions.parse(
        model="demo", messages=QUESTION, response_format=Verdict, max_tokens=100
    )
    assert isinstance(parsed.choices[0].message.parsed, Verdict)
    asked: Any = {"model": "demo", "messages": QUESTION, "response_format": Verdict, "max_tokens": 100}
    with client.chat.completions.stream(**asked) as stream:
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Verdict)


def test_a_schema_describes_the_answer_as_llama_server_takes_it(client: OpenAI) -> None:
    described: Any = {"type": "json_object", "schema": Verdict.model_json_schema()}
    answer = client.chat.completions.create(
        model="demo", messages=QUESTION, response_format=described, max_tokens=100
    )
    assert Verdict.model_validate_json(answer.choices[0].message.content or "")


def test_tokens_come_with_their_probabilities(client: OpenAI) -> None:
    asked: Any = {"model": "demo", "messages": QUESTION, "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    assert whole.choices[0].logprobs is not None
    tokens = whole.choices[0].logprobs.content or []
    assert "".join(token.token for token in tokens) == whole.choices[0].message.content
    assert all(token.logprob <= 0 and len(token.top_logprobs) == 3 for token in tokens)
    streamed = [
        token.token
        for chunk in client.chat.completions.create(**asked, logprobs=True, stream=True)
        if chunk.choices[0].logprobs is not None
        for token in chunk.choices[0].logprobs.content or ()
    ]
    assert streamed == [token.token for token in tokens]


def test_a_completion_continues_the_text_itself(client: OpenAI) -> None:
    prompt = "<|im_start|>user\nWhat is a worker?<|im_end|>\n<|im_start|>assistant\n"
    asked: Any = {"model": "demo", "prompt": prompt, "temperature": 0, "max_tokens": 30}
    whole = client.completions.create(**asked, logprobs=2)
    answer = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0, max_tokens=30)
    assert whole.choices[0].text == answer.choices[0].message.content
    assert whole.choices[0].finish_reason == "length"
    assert whole.choices[0].logprobs is not None
    assert "".join(whole.choices[0].logprobs.tokens or ()) == whole.choices[0].text
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 30
    *streamed, last = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole.choices[0].text
    assert last.usage is not None
    assert last.usage.total_tokens == whole.usage.total_tokens


# --- errors ---------------------------------------------------------------------------------------


def test_a_model_that_does_not_exist_is_not_found(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="nobody/has:this", messages=QUESTION)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    with pytest.raises(openai.NotFoundError):
        next(client.chat.completions.create(model="nobody/has:this", messages=QUESTION, stream=True))


def test_a_text_that_does_not_fit_is_refused_with_its_code(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="demo", messages=[{"role": "user", "content": "worker " * 20_000}], stream=True
        )
    assert caught.value.code == "context_length_exceeded"


def test_a_field_that_cannot_be_followed_is_named(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="demo", messages=QUESTION, n=2)
    assert caught.value.param == "n"


def test_a_client_that_leaves_frees_its_slot(engine: object, alone: None, tmp_path: Path, endless: str) -> None:
    # A large context, so that the answer does not fill it before the slots are looked at.
    variables = {"SOLLOL_CONTEXT_TOKENS": str(ENDLESS_CONTEXT_TOKENS)}
    with own_gateway(tmp_path / "state", **variables) as gateway:
        client = OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)
        raw = client.chat.completions.with_raw_response.create(
            model=endless, messages=QUESTION, temperature=0, max_tokens=30_000, stream=True
        )
        engine_url = raw.headers["X-Sollol-Route"].split()[-1]
        stream = raw.parse()
        for _ in range(3):
            next(stream)
        assert busy_slots_at(engine_url) == 1
        stream.close()
        eventually(lambda: busy_slots_at(engine_url) == 0, "the slot is free")


def test_an_error_within_a_stream_is_raised_by_the_client(client: OpenAI, endless: str) -> None:
    asked: Any = {"model": endless, "messages": QUESTION, "temperature": 0, "max_tokens": 30_000}
    with pytest.raises(openai.APIError, match="1 s"):
        list(client.chat.completions.create(**asked, stream=True, extra_headers={"X-Sollol-Timeout": "1"}))


# --- models ---------------------------------------------------------------------------------------


def test_the_models_are_listed_and_can_be_named(client: OpenAI) -> None:
    names = [model.id for model in client.models.list()]
    assert "demo" in names
    assert "demo:sharded" in names
    assert client.models.retrieve("demo:sharded").id == "demo:sharded"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nobody/has:this")
    assert caught.value.code == "model_not_found"
