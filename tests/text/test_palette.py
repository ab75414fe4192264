"""Colours can be read: dots on a dark background, the text of pills and of layer bars."""

from __future__ import annotations

import pytest

from sollol_nb.text.palette import MARKS, PILLS, SEGMENT_TEXT, SEGMENTS, Role, Theme

BLACK_IN_JUPYTERLAB = "#111111"
LEAST_CONTRAST = 4.5
"""Source: WCAG 2.2, success criterion 1.4.3; the formulas are its definitions of contrast and luminance."""
LEAST_CONTRAST_OF_SHAPES = 3.0
"""Source: WCAG 2.2, success criterion 1.4.11."""


def _luminance(color: str) -> float:
    channels = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: str, second: str) -> float:
    darker, lighter = sorted((_luminance(first), _luminance(second)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("theme", PILLS)
@pytest.mark.parametrize("role", MARKS)
def test_the_text_of_a_pill_can_be_read(theme: Theme, role: Role) -> None:
    fill = PILLS[theme][role]
    assert contrast(fill.text, fill.background) >= LEAST_CONTRAST


@pytest.mark.parametrize("page", ["#ffffff", BLACK_IN_JUPYTERLAB])
@pytest.mark.parametrize("role", MARKS)
def test_a_pill_for_any_theme_stands_out_from_the_page(page: str, role: Role) -> None:
    assert contrast(PILLS["any"][role].background, page) >= LEAST_CONTRAST_OF_SHAPES


@pytest.mark.parametrize("color", SEGMENTS)
def test_the_text_in_a_layer_bar_can_be_read(color: str) -> None:
    assert contrast(SEGMENT_TEXT, color) >= LEAST_CONTRAST
