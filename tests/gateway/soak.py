"""The long run: `python -m tests.gateway.soak --minutes 5 --streams 500`, or `make soak MINUTES=5`.

That many clients of a gateway stream answers of the demo model at the same time, with another API in each
round. At the end every text must be the one that the model gives alone, no slot of the engine may be in use, and
the gateway must not have more memory than after the first round (but for `MARGIN_BYTES`). Exit code 1 otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import busy_slots, eventually, run
from tests.support.gateway import GatewayProcess, running_gateway

MODEL = "demo"
QUESTIONS = ("What is a worker?", "Hello!", "What is a coordinator?")
TOKENS = 48
MARGIN_BYTES = 48 * 1024 * 1024
"""What the allocator may keep, since the rounds differ in how many answers end at the same time."""
LIMIT_S = 900.0


@dataclass(frozen=True)
class Api:
    """How to ask in one API, and where the text is in an event of its stream."""

    path: str
    body: Callable[[str], dict[str, Any]]
    text_in: Callable[[Any], str | None]


def _messages(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


APIS = (
    Api(
        "/v1/chat/completions",
        lambda question: {"messages": _messages(question), "max_tokens": TOKENS, "temperature": 0},
        lambda event: event["choices"][0]["delta"].get("content") if event["choices"] else None,
    ),
    Api(
        "/v1/messages",
        lambda question: {"messages": _messages(question), "max_tokens": TOKENS, "temperature": 0},
        lambda event: event["delta"].get("text") if event["type"] == "content_block_delta" else None,
    ),
    Api(
        "/api/chat",
        lambda question: {
            "messages": _messages(question),
            "options": {"num_predict": TOKENS, "temperature": 0},
        },
        lambda event: event["message"].get("content"),
    ),
    Api(
        "/v1/responses",
        lambda question: {"input": question, "max_output_tokens": TOKENS, "temperature": 0},
        lambda event: event["delta"] if event["type"] == "response.output_text.delta" else None,
    ),
)


@dataclass
class Result:
    """What was received.

    Attributes:
        answers: complete ones with the right text.
        problems: all others, by what was wrong.
        rss_bytes: memory of the gateway after each round of all clients.
        busy: slots in use at the end.
    """

    answers: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    rss_bytes: list[int] = field(default_factory=list)
    busy: int = 0

    @property
    def is_good(self) -> bool:
        """Whether all held."""
        has_grown = bool(self.rss_bytes) and self.rss_bytes[-1] > self.rss_bytes[0] + MARGIN_BYTES
        return bool(self.answers) and not self.problems and not self.busy and not has_grown

    def __str__(self) -> str:
        megabytes = ", ".join(f"{rss / 2**20:.0f}" for rss in self.rss_bytes)
        lines = [f"{self.answers} answers, {self.problems.total()} lost or wrong, {self.busy} slots in use"]
        lines += [f"{count} times: {problem}" for problem, count in self.problems.most_common(10)]
        return "\n".join([*lines, f"memory of the gateway after each round, in MiB: {megabytes}"])


async def ask(client: httpx.AsyncClient, api: Api, question: str) -> str:
    """The text of one streamed answer."""
    text = ""
    body = {"model": MODEL, "stream": True, **api.body(question)}
    async with client.stream("POST", api.path, json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{response.status_code} {(await response.aread()).decode()[:200]}")
        async for line in response.aiter_lines():
            data = line.removeprefix("data: ")
            if data.startswith("{"):
                event = json.loads(data)
                if event.get("error"):
                    raise RuntimeError(data[:200])
                text += api.text_in(event) or ""
    return text


async def soak(gateway: GatewayProcess, *, streams: int, minutes: float) -> Result:
    """Ask for so long; each client begins a new round once all have ended theirs."""
    result, process = Result(), psutil.Process(gateway.process.pid)
    limits = httpx.Limits(max_connections=streams, max_keepalive_connections=streams)
    async with httpx.AsyncClient(base_url=gateway.url, timeout=LIMIT_S, limits=limits) as client:
        expected = {question: await ask(client, APIS[0], question) for question in QUESTIONS}
        deadline = time.monotonic() + minutes * 60

        async def once(number: int) -> None:
            api, question = APIS[number % len(APIS)], QUESTIONS[number % len(QUESTIONS)]
            try:
                text = await ask(client, api, question)
            except (httpx.HTTPError, RuntimeError) as error:
                result.problems[f"{api.path}: {type(error).__name__} {error}"] += 1
                return
            if text == expected[question]:
                result.answers += 1
            else:
                result.problems[f"{api.path}: another text"] += 1

        for number in itertools.count():
            await asyncio.gather(*(once(number + client_number) for client_number in range(streams)))
            result.rss_bytes.append(process.memory_info().rss)
            if time.monotonic() >= deadline and number:
                return result
    raise AssertionError("unreachable")


def run_soak(gateway: GatewayProcess, *, streams: int, minutes: float) -> Result:
    """The result of a run; the slots are counted at the engine itself."""
    result = asyncio.run(soak(gateway, streams=streams, minutes=minutes))
    with HybridRouter() as router:
        router.route_request(MODEL, "Hello!", max_tokens=1)  # adopts the gateway's coordinator
        (coordinator,) = router.coordinators

        def is_free() -> bool:
            result.busy = run(busy_slots(coordinator))
            return not result.busy

        eventually(is_free, "all slots are free")
        router.close(keep=True)
    return result


def main() -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--streams", type=int, default=500)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SOLLOL_STATE_DIR"] = folder
        variables = {"SOLLOL_SLOTS": "16", "SOLLOL_KEEP_ALIVE": "20s"}
        with running_gateway(variables=variables) as gateway:
            result = run_soak(gateway, streams=arguments.streams, minutes=arguments.minutes)
        print(result)
    return 0 if result.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
