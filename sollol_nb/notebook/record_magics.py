"""`%sollol_latency`: the latency log as a frame or a plot."""

from __future__ import annotations

from typing import TYPE_CHECKING

from IPython.core.magic import Magics, line_magic, magics_class
from IPython.core.magic_arguments import argument, magic_arguments

from sollol_nb import notebook
from sollol_nb.notebook import options

if TYPE_CHECKING:
    import pandas as pd


@magics_class
class RecordMagics(Magics):
    """`%sollol_latency`."""

    @magic_arguments()
    @argument("--model", help="only requests to this model")
    @argument("--last", type=options.whole_number, help="only the newest N requests")
    @line_magic
    def sollol_latency(self, line: str) -> pd.DataFrame:
        """The latency log as a pandas frame, one row per request, the newest last.

        Example::

            frame = %sollol_latency --last 20

            frame[["model", "ttft_ms", "total_ms"]]
        """
        arguments, _ = options.parse(self.sollol_latency, line, name="%sollol_latency")
        return notebook.router().latency.frame(model=arguments.model, last=arguments.last)
