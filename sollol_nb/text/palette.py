"""The colours of all plots, tables and widgets: one palette that people with colour blindness can tell apart.

Source: M. Okabe and K. Ito, Color Universal Design (2008), https://jfly.uni-koeln.de/color/. Its yellow and black
are left out where they would vanish on a white or a black background; grey stands for "nothing special".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

ORANGE = "#e69f00"
SKY_BLUE = "#56b4e9"
GREEN = "#009e73"
BLUE = "#0072b2"
VERMILION = "#d55e00"
PURPLE = "#cc79a7"
GREY = "#8c8c8c"

BAD = VERMILION
"""Errors, losses and faults."""
SERIES = (BLUE, ORANGE, GREEN, PURPLE, SKY_BLUE, VERMILION, GREY)
"""Lines and points, in the order in which they are taken."""
SEGMENTS = (SKY_BLUE, ORANGE, "#2fbf93", "#f0e442", "#cc8fb5", "#e0814a", "#8fb3e0", "#b5b5b5")
"""Areas with a label inside: the palette, lightened so that `SEGMENT_TEXT` can be read on it."""
SEGMENT_TEXT = "#111111"

BACKENDS = {"ollama-pool": BLUE, "llama.cpp-distributed": ORANGE, "llama.cpp-local": GREEN}
REQUEST_STATUSES = {"ok": GREEN, "error": BAD, "timeout": ORANGE, "cancelled": GREY}

Role = Literal["ok", "busy", "bad", "idle"]
"""What a state means to a person: usable, in use, needs attention, nothing to do."""
Theme = Literal["light", "dark", "any"]
"""Of the page around; `any` is for pages whose theme is not known, such as saved notebooks."""


@dataclass(frozen=True, slots=True)
class Fill:
    """A background and the text on it. Their contrast is at least 4.5 (WCAG 2.2, success criterion 1.4.3)."""

    background: str
    text: str


PILLS: Mapping[Theme, Mapping[Role, Fill]] = {
    "light": {
        "ok": Fill("#d9f2e6", "#00583f"),
        "busy": Fill("#dcecf9", "#00487a"),
        "bad": Fill("#fde3d5", "#8a3500"),
        "idle": Fill("#ececec", "#4d4d4d"),
    },
    "dark": {
        "ok": Fill("#0d3d2d", "#7fdcb6"),
        "busy": Fill("#123a57", "#8ecbf5"),
        "bad": Fill("#57260a", "#ffb48a"),
        "idle": Fill("#383838", "#c8c8c8"),
    },
    "any": {
        "ok": Fill("#007a58", "#ffffff"),
        "busy": Fill("#0a6cb0", "#ffffff"),
        "bad": Fill("#b84a00", "#ffffff"),
        "idle": Fill("#6b6b6b", "#ffffff"),
    },
}
"""Pills: green, blue, vermilion and grey of the palette, darkened or lightened for their text."""
MARKS: Mapping[Role, str] = {"ok": "●", "busy": "◐", "bad": "✕", "idle": "○"}
"""What stands before the text of a pill, so that colour is not the only difference."""
