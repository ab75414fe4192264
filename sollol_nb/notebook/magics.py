"""The magics: each parses its line into one request, and dispatches it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_cell_magic, line_magic, magics_class, no_var_expand
from IPython.core.magic_arguments import argument, magic_arguments, parse_argstring
from IPython.utils.process import arg_split  # type: ignore[attr-defined]

from sollol_nb import notebook
from sollol_nb.cluster_status import ClusterStatus
from sollol_nb.completion import Completion
from sollol_nb.io_loop import run_blocking
from sollol_nb.notebook.answer import ask
from sollol_nb.priority_helpers import Priority
from sollol_nb.running import stop_running
from sollol_nb.toolchain import ensure_engine

if TYPE_CHECKING:
    import pandas as pd

_SAMPLING = ("temperature", "top_p", "max_tokens", "seed", "stop")


def _text(text: str) -> str:
    """Words as they are meant: IPython leaves the quotes around them."""
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def _priority(text: str) -> int:
    """A priority by number or by name."""
    return int(text) if text.isdecimal() else int(Priority[text.upper()])


_priority.__name__ = "priority (1 to 10, or a name such as high)"  # argparse shows it in its error


@magics_class
class SollolMagics(Magics):
    """`%%sollol`, `%sollol_cluster`, `%sollol_latency`, `%sollol_route`, `%sollol_stop`."""

    @no_var_expand
    @magic_arguments()
    @argument("model", help="model name, such as demo, demo:sharded, llama3.2, llama3.1:70b")
    @argument("prompt", nargs="*", help='line form: the prompt, in quotes if it ends with "?"')
    @argument("--temperature", type=float, help="0 is greedy: the same answer each time")
    @argument("--top-p", type=float, help="keep the most likely tokens that sum up to this probability")
    @argument("--max-tokens", type=int, help="longest answer, in tokens")
    @argument("--seed", type=int, help="seed of the sampling")
    @argument(
        "--stop", type=_text, action="append", help="end the answer before this text (may be given several times)"
    )
    @argument("--system", type=_text, help="system message")
    @argument("--priority", type=_priority, default=Priority.NORMAL, help="1 to 10, or a name such as high")
    @argument("--timeout", type=float, help="limit in seconds, from when the model is ready")
    @argument("--out", metavar="NAME", help="variable that gets the answer")
    @line_cell_magic
    def sollol(self, line: str, cell: str | None = None) -> None:
        """Ask a model; the answer streams into the cell.

        Example::

            %%sollol demo:sharded --max-tokens 100 --out answer
            What is model sharding?
        """
        # Intermixed: the prompt may come after options. Not strict: an apostrophe in it is no open quote.
        arguments = self.sollol.parser.parse_intermixed_args(arg_split(line, strict=False))
        prompt = cell if cell is not None else _text(" ".join(arguments.prompt))
        if cell is not None and arguments.prompt:
            raise UsageError(
                f"unexpected {' '.join(arguments.prompt)!r}; in a cell the prompt goes below the first line"
            )
        if not prompt.strip():
            raise UsageError("the prompt is empty; write it below %%sollol MODEL, or after %sollol MODEL")
        if arguments.out is not None and not arguments.out.isidentifier():
            raise UsageError(f"--out {arguments.out!r} is not a variable name")
        messages = [{"role": "system", "content": arguments.system}] if arguments.system else []
        messages.append({"role": "user", "content": prompt.strip()})

        assert self.shell is not None
        variables = self.shell.user_ns

        def keep(completion: Completion) -> None:
            variables["_"] = completion
            if arguments.out is not None:
                variables[arguments.out] = completion

        ask(
            notebook.router(),
            arguments.model,
            messages,
            in_notebook=_is_kernel(self.shell),
            keep=keep,
            priority=arguments.priority,
            timeout=arguments.timeout,
            **{name: getattr(arguments, name) for name in _SAMPLING},
        )

    @magic_arguments()
    @argument("action", nargs="?", choices=("start", "stop", "discover", "add", "remove"), help="default: show")
    @argument("what", nargs="*", help="start: how many; add, remove: host:port; stop: a model (default: all)")
    @argument("--text", action="store_true", help="as text instead of HTML")
    @line_magic
    def sollol_cluster(self, line: str) -> ClusterStatus | None:
        """Show workers and the layers of each coordinator, or change them.

        Example::

            %sollol_cluster                          show
            %sollol_cluster start 3                  start three workers on this machine
            %sollol_cluster add 192.168.1.10:50052   use a worker on another machine
            %sollol_cluster remove 192.168.1.10:50052
            %sollol_cluster discover                 look for workers on this machine
            %sollol_cluster stop                     stop all coordinators; stop MODEL: only that model's
        """
        arguments = parse_argstring(self.sollol_cluster, line)
        router, what = notebook.router(), arguments.what
        match arguments.action:
            case "start":
                count = what[0] if what else "3"
                if not count.isdecimal():
                    raise UsageError(f"start takes a number of workers, not {count!r}: %sollol_cluster start 3")
                ensure_engine()  # here, in the main thread, so that a first build shows its progress bar
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
                        running = ", ".join(one.model for one in router.coordinators) or "none"
                        raise UsageError(f"no coordinator runs {model}; running: {running}")
        status = router.cluster()
        if arguments.text:
            print(status)
            return None
        return status

    @magic_arguments()
    @argument("names", nargs="*", help="models, or workers as host:port; default: this notebook's coordinators")
    @argument("--all", action="store_true", help="all that runs, of other notebooks and in use too")
    @line_magic
    def sollol_stop(self, line: str) -> None:
        """Stop coordinators: those of this notebook, those named, or all that runs (workers too).

        Example::

            %sollol_stop                  stop this notebook's coordinators
            %sollol_stop llama3.1:70b     stop the coordinator of one model, whoever started it
            %sollol_stop --all            stop every coordinator and every worker on this machine
        """
        arguments = parse_argstring(self.sollol_stop, line)
        if arguments.all or arguments.names:
            ended = run_blocking(stop_running(arguments.names, also_used=True))
            stopped = [f"{one.kind} {one.name}" for one in ended]
        else:
            stopped = [f"coordinator {model}" for model in notebook.router().stop_coordinator()]
        print("stopped " + ", ".join(stopped) if stopped else "nothing runs")

    @magic_arguments()
    @argument("--model", help="only requests to this model")
    @argument("--last", type=int, help="only the newest N requests")
    @line_magic
    def sollol_latency(self, line: str) -> pd.DataFrame:
        """The latency log as a pandas frame, one row per request, the newest last.

        Example::

            frame = %sollol_latency --last 20
        """
        arguments = parse_argstring(self.sollol_latency, line)
        return notebook.router().latency.frame(model=arguments.model, last=arguments.last)

    @magic_arguments()
    @argument("model", help="model name")
    @line_magic
    def sollol_route(self, line: str) -> None:
        """Tell where a request for a model would go now, and why.

        Example::

            %sollol_route llama3.1:70b
        """
        arguments = parse_argstring(self.sollol_route, line)
        print(notebook.router().route(arguments.model))


def _is_kernel(shell: Any) -> bool:
    """Whether output goes to a notebook (a kernel) rather than to a terminal."""
    return hasattr(shell, "kernel")
