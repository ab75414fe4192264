"""Models, workers and shards for layer plans."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sollol_nb.gguf.facts import ModelFacts
from sollol_nb.layers.plan import Shard
from sollol_nb.layers.strategies import WorkerCapacity

GB = 10**9


def model(layer_bytes: Sequence[int], output_bytes: int, kv_per_token: int = 0) -> ModelFacts:
    """Facts of a model with these weights; narrow, so that the reserve is small."""
    return ModelFacts(
        path=Path("model.gguf"),
        architecture="llama",
        parameter_count=0,
        file_bytes=0,
        layer_count=len(layer_bytes),
        layer_bytes=tuple(layer_bytes),
        output_bytes=output_bytes,
        context_length=4096,
        embedding_length=64,
        feed_forward_width=128,
        vocabulary_size=1000,
        layer_kv_bytes_per_token=(kv_per_token,) * len(layer_bytes),
    )


def workers(*free_bytes: int, domains: str | None = None) -> list[WorkerCapacity]:
    """Workers `w0:1`, `w1:1`, ...; `domains` names the memory of each by a letter, `.` for its own."""
    letters = domains or "." * len(free_bytes)
    return [
        WorkerCapacity(f"w{n}:1", free, free, memory_domain=None if letter == "." else letter)
        for n, (free, letter) in enumerate(zip(free_bytes, letters, strict=True))
    ]


TWELVE = model([GB] * 12, GB)
"""Twelve layers and the output layer, all of the same size."""


def shard(endpoint: str, first: int, count: int, *, output: bool = False) -> Shard:
    """A worker's layers, without sizes."""
    return Shard(
        endpoint=endpoint,
        first_layer=first,
        layer_count=count,
        has_output=output,
        weight_bytes=0,
        kv_bytes=0,
        reserve_bytes=0,
        free_bytes=0,
    )
