"""`%sollol_bench`: a benchmark in a cell, with its progress, its table and its plot."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

from IPython.core.magic import Magics, line_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments

from sollol_nb.bench.plan import DEFAULT_MAX_TOKENS, DEFAULT_PROMPTS, DEFAULT_REPEAT, DEFAULT_WARMUP
from sollol_nb.bench.result import BenchResult
from sollol_nb.layers.strategies import STRATEGIES
from sollol_nb.notebook import magic_line, session
from sollol_nb.notebook.displays import is_kernel
from sollol_nb.text.tables import counted

PLOT_DPI = 100


@magics_class
class BenchMagics(Magics):
    """`%sollol_bench`."""

    @magic_line.options_magic()
    @magic_arguments()
    @argument("models", nargs="+", metavar="model", help="models, such as demo:sharded")
    @argument(
        "--layouts",
        default="auto",
        help="auto, local, a number of workers, or units (layers and the output layer) for each worker; "
        "comma-separated: auto,1,2,5/4/4",
    )
    @argument("--strategies", default="", help=f"layer strategies, comma-separated: {', '.join(STRATEGIES)}")
    @argument("--concurrency", default="1", help="simultaneous requests, comma-separated: 1,2,4")
    @argument(
        "--prompts",
        default=str(DEFAULT_PROMPTS),
        help=f"a variable with a list of prompts, or a number of built-in prompts (default {DEFAULT_PROMPTS})",
    )
    @argument(
        "--repeat", type=magic_line.whole_number, default=DEFAULT_REPEAT, help=f"rounds (default {DEFAULT_REPEAT})"
    )
    @argument(
        "--warmup",
        default=str(DEFAULT_WARMUP),
        help=f"unmeasured requests after each load (default {DEFAULT_WARMUP})",
    )
    @argument(
        "--max-tokens",
        type=magic_line.whole_number,
        default=DEFAULT_MAX_TOKENS,
        help=f"maximum length of an answer, in tokens (default {DEFAULT_MAX_TOKENS})",
    )
    @argument("--temperature", type=magic_line.number, help="default 0: all layouts give the same answers")
    @argument("--timeout", type=magic_line.number, help="time limit of each request, in seconds")
    @argument(
        "--reload",
        action="store_true",
        default=None,
        help="let coordinators take turns on the same workers, even if there are enough free workers for all",
    )
    @argument("--out", metavar="NAME", help="store the result in this variable")
    @line_magic
    def sollol_bench(self, call: magic_line.Call) -> BenchResult:
        """Compare models, layouts, strategies and concurrency. The cases take turns.

        Shows medians with 95 % intervals and a plot. The result has `.frame` (one row per request), `.summary()`,
        `.plot()` and `.save(path)`. The stop button ends the benchmark and keeps the measurements so far.

        If enough workers are free, each coordinator gets its own workers and all stay loaded. Otherwise they take
        turns on the same workers, and each turn begins with a load, which is not measured.

        Example::

            %sollol_cluster start 3

            %sollol_bench demo:sharded --layouts 1,2,3 --out result

            %sollol_bench demo:sharded --layouts auto,local --concurrency 1,4 --max-tokens 32

            %sollol_bench demo:sharded --layouts 2 --strategies even,memory_aware --repeat 10
        """
        assert self.shell is not None
        arguments = call.arguments
        result = session.router().bench(
            arguments.models,
            layouts=arguments.layouts,
            strategies=arguments.strategies,
            concurrency=arguments.concurrency,
            prompts=_prompts(arguments.prompts, call),
            repeat=arguments.repeat,
            warmup=arguments.warmup,
            reload=arguments.reload,
            timeout=arguments.timeout,
            max_tokens=arguments.max_tokens,
            temperature=arguments.temperature,
        )
        if arguments.out is not None:
            self.shell.user_ns[arguments.out] = result
        if is_kernel(self.shell):
            _show_plot(result)
        return result


def _prompts(text: str, call: magic_line.Call) -> Any:
    """A number of built-in prompts, or the prompts in a variable (a list, a column of a frame, one text)."""
    if text.isdecimal() and len(text) < 10:
        return int(text)
    value = call.named_value(text, "--prompts")
    return list(value) if isinstance(value, Iterable) and not isinstance(value, str) else value


def _show_plot(result: BenchResult) -> None:
    """Show the plot as a picture, without pyplot: its backend and open figures belong to the user."""
    from IPython.display import display

    picture = io.BytesIO()
    result.overview().savefig(picture, format="png", dpi=PLOT_DPI)
    text = f"plot of {counted(len(result.cases), 'case')}"
    display({"image/png": picture.getvalue(), "text/plain": text}, raw=True)
