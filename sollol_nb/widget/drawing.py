"""The map's JavaScript and style sheet, for the widget in a notebook and for the gateway's status page."""

from __future__ import annotations

from pathlib import Path

from sollol_nb.text import palette

_ASSETS = Path(__file__).parent / "assets"
_DARK_THEMES = ('[data-jp-theme-light="false"]', ".vscode-dark", ".vscode-high-contrast", "[theme=dark]")
"""Where JupyterLab, VS Code and Colab show a dark theme; the status page follows the system."""
_PARTS = ("background", "text")  # of a palette.Fill


def _read(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _role_colors(theme: palette.Theme) -> str:
    fills = palette.PILLS[theme].items()
    return " ".join(f"--sollol-{role}-{part}: {getattr(fill, part)};" for role, fill in fills for part in _PARTS)


def _style() -> str:
    light, dark = _role_colors("light"), _role_colors("dark")
    colors = {"bad": palette.BAD, "used": palette.SKY_BLUE, "segment-text": palette.SEGMENT_TEXT}
    fixed = " ".join(f"--sollol-{name}: {color};" for name, color in colors.items())
    roles = "".join(
        f".sollol-cluster .sollol-is-{role} {{ "
        + " ".join(f"--sollol-role-{part}: var(--sollol-{role}-{part});" for part in _PARTS)
        + " }\n"
        for role in palette.PILLS["light"]
    )
    return (
        f".sollol-cluster {{ {fixed} {light} }}\n"
        f"{', '.join(f'{theme} .sollol-cluster' for theme in _DARK_THEMES)} {{ {dark} }}\n"
        f"@media (prefers-color-scheme: dark) {{ .sollol-page .sollol-cluster {{ {dark} }} }}\n"
        f"{roles}{_read('cluster_map.css')}"
    )


CLIPBOARD = _read("clipboard.js")
"""What copies a text, also for other modules."""
SOURCE = CLIPBOARD + _read("cluster_parts.js") + _read("cluster_map.js")
"""The module: one file, since a widget cannot import others."""
STYLE = _style()
"""The style sheet, after the palette's colours as the variables that it uses."""
