"""A progress bar as text in one display: seen in every frontend, and kept in a saved notebook.

tqdm's own bar for notebooks is a widget, of which a notebook on GitHub shows the first state only.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from tqdm.std import tqdm

from sollol_nb.notebook.displays import make_display

COLUMNS = 78


if TYPE_CHECKING:
    _Bar = tqdm[Any]
else:  # generic for type checkers only
    _Bar = tqdm


class TextBar(_Bar):
    """tqdm's text bar, in a display that is updated in place; empty once it is closed, if it is not to be left."""

    def __init__(self, **settings: Any) -> None:
        self._update: Any = None
        super().__init__(**settings, file=io.StringIO(), ncols=COLUMNS, ascii=False)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Show the bar as it is now."""
        text = str(self) if msg is None else msg
        if self._update is None:
            self._update = make_display({"text/plain": text})
        else:
            self._update({"text/plain": text})

    def close(self) -> None:
        """Show it for the last time, or take it away."""
        if self.disable:
            return
        super().close()
        self.display(None if self.leave else "")
