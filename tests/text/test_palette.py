"""The colours of dots are visible on a dark background."""

from __future__ import annotations

import pytest

from sollol_nb.text.palette import state_color

BLACK_IN_JUPYTERLAB = "#111111"
LEAST_CONTRAST = 4.5
"""Source: WCAG 2.2, success criterion 1.4.3; the formulas are its definitions of contrast and luminance."""


def _luminance(color: str) -> float:
    channels = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("state", ["free", "held", "busy", "ready", "cooling", "unknown", "absent", "down"])
def test_the_dot_of_a_state_is_visible_in_the_dark_theme(state: str) -> None:
    contrast = (_luminance(state_color(state)) + 0.05) / (_luminance(BLACK_IN_JUPYTERLAB) + 0.05)
    assert contrast >= LEAST_CONTRAST
