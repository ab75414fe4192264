"""From the death of a worker in mid-answer to the answer's next token.

    python benchmarks/failover.py [--rounds 5] [--models demo smollm2]

One of three workers is killed while an answer streams. The router notices it, starts a coordinator over the other
two, and continues the answer. Of that time, loading the model and processing the known tokens are the engine's
part: a bare llama-server with the same two workers is started in the same round, and processes as many tokens up
to the first new one. What is left is the router's part: noticing the loss (llama-server takes a while to end
itself), finding free workers, planning, and continuing.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median

import httpx
from clusters import answers, bare_server, running_worker
from common import MODELS, Report, add_models, isolated, parser_of, run, seconds_of, wait_until

from sollol_nb.settings.endpoints import parse_endpoint
from sollol_nb.sync_wrapper import HybridRouter

QUESTION = "Tell me everything about sharding."
KILLED_AFTER, MAX_TOKENS = 24, 48  # chunks, tokens
LIMIT_S = 60.0
WORKERS = 3


def main() -> Report:
    """Measure each model."""
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    add_models(parser)
    arguments = parser.parse_args()
    report = Report()
    table = report.table(
        f"A worker killed after {KILLED_AFTER} tokens, medians",
        *("model", "to the next token, s", "bare: load, s", "bare: known tokens, s", "the router's part, s"),
    )
    for name in arguments.models:
        path = MODELS[name]()
        with isolated():
            found = [one_death(path) for _ in range(arguments.rounds)]
        own_s = median(whole_s - load_s - prompt_s for whole_s, load_s, prompt_s in found)
        table.add(name, *(median(column) for column in zip(*found, strict=True)), own_s)
    return report


def one_death(model: Path) -> tuple[float, float, float]:
    """Seconds from the death to the next token; and what a bare llama-server takes to load, and for the tokens."""
    with ExitStack() as stack:
        workers = [stack.enter_context(running_worker()) for _ in range(WORKERS)]
        with HybridRouter(
            rpc_backends=[worker.endpoint for worker in workers],
            num_rpc_backends=WORKERS,
            auto_discover_rpc=False,
            keep_alive=0,
            layer_strategy="even",
            speculation="off",  # each chunk is one token
        ) as router:
            stream = router.stream(
                str(model), QUESTION, backend="sharded", temperature=0, max_tokens=MAX_TOKENS, timeout=LIMIT_S
            )
            died, next_s, known = 0.0, 0.0, 0
            for number, chunk in enumerate(stream):
                if number == KILLED_AFTER:
                    workers[-1].process.kill()
                    died = time.perf_counter()
                elif died and not next_s and chunk.get("_routing", {}).get("failovers"):
                    next_s = time.perf_counter() - died
                    known = number  # of the answer, of which some came after the death
                last = chunk
            if not next_s:
                raise RuntimeError(f"the answer was complete before the death of a worker was noticed: {last}")
            known += last["prompt_eval_count"]
        left = [worker.endpoint for worker in workers[:-1]]
        for endpoint in left:
            wait_until(partial(answers, parse_endpoint(endpoint)[1]), f"the worker {endpoint}")
        with bare_server(model, left, "-c", "8192", "-np", "4", "--kv-unified", "--cache-ram", "0") as server:
            body = {"prompt": [10] * known, "n_predict": 1, "temperature": 0}
            headers = {"Authorization": f"Bearer {server.key}"}
            ask = partial(httpx.post, f"{server.url}/completion", json=body, headers=headers, timeout=LIMIT_S)
            return next_s, server.ready_s, seconds_of(ask)


if __name__ == "__main__":
    sys.exit(run(main))
