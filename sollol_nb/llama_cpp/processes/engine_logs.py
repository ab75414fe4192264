"""The logs of engine processes, of those that run and of those that have ended."""

from __future__ import annotations

from collections import deque
from pathlib import Path

from sollol_nb.errors import ConfigError
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.settings import config


def engine_log(name: str, *, last: int = 20, grep: str | None = None) -> str:
    """The last lines of the log of an engine that runs, and a first line that says which file they are from.

    Args:
        name: a coordinator's model, a worker's `host:port`, or an id of `sollol-nb ps`.
        last: how many lines at most.
        grep: only lines that contain this text, in any case.

    Raises:
        ConfigError: no such engine runs (the message names those that do, and the folder of older logs), or its
            log cannot be read.
    """
    entries = registry.entries()
    # Of several coordinators of a model the one that was started last.
    found = [one for one in sorted(entries, key=lambda one: one.started_at) if name in (one.name, one.id)]
    if not found:
        running = ", ".join(sorted({one.name for one in entries})) or "nothing"
        raise ConfigError(
            f"nothing called {name!r} runs (running: {running}); logs of what has ended are in {config.log_dir()}"
        )
    path = Path(found[-1].log_path)
    wanted = (grep or "").casefold()
    try:
        with path.open(encoding="utf-8", errors="replace") as log:
            lines = deque((line for line in log if wanted in line.casefold()), maxlen=last)
    except OSError as error:
        raise ConfigError(f"the log of {name} cannot be read: {path} ({error.strerror or error})") from None
    return f"{path}\n" + "".join(lines).rstrip("\n")
