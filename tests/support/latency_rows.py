"""Rows of a latency log."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from sollol_nb.latency.schema import LatencyRow

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)

FULL = LatencyRow(
    started_at=NOON.timestamp(),
    model="llama3.1:70b",
    backend="llama.cpp-distributed",
    layout="5/4/4",
    place="http://127.0.0.1:18080",
    queue_ms=1.5,
    load_ms=4000.25,
    ttft_ms=80.5,
    total_ms=900.125,
    prompt_tokens=12,
    completion_tokens=34,
    tokens_per_s=41.5,
    router_overhead_ms=0.75,
    failovers=1,
    status="ok",
    error="",
    priority=8,
    done_reason="stop",
    predicted_ms_per_token=24.5,
    failover_details='[{"what": "lost", "when": 1772366400.5, "lost_workers": ["a:1"]}]',
    drafted_tokens=40,
    accepted_tokens=18,
    cached_tokens=8,
    restored_tokens=6,
)
REFUSED = LatencyRow(
    started_at=(NOON + timedelta(hours=1)).timestamp(),
    model="caf\u00e9 '; DROP TABLE requests; --",
    backend="",
    layout="",
    place="",
    queue_ms=None,
    load_ms=None,
    ttft_ms=None,
    total_ms=0.5,
    prompt_tokens=None,
    completion_tokens=None,
    tokens_per_s=None,
    router_overhead_ms=None,
    failovers=0,
    status="error",
    error="no place has it\n\u2028",
    partial_text="half an ans\0\n",
)
HOURLY = [
    replace(
        FULL,
        started_at=(NOON + timedelta(hours=hour)).timestamp(),
        model=f"m{hour % 2}",
        backend="ollama-pool" if hour < 3 else "llama.cpp-local",
        status="error" if hour == 5 else "ok",
        total_ms=float(hour),
    )
    for hour in range(6)
]
