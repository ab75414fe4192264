"""A batch of prompts through `router.map`, beside raw httpx with as many requests at the same time.

    python benchmarks/batch.py [--prompts 200] [--tokens 16] [--rounds 5] [--model demo:sharded]

The model is sharded over three workers on loopback. Both ask as many questions at the same time as the
llama-server has slots, in turns. Each question is asked once, so that neither the prompt cache nor a kept answer
helps. The batch keeps its answers, writes the latency log and makes a DataFrame.
"""

from __future__ import annotations

import asyncio
import itertools
import sys

import httpx
from common import Report, isolated, measured, paired_ratio, parser_of, percentile, run, seconds_of

from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.sync_wrapper import HybridRouter

GOAL = 0.95
_numbers = itertools.count(1)


def questions(count: int) -> list[str]:
    """Questions that were not asked before."""
    return [f"{next(_numbers)}. What is sharding?" for _ in range(count)]


async def ask_raw(coordinator: Coordinator, prompts: list[str], tokens: int, connections: int) -> None:
    """Ask all of them over so many connections."""
    left = iter(prompts)
    headers = {"Authorization": f"Bearer {coordinator._process.key}"}
    async with httpx.AsyncClient(
        base_url=coordinator.base_url, headers=headers, trust_env=False, timeout=60
    ) as client:

        async def ask_next() -> None:
            for prompt in left:
                messages = [{"role": "user", "content": prompt}]
                body = {"messages": messages, "max_tokens": tokens, "temperature": 0}
                (await client.post("/v1/chat/completions", json=body)).raise_for_status().json()

        await asyncio.gather(*[ask_next() for _ in range(connections)])


def main() -> Report:
    parser = parser_of(__doc__)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=16, help="of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="demo:sharded", help="its name, or the path of a GGUF file")
    arguments = parser.parse_args()
    report, options = Report(), {"max_tokens": arguments.tokens, "temperature": 0}
    with isolated(), HybridRouter(auto_setup_rpc=True, num_rpc_backends=3) as router:
        router.route_request(arguments.model, "Hello!", backend="sharded", max_tokens=1)
        (coordinator,) = router.coordinators
        assert isinstance(coordinator, Coordinator)
        slots = coordinator.gate.slots

        def through_map() -> float:
            asked = questions(arguments.prompts)
            began = seconds_of(
                lambda: frames.append(
                    router.map(
                        asked, "{{ item }}", model=arguments.model, backend="sharded", progress=False, **options
                    )
                )
            )
            if set(frames.pop().status) != {"ok"}:
                report.failed = "rows of the batch were not answered"
            return began

        def through_httpx() -> float:
            asked = questions(arguments.prompts)
            return seconds_of(lambda: asyncio.run(ask_raw(coordinator, asked, arguments.tokens, slots)))

        frames: list = []
        seconds = measured({"httpx": through_httpx, "router.map": through_map}, arguments.rounds)
    rates = {way: [arguments.prompts / value for value in values] for way, values in seconds.items()}
    ratio = paired_ratio(rates["router.map"], rates["httpx"])
    table = report.table(
        f"{arguments.prompts} prompts, {slots} at the same time, answers of {arguments.tokens} tokens",
        "way",
        "answers a second, p50",
        "ratio",
    )
    table.add("httpx", percentile(rates["httpx"], 50), "")
    table.add("router.map", percentile(rates["router.map"], 50), ratio)
    report.goal(f"at least {GOAL:g} of httpx", ratio, ratio >= GOAL)
    return report


if __name__ == "__main__":
    sys.exit(run(main))
