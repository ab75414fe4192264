"""Parts of layer plans."""

from __future__ import annotations

from sollol_nb.layers.plan import Shard


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
