"""Frontends with less than JupyterLab has, as clients that take only what these take from a kernel."""

from __future__ import annotations

from typing import ClassVar

from tests.support.kernels import Kernel, Shown

WIDGET = "application/vnd.jupyter.widget-view+json"
RICH = ("text/html", "text/latex", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/plain")
"""What can be shown of a display, the best first."""


class WithoutWidgets(Kernel):
    """As VS Code without its renderers of widgets: no comm is answered, displays are updated in any cell."""

    shown_kinds: ClassVar[tuple[str, ...]] = RICH

    def seen(self, shown: Shown) -> list[str]:
        """What a reader sees of a cell's displays."""
        best = (next((kind for kind in self.shown_kinds if kind in each), "") for each in shown.displays)
        return [each.get(kind, "") for each, kind in zip(shown.displays, best, strict=True)]


class OnlyItsOwnUpdates(WithoutWidgets):
    """As Colab without its manager of third-party widgets: a cell that has ended, or is not the one that runs, is
    updated no more."""

    def takes_update(self, shown: Shown, message_id: str) -> bool:
        return shown is self._shown(message_id) and message_id not in self._idle
