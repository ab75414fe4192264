"""Why an engine ended, read from the last lines of its log."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence

PORT_TAKEN = "another program uses the port"
WORKER_LOST = "a worker was lost; %sollol_cluster shows which one; start it again"
BAD_TEMPLATE = "llama.cpp cannot use the model's chat template; use another GGUF file of the model"
ILLEGAL_INSTRUCTION = (
    "this llama.cpp build uses processor instructions that are not available here; build it on this machine with "
    "`sollol-nb install --force`, or run the model over workers (backend=sharded)"
)
CRASHED = "llama.cpp crashed; try it over workers (backend=sharded), another GGUF file, or another llama.cpp build"
BAD_MODEL = "the model file is damaged, or llama.cpp does not support it"
_REASONS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), reason)
    for pattern, reason in (
        (r"couldn't bind|bind.*(failed|in use)", PORT_TAKEN),
        (r"chat template parsing error|failed to initialize chat template", BAD_TEMPLATE),
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

_TEMPLATE_PROBLEM = re.compile(r"^Error: (.+)|Parser Error: (.+)", re.MULTILINE)
_DEBUG_LINE, _ERROR_LINE = re.compile(r"^\S*[\d.]+ D "), re.compile(r"^\S*[\d.]+ E ")
# Not SIGABRT, with which llama.cpp ends when a worker is lost, nor SIGKILL, which comes from outside.
_CRASH_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGILL", "SIGSEGV", "SIGBUS", "SIGFPE") if hasattr(signal, name)
)


def exit_reason(tail: Sequence[str]) -> str | None:
    """Why an engine ended, by the first pattern that its last log lines match; None if none matches."""
    text = "\n".join(tail)
    for pattern, reason in _REASONS:
        if pattern.search(text):
            return reason
    return None


def template_problem(tail: Sequence[str]) -> str:
    """What is wrong with the chat template, in llama.cpp's words; "" if the log does not say it."""
    found = _TEMPLATE_PROBLEM.search("\n".join(tail))
    return (found[1] or found[2]).strip() if found is not None else ""


def crash_reason(code: int | None) -> str | None:
    """Why an engine crashed that was ended by a signal of its own program; None if it was not."""
    if code is None or -code not in _CRASH_SIGNALS:
        return None
    return ILLEGAL_INSTRUCTION if -code == getattr(signal, "SIGILL", None) else CRASHED


def last_lines(tail: Sequence[str]) -> str:
    """The last lines of a log that say something: errors if there are any, and no debug lines."""
    lines = [line for line in tail if not _DEBUG_LINE.match(line)]
    errors = [line for line in lines if _ERROR_LINE.match(line)]
    return "; ".join((errors or lines)[-2:]) or "its log is empty"


def describe_exit(code: int | None) -> str:
    """An exit code as text: `signal 9`, `exit code 1`, or that the supervisor was lost."""
    if code is None:
        return "its supervisor was lost"
    return f"signal {-code}" if code < 0 else f"exit code {code}"
