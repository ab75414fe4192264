"""Tokens per second with drafts (`speculation=auto`) and without, over three workers at several distances.

    python benchmarks/speculation.py [--rounds 1] [--round-trips-ms 1,5,10,20] [--questions 12] [--json FILE]

Each way has its own three workers behind delay proxies, and both answer the same questions in turns:

- repetitive: the demo model, asked a question that it has answered before in the same chat;
- free: the demo model, asked other questions;
- edits and summaries, and free text of SmolLM2, on loopback and 10 ms away.

The limit is that of round trips: what no engine exceeds that computes one token after the other. Last, the greedy
answers of SmolLM2 with and without drafts are compared: tokens that are verified together may round differently.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, median

from clusters import delayed, running_worker
from common import DEMO_MODEL_PATH, Report, in_turns, isolated, parser_of, run, smollm2_path

from sollol_nb.sync_wrapper import HybridRouter

WORKERS = 3
WAYS = ("off", "auto")
SMOL_ROUND_TRIP_MS = 10.0

Messages = list[dict[str, str]]

STORY = (
    "The lighthouse stands on a narrow cape at the northern end of the island. It was built in 1874 by "
    "Henry Marsh, a stonemason from the mainland, who brought forty workers and two ships. The tower is "
    "thirty-one metres high and painted white, with a red lantern room. For eighty years three keepers "
    "lived beside it with their families, and grew potatoes and cabbage in a walled garden. In 1956 the "
    "light was made automatic, and the last keeper, Anna Holm, left the island with her two cats."
)
NOTICE = (
    "Our meeting takes place on Tuesday at nine o'clock in the large hall. Please bring your laptop, a "
    "notebook and the report for March. Lunch is served at noon in the canteen, and there are sandwiches "
    "for everybody who has registered. In the afternoon we visit the new laboratory in building seven. "
    "The bus leaves at two o'clock from the main gate and returns at five. If you cannot come, please "
    "write to Maria before Monday."
)
EDITS = (
    f"Repeat this text word for word, but write Peter instead of Henry:\n\n{STORY}",
    f"Correct the spelling of this text and write it again:\n\n{NOTICE}",
    f"Summarize this text:\n\n{STORY}",
    f"Summarize this text:\n\n{NOTICE}",
)
FREE = (
    "Write a story about a dragon who is afraid of the dark.",
    "What are the main causes of the French Revolution?",
    "Explain photosynthesis to a child.",
    "Give me a recipe for an apple pie.",
)
DEMO = ("What is model sharding?", "What is a worker?", "What is a coordinator?", "What is a layer plan?")
MORE = tuple(
    f"{begin} {topic}?"
    for begin in ("What is", "Tell me about", "Why do people like", "Write a short poem about")
    for topic in (
        "a volcano",
        "the ocean",
        "bicycles",
        "a friendly robot",
        "the winter",
        "music",
        "tea",
        "the moon",
    )
)


@dataclass(frozen=True)
class Text:
    """Questions of one kind to one model.

    Attributes:
        repeats: each question is asked in a chat in which the model has answered it.
    """

    name: str
    model: Path
    questions: tuple[str, ...]
    max_tokens: int
    repeats: bool = False


def main() -> Report:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--round-trips-ms", default="1,5,10,20")
    parser.add_argument("--questions", type=int, default=12, help="to SmolLM2, whose answers are compared")
    arguments = parser.parse_args()
    report = Report()
    columns = ("round trip ms", "text", "without", "with drafts", "ratio", "accepted", "limit of round trips")
    table = report.table(f"Tokens per second over {WORKERS} workers (medians)", *columns)
    ratios: dict[tuple[float, str], float] = {}
    with isolated():
        small = [
            Text("repetitive", DEMO_MODEL_PATH, DEMO, 60, repeats=True),
            Text("free", DEMO_MODEL_PATH, DEMO, 60),
        ]
        smol = [
            Text("SmolLM2: edits and summaries", smollm2_path(), EDITS, 160),
            Text("SmolLM2: free", smollm2_path(), FREE, 100),
        ]
        cases = [(float(ms), small) for ms in arguments.round_trips_ms.split(",")]
        for round_trip_ms, texts in [*cases, (0.0, smol), (SMOL_ROUND_TRIP_MS, smol)]:
            with ExitStack() as stack:
                routers = {way: router_of(stack, way, round_trip_ms) for way in WAYS}
                for text in texts:
                    without, drafting, accepted = compared(routers, text, arguments.rounds)
                    ratios[round_trip_ms, text.name] = drafting / without
                    print(
                        f"{round_trip_ms:g} ms, {text.name}: {drafting / without:.2f}", file=sys.stderr, flush=True
                    )
                    limit = f"{1000 / (WORKERS * round_trip_ms):.0f}" if round_trip_ms else "-"
                    table.add(round_trip_ms, text.name, without, drafting, drafting / without, accepted, limit)
                if round_trip_ms == 0 and arguments.questions:
                    add_differences(report, routers, MORE[: arguments.questions])
    add_goals(report, ratios)
    return report


def add_goals(report: Report, ratios: dict[tuple[float, str], float]) -> None:
    """The goals that these rows reach or miss."""
    edits = "SmolLM2: edits and summaries"
    for round_trip_ms, name, least in (
        (SMOL_ROUND_TRIP_MS, "repetitive", 5.0),
        (SMOL_ROUND_TRIP_MS, edits, 2.0),
        (0.0, edits, 1.3),
    ):
        if (round_trip_ms, name) in ratios:
            ratio = ratios[round_trip_ms, name]
            report.goal(f"{name}, {round_trip_ms:g} ms: at least {least:g} times", ratio, ratio >= least)
    slowest = min(ratios.values())
    report.goal("nowhere below 0.97 times", slowest, slowest >= 0.97)


def router_of(stack: ExitStack, way: str, round_trip_ms: float) -> HybridRouter:
    """A router with this speculation, over its own workers."""
    endpoints = []
    for _ in range(WORKERS):
        endpoint = stack.enter_context(running_worker()).endpoint
        endpoints.append(
            stack.enter_context(delayed(endpoint, round_trip_ms / 1000)) if round_trip_ms else endpoint
        )
    return stack.enter_context(
        HybridRouter(
            rpc_backends=endpoints,
            num_rpc_backends=WORKERS,
            auto_discover_rpc=False,
            distributed_threshold_params=1e-6,
            layer_strategy="even",
            context_tokens=2048,
            speculation=way,
        )
    )


def compared(routers: dict[str, HybridRouter], text: Text, rounds: int) -> tuple[float, float, str]:
    """Tokens per second without and with drafts, and how many drafted tokens were accepted."""
    speeds: dict[str, dict[str, list[float]]] = {way: {} for way in routers}
    drafted = accepted = 0
    chats = {question: first_turn(routers["off"], text, question) for question in text.questions}
    for way in routers:
        routers[way].preload(text.model)
    for position, (question, chat) in enumerate(chats.items()):
        ways = list(routers) if position % 2 == 0 else list(reversed(routers))
        for way in in_turns(ways, rounds):
            answer = routers[way].route_request(text.model, chat, temperature=0, max_tokens=text.max_tokens)
            if answer.routing["tokens_per_s"]:
                speeds[way].setdefault(question, []).append(float(answer.routing["tokens_per_s"]))
            drafted += answer.routing["drafted_tokens"] or 0
            accepted += answer.routing["accepted_tokens"] or 0
    for router in routers.values():
        router.unload(text.model)  # its workers are needed for the next model
    means = {way: geometric_mean(median(values) for values in speeds[way].values()) for way in routers}
    return means["off"], means["auto"], f"{accepted} of {drafted}" if drafted else "-"


def first_turn(router: HybridRouter, text: Text, question: str) -> Messages:
    """The messages with which a question is asked."""
    asked = {"role": "user", "content": question}
    if not text.repeats:
        return [asked]
    answer = router.route_request(text.model, [asked], temperature=0, max_tokens=text.max_tokens)
    return [asked, {"role": "assistant", "content": answer.text}, asked]


def add_differences(report: Report, routers: dict[str, HybridRouter], questions: Sequence[str]) -> None:
    """Count greedy answers that differ with drafts."""
    differing = drafting = 0
    for question in questions:
        answers = {
            way: router.route_request(smollm2_path(), question, temperature=0, max_tokens=120)
            for way, router in routers.items()
        }
        differing += answers["off"].text != answers["auto"].text
        drafting += bool(answers["auto"].routing["accepted_tokens"])
    report.table("Greedy answers of SmolLM2 with and without drafts", "answers", "with drafts", "different").add(
        len(questions), drafting, differing
    )


if __name__ == "__main__":
    sys.exit(run(main))
