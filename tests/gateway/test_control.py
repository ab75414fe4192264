"""What a key that was not made with `--control` may not do, through each route."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sollol_nb.gateway.keys import Key, Keys, add_key
from sollol_nb.router.remote.calls import CALLS
from sollol_nb.runtime.io_loop import run_blocking
from tests.support.gateway import gateway_without_engines

FILE = "/home/somebody/model.gguf"
MESSAGES = [{"role": "user", "content": "Hello!"}]
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("/api/chat", {"messages": MESSAGES}),
    ("/api/generate", {"prompt": "Hello!"}),
    ("/api/embed", {"input": "Hello!"}),
    ("/api/embeddings", {"prompt": "Hello!"}),
    ("/api/show", {}),
    ("/api/pull", {}),
    ("/v1/chat/completions", {"messages": MESSAGES}),
    ("/v1/completions", {"prompt": "Hello!"}),
    ("/v1/embeddings", {"input": "Hello!"}),
    ("/v1/responses", {"input": "Hello!"}),
    ("/v1/responses/input_tokens", {"input": "Hello!"}),
    ("/v1/messages", {"messages": MESSAGES, "max_tokens": 5}),
    ("/v1/messages/count_tokens", {"messages": MESSAGES}),
    ("/sollol/chat", {"messages": MESSAGES}),
    ("/sollol/chat", {"prompt": {"text": "Hello!"}}),
    *((f"/sollol/call/{name}", {}) for name, call in CALLS.items() if "model" in call.method.__annotations__),
]


def _statuses(file: Path, requests: list[tuple[str, dict[str, Any]]], *, control: bool = False) -> list[int]:
    async def ask() -> list[int]:
        key = add_key(Key(name="ada", may_control=control), file)
        async with gateway_without_engines(keys=Keys(file)) as client:
            headers = {"x-api-key": key}
            return [(await client.post(path, json=body, headers=headers)).status_code for path, body in requests]

    return run_blocking(ask())


@pytest.mark.parametrize(("path", "body"), REQUESTS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_file_is_not_named_without_the_right_to_do_so(tmp_path: Path, path: str, body: dict[str, Any]) -> None:
    assert _statuses(tmp_path / "keys", [(path, {"model": FILE, **body})]) == [403]


def test_the_state_of_an_interrupted_answer_names_no_file_either(tmp_path: Path) -> None:
    state = {
        "kind": "sampled",
        "model": FILE,
        "messages": MESSAGES,
        "options": {},
        "seed": 1,
        "token_count": 0,
        "prompt_tokens": None,
        "logprobs": [],
        "spent_ms": {},
    }
    request = ("/sollol/chat", {"model": "demo", "interrupted": state})
    assert _statuses(tmp_path / "keys", [request]) == [403]
    assert _statuses(tmp_path / "others", [request], control=True) != [403]


def test_what_changes_the_cluster_is_refused(tmp_path: Path) -> None:
    paths = [f"/sollol/call/{name}" for name, call in CALLS.items() if call.controls]
    assert "/sollol/call/configure" in paths
    assert set(_statuses(tmp_path / "keys", [(path, {}) for path in paths])) == {403}
