"""What sharding and the router cost, measured side by side in one run, as ratios.

    python benchmarks/sharding.py [--rounds 15]

The built-in demo model answers the same question on a local llama-server and over 1, 2 and 3 loopback workers.
Layouts take turns (A B C D A B C D ...), so that drift of the machine cancels. The model is tiny, so what a layer
costs is small and what a hop costs is not: for a large model the ratios are closer to 1.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack
from statistics import median

from sollol_nb.chat.messages import check_messages
from sollol_nb.runtime.io_loop import run_blocking
from sollol_nb.sync_wrapper import HybridRouter

QUESTION = "Tell me everything about sharding."
MAX_TOKENS = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    with ExitStack() as stack:
        layouts = {
            "local": ("demo", stack.enter_context(HybridRouter())),
            **{
                f"{count} worker{'s' * (count > 1)}": (
                    "demo:sharded",
                    stack.enter_context(
                        HybridRouter(num_rpc_backends=count, auto_setup_rpc=True, auto_discover_rpc=False)
                    ),
                )
                for count in (1, 2, 3)
            },
        }
        speeds: dict[str, list[float]] = {name: [] for name in layouts}
        for model, router in layouts.values():
            ask(router, model)  # loads the model, warms the slot's prompt cache
        for _ in range(rounds):
            for name, (model, router) in layouts.items():
                speeds[name].append(ask(router, model))
        print(f"{'layout':<12} {'tokens/s':>9} {'ratio to local':>15}")
        for name, values in speeds.items():
            ratio = median(values) / median(speeds["local"])
            print(f"{name:<12} {median(values):>9.0f} {ratio:>15.2f}")
        model, router = layouts["3 workers"]
        direct, routed = overhead(router, model, rounds * 4)
        print(
            f"\none token over 3 workers: {direct:.2f} ms directly from llama-server, {routed:.2f} ms through the "
            f"blocking router: ratio {routed / direct:.2f}"
        )


def ask(router: HybridRouter, model: str) -> float:
    """Tokens per second of one answer, as the engine measured them."""
    answer = router.route_request(model, QUESTION, temperature=0, max_tokens=MAX_TOKENS)
    return float(answer.routing["tokens_per_s"])


def overhead(router: HybridRouter, model: str, rounds: int) -> tuple[float, float]:
    """Median milliseconds of a one-token answer: from the coordinator directly, and through the router."""
    coordinator = router.coordinator
    assert coordinator is not None
    messages = check_messages("Hello!")

    async def direct_answer() -> None:
        async for _ in coordinator.stream(coordinator.answer(messages, {"max_tokens": 1, "temperature": 0})):
            pass

    direct: list[float] = []
    routed: list[float] = []
    for _ in range(rounds):
        began = time.perf_counter()
        run_blocking(direct_answer())
        direct.append((time.perf_counter() - began) * 1000)
        began = time.perf_counter()
        router.route_request(model, "Hello!", temperature=0, max_tokens=1)
        routed.append((time.perf_counter() - began) * 1000)
    return median(direct), median(routed)


if __name__ == "__main__":
    main()
