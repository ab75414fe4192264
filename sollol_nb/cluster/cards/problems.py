"""What needs attention in a cluster, each with its fix: a command to type, and an action for a button."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from sollol_nb.cluster.cards.shapes import Action, Problem
from sollol_nb.cluster.coordinator_status import CoordinatorStatus
from sollol_nb.llama_cpp.workers.probe import ProbeOutcome
from sollol_nb.llama_cpp.workers.status import WorkerStatus
from sollol_nb.ollama.nodes import NodeState, NodeStatus
from sollol_nb.runtime.events import Event, EventKind
from sollol_nb.settings.endpoints import is_target, parse_endpoint
from sollol_nb.text.palette import Role
from sollol_nb.text.short_names import short_name
from sollol_nb.text.tables import counted

TOGETHER = 2
"""More workers that are down than this are one problem."""
NAMED = 3
"""So many workers of one problem are named; the others are in its details."""
FIRST_WORKERS = 3
_LOADED = (EventKind.COORDINATOR_READY, EventKind.COORDINATOR_ADOPTED, EventKind.COORDINATOR_STARTING)


def problems_of(
    workers: Sequence[WorkerStatus],
    coordinators: Sequence[CoordinatorStatus],
    nodes: Sequence[NodeStatus],
    events: Iterable[Event],
) -> tuple[Problem, ...]:
    """All of them, the worst first; without any worker or node, what to do first."""
    found = [*_of_loads(events), *_of_workers(workers), *_of_nodes(nodes), *_of_coordinators(coordinators)]
    if not workers and not coordinators and not nodes:
        text = "Nothing runs yet: start workers on this machine, over which a model can be spread"
        found.append(_with_action(text, _start(FIRST_WORKERS), "idle", "workers"))
    return tuple(found)


def command_of(action: Action) -> str:
    """An action as a line of a cell."""
    return " ".join(("%sollol_cluster", action.name, *map(_quoted, action.arguments)))


def _quoted(argument: str) -> str:
    return f'"{argument}"' if " " in argument else argument


def _start(count: int) -> Action:
    return Action(name="start", arguments=(str(count),), label=f"Start {counted(count, 'worker')}")


def _with_action(text: str, action: Action, role: Role, key: str, details: tuple[str, ...] = ()) -> Problem:
    return Problem(text, command_of(action), action, role, key, details)


def _of_loads(events: Iterable[Event]) -> Iterator[Problem]:
    """Models that could not be loaded, and were not since."""
    failed: dict[str, Event] = {}
    for event in events:
        if event.kind == EventKind.COORDINATOR_FAILED and not event.data.get("cancelled"):
            failed[event.subject] = event
        elif event.kind in _LOADED:
            failed.pop(event.subject, None)
    for model, event in failed.items():
        yield Problem(event.message, f"%sollol_log {_quoted(model)}", None, "bad", f"load {model}")


def _of_workers(workers: Sequence[WorkerStatus]) -> Iterator[Problem]:
    gone = [worker for worker in workers if worker.state in ("down", "lost") and not is_target(worker.endpoint)]
    if len(gone) > TOGETHER:
        names = ", ".join(worker.label for worker in gone[:NAMED])
        more = f" and {len(gone) - NAMED} more" if len(gone) > NAMED else ""
        remove = Action(
            name="remove",
            arguments=tuple(dict.fromkeys(worker.target or worker.endpoint for worker in gone)),
            label=f"Remove {len(gone)} workers",
        )
        text = f"{len(gone)} workers do not answer: {names}{more}; start them again, or remove them"
        details = tuple(worker.problem for worker in gone)
        yield _with_action(text, remove, "bad", "workers down", details)
    for worker in workers:
        if worker.state in ("down", "lost", "incompatible") and (worker not in gone or len(gone) <= TOGETHER):
            yield _of_worker(worker)


def _of_worker(worker: WorkerStatus) -> Problem:
    text, key = worker.problem, f"worker {worker.endpoint}"
    remove = Action(name="remove", arguments=(worker.target or worker.endpoint,), label="Remove")
    if worker.probe is not None and worker.probe.outcome is ProbeOutcome.REFUSED and not worker.target:
        if worker.is_local:
            return Problem(text, command_of(_start(1)), _start(1), "bad", key)
        host, port = parse_endpoint(worker.endpoint, 0)
        text = f"{worker.label} does not answer: nothing listens there; start a worker there"
        return Problem(text, f"ggml-rpc-server -H {host} -p {port}", remove, "bad", key)
    instead = ", or remove it" if "; " in text else "; repair or remove it"
    return _with_action(f"{text}{instead}", remove, "bad", key)


def _of_nodes(nodes: Sequence[NodeStatus]) -> Iterator[Problem]:
    for node in nodes:
        name, key = node.url.removeprefix("http://"), f"node {node.url}"
        error = node.last_error or "it did not answer"
        where = "" if name in error else f" at {name}"
        if node.state == NodeState.ABSENT:
            yield Problem(f"Ollama{where} is down: {error}", "ollama serve", None, "bad", key)
        elif node.state == NodeState.COOLING:
            text = f"Ollama{where} failed: {error}; it will be tried again automatically"
            yield Problem(text, "", None, "bad", key)


def _of_coordinators(coordinators: Sequence[CoordinatorStatus]) -> Iterator[Problem]:
    for coordinator in coordinators:
        name = short_name(coordinator.model)
        if coordinator.differences:
            text = f"{name} is not placed as planned: {coordinator.differences[0]}"
            key = f"placement {coordinator.url}"
            yield Problem(text, "", None, "busy", key, coordinator.differences[1:])
        if coordinator.advice:
            key = f"advice {coordinator.url}"
            text = coordinator.advice.partition("; `")[0].replace(coordinator.model, name)
            apply = Action(name="replan", arguments=(coordinator.model,), label="Apply")
            yield _with_action(text, apply, "busy", key)
