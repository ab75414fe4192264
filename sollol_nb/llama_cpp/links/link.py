"""Start a link, and read what its registry entry says."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.process import EngineProcess
from sollol_nb.llama_cpp.processes.registry import Entry

SPEC = "SOLLOL_LINK"
"""Environment variable of a link's process with its arguments as JSON, where other users cannot read them."""

CONNECTING = "connecting"
INSTALLING = "installing"
READY = "ready"
LOST = "lost"
"""It was ready; it tries to connect again."""
SETTLED = (READY, LOST)
"""States of a link for which nobody waits."""
CPU = "CPU"
"""The device of a worker that computes in its machine's memory."""
FAILED = "failed: "
"""A link that cannot work prints a last line with this prefix and the reason, and ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkedWorker:
    """A worker that a link makes reachable.

    Attributes:
        name: how people call it: `gpu1`, or `gpu1/CUDA0` if its machine has several devices.
        machine: equal for workers that are processes of one machine (its boot); "" if unknown.
        device: `CPU`, or llama.cpp's name of its GPU, such as `CUDA0`; "" if unknown.
        engine: the commit of its llama.cpp; "" if unknown.
        place: equal for links to the same user of the same machine; "" if unknown.
    """

    name: str
    machine: str = ""
    device: str = ""
    engine: str = ""
    place: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the registry entry."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LinkedWorker:
        """The worker of an `as_dict`; what is missing or of another type is "" (a newer version may add keys)."""
        texts = {field.name: data.get(field.name) for field in fields(cls)}
        return cls(**{name: text if isinstance(text, str) else "" for name, text in texts.items()})


def linked_workers(entry: Entry) -> dict[str, LinkedWorker]:
    """The workers of a link, by their endpoints on loopback."""
    return {endpoint: LinkedWorker.from_dict(worker) for endpoint, worker in entry.endpoints.items()}


async def start_link(
    program: str, target: str, spec: Mapping[str, Any], *, keep_alive_s: float | None
) -> EngineProcess:
    """Start a link, which is not ready yet.

    Args:
        program: name of its module in this package, such as `relay`.
        target: what it leads to, such as `ssh://gpu1`; at most one link of a target runs at a time.
        spec: its arguments, plain data; may be secret.
        keep_alive_s: seconds that it lives without a lease; None is forever.

    Raises:
        EngineError: it cannot be started.
    """
    # The package is found where this process has found it; nothing of the working folder is imported (-P).
    package = str(Path(__file__).parents[3])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    return await EngineProcess.start(
        [sys.executable, "-P", "-m", f"{__package__}.{program}"],
        kind=registry.LINK,
        about={"target": target, "state": CONNECTING, "detail": f"connecting to {target}", "endpoints": {}},
        keep_alive_s=keep_alive_s,
        log_path=registry.new_log_path(registry.LINK, os.getpid()),
        env={SPEC: json.dumps({"target": target, **spec}), "PYTHONPATH": os.pathsep.join(paths)},
    )
