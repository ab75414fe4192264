"""Markdown tables, written and parsed, and numbers, units and texts as people read them.

Source of the format: GitHub Flavored Markdown, section 4.10 (a header row, a delimiter row of dashes, cells
between pipes, `\\|` for a pipe in a cell).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_DELIMITERS = re.compile(r"\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*")
_PIPE = re.compile(r"(?<!\\)\|")
_BINARY_STEPS = ("KiB", "MiB", "GiB", "TiB", "PiB")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table of texts; pipes and line ends in them are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(escaped, line)) + " |" for line in lines)


def parse_markdown_table(text: str) -> tuple[list[str], list[list[str]]] | None:
    """Header and rows of the first Markdown table in a text; None without one.

    Each row is as long as the header: surplus cells are dropped, missing ones are empty.
    """
    lines = text.splitlines()
    for position in range(1, len(lines)):
        header = _cells(lines[position - 1])
        delimiters = lines[position]
        if (
            "|" in lines[position - 1]
            and _DELIMITERS.fullmatch(delimiters)
            and len(_cells(delimiters)) == len(header)
        ):
            rows: list[list[str]] = []
            for line in lines[position + 1 :]:
                if "|" not in line:
                    break
                cells = _cells(line)
                rows.append((cells + [""] * len(header))[: len(header)])
            return header, rows
    return None


def _cells(line: str) -> list[str]:
    inner = line.strip().removeprefix("|")
    cells = _PIPE.split(inner)
    if len(cells) > 1 and not cells[-1].strip():  # the pipe at the end of the line
        cells.pop()
    return [cell.strip().replace("\\|", "|") for cell in cells]


def escaped(text: str) -> str:
    """A text escaped for a cell."""
    return "<br>".join(text.replace("|", "\\|").splitlines())


def shortened(text: str, limit_chars: int) -> str:
    """The text; if it is longer than the limit, `…` replaces its end."""
    return text if len(text) <= limit_chars else text[: limit_chars - 1] + "…"


def compact_number(value: float) -> str:
    """A float with six significant digits, or all digits of its integer part if there are more."""
    if value != value:
        return "NaN"
    return f"{value:.0f}" if 1e6 <= abs(value) < 1e15 else f"{value:.6g}"


def counted(count: int, noun: str) -> str:
    """`1 row`, `50,000 rows`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def format_bytes(count: int) -> str:
    """Bytes in the largest binary unit that leaves at least 1: `0 B`, `640 B`, `1.5 KiB`, `13.2 GiB`."""
    if abs(count) < 1024:
        return f"{count} B"
    step = 1
    # 1023.95 and more would be shown as 1024.0 of this unit.
    while step < len(_BINARY_STEPS) and abs(count) / 1024**step >= 1023.95:
        step += 1
    return f"{count / 1024**step:.1f} {_BINARY_STEPS[step - 1]}"


def format_ms(duration_ms: float) -> str:
    """A duration, in seconds if it is one second or longer: `1.2 ms`, `348 ms`, `1.5 s`, `123 s`."""
    if duration_ms < 999.5:
        return f"{duration_ms:.{1 if duration_ms < 9.95 else 0}f} ms"
    return f"{duration_ms / 1000:,.{1 if duration_ms < 99_950 else 0}f} s"


def format_age(seconds: float) -> str:
    """An age in the largest unit that leaves at least 1, rounded down: `0 s`, `59 s`, `3 min`, `23 h`, `5 d`."""
    whole = max(0, int(seconds))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if whole >= size:
            return f"{whole // size} {unit}"
    return f"{whole} s"
