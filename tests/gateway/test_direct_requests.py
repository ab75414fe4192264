"""Raw prompts, counts and embeddings over a gateway are as without one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sollol_nb.errors import ConfigError
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.gateway import GatewayProcess

pytestmark = pytest.mark.engine

PROMPT = "<|im_start|>user\nWhat is a worker?<|im_end|>\n<|im_start|>assistant\n"
MESSAGES = [{"role": "user", "content": "What is a worker?"}]


@pytest.fixture(scope="module")
def over(gateway: GatewayProcess) -> Iterator[HybridRouter]:
    with HybridRouter(gateway=gateway.url) as router:
        yield router


def test_a_raw_prompt_is_continued_as_the_chat_that_it_spells(over: HybridRouter) -> None:
    chat = over.route_request("demo", MESSAGES, temperature=0, max_tokens=20)
    raw = over.generate("demo", PROMPT, temperature=0, max_tokens=20, logprobs=True)
    assert raw.text == chat.text
    assert "".join(entry["token"] for entry in raw["logprobs"]) == raw.text
    assert raw["prompt_eval_count"] == chat["prompt_eval_count"] == over.count_tokens("demo", MESSAGES)


def test_what_the_engines_cannot_do_is_refused_as_without_a_gateway(over: HybridRouter) -> None:
    with pytest.raises(ConfigError, match=r"llama\.cpp does not take suffix here"):
        over.generate("demo", PROMPT, suffix="!", backend="local")
    with pytest.raises(ConfigError, match="prompt='' must be text"):
        over.generate("demo", "")
    with pytest.raises(ConfigError, match=r"demo is routed to llama\.cpp, which has no embeddings here"):
        over.embed("demo", ["a", "b"])
