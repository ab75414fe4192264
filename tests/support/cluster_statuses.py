"""Workers, layers and coordinators as a status has them, with the values that a test needs."""

from __future__ import annotations

from typing import Any

from sollol_nb.cluster.coordinator_status import CoordinatorStatus, LayerSegment
from sollol_nb.llama_cpp.workers.probe import Probe, ProbeOutcome
from sollol_nb.llama_cpp.workers.status import WorkerStatus
from sollol_nb.text.palette import SEGMENTS

GIB, MIB = 2**30, 2**20


def worker(number: int, state: str = "free", detail: str = "", **more: Any) -> WorkerStatus:
    endpoint = more.pop("endpoint", f"10.0.0.{number}:50052")
    probe = Probe(
        endpoint=endpoint,
        outcome=ProbeOutcome.FREE,
        detail="free",
        protocol=(7, 0, 3),
        device_free_bytes=(3 * GIB,),
        total_bytes=4 * GIB,
        round_trip_ms=0.4567,
    )
    values = {"held_by": None, "probe": probe, "is_local": False} | more
    return WorkerStatus(endpoint=endpoint, state=state, detail=detail or state, **values)


def segment(endpoint: str, layers: str, units: int, **more: Any) -> LayerSegment:
    values: dict[str, Any] = {
        "actual_units": units,
        "weight_bytes": 2 * MIB,
        "actual_weight_bytes": 3 * MIB,
        "kv_bytes": MIB,
        "share": units / 10,
        "color": SEGMENTS[0],
    }
    return LayerSegment(endpoint=endpoint, layers=layers, units=units, **(values | more))


def coordinator(*segments: LayerSegment, **more: Any) -> CoordinatorStatus:
    values: dict[str, Any] = {
        "model": "llama3.1:70b",
        "note": "",
        "url": "http://127.0.0.1:18080",
        "log_path": "/tmp/log",
        "strategy": "memory_aware",
        "context_tokens": 8192,
        "running": 1,
        "waiting": 2,
        "slots": 4,
        "uptime_s": 9.0,
        "load_ms": 1250.0,
        "segments": segments,
        "differences": (),
    }
    return CoordinatorStatus(**(values | more))
