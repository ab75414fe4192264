"""The record of one request: its times while it runs, its latency row and `_routing` when it ends."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterable, Mapping
from typing import Any

from sollol_nb.chat.chunk import CACHED, DRAFTS, DROPPED, RESTARTED, Chunk, Failover, Routing
from sollol_nb.chat.completion import Completion
from sollol_nb.latency.schema import LatencyRow
from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.models.files import names_file
from sollol_nb.models.routing import Route
from sollol_nb.text.short_names import short_name

MIN_SINGLE_TOKENS = 8
"""How many tokens must have been computed alone, so that their mean is the time of one."""


class RequestRecord:
    """What happened to one request, and when (by `time.perf_counter`).

    Attributes:
        model: as the request names it.
        name: the model's name for display.
        priority: of the request; None until it has been checked.
        answer_id: of the answer in the journal; "" where it is not journaled.
        router_overhead_ms: the router's part of the time before the request was sent to its backend.
    """

    def __init__(self, model: str, *, text: str = "") -> None:
        self.model = model
        self.name = short_name(model)
        self.backend = ""
        self.reason = ""
        self.model_path = ""
        self._route_reason = ""
        self.note = ""
        self.server_url = ""
        self.layout = ""
        self.priority: int | None = None
        self.plan: dict[str, Any] | None = None
        self.placement_differences: list[str] = []
        self.queue_ms: float | None = None
        self.load_ms: float | None = None
        self.loaded_by = ""
        self.router_overhead_ms: float | None = None
        self.failovers: list[Failover] = []
        self.text = text
        self.drafted_tokens: int | None = None
        self.accepted_tokens: int | None = None
        self.dropped = ""
        self.answer_id = ""
        self.cached_tokens: int | None = None
        self.restored_tokens: int | None = None
        self.context_note = ""
        self._sent: float | None = None
        self._left_ms = 0.0  # spent at a backend that could not answer
        self._first: float | None = None
        self._last: float | None = None
        self._lost_at: float | None = None
        self._final: Mapping[str, Any] = {}
        self.start()

    def start(self) -> None:
        """Start the clock (again): the request begins now."""
        self._started_at = time.time()
        self._began = time.perf_counter()

    def set_route(self, route: Route) -> None:
        """Note the route that the request takes."""
        self.backend, self.reason = route.backend, route.reason
        self._route_reason = route.reason
        self.model_path = str(route.model_path) if route.model_path and names_file(route.model) else ""

    def set_node(self, node_routing: Mapping[str, Any]) -> None:
        """Note the Ollama node that answers, and its times so far, from the `_routing` of its chunk."""
        self.server_url = str(node_routing.get("node") or "")
        self.queue_ms = node_routing.get("queue_ms")
        self.load_ms = node_routing.get("load_ms") or None
        self.failovers = list(node_routing.get("failovers") or ())

    def set_gateway_routing(self, routing: Mapping[str, Any], earlier: Iterable[Failover]) -> None:
        """Note where a gateway has the request answered, from the `_routing` of its chunk.

        Args:
            earlier: failovers before this one of the gateway's answers.
        """
        self.backend, self.reason = str(routing.get("backend") or ""), str(routing.get("reason") or "")
        self.server_url = str(routing.get("coordinator_url") or routing.get("node_url") or "")
        self.model_path, self.note = str(routing.get("model_path") or ""), str(routing.get("note") or "")
        self.layout, self.loaded_by = str(routing.get("layout") or ""), str(routing.get("loaded_by") or "")
        self.plan, self.dropped = routing.get("plan"), str(routing.get("dropped") or "")
        self.placement_differences = list(routing.get("placement_differences") or ())
        self.queue_ms, self.load_ms = routing.get("queue_ms"), routing.get("load_ms")
        self.drafted_tokens, self.accepted_tokens = routing.get("drafted_tokens"), routing.get("accepted_tokens")
        self.cached_tokens, self.restored_tokens = routing.get("cached_tokens"), routing.get("restored_tokens")
        self.context_note = str(routing.get("context_note") or "")
        self.router_overhead_ms = routing.get("router_overhead_ms")
        self.failovers = [*earlier, *(routing.get("failovers") or ())]

    def add_fallback(self, what: str) -> None:
        """Note that a backend could not answer, and that another one answers from the beginning."""
        self._add_failover(what, 0, continued=False)
        self._left_ms = (time.perf_counter() - (self._sent or self._began)) * 1000
        self.failovers[-1]["cost_ms"] = self._left_ms

    def set_coordinator(self, coordinator: Coordinator) -> None:
        """Note the coordinator on which the request runs now."""
        plan = coordinator.plan
        self.server_url = coordinator.base_url
        self.plan = plan.as_dict() if plan else None
        self.layout = "/".join(map(str, plan.unit_counts)) if plan else ""
        self.placement_differences = coordinator.placement_differences
        if coordinator.settings.speculation.is_on and self.drafted_tokens is None:
            self.drafted_tokens = self.accepted_tokens = 0
        why_alone = plan.reasons[0] if plan and plan.reasons and not plan.workers else ""
        self.reason = "; ".join(filter(None, (self._route_reason, why_alone, coordinator.compromise)))

    def add_failover(self, what: str, tokens_before: int) -> None:
        """Note that the coordinator was lost after so many tokens, and that the answer will be continued."""
        self._lost_at = self._last or self._sent or self._began
        self._add_failover(what, tokens_before, continued=True)

    def _add_failover(self, what: str, tokens_before: int, *, continued: bool) -> None:
        self.failovers.append(
            {
                "what": what,
                "when": time.time(),
                "cost_ms": None,
                "continued": continued,
                "tokens_before": tokens_before,
                "lost_workers": [],
            }
        )

    def set_lost_workers(self, workers: Iterable[str]) -> None:
        """Note which workers were lost in the last failover."""
        self.failovers[-1]["lost_workers"] = sorted(workers)

    def set_recovery(self, recovery: str) -> None:
        """Note how the answer continued after its coordinators were lost: `exact` or `fast`."""
        for failover in self.failovers:
            if failover["continued"]:
                failover["recovery"] = recovery

    def has_too_many_failovers(self, most: int, most_without_a_token: int) -> bool:
        """Whether coordinators were lost too often, or too often without a new token in between."""
        counts = [failover["tokens_before"] for failover in self.failovers if failover["continued"]]
        return len(counts) > most or len(counts) - len(set(counts)) >= most_without_a_token

    def set_sent(self) -> None:
        """Note that the request is sent now: to Ollama before it waits and the model loads, else after that."""
        self._sent = time.perf_counter()
        waited_ms = (self.queue_ms or 0.0) + (self.load_ms or 0.0) + self._left_ms
        self.router_overhead_ms = max(0.0, (self._sent - self._began) * 1000 - waited_ms)

    def add_chunk(self, chunk: Chunk) -> None:
        """Note a chunk of the answer. The first one after a failover sets its cost: the time since the last chunk
        of the lost coordinator."""
        self._last = time.perf_counter()
        if self._lost_at is not None:
            cost_ms = (self._last - self._lost_at) * 1000
            for failover in self.failovers:
                if failover["cost_ms"] is None:
                    failover["cost_ms"] = round(cost_ms, 3)
            self._lost_at = None
        message = chunk.get("message") or {}
        if self._first is None and (message.get("content") or message.get("thinking") or chunk.get("done")):
            self._first = self._last
        self.text = ("" if chunk.get(RESTARTED) else self.text) + (message.get("content") or "")
        self.dropped = chunk.get(DROPPED) or self.dropped
        if CACHED in chunk:
            cached = chunk[CACHED]
            self.cached_tokens, self.restored_tokens = cached["cached_tokens"], cached["restored_tokens"]
            self.context_note = cached["context_note"]
        if chunk.get("done"):
            self._final = chunk
            self._keep_cached_within(chunk.get("prompt_eval_count"))
            if self.drafted_tokens is not None and DRAFTS in chunk:
                self.drafted_tokens, self.accepted_tokens = chunk[DRAFTS]["drafted"], chunk[DRAFTS]["accepted"]

    def _keep_cached_within(self, prompt_tokens: int | None) -> None:
        """Count only tokens of the prompt: one that continues an answer has the answer's cached too."""
        if prompt_tokens is not None and self.cached_tokens is not None:
            self.cached_tokens = min(self.cached_tokens, prompt_tokens)
            self.restored_tokens = min(self.restored_tokens or 0, self.cached_tokens)

    @property
    def duration_ms(self) -> float:
        """From the request to now."""
        return (time.perf_counter() - self._began) * 1000

    @property
    def ttft_ms(self) -> float | None:
        """From the request to the first token, with waiting and loading; None before it."""
        return None if self._first is None else (self._first - self._began) * 1000

    @property
    def completion_tokens(self) -> int | None:
        """Tokens of the answer; None until it is complete."""
        count = self._final.get("eval_count")
        return count if isinstance(count, int) else None

    @property
    def tokens_per_s(self) -> float | None:
        """Generation speed as the engine measured it; None for answers of one token or none."""
        count, nanoseconds = self._final.get("eval_count"), self._final.get("eval_duration")
        # The first token comes with the prompt, and the time begins after it.
        return (count - 1) / nanoseconds * 1e9 if count and count > 1 and nanoseconds else None

    @property
    def context_tokens(self) -> float | None:
        """How many tokens each generated one was behind, in the mean; None if unknown."""
        prompt, answer = self._final.get("prompt_eval_count"), self._final.get("eval_count")
        return None if prompt is None or answer is None else prompt + answer / 2

    @property
    def token_ms(self) -> float | None:
        """Milliseconds that the engine took for a token that it computed alone; None if unknown, and for an answer
        of several engines. With drafts that is not the inverse of `tokens_per_s`."""
        if any(failover["continued"] for failover in self.failovers):
            return None
        if self.drafted_tokens is None:
            return 1000 / self.tokens_per_s if self.tokens_per_s else None
        drafts = self._final.get(DRAFTS)
        if not drafts or drafts["single_tokens"] < MIN_SINGLE_TOKENS:
            return None
        return float(drafts["single_ms"] / drafts["single_tokens"])

    def draft_results(self) -> dict[str, float] | None:
        """What the engine generated, in which time, with which drafts; None without drafts, and before the end."""
        drafts, tokens = self._final.get(DRAFTS), self._final.get("eval_count")
        if self.drafted_tokens is None or not drafts or not tokens:
            return None
        return {**drafts, "tokens": tokens, "ms": self._final["eval_duration"] / 1e6}

    def partial(self) -> Completion:
        """The completion so far."""
        message = {"role": "assistant", "content": self.text}
        return Completion(
            model=self.model, message=message, done=False, done_reason="error", _routing=self.routing()
        )

    def routing(self) -> Routing:
        """The `_routing` entry of the answer."""
        return {
            "backend": self.backend,
            "reason": self.reason,
            "model_path": self.model_path,
            "note": self.note,
            "duration_ms": round(self.duration_ms, 3),
            "coordinator_url": self.server_url if self.backend.startswith("llama.cpp") else None,
            "node_url": None if self.backend.startswith("llama.cpp") else self.server_url,
            "plan": self.plan,
            "placement_differences": self.placement_differences,
            "layout": self.layout,
            "queue_ms": self.queue_ms,
            "load_ms": self.load_ms,
            "loaded_by": self.loaded_by,
            "ttft_ms": self.ttft_ms,
            "tokens_per_s": self.tokens_per_s,
            "router_overhead_ms": self.router_overhead_ms,
            "failovers": copy.deepcopy(self.failovers),
            "drafted_tokens": self.drafted_tokens,
            "accepted_tokens": self.accepted_tokens,
            "dropped": self.dropped,
            "answer_id": self.answer_id,
            "cached_tokens": self.cached_tokens,
            "restored_tokens": self.restored_tokens,
            "context_note": self.context_note,
        }

    def row(self, status: str, error: str = "") -> LatencyRow:
        """The latency row, as of now."""
        return LatencyRow(
            started_at=self._started_at,
            model=str(self.model),  # a text also where the request had something else
            backend=self.backend,
            layout=self.layout,
            place=self.server_url,
            queue_ms=self.queue_ms,
            load_ms=self.load_ms,
            ttft_ms=self.ttft_ms,
            total_ms=self.duration_ms,
            prompt_tokens=self._final.get("prompt_eval_count"),
            completion_tokens=self.completion_tokens,
            tokens_per_s=self.tokens_per_s,
            router_overhead_ms=self.router_overhead_ms,
            failovers=len(self.failovers),
            status=status,
            error=error,
            partial_text="" if status == "ok" else self.text,
            priority=self.priority,
            done_reason=self._final.get("done_reason") or "",
            predicted_ms_per_token=(self.plan or {}).get("predicted_token_ms"),
            failover_details=json.dumps(self.failovers) if self.failovers else "",
            drafted_tokens=self.drafted_tokens,
            accepted_tokens=self.accepted_tokens,
            cached_tokens=self.cached_tokens,
            restored_tokens=self.restored_tokens,
        )
