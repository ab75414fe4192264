"""The weights that workers of this machine keep, for `sollol-nb weights` and the doctor."""

from __future__ import annotations

from sollol_nb.llama_cpp.weights import cache
from sollol_nb.settings import config
from sollol_nb.text.tables import format_bytes


def describe() -> str:
    """How much is kept, and may be, as one line."""
    use = cache.measure()
    kept = f"{format_bytes(use.used_bytes)} kept by workers in {use.folder}"
    if not config.default("tensor_cache_gb"):
        return f"{kept}; no more are kept, since tensor_cache_gb = 0"
    if use.free_bytes < cache.MIN_FREE_BYTES:
        return f"{kept}; no more are kept, since only {format_bytes(use.free_bytes)} of the disk are free"
    return f"{kept}, of at most {format_bytes(use.limit_bytes)} (setting tensor_cache_gb; safe to delete)"


def forget() -> str:
    """Delete them, so that the next load sends them again; one line about it."""
    return f"deleted {format_bytes(cache.clear())} of weights"
