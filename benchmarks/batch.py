"""A batch of prompts through `router.map`, beside raw httpx with as many requests at the same time.

    python benchmarks/batch.py [--prompts 200] [--rounds 4]

The demo model, and a real one (SmolLM2), are sharded over three workers on loopback. Both ways ask as many
questions at the same time as the llama-server has slots, in turns. Each question is asked once, so that neither
the prompt cache nor a kept answer helps. A batch keeps its answers and writes the latency log.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
from typing import Any

import httpx
from common import Report, isolated, measured, paired_ratio, parser_of, percentile, run, seconds_of, smollm2_path

from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.sync_wrapper import HybridRouter

GOAL = 0.95
DEMO_TOKENS, REAL_TOKENS = 16, 4
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
    parser.add_argument("--rounds", type=int, default=4, help="with the demo model; the real one has half of them")
    arguments = parser.parse_args()
    report = Report()
    table = report.table(
        f"{arguments.prompts} prompts, answers a second",
        "model",
        "at the same time",
        "httpx",
        "router.map",
        "ratio",
    )
    for name, model, tokens, rounds in (
        ("demo", "demo:sharded", DEMO_TOKENS, arguments.rounds),
        ("SmolLM2-135M", str(smollm2_path()), REAL_TOKENS, max(1, arguments.rounds // 2)),
    ):
        with isolated(), HybridRouter(auto_setup_rpc=True, num_rpc_backends=3) as router:
            slots, rates = compared(router, model, arguments.prompts, tokens, rounds)
        ratio = paired_ratio(rates["router.map"], rates["httpx"])
        medians = (percentile(rates["httpx"], 50), percentile(rates["router.map"], 50))
        table.add(f"{name}, {tokens} tokens", slots, *medians, ratio)
        report.goal(f"{name}: at least {GOAL:g} of httpx", ratio, ratio >= GOAL)
    report.notes.append(
        "The demo model answers faster than any real one, so the processor time of the client counts: the router "
        "reads every token when it is generated, so that an answer survives the engine; httpx reads whole answers."
    )
    return report


def compared(
    router: HybridRouter, model: str, prompts: int, tokens: int, rounds: int
) -> tuple[int, dict[str, list[float]]]:
    """How many requests ran at the same time, and the answers a second of both ways in each round."""
    options: dict[str, Any] = {"model": model, "backend": "sharded", "max_tokens": tokens, "temperature": 0}
    router.map(questions(8), "{{ item }}", progress=False, **options)
    (coordinator,) = router.coordinators
    assert isinstance(coordinator, Coordinator)
    slots = coordinator.gate.slots

    def through_map() -> float:
        asked, frames = questions(prompts), []
        seconds = seconds_of(lambda: frames.append(router.map(asked, "{{ item }}", progress=False, **options)))
        if set(frames[0].status) != {"ok"}:
            raise RuntimeError("rows of the batch were not answered")
        return prompts / seconds

    def through_httpx() -> float:
        asked = questions(prompts)
        return prompts / seconds_of(lambda: asyncio.run(ask_raw(coordinator, asked, tokens, slots)))

    return slots, measured({"httpx": through_httpx, "router.map": through_map}, rounds, warm_up=0)


if __name__ == "__main__":
    sys.exit(run(main))
