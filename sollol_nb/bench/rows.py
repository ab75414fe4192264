"""The metrics of a benchmark, and the row that each measured request becomes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sollol_nb.chat.completion import Completion


@dataclass(frozen=True, slots=True)
class Metric:
    """A measured quantity: its title for tables and plots, and whether a higher value is better."""

    title: str
    higher_is_better: bool = False


METRICS: dict[str, Metric] = {
    "ttft_ms": Metric("first token, ms"),
    "prompt_tokens_per_s": Metric("prompt, tokens/s", True),
    "tokens_per_s": Metric("generation, tokens/s", True),
    "total_ms": Metric("whole answer, ms"),
    "throughput_tokens_per_s": Metric("throughput, tokens/s", True),
    "queue_ms": Metric("queue, ms"),
    "router_overhead_ms": Metric("router overhead, ms"),
}
"""Metrics of a summary. `throughput_tokens_per_s` belongs to a round: all its generated tokens, divided by the
time from the start of its first request to the end of its last one. The others belong to a request, see
`BenchRow`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRow:
    """One measured request. None where it does not apply, or the request failed.

    Attributes:
        case: the case's label.
        model, layout, strategy, concurrency: the case; `strategy` is "" where the router's own is used.
        round, client, prompt: numbers from 0; `prompt` is the position in the settings' prompts.
        start_s: when it was sent, in seconds since the start of the measurement.
        backend: the backend that ran it, such as `llama.cpp-distributed`.
        layers: units per worker as planned, such as `5/4/4`; "" where nothing is sharded.
        workers: these workers by their names, else by their endpoints, separated by spaces.
        queue_ms: time in the queue of its coordinator or node.
        load_ms: time that it waited for a model load; a request that did is left out of the summary.
        ttft_ms: from the request to its first token.
        total_ms: from the request to its last token.
        prompt_tokens, completion_tokens: tokens of the prompt and of the answer.
        prompt_tokens_per_s: speed of prompt processing, as the engine measured it.
        tokens_per_s: speed of generation, as the engine measured it; None for one token or less.
        router_overhead_ms: part of `ttft_ms` spent in the router itself.
        failovers: how often it continued on another coordinator or node.
        error: why it failed, or "".
    """

    case: str
    model: str
    layout: str
    strategy: str
    concurrency: int
    round: int
    client: int
    prompt: int
    start_s: float
    backend: str = ""
    layers: str = ""
    workers: str = ""
    queue_ms: float | None = None
    load_ms: float | None = None
    ttft_ms: float | None = None
    total_ms: float | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_per_s: float | None = None
    tokens_per_s: float | None = None
    router_overhead_ms: float | None = None
    failovers: int = 0
    error: str = ""


_TEXTS = ("case", "model", "layout", "strategy", "backend", "layers", "workers", "error")
_WHOLE = ("concurrency", "round", "client", "prompt", "prompt_tokens", "completion_tokens", "failovers")
DTYPES = dict.fromkeys(_TEXTS, "string") | dict.fromkeys(_WHOLE, "Int64")
"""The types of columns of the frame; all others are float64."""


def measurements_of(completion: Completion) -> dict[str, Any]:
    """The measurements that a completion carries, by the names of `BenchRow`."""
    routing = completion.routing
    shards = (routing.get("plan") or {}).get("shards", ())
    prompt_tokens, prompt_ns = completion.get("prompt_eval_count"), completion.get("prompt_eval_duration")
    return {
        "backend": routing.get("backend", ""),
        "layers": routing.get("layout") or "",
        "workers": " ".join(shard.get("name") or shard["endpoint"] for shard in shards),
        "queue_ms": routing.get("queue_ms"),
        "load_ms": routing.get("load_ms"),
        "ttft_ms": routing.get("ttft_ms"),
        "total_ms": routing.get("duration_ms"),
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion.get("eval_count"),
        "prompt_tokens_per_s": prompt_tokens / prompt_ns * 1e9 if prompt_tokens and prompt_ns else None,
        "tokens_per_s": routing.get("tokens_per_s"),
        "router_overhead_ms": routing.get("router_overhead_ms"),
        "failovers": len(routing.get("failovers") or ()),
    }
