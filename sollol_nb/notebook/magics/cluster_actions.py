"""What the actions of `%sollol_cluster` do: each prints what happened, in a line for each thing.

An action is a function of the router and the line's arguments, and an entry in `ACTIONS`.
What needs llama.cpp is imported where it is used, so that `%load_ext` is quick.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from IPython.core.error import UsageError

from sollol_nb.notebook import session
from sollol_nb.notebook.displays import link_progress
from sollol_nb.runtime.events import EventKind
from sollol_nb.settings.endpoints import SSH, is_ssh, is_target
from sollol_nb.text.tables import counted

if TYPE_CHECKING:
    from sollol_nb.llama_cpp.processes.running import Ended
    from sollol_nb.sync_wrapper import HybridRouter


Action = Callable[["HybridRouter", argparse.Namespace], None]

USABLE = ("free", "held", "busy")
"""States of a worker that is there."""


OPTIONS = {
    "more": ("--more", "start"),
    "force": ("--force", "stop"),
    "scan": ("--scan", "discover"),
    "mdns": ("--mdns", "discover"),
    "uses": ("--uses", "invite"),
    "duration": ("--for", "invite"),
    "host": ("--host", "invite"),
}
"""Arguments that only one action has: their options, and that action."""


def check_options(arguments: argparse.Namespace) -> None:
    """Refuse what would have no effect.

    Raises:
        UsageError: an option belongs to another action, or the action takes no names.
    """
    for name, (option, action) in OPTIONS.items():
        if getattr(arguments, name) and arguments.action != action:
            raise UsageError(f"{option} is an option of {action}: %sollol_cluster {action} {option}")
    if arguments.action == "discover" and arguments.what:
        raise UsageError(
            f"discover takes no names, but {' '.join(arguments.what)!r} was given; look at hosts with "
            "%sollol_cluster discover --ssh HOSTS"
        )


def _start(router: HybridRouter, arguments: argparse.Namespace) -> None:
    what, more = arguments.what, arguments.more
    count = what[0] if what else "3"
    if len(what) > 1 or not count.isdecimal() or len(count) > 9:
        given = " ".join(what)
        raise UsageError(f"start takes one number of workers, not {given!r}: %sollol_cluster start 3")
    from sollol_nb.llama_cpp.engine.find import ensure_engine

    if router.gateway is None:  # here, in the main thread, so that a first build shows its progress bar
        ensure_engine(session.settings().own("llama_cpp"))
    started = router.start_workers(int(count)) if more else router.ensure_workers(int(count))
    if started:
        print(f"started {counted(len(started), 'worker')}: {', '.join(started)}")
    else:
        running = [worker.endpoint for worker in router.check_workers() if worker.is_local]
        print(
            f"{counted(len(running), 'worker')} already {'run' if len(running) > 1 else 'runs'}: "
            f"{', '.join(running)}; `%sollol_cluster start {count} --more` starts more"
        )


def _discover(router: HybridRouter, arguments: argparse.Namespace) -> None:
    since = time.time()
    found = router.discover_workers()
    print(f"found {counted(len(found), 'new worker')}{': ' * bool(found)}{', '.join(found)}")
    for event in router.events.recent():
        if event.at >= since and event.kind == EventKind.WORKER_DISCOVERED and event.subject not in found:
            print(event.message)
    hosts = arguments.ssh or ()
    if hosts or arguments.scan or arguments.mdns:
        from sollol_nb.llama_cpp.workers.discovery import as_table

        print(as_table(router.find_workers(ssh=hosts, scan=arguments.scan, mdns=arguments.mdns)))


def _calibrate(router: HybridRouter, arguments: argparse.Namespace) -> None:
    for result in router.calibrate(arguments.what or None):
        print(result)


def _replan(router: HybridRouter, arguments: argparse.Namespace) -> None:
    for model in arguments.what or [None]:
        lines = router.replan(model)
        print("\n".join(lines) if lines else "no sharded model is running")


def _preload(router: HybridRouter, arguments: argparse.Namespace) -> None:
    """Begin to load models in the background. A notebook shows how far they are."""
    if not arguments.what:
        raise UsageError("preload takes models: %sollol_cluster preload MODEL")
    for model in arguments.what:
        preload = session.preload(model)
        if not preload.is_shown:
            print(f"{preload.line} in the background")


def _named(what: Sequence[str], action: str) -> Sequence[str]:
    if not what:
        raise UsageError(f"{action} takes workers: %sollol_cluster {action} HOST:PORT, or {action} ssh://HOST")
    return what


def _add(router: HybridRouter, arguments: argparse.Namespace) -> None:
    add_workers(router, _named(arguments.what, "add"))


def add_workers(router: HybridRouter, names: Sequence[str]) -> None:
    """Add those that can be reached, and print for each whether it was added.

    Args:
        names: `host:port` of workers, `ssh://host` of machines; these are connected at the same time.
    """
    from sollol_nb.cluster.status import describe_worker

    if router.gateway is None and any(map(is_ssh, names)):
        from sollol_nb.llama_cpp.engine.find import ensure_engine

        ensure_engine(session.settings().own("llama_cpp"))  # a first build shows its progress bar here
    known = router.worker_targets
    with link_progress(router.events):
        workers = router.add_workers(names)
    usable = {worker.target or worker.endpoint for worker in workers if worker.state in USABLE}
    for worker in workers:
        added = worker.target or worker.endpoint
        if worker.state in USABLE or added in known:
            print(f"added worker {worker.label}: {worker.state}, {describe_worker(worker)}")
        else:
            print(f"not added: {worker.problem}")
    for useless in {worker.target or worker.endpoint for worker in workers} - usable - {*known}:
        router.remove_worker(useless)


def _remove(router: HybridRouter, arguments: argparse.Namespace) -> None:
    for endpoint in _named(arguments.what, "remove"):
        router.remove_worker(endpoint)
        print(f"removed worker {endpoint}")


def _invite(router: HybridRouter, arguments: argparse.Namespace) -> None:
    """Print the command that another machine runs to join. It is shown once."""
    if len(arguments.what) > 1:
        raise UsageError("invite takes one name: %sollol_cluster invite gpu1 --uses 1 --for 1h")
    name = arguments.what[0] if arguments.what else None
    invitation = router.invite(
        uses=arguments.uses or 1, expires=arguments.duration or "1h", name=name, host=arguments.host
    )
    print(f"run on the machine that joins:\n{invitation}")


def _revoke(router: HybridRouter, arguments: argparse.Namespace) -> None:
    names = [name for what in arguments.what or [None] for name in router.revoke(what)]
    print(f"revoked {', '.join(names)}" if names else "no invitation is open, and no worker has joined")


def _stop(router: HybridRouter, arguments: argparse.Namespace) -> None:
    """Stop the named coordinators and workers of this notebook, or all."""
    what, force = arguments.what, arguments.force
    if not what:
        report([*router.end_coordinators(force=force), *router.stop_workers(force=force)])
        return
    workers = {worker.endpoint for worker in router.check_workers() if worker.is_local}
    workers |= set(filter(is_target, router.worker_targets))
    ended: list[Ended] = []
    for name in what:
        found = workers & {name, f"{SSH}{name}"}
        if found:
            ended += router.stop_workers([*found], force=force)
            continue
        of_model = router.end_coordinators(name, force=force)
        if not of_model:
            running = ", ".join([*session.running_models(), *sorted(workers)]) or "none"
            raise UsageError(f"this notebook runs no coordinator or worker called {name}; running: {running}")
        ended += of_model
    report(ended)


def report(ended: Sequence[Ended]) -> None:
    """Print what was stopped, and what was left running, with its users."""
    stopped = [f"{engine.kind} {engine.name}" for engine in ended if not engine.users]
    left = [engine for engine in ended if engine.users]
    if stopped or not left:
        print("stopped " + ", ".join(stopped) if stopped else "nothing is running")
    for engine in left:
        print(f"{engine}; --force stops it too")


ACTIONS: Mapping[str, Action] = {
    "start": _start,
    "discover": _discover,
    "preload": _preload,
    "calibrate": _calibrate,
    "replan": _replan,
    "add": _add,
    "remove": _remove,
    "stop": _stop,
    "invite": _invite,
    "revoke": _revoke,
}
SHOWING = ("start", "discover")
"""After these actions the cluster is shown."""
