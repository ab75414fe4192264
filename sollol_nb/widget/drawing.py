"""The map's JavaScript and style sheet, for the widget in a notebook and for the gateway's status page."""

from __future__ import annotations

from pathlib import Path

from sollol_nb.text import palette

_ASSETS = Path(__file__).parent / "assets"
SOURCE = _ASSETS / "cluster_map.js"
STYLE = (
    f".sollol-cluster {{ --sollol-bad: {palette.BAD}; --sollol-used: {palette.SKY_BLUE};"
    f" --sollol-segment-text: {palette.SEGMENT_TEXT}; }}\n"
    + (_ASSETS / "cluster_map.css").read_text(encoding="utf-8")
)
"""The style sheet, after the palette's colours as the variables that it uses."""
