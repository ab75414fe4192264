"""A client that others wrote, which translates between the APIs itself: LiteLLM, with three of its providers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.support.engines import HANG_GUARD_S
from tests.support.gateway import GatewayProcess

pytestmark = pytest.mark.engine

# In a separate process: importing it takes seconds and changes the settings of other libraries.
SCRIPT = """
import json, sys
import litellm

url = sys.argv[1]
messages = [{"role": "user", "content": "What is a worker?"}]
answers = {}
for model, base in {"openai/demo": f"{url}/v1", "anthropic/demo": url, "ollama_chat/demo": url}.items():
    request = dict(model=model, api_base=base, api_key="none", messages=messages, temperature=0, max_tokens=30)
    whole = litellm.completion(**request)
    streamed = litellm.completion(**request, stream=True)
    answers[model] = [
        whole.choices[0].message.content,
        "".join(chunk.choices[0].delta.content or "" for chunk in streamed),
        whole.usage.completion_tokens,
    ]
print(json.dumps(answers))
"""


def test_litellm_gets_the_same_answer_through_three_apis(gateway: GatewayProcess) -> None:
    offline = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, gateway.url],
        env=offline,
        capture_output=True,
        text=True,
        timeout=HANG_GUARD_S,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    answers = json.loads(ran.stdout.splitlines()[-1])
    texts = {text for whole, streamed, _ in answers.values() for text in (whole, streamed)}
    assert len(texts) == 1, answers
    assert {count for _, _, count in answers.values()} == {30}
