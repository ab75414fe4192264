"""`%sollol_latency`: the latency log as a frame, a plot or a file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from IPython.core.magic import Magics, line_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments

from sollol_nb.latency.schema import STATUSES
from sollol_nb.notebook import magic_line, session
from sollol_nb.notebook.displays import hide_once

if TYPE_CHECKING:
    from collections.abc import Callable

    import pandas as pd
    from matplotlib.axes import Axes

    from sollol_nb.sync_wrapper import HybridRouter

FILTERS = ("model", "backend", "status", "since", "until", "last")
PLOTS = ("ttft", "total", "speed", "timeline", "predicted", "queue")


@magics_class
class LatencyMagics(Magics):
    """`%sollol_latency`."""

    @magic_line.options_magic()
    @magic_arguments()
    @argument("--model", help="only requests to this model")
    @argument("--backend", help="only requests that ran on this backend, such as llama.cpp-distributed")
    @argument("--status", choices=STATUSES, help="only requests with this status")
    @argument("--since", metavar="WHEN", help="only requests after WHEN, such as 1h, 2 days, or a date and time")
    @argument("--until", metavar="WHEN", help="only requests before WHEN")
    @argument("--last", type=magic_line.whole_number, metavar="N", help="only the newest N")
    @argument("--plot", nargs="?", const="total", choices=PLOTS, help="draw a plot (default: total)")
    @argument("--export", metavar="FILE", help="write the log to a .csv or .parquet file")
    @line_magic
    def sollol_latency(self, call: magic_line.Call) -> pd.DataFrame | Axes | None:
        """The latency log as a pandas frame, one row per request, newest last; or as a plot or a file.

        The cell shows some of the columns, rounded; the frame has all of them.

        Example::

            frame = %sollol_latency --last 20

            frame[["model", "ttft_ms", "total_ms"]]

            %sollol_latency --since 1h --status ok

            %sollol_latency --since "2 days" --plot ttft

            %sollol_latency --export latency.csv
        """
        arguments = call.arguments
        router = session.router()
        filters = {name: getattr(arguments, name) for name in FILTERS}
        if arguments.export is not None:
            print(f"saved to {router.latency.export(arguments.export, **filters)}")
            return None
        frame = router.latency.frame(**filters)
        if arguments.plot is None:
            from sollol_nb.latency.frames import BriefFrame  # imports pandas

            return BriefFrame(frame)
        axes = _plotted(arguments.plot, frame, router)
        hide_once(self.shell, axes)  # the figure is shown; its repr would stand below it
        return axes


def _plotted(name: str, frame: pd.DataFrame, router: HybridRouter) -> Axes:
    from sollol_nb import plots

    if name == "timeline":
        return plots.timeline(frame, events=router.events.recent())
    draw: Callable[[pd.DataFrame], Axes] = {
        "ttft": plots.ttft_ecdf,
        "total": plots.total_ecdf,
        "speed": plots.tokens_per_s_by_layout,
        "predicted": plots.predicted_vs_measured,
        "queue": plots.queue_wait_by_priority,
    }[name]
    return draw(frame)
