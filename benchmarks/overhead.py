"""What the router adds to a request, beside raw httpx to the same llama-server: milliseconds, and time per token.

    python benchmarks/overhead.py [--rounds 300] [--long-rounds 30] [--tokens 100] [--model demo:sharded]

The model is sharded over three workers on loopback. One-token requests and the first tokens of streams are
measured in turns: httpx with keep-alive to `/v1/chat/completions`, the blocking router and the async one. Each
question is asked once, so that no prompt cache helps, and nothing is drafted, so that every token is computed. All
processes share the machine's processors.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import httpx
from common import (
    Report,
    isolated,
    measured,
    paired_difference,
    paired_ratio,
    parser_of,
    percentile,
    run,
    seconds_of,
)

from sollol_nb.hybrid_router import HybridRouter as AsyncRouter
from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.sync_wrapper import HybridRouter

GOAL_P50_MS, GOAL_P99_MS, GOAL_FIRST_MS, GOAL_PER_TOKEN = 2.0, 4.0, 2.0, 1.02
WARM_UP = 10
CHAT = "/v1/chat/completions"
_numbers = itertools.count(1)


def question() -> list[dict[str, Any]]:
    """Messages that were not sent before."""
    return [{"role": "user", "content": f"{next(_numbers)}. What is sharding?"}]


def body(max_tokens: int, **more: Any) -> dict[str, Any]:
    """The body of a raw request."""
    return {"messages": question(), "max_tokens": max_tokens, "temperature": 0, **more}


class RawClient:
    """What a program without a router would do."""

    def __init__(self, coordinator: Coordinator, stack: ExitStack, loop: asyncio.AbstractEventLoop) -> None:
        key = {"Authorization": f"Bearer {coordinator._process.key}"}
        settings: dict[str, Any] = {"base_url": coordinator.base_url, "headers": key, "trust_env": False}
        self._client = stack.enter_context(httpx.Client(**settings, timeout=60))
        self._loop = loop
        self._async = httpx.AsyncClient(**settings, timeout=60)
        stack.callback(lambda: loop.run_until_complete(self._async.aclose()))

    def ask(self) -> None:
        self._client.post(CHAT, json=body(1)).raise_for_status().json()

    def ask_async(self) -> None:
        async def ask() -> None:
            (await self._async.post(CHAT, json=body(1))).raise_for_status().json()

        self._loop.run_until_complete(ask())

    def times_of_tokens(self, tokens: int) -> list[float]:
        """Seconds from the request to each token of a streamed answer."""
        began, times = time.perf_counter(), []
        # The server closes the connection after a stream.
        close = {"Connection": "close"}
        with self._client.stream("POST", CHAT, json=body(tokens, stream=True), headers=close) as response:
            for line in response.iter_lines():
                if line.startswith("data: {") and any(
                    choice["delta"].get("content") for choice in json.loads(line[6:])["choices"]
                ):
                    times.append(time.perf_counter() - began)
        return times


def main() -> Report:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=300, help="one-token requests, by each way")
    parser.add_argument("--long-rounds", type=int, default=30, help="long answers, by each way")
    parser.add_argument("--tokens", type=int, default=100, help="of a long answer")
    parser.add_argument("--model", default="demo:sharded", help="its name, or the path of a GGUF file")
    arguments = parser.parse_args()
    model, report = arguments.model, Report()
    with isolated(), ExitStack() as stack:
        router = stack.enter_context(HybridRouter(auto_setup_rpc=True, num_rpc_backends=3, speculation="off"))
        router.route_request(model, question(), backend="sharded", max_tokens=1)
        (coordinator,) = router.coordinators
        assert isinstance(coordinator, Coordinator)
        loop = asyncio.new_event_loop()
        stack.callback(loop.close)
        raw = RawClient(coordinator, stack, loop)
        routers: AsyncRouter = router._async
        options = {"backend": "sharded", "temperature": 0}

        def times_of_tokens(tokens: int) -> list[float]:
            began, times = time.perf_counter(), []
            for chunk in router.stream(model, question(), max_tokens=tokens, **options):
                if chunk["message"].get("content"):
                    times.append(time.perf_counter() - began)
            return times

        def ask_async() -> None:
            loop.run_until_complete(routers.route_request(model, question(), max_tokens=1, **options))

        ways: dict[str, Callable[[], float]] = {
            "httpx": lambda: seconds_of(raw.ask),
            "httpx, async": lambda: seconds_of(raw.ask_async),
            "httpx, first token of a stream": lambda: raw.times_of_tokens(1)[0],
            "router": lambda: seconds_of(lambda: router.route_request(model, question(), max_tokens=1, **options)),
            "router, async": lambda: seconds_of(ask_async),
            "router, first token of a stream": lambda: times_of_tokens(1)[0],
        }
        found = {
            name: [s * 1000 for s in values] for name, values in measured(ways, arguments.rounds, WARM_UP).items()
        }
        table = report.table("One token, in milliseconds", "way", "p50", "p99", "added at p50", "added at p99")
        added: dict[str, tuple[float, float]] = {}
        for name, values in found.items():
            base = found[name.replace("router", "httpx")]
            added[name] = paired_difference(values, base), percentile(values, 99) - percentile(base, 99)
            differences = ("", "") if name.startswith("httpx") else added[name]
            table.add(name, percentile(values, 50), percentile(values, 99), *differences)
        for name in ("router", "router, async"):
            p50_ms, p99_ms = added[name]
            report.goal(f"{name}: at most {GOAL_P50_MS:g} ms added at p50", p50_ms, p50_ms <= GOAL_P50_MS)
            report.goal(f"{name}: at most {GOAL_P99_MS:g} ms added at p99", p99_ms, p99_ms <= GOAL_P99_MS)
        first_ms, _ = added["router, first token of a stream"]
        report.goal(f"first token within {GOAL_FIRST_MS:g} ms, p50", first_ms, first_ms <= GOAL_FIRST_MS)

        long = measured(
            {
                "httpx": lambda: per_token_ms(raw.times_of_tokens(arguments.tokens)),
                "router": lambda: per_token_ms(times_of_tokens(arguments.tokens)),
            },
            arguments.long_rounds,
        )
        ratio = paired_ratio(long["router"], long["httpx"])
        table = report.table(f"Answers of {arguments.tokens} tokens", "way", "ms per token, p50", "ratio")
        table.add("httpx", percentile(long["httpx"], 50), "")
        table.add("router", percentile(long["router"], 50), ratio)
        report.goal(f"time per token within {GOAL_PER_TOKEN - 1:.0%}", ratio, ratio <= GOAL_PER_TOKEN)
    return report


def per_token_ms(times_s: list[float]) -> float:
    """Milliseconds from a token to the next one; a token without text comes with the next."""
    return (times_s[-1] - times_s[0]) / (len(times_s) - 1) * 1000


if __name__ == "__main__":
    sys.exit(run(main))
