"""A better layout of a running model, where the router knows one, and a button that applies it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from typing import Any

import ipywidgets

from sollol_nb.router.router import Router
from sollol_nb.widget.actions import ClusterActions


class Suggestion:
    """The suggested layout of one model; hidden while there is none.

    Args:
        actions: apply it.
        compare: shows it in the panel with the sliders.

    Attributes:
        model: the model; "" without a suggestion.
    """

    def __init__(self, actions: ClusterActions, compare: Callable[[str], None]) -> None:
        self._actions = actions
        self.model = ""
        self.text = ipywidgets.HTML()
        small = {"width": "auto"}
        self.apply = ipywidgets.Button(
            description="Apply this layout",
            tooltip="start the model anew with this layout; running answers continue",
            layout=small,
        )
        self.compare = ipywidgets.Button(
            description="Compare", tooltip="show this layout on the sliders of What if", layout=small
        )
        self.box = ipywidgets.HBox(
            [self.text, self.apply, self.compare],
            layout={"display": "none", "flex_flow": "row wrap", "align_items": "center"},
        )
        self.apply.on_click(self._apply)
        self.compare.on_click(lambda _: compare(self.model))

    def refresh(self, data: Mapping[str, Any]) -> None:
        """Fit it to the state: the suggestion for the first model of this router that has one."""
        coordinators = data.get("coordinators", {}).values()
        suggested = [each for each in coordinators if each.get("own") and each.get("advice")]
        self.model = suggested[0]["model"] if suggested else ""
        advice: Mapping[str, Any] = suggested[0]["advice"] if suggested else {"text": "", "layout": ()}
        self.compare.disabled = not advice["layout"]  # where workers have to be measured first
        self.text.value = f"better layout for <b>{escape(self.model)}</b>"
        self.text.tooltip = advice["text"]
        self.box.layout.display = "" if suggested else "none"
        self.apply.disabled = self._actions.is_unavailable("apply")

    def _apply(self, _: object) -> None:
        model = self.model

        async def apply(router: Router) -> str:
            return "; ".join(await router.replan(model))

        if model:
            self._actions.start("apply", f"applying the suggested layout of {model}", apply)
