"""One request in the pool: what to send, and what has happened to it so far."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sollol_nb.chat.chunk import Chunk, Failover, Routing
from sollol_nb.models.names import ModelName
from sollol_nb.models.routing import OLLAMA
from sollol_nb.ollama.exchange import Deadline, NodeLostError
from sollol_nb.ollama.nodes import OllamaNode
from sollol_nb.ollama.requests import AnswerSoFar, can_continue

CHAT, GENERATE, EMBED = "/api/chat", "/api/generate", "/api/embed"


@dataclass(slots=True, kw_only=True)
class PoolRequest:
    """One request in the pool.

    Attributes:
        path: `CHAT`, `GENERATE`, `EMBED`, or another path of Ollama's API.
        body: the request's body as the caller gave it.
        priority: 1 to 10.
        deadline: its time limit.
        name: the model.
        failed: the nodes that failed it and how, by URL, in order.
        has_returned: whether it has returned to a node that had failed it; this may happen once.
        load_ms: time spent on loading the model before the request itself was sent.
    """

    path: str
    body: dict[str, Any]
    priority: int
    deadline: Deadline
    name: ModelName
    started_s: float = field(default_factory=time.monotonic)
    last_chunk_s: float = field(default_factory=time.monotonic)
    so_far: AnswerSoFar = field(default_factory=AnswerSoFar)
    failed: dict[str, NodeLostError] = field(default_factory=dict)
    failovers: list[Failover] = field(default_factory=list)
    has_returned: bool = False
    queue_ms: float = 0.0
    load_ms: float = 0.0
    ttft_ms: float | None = None

    def option(self, name: str) -> Any:
        """One of Ollama's options as the caller set it; None where it is not set."""
        return (self.body.get("options") or {}).get(name)

    def record_failover(self, node: OllamaNode, error: NodeLostError) -> None:
        """Record that a node failed this request."""
        self.failed[node.url] = error
        tokens = self.so_far.tokens
        continued = tokens > 0 and can_continue(self.path, self.body, self.so_far)
        self.failovers.append(
            {
                "what": str(error),
                "when": time.time(),
                "cost_ms": None,
                "continued": continued,
                "tokens_before": tokens,
            }
        )

    def record_chunk(self, chunk: Chunk) -> bool:
        """Record a chunk of the answer; whether it is the last."""
        now_s = time.monotonic()
        for failover in self.failovers:
            if failover["cost_ms"] is None:
                failover["cost_ms"] = (now_s - self.last_chunk_s) * 1e3
        self.last_chunk_s = now_s
        is_last = bool(chunk.get("done")) or self.path == EMBED
        if (self.so_far.add(chunk) or is_last) and self.ttft_ms is None:
            self.ttft_ms = (now_s - self.started_s) * 1e3
        return is_last

    def routing(self, node: OllamaNode, final: Mapping[str, Any]) -> Routing:
        """The `_routing` of the answer: so far, or (with the last chunk as `final`) as a whole."""
        return {
            "backend": OLLAMA,
            "node": node.url,
            "queue_ms": self.queue_ms,
            "ttft_ms": self.ttft_ms,
            "total_ms": (time.monotonic() - self.started_s) * 1e3,
            "load_ms": self.load_ms + final.get("load_duration", 0) / 1e6,
            "failovers": [failover.copy() for failover in self.failovers],
        }
