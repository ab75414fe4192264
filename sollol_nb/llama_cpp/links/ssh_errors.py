"""What the messages of the `ssh` program mean, and the command that helps, as one line."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence

SHOWN_CHARACTERS = 300
_FINGERPRINT = re.compile(r"Server host key: (\S+ \S+)")


def is_wanted(line: str) -> bool:
    """Whether a line of ssh's output at LogLevel DEBUG1 says something about an error."""
    return not line.startswith(("debug1:", "OpenSSH_")) or _FINGERPRINT.search(line) is not None


def explain(host: str, command: Sequence[str], lines: Iterable[str]) -> str:
    """Why ssh ended, and what to do.

    Args:
        host: the machine as the user calls it.
        command: the ssh program and its options, for the command to run.
        lines: the last lines that it printed.
    """
    said = [line for line in lines if line and not line.startswith("debug1:")]
    return _cut(
        f"cannot connect to {host}: {said[-1] if said else 'ssh ended'}; try `{shlex.join(command)} {host}`"
    )


def explain_silence(host: str, limit_s: float, lines: Iterable[str]) -> str:
    """Why there is no connection after the limit."""
    return f"cannot connect to {host}: ssh has not connected within {limit_s:g} s"


def explain_missing_program(program: str, error: OSError) -> str:
    """Why the ssh program does not run."""
    return (
        f"cannot run {program} ({error.strerror}); install OpenSSH's client, or set SOLLOL_SSH to your ssh program"
    )


def explain_no_shell(host: str, command: Sequence[str], noise: Iterable[str], errors: Iterable[str]) -> str:
    """Why no POSIX shell has run a script."""
    said = " ".join([*noise, *errors]).strip()
    return _cut(f"{host} did not run a POSIX shell for this user: {said or 'it printed nothing'}")


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
