"""The magics that show and control the cluster: workers, coordinators, logs.

What needs llama.cpp is imported where it is used, so that `%load_ext` is quick.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments

from sollol_nb.notebook import magic_line, session
from sollol_nb.notebook.displays import is_kernel
from sollol_nb.runtime.io_loop import run_blocking

if TYPE_CHECKING:
    from sollol_nb.cluster.status import ClusterStatus
    from sollol_nb.widget.cluster_widget import ClusterWidget

ACTIONS = ("start", "stop", "discover", "add", "remove")


@magics_class
class ClusterMagics(Magics):
    """`%sollol_cluster`, `%sollol_stop`, `%sollol_log`."""

    @magic_line.options_magic()
    @magic_arguments()
    @argument("action", nargs="?", choices=ACTIONS, help="default: show")
    @argument(
        "what", nargs="*", help="start: number of workers; add, remove: host:port; stop: model (default: all)"
    )
    @argument("--static", action="store_true", help="a snapshot instead of the live widget")
    @argument("--text", action="store_true", help="a snapshot as plain text")
    @line_magic
    def sollol_cluster(self, call: magic_line.Call) -> ClusterWidget | ClusterStatus | None:
        """Show the workers and the layers of each coordinator, live and with controls; or change them.

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
                count = what[0] if what else "3"
                if not count.isdecimal() or len(count) > 9:
                    raise UsageError(f"start takes a number of workers, not {count!r}: %sollol_cluster start 3")
                from sollol_nb.llama_cpp.engine.find import ensure_engine

                # Here, in the main thread, so that a first build shows its progress bar.
                ensure_engine(session.settings().own("llama_cpp"))
                router.start_workers(int(count))
            case "discover":
                router.discover_workers()
            case "add" | "remove":
                if not what:
                    raise UsageError(
                        f"{arguments.action} takes endpoints: %sollol_cluster {arguments.action} HOST:PORT"
                    )
                for endpoint in what:
                    router.add_worker(endpoint) if arguments.action == "add" else router.remove_worker(endpoint)
            case "stop":
                for model in what or [None]:
                    if not router.stop_coordinator(model) and model is not None:
                        running = ", ".join(session.running_models()) or "none"
                        raise UsageError(f"there is no coordinator of {model}; running: {running}")
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
    @argument("--all", action="store_true", help="everything, including what other notebooks use")
    @line_magic
    def sollol_stop(self, call: magic_line.Call) -> None:
        """Stop the coordinators of this notebook, or the named engines, or everything (including workers).

        Example::

            %sollol_stop

            %sollol demo "What is a worker?"

            %sollol_stop demo

            %sollol_stop --all
        """
        from sollol_nb.llama_cpp.processes.running import stop_engines

        arguments = call.arguments
        if arguments.all or arguments.names:
            ended = run_blocking(stop_engines(arguments.names, also_used=True))
            stopped = [f"{process.kind} {process.name}" for process in ended]
        else:
            stopped = [f"coordinator {model}" for model in session.router().stop_coordinator()]
        print("stopped " + ", ".join(stopped) if stopped else "nothing is running")

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
        from sollol_nb.llama_cpp.processes.running import engine_log

        arguments = call.arguments
        name = arguments.name
        if name is None:
            if not session.router().coordinators:
                raise UsageError(
                    "this notebook has no running coordinator; name a model or worker: %sollol_log demo"
                )
            name = session.router().coordinators[-1].model
        print(engine_log(name, last=arguments.last, grep=arguments.grep))
