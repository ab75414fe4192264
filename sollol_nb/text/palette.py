"""The colours of all plots, tables and widgets: one palette that people with colour blindness can tell apart.

Source: M. Okabe and K. Ito, Color Universal Design (2008), https://jfly.uni-koeln.de/color/. Its yellow and black
are left out where they would vanish on a white or a black background; grey stands for "nothing special".
"""

from __future__ import annotations

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

_STATES = {
    "free": GREEN,
    "held": "#2b8cc4",  # `BLUE`, lightened: a small dot must be visible on black, too
    "busy": ORANGE,
    "ready": GREEN,
    "cooling": ORANGE,
    "connecting": ORANGE,
    "installing": ORANGE,
    "unknown": GREY,
    "duplicate": GREY,
    "absent": GREY,
}


def state_color(state: str) -> str:
    """The colour of the dot beside a worker's or Ollama node's state; `BAD` for states that need attention."""
    return _STATES.get(state, BAD)
