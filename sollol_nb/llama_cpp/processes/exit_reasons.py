"""Why an engine ended, in words: read from the last lines of its log."""

from __future__ import annotations

import re
from collections.abc import Sequence

PORT_TAKEN = "the port is taken by another program"
WORKER_LOST = "a worker was lost; see %sollol_cluster for which, and start it again"
BAD_MODEL = "the model file is damaged or not one that llama.cpp loads"
_REASONS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), words)
    for pattern, words in (
        (r"couldn't bind|bind.*(failed|in use)", PORT_TAKEN),
        (
            r"RPC server version mismatch",
            "a worker speaks another RPC protocol; use one llama.cpp build everywhere",
        ),
        (  # an abort may come before the line that tells the version is written
            r"RPC handshake failed",
            "a worker was lost or speaks another RPC protocol; see %sollol_cluster for which",
        ),
        (
            r"Remote RPC server crashed|failed to connect to \S+:\d+|RPC transport",
            WORKER_LOST,
        ),
        (
            r"out of memory|failed to allocate|unable to allocate|bad_alloc|cannot allocate memory",
            "out of memory; add workers, use a smaller context, or a smaller model",
        ),
        (
            r"not within the file bounds|invalid magic|model is corrupted|unknown model architecture|"
            r"error loading model|failed to load model",
            BAD_MODEL,
        ),
        (r"error: (invalid argument|unknown argument)", "this llama.cpp build does not know one of our flags"),
    )
)


def exit_reason(tail: Sequence[str]) -> str | None:
    """Why an engine ended, from its last log lines, most telling first; None when they do not say."""
    text = "\n".join(tail)
    for pattern, words in _REASONS:
        if pattern.search(text):
            return words
    return None


def describe_exit(code: int | None) -> str:
    """An exit code as people say it."""
    if code is None:
        return "its supervisor was lost"
    return f"signal {-code}" if code < 0 else f"exit code {code}"
