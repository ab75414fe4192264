"""OpenAI's official client on the gateway."""

from __future__ import annotations

import pytest
from openai import OpenAI

from tests.support.gateway import GatewayProcess

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def client(gateway: GatewayProcess) -> OpenAI:
    return OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)


def test_a_streamed_answer_is_that_of_the_whole_one(client: OpenAI) -> None:
    messages = [{"role": "user", "content": "What is a worker?"}]
    whole = client.chat.completions.create(model="demo", messages=messages, temperature=0)  # type: ignore[arg-type]
    streamed = client.chat.completions.create(  # type: ignore[call-overload]
        model="demo", messages=messages, temperature=0, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices)
    assert text == whole.choices[0].message.content
    assert len(text) > 20
