"""A llama-server of the tests' own, answers on it, and what makes two answers the same."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from sollol_nb.chat.messages import check_messages
from sollol_nb.chat.option_checks import check_options
from sollol_nb.llama_cpp.answers.base import Answer
from sollol_nb.llama_cpp.answers.kinds import answer_for
from sollol_nb.llama_cpp.answers.protocol import parse_event
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.models.files import DEMO_MODEL_PATH
from sollol_nb.runtime.http_client import JsonClient
from tests.support.engines import eventually, unused_ports

API_KEY = "a-key-of-the-tests"
LONG = "Tell me everything about sharding."
SHORT = "What is a worker?"
ACCENTS = "Say something with accents and symbols."
GREEDY = {"temperature": 0}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "n": {"type": "number"}, "ok": {"type": "boolean"}},
    "required": ["name", "n", "ok"],
}
PLAIN = "{{ message['content'] }}"
THINKING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.reasoning_content %}<think>\n"
    "{{ message.reasoning_content }}\n</think>\n\n{% endif %}{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}


@dataclass(frozen=True)
class Server:
    """A running llama-server."""

    client: JsonClient

    async def events(self, asked: tuple[str, dict[str, Any]]) -> AsyncGenerator[dict[str, Any], None]:
        async with self.client.stream_lines(*asked) as lines:
            async for line in lines:
                event = parse_event(line)
                if event is not None:
                    assert "error" not in event
                    yield event

    async def finish(self, answer: Answer, add: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        """Ask until the answer is complete; all its chunks."""
        chunks = []
        while (asked := await answer.request(self.client.post)) is not None:
            async with aclosing(self.events((asked[0], {**asked[1], **(add or {})}))) as events:
                async for event in events:
                    if (render := answer.unconfirmed) is not None:
                        answer.confirm((await self.client.post("/apply-template", render))["prompt"])
                    chunk = answer.translate(event)
                    chunks += [chunk] if chunk is not None else []
                    if answer.is_abandoned:
                        break
        return [*chunks, answer.final()]


Run = Callable[[Callable[[Server], Awaitable[Any]]], Any]


@contextmanager
def llama_server(engine: Engine, folder: Path, *flags: str) -> Iterator[Run]:
    """Start a llama-server; yields a function that runs a coroutine function with it."""
    port = unused_ports(1)
    command = [str(engine.server), "-m", str(DEMO_MODEL_PATH), "--host", "127.0.0.1", "--port", str(port)]
    command += ["-c", "4096", "-np", "4", "-t", "1", "--jinja", "--cache-ram", "0", "--kv-unified", *flags]
    with (folder / "llama-server.log").open("wb") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, "LLAMA_API_KEY": API_KEY, "GGML_NO_BACKTRACE": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    url = f"http://127.0.0.1:{port}"

    def run(test: Callable[[Server], Awaitable[Any]]) -> Any:
        async def guarded() -> Any:
            client = JsonClient(url, api_key=API_KEY)
            try:
                async with asyncio.timeout(200):
                    return await test(Server(client))
            finally:
                await client.aclose()

        return asyncio.run(guarded())

    def is_ready() -> bool:
        assert process.poll() is None, (folder / "llama-server.log").read_text(errors="replace")[-2000:]
        try:
            return httpx.get(f"{url}/health", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    try:
        eventually(is_ready, "llama-server is ready")
        yield run
    finally:
        process.kill()
        process.wait()


def new_answer(question: str, options: Mapping[str, Any], template: str = PLAIN) -> Answer:
    return answer_for("demo", check_messages(question), check_options(options), chat_template=template)


def through_json(answer: Answer) -> Answer:
    return Answer.from_state(json.loads(json.dumps(answer.state())))


def whole(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """The parts of a whole answer that must not depend on where it was interrupted."""
    assert [chunk["done"] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    names = ("model", "done_reason", "prompt_eval_count", "eval_count")
    return {
        **{name: chunks[-1][name] for name in names},
        "content": "".join(chunk["message"]["content"] for chunk in chunks),
        "thinking": "".join(chunk["message"].get("thinking", "") for chunk in chunks),
    }


async def uncut(
    server: Server, answer: Answer, add: Mapping[str, Any] | None = None
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The events of an uninterrupted answer, and the whole answer."""
    asked = await answer.request(server.client.post)
    assert asked is not None
    events = [event async for event in server.events((asked[0], {**asked[1], **(add or {})}))]
    chunks = [chunk for event in events if (chunk := answer.translate(event)) is not None]
    assert answer.is_complete
    return events, whole([*chunks, answer.final()])


async def cut_after(
    server: Server, answer: Answer, events: list[dict[str, Any]]
) -> tuple[Answer, list[dict[str, Any]]]:
    """The answer as another process would load it after these events, and the chunks sent so far."""
    await answer.request(server.client.post)
    chunks = [chunk for event in events if (chunk := answer.translate(event)) is not None]
    return through_json(answer), chunks
