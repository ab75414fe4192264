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
from sollol_nb.notebook.magics.cluster_actions import ACTIONS, SHOWING, add_workers, check_options, report

if TYPE_CHECKING:
    from sollol_nb.cluster.status import ClusterStatus
    from sollol_nb.widget.cluster_widget import ClusterWidget


@magics_class
class ClusterMagics(Magics):
    """`%sollol_cluster`, `%sollol_stop`, `%sollol_log`."""

    @magic_line.options_magic()
    @magic_arguments()
    @argument("action", nargs="?", choices=tuple(ACTIONS), help="default: show")
    @argument(
        "what",
        nargs="*",
        help="start: how many workers are to run (default: 3); add, remove: host:port or ssh://host; "
        "calibrate: workers (default: all, and this machine); replan: models (default: all); preload: models; "
        "stop: models, workers or machines (default: all of this notebook); invite: name of the workers (default: "
        "that of their machine); revoke: names (default: all)",
    )
    @argument(
        "--ssh",
        metavar="HOSTS",
        type=magic_line.ssh_hosts,
        help="use these machines, through ssh: host or user@host:port, with commas between them; discover: only "
        "look at them",
    )
    @argument("--more", action="store_true", help="start: so many in addition to those that run")
    @argument("--force", action="store_true", help="stop: also what another notebook uses")
    @argument("--scan", metavar="NETWORK", help="discover: scan a private network, such as 192.168.1.0/24")
    @argument("--mdns", action="store_true", help="discover: look for workers announced in the local network")
    @argument(
        "--uses", type=magic_line.whole_number, metavar="N", help="invite: how many machines may join (default: 1)"
    )
    @argument("--for", dest="duration", metavar="TIME", help="invite: how long they may join (default: 1h)")
    @argument("--host", metavar="ADDRESS", help="invite: listen here (default: this machine's own address)")
    @argument("--static", action="store_true", help="a snapshot instead of the live widget")
    @argument("--text", action="store_true", help="a snapshot as plain text")
    @argument("-v", "--verbose", action="store_true", help="the same, with all reasons of each plan")
    @line_magic
    def sollol_cluster(self, call: magic_line.Call) -> ClusterWidget | ClusterStatus | None:
        """Show the workers and the layers of each coordinator, live and with controls; or change them.

        `start 3` makes sure that three workers run on this machine, and `stop` ends the workers and coordinators
        of this notebook. What another notebook uses stays. `calibrate` measures how fast this machine and the free
        workers (or the named ones) are.

        `preload` begins to load a model in the background, and shows how far it is; a cell that asks it meanwhile
        waits for the rest.

        `replan` applies the layout that is the fastest now to a running model, if it is another one.

        `--ssh gpu1,user@gpu2:2222` uses other machines: a worker runs on each of their devices, reached through
        your own ssh, and nothing there listens to the network. llama.cpp is installed there if necessary.

        `invite` prints a command for a machine that cannot be reached from here: its worker dials this one, and
        nothing listens there. `revoke` ends what was invited.

        Example::

            %sollol_cluster start 2

            %sollol_cluster

            %sollol_cluster add 192.168.1.10:50052

            %sollol_cluster remove 192.168.1.10:50052

            %sollol_cluster discover

            %sollol_cluster discover --scan 127.0.0.0/28

            %sollol_cluster invite --for 30m

            %sollol_cluster revoke

            %sollol_cluster calibrate

            %sollol_cluster replan

            %sollol_cluster preload demo

            %sollol_cluster stop

            %sollol_cluster --static

            %sollol_cluster --text

            %sollol_cluster -v
        """
        arguments = call.arguments
        check_options(arguments)
        router = session.router()
        if arguments.ssh is not None and arguments.action != "discover":
            add_workers(router, arguments.ssh)
        if arguments.action is not None:
            ACTIONS[arguments.action](router, arguments)
            if arguments.action not in SHOWING:
                return None
        status = router.cluster()
        if arguments.text or arguments.verbose:
            print(status.describe(verbose=arguments.verbose))
            return None
        if arguments.static or arguments.action is not None or not is_kernel(self.shell):
            return status
        return router.widget()

    @magic_line.options_magic()
    @magic_arguments()
    @argument(
        "names",
        nargs="*",
        help="models, workers as host:port, machines as ssh://host; default: this notebook's coordinators",
    )
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
        report(ended)

    @magic_line.options_magic()
    @magic_arguments()
    @argument(
        "name",
        nargs="?",
        help="a model, a worker as host:port, or a machine as ssh://host; default: the coordinator used last",
    )
    @argument("--last", type=magic_line.whole_number, default=20, help="number of lines (default: 20)")
    @argument("--grep", metavar="TEXT", help="only lines that contain this text, ignoring case")
    @line_magic
    def sollol_log(self, call: magic_line.Call) -> None:
        """Show the last lines of the log of a coordinator, a worker, or the link to another machine.

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
