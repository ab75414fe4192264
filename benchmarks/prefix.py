"""A batch whose rows have a long instruction in common, through `router.map` and through raw concurrent clients.

    python benchmarks/prefix.py [--rows 24] [--unshared 4] [--tokens 1500] [--rounds 1]

SmolLM2 runs over three workers on loopback. The clients ask as many rows at the same time as the llama-server has
slots. One has the server process every prompt from its beginning (`cache_prompt` false), as a server does whose
slots were used for something else in between; the other leaves it to the server what is still in a slot. Each way
has a coordinator of its own, an instruction of its own, and no kept answer. A row without sharing takes the same
time whatever their number, so the first way asks fewer.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

import httpx
from common import Report, isolated, paired_ratio, parser_of, percentile, run, smollm2_path

from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.sync_wrapper import HybridRouter

GOAL = 4.0
ANSWER_TOKENS = 4
UNSHARED, CACHING, MAP = "httpx, no sharing", "httpx, the server's own caching", "router.map"
_SENTENCE = (
    "Rule {number}: where a review speaks of {what}, weigh it {how} than the rest, and say so in one word. "
)
_WHAT = ("the delivery", "the price", "the screen", "the battery", "the sound", "the service", "the colour")
_HOW = ("more", "less", "later", "earlier")


def instruction(name: str, tokens: int, router: HybridRouter, model: str) -> str:
    """An instruction of about so many tokens, which begins with its name, so that no two begin alike."""
    sentences = [
        _SENTENCE.format(number=number, what=_WHAT[number % len(_WHAT)], how=_HOW[number % len(_HOW)])
        for number in range(1, 1 + tokens // 8)
    ]
    text = f"These are the rules of {name}. " + "".join(sentences)
    counted = router.count_tokens(model, text, backend="sharded")
    if counted < tokens:
        raise RuntimeError(f"the instruction has only {counted} tokens")
    return text[: len(text) * tokens // counted]


def reviews(count: int) -> list[str]:
    """The rows, about twenty tokens each."""
    return [f"Review {number}: {_WHAT[number % len(_WHAT)]} was fine on day {number}." for number in range(count)]


async def ask_raw(
    coordinator: Coordinator, system: str, rows: list[str], connections: int, extra: dict[str, Any]
) -> int:
    """Ask all rows over so many connections; returns how many prompt tokens the server processed."""
    left, processed = iter(rows), 0
    headers = {"Authorization": f"Bearer {coordinator._process.key}"}
    async with httpx.AsyncClient(
        base_url=coordinator.base_url, headers=headers, trust_env=False, timeout=600
    ) as client:

        async def ask_next() -> None:
            nonlocal processed
            for row in left:
                messages = [{"role": "system", "content": system}, {"role": "user", "content": row}]
                body = {"messages": messages, "max_tokens": ANSWER_TOKENS, "temperature": 0, **extra}
                answer = (await client.post("/v1/chat/completions", json=body)).raise_for_status().json()
                processed += answer["timings"]["prompt_n"]

        await asyncio.gather(*[ask_next() for _ in range(connections)])
    return processed


def measured(way: str, count: int, tokens: int, name: str) -> tuple[float, int]:
    """Rows a second of one way, and how many prompt tokens were processed."""
    model = str(smollm2_path())
    options: dict[str, Any] = {"backend": "sharded", "max_tokens": ANSWER_TOKENS, "temperature": 0}
    with (
        isolated(keeps_contexts=True),
        # The raw clients hold no lease, which would keep it alive.
        HybridRouter(auto_setup_rpc=True, num_rpc_backends=3, speculation="off", keep_alive="10m") as router,
    ):
        router.route_request(model, "Hello!", **options)
        system = instruction(name, tokens, router, model)
        (coordinator,) = router.coordinators
        assert isinstance(coordinator, Coordinator)
        rows = reviews(count)
        began = time.perf_counter()
        if way == MAP:
            frame = router.map(rows, "{{ item }}", model=model, system=system, progress=False, **options)
            seconds = time.perf_counter() - began
            if set(frame.status) != {"ok"}:
                raise RuntimeError("rows of the batch were not answered")
            log = router.latency.frame(last=count)
            processed = int((log.prompt_tokens - log.cached_tokens.fillna(0)).sum())
        else:
            extra = {"cache_prompt": False} if way == UNSHARED else {}
            processed = asyncio.run(ask_raw(coordinator, system, rows, coordinator.gate.slots, extra))
            seconds = time.perf_counter() - began
    return count / seconds, processed


def main() -> Report:
    parser = parser_of(__doc__)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--unshared", type=int, default=4, help="rows of the client that does not share")
    parser.add_argument("--tokens", type=int, default=1500, help="of the common instruction")
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    counts = {UNSHARED: arguments.unshared, MAP: arguments.rows, CACHING: arguments.rows}
    rates: dict[str, list[float]] = {way: [] for way in counts}
    processed: dict[str, float] = {}
    for number in range(arguments.rounds):
        for way in counts if number % 2 == 0 else reversed(counts):
            rate, tokens = measured(way, counts[way], arguments.tokens, f"{way} {number}")
            rates[way].append(rate)
            processed[way] = tokens / counts[way]
            print(f"{way}: {rate:.3g} rows a second, {processed[way]:.0f} prompt tokens each", file=sys.stderr)
    report = Report()
    table = report.table(
        f"An instruction of {arguments.tokens:,} tokens before each row",
        "way",
        "rows",
        "rows a second",
        "prompt tokens processed per row",
        "ratio",
    )
    for way, count in counts.items():
        ratio = paired_ratio(rates[way], rates[UNSHARED])
        table.add(way, count, percentile(rates[way], 50), processed[way], ratio)
    ratio = paired_ratio(rates[MAP], rates[UNSHARED])
    report.goal(f"at least {GOAL:g} times a client that does not share", ratio, ratio >= GOAL)
    report.notes.append(
        "The more rows there are, the less the first of them counts, whose prompt is processed from its beginning."
    )
    return report


if __name__ == "__main__":
    sys.exit(run(main))
