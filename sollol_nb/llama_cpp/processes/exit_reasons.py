"""Why an engine ended, read from the last lines of its log."""

from __future__ import annotations

import re
from collections.abc import Sequence

PORT_TAKEN = "another program uses the port"
WORKER_LOST = "a worker was lost; %sollol_cluster shows which one; start it again"
BAD_MODEL = "the model file is damaged, or llama.cpp does not support it"
_REASONS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), reason)
    for pattern, reason in (
        (r"couldn't bind|bind.*(failed|in use)", PORT_TAKEN),
        (
            r"RPC server version mismatch",
            "a worker speaks another RPC protocol; use one llama.cpp build everywhere",
        ),
        (  # the engine may abort before it has logged the version
            r"RPC handshake failed",
            "a worker was lost or speaks another RPC protocol; %sollol_cluster shows which one",
        ),
        (
            r"Remote RPC server crashed|failed to connect to \S+:\d+|RPC transport",
            WORKER_LOST,
        ),
        (
            r"out of memory|failed to allocate|unable to allocate|bad_alloc|cannot allocate memory",
            "out of memory; add workers, or use a smaller context or a smaller model",
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
    """Why an engine ended, by the first pattern that its last log lines match; None if none matches."""
    text = "\n".join(tail)
    for pattern, reason in _REASONS:
        if pattern.search(text):
            return reason
    return None


def describe_exit(code: int | None) -> str:
    """An exit code as text: `signal 9`, `exit code 1`, or that the supervisor was lost."""
    if code is None:
        return "its supervisor was lost"
    return f"signal {-code}" if code < 0 else f"exit code {code}"
