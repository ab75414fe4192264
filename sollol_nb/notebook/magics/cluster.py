"""The magics that show and control the cluster: workers, coordinators, logs.

What needs llama.cpp is imported where it is used, so that `%load_ext` is quick.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments

from sollol_nb.notebook import magic_line, session
from sollol_nb.notebook.displays import is_kernel
from sollol_nb.runtime.events import EventKind
from sollol_nb.text.tables import counted

if TYPE_CHECKING:
    from sollol_nb.cluster.status import ClusterStatus
    from sollol_nb.llama_cpp.processes.running import Ended
    from sollol_nb.sync_wrapper import HybridRouter
    from sollol_nb.widget.cluster_widget import ClusterWidget

ACTIONS = ("start", "stop", "discover", "add", "remove")
USABLE = ("free", "held", "busy")
"""States of a worker that is there."""


def _start_workers(router: HybridRouter, what: Sequence[str], *, more: bool) -> None:
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


def _discover_workers(router: HybridRouter) -> None:
    since = time.time()
    found = router.discover_workers()
    print(f"found {counted(len(found), 'new worker')}{': ' * bool(found)}{', '.join(found)}")
    for event in router.events.recent():
        if event.at >= since and event.kind == EventKind.WORKER_DISCOVERED and event.subject not in found:
            print(event.message)


def _named(what: Sequence[str], action: str) -> Sequence[str]:
    if not what:
        raise UsageError(f"{action} takes endpoints: %sollol_cluster {action} HOST:PORT")
    return what


def _add_workers(router: HybridRouter, endpoints: Sequence[str]) -> None:
    """Add those that can be reached, and print for each whether it was added."""
    from sollol_nb.cluster.status import describe_worker

    for endpoint in endpoints:
        known = router.worker_endpoints
        worker = router.add_worker(endpoint)
        if worker.state in USABLE or worker.endpoint in known:
            print(f"added worker {worker.endpoint}: {worker.state}, {describe_worker(worker)}")
        else:
            router.remove_worker(worker.endpoint)
            print(f"not added: {worker.detail}")


def _stop(router: HybridRouter, what: Sequence[str], *, force: bool) -> None:
    """Stop the named coordinators and workers of this notebook, or all."""
    if not what:
        _report([*router.end_coordinators(force=force), *router.stop_workers(force=force)])
        return
    workers = {worker.endpoint for worker in router.check_workers() if worker.is_local}
    ended: list[Ended] = []
    for name in what:
        if name in workers:
            ended += router.stop_workers([name], force=force)
            continue
        of_model = router.end_coordinators(name, force=force)
        if not of_model:
            running = ", ".join([*session.running_models(), *sorted(workers)]) or "none"
            raise UsageError(f"this notebook runs no coordinator or worker called {name}; running: {running}")
        ended += of_model
    _report(ended)


def _report(ended: Sequence[Ended]) -> None:
    """Say what was stopped, and what was left running for whom."""
    stopped = [f"{engine.kind} {engine.name}" for engine in ended if not engine.users]
    left = [engine for engine in ended if engine.users]
    if stopped or not left:
        print("stopped " + ", ".join(stopped) if stopped else "nothing is running")
    for engine in left:
        print(f"{engine}; --force stops it too")


@magics_class
class ClusterMagics(Magics):
    """`%sollol_cluster`, `%sollol_stop`, `%sollol_log`."""

    @magic_line.options_magic()
    @magic_arguments()
    @argument("action", nargs="?", choices=ACTIONS, help="default: show")
    @argument(
        "what",
        nargs="*",
        help="start: how many workers are to run (default: 3); add, remove: host:port; stop: models or workers "
        "(default: all of this notebook)",
    )
    @argument("--more", action="store_true", help="start: so many in addition to those that run")
    @argument("--force", action="store_true", help="stop: also what another notebook uses")
    @argument("--static", action="store_true", help="a snapshot instead of the live widget")
    @argument("--text", action="store_true", help="a snapshot as plain text")
    @line_magic
    def sollol_cluster(self, call: magic_line.Call) -> ClusterWidget | ClusterStatus | None:
        """Show the workers and the layers of each coordinator, live and with controls; or change them.

        `start 3` makes sure that three workers run on this machine, and `stop` ends the workers and coordinators
        of this notebook. What another notebook uses stays.

        Example::

            %sollol_cluster start 2

            %sollol_cluster

            %sollol_cluster add 192.168.1.10:50052

            %sollol_cluster remove 192.168.1.10:50052

            %sollol_cluster discover

            %sollol_cluster stop

            %sollol_cluster --static

            %sollol_cluster --text
        """
        arguments = call.arguments
        router, what = session.router(), arguments.what
        match arguments.action:
            case "start":
                _start_workers(router, what, more=arguments.more)
            case "discover":
                _discover_workers(router)
            case "add":
                _add_workers(router, _named(what, "add"))
                return None
            case "remove":
                for endpoint in _named(what, "remove"):
                    router.remove_worker(endpoint)
                    print(f"removed worker {endpoint}")
                return None
            case "stop":
                _stop(router, what, force=arguments.force)
                return None
        status = router.cluster()
        if arguments.text:
            print(status)
            return None
        if arguments.static or arguments.action is not None or not is_kernel(self.shell):
            return status
        return router.widget()

    @magic_line.options_magic()
    @magic_arguments()
    @argument("names", nargs="*", help="models, or workers as host:port; default: this notebook's coordinators")
    @argument("--all", action="store_true", help="all coordinators and workers on this machine")
    @argument("--force", action="store_true", help="also those that another notebook or script uses")
    @line_magic
    def sollol_stop(self, call: magic_line.Call) -> None:
        """Stop the coordinators of this notebook, or the named engines, or all of them (including workers).

        What another notebook or script uses is left running, unless you add `--force`.

        Example::

            %sollol_stop

            %sollol demo "What is a worker?"

            %sollol_stop demo

            %sollol_stop --all
        """
        arguments = call.arguments
        if arguments.all or arguments.names:
            ended = session.router().end_engines(arguments.names, force=arguments.force)
        else:
            ended = session.router().end_coordinators(force=arguments.force)
        _report(ended)

    @magic_line.options_magic()
    @magic_arguments()
    @argument("name", nargs="?", help="a model, or a worker as host:port; default: the coordinator used last")
    @argument("--last", type=magic_line.whole_number, default=20, help="number of lines (default: 20)")
    @argument("--grep", metavar="TEXT", help="only lines that contain this text, ignoring case")
    @line_magic
    def sollol_log(self, call: magic_line.Call) -> None:
        """Show the last lines of the log of a coordinator or a worker.

        Example::

            %sollol demo "What is a worker?"

            %sollol_log

            %sollol_log demo --last 5

            %sollol_log demo --grep error
        """
        arguments = call.arguments
        router = session.router()
        if arguments.name is None and router.gateway is None and not router.coordinators:
            raise UsageError("this notebook has no running coordinator; name a model or worker: %sollol_log demo")
        print(router.engine_log(arguments.name, last=arguments.last, grep=arguments.grep))
