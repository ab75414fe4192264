"""One link as a router knows it, and what is shown of it: unique names of its workers, and why it ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from sollol_nb.llama_cpp.links import link
from sollol_nb.llama_cpp.links.link import LinkedWorker
from sollol_nb.llama_cpp.processes.process import EngineProcess, ExitReport
from sollol_nb.runtime.http_client import one_line
from sollol_nb.settings.endpoints import SSH

NOT_CONNECTED = "not connected; the next request connects to it"
PENDING = (link.CONNECTING, link.INSTALLING)


@dataclass(slots=True)
class KnownLink:
    """One target that this router knows.

    Attributes:
        is_wanted: whether this router uses it; else it is only shown.
        process: its link, with a lease; None while this router has none.
        state, detail: as its registry entry says, or why there is none.
        workers: that were reachable through the link that runs or ran last, by endpoint.
        reachable: those of them that are reachable now.
        entry_id: of the registry entry that names the workers.
        is_settled: whether its first connect has ended, well or not.
        was_ready: whether it was ready since this router knows it.
        same_as: the target whose link leads to the same devices, which is used instead; "" if there is none.
    """

    is_wanted: bool = False
    process: EngineProcess | None = None
    state: str = "unknown"
    detail: str = NOT_CONNECTED
    workers: dict[str, LinkedWorker] = field(default_factory=dict)
    reachable: frozenset[str] = frozenset()
    entry_id: str = ""
    is_settled: bool = False
    was_ready: bool = False
    same_as: str = ""

    @property
    def is_connecting_first(self) -> bool:
        """Whether its first connect is in progress."""
        return self.process is not None and not self.is_settled and self.state in PENDING


def unique_names(names: Mapping[str, str], targets: Mapping[str, str]) -> dict[str, str]:
    """Names of workers that are all different: to equal ones their target is added, or their endpoint.

    Args:
        names: by endpoint.
        targets: by endpoint, as far as known.
    """
    unique = dict(names)
    for addition in ({endpoint: target.removeprefix(SSH) for endpoint, target in targets.items()}, {}):
        counts = Counter(unique.values())
        unique = {
            endpoint: name if counts[name] == 1 else f"{name} ({addition.get(endpoint, endpoint)})"
            for endpoint, name in unique.items()
        }
    return unique


def why_ended(target: str, report: ExitReport) -> str:
    """Why a link ended that nobody has stopped, in one line: its last message, if there is one."""
    for line in reversed(report.tail):
        if line.startswith(link.FAILED):
            return one_line(line.removeprefix(link.FAILED))
    return f"the link to {target} ended ({one_line(report.tail[-1], 200) if report.tail else 'without a reason'})"
