"""matplotlib figures as words: titles, axis labels, what is drawn with its range, and sampled data.

The words come from the artists, not from a picture, so nothing is drawn for them. numpy and matplotlib have been
imported by whoever made the figure.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

from sollol_nb.text.tables import compact_number, counted, markdown_table, shortened

MOST_AXES = 20
MOST_ARTISTS = 20  # of a kind, in one axes
SAMPLED_POINTS = 10


def figure_words(value: Any) -> str:
    """A figure or one of its axes in words."""
    if hasattr(value, "get_lines"):
        return _axes_words(value, "Axes")
    title = value.get_suptitle()
    words = [f"Figure with {len(value.axes)} axes" + (f": {title}" if title else "")]
    words += [_axes_words(axes, f"Axes {number}") for number, axes in enumerate(value.axes[:MOST_AXES], 1)]
    if len(value.axes) > MOST_AXES:
        words.append(f"[cut: {MOST_AXES} of {len(value.axes):,} axes shown]")
    return "\n\n".join(words)


def _axes_words(axes: Any, name: str) -> str:
    titles = [axes.get_title(loc) for loc in ("left", "center", "right")]
    about = [f"title {title!r}" for title in titles if title]
    for axis, scale, label in (
        ("x", axes.get_xscale(), axes.get_xlabel()),
        ("y", axes.get_yscale(), axes.get_ylabel()),
    ):
        scale = "" if scale == "linear" else f" ({scale} scale)"
        if label or scale:
            about.append(f"{axis} axis{f' {label!r}' if label else ''}{scale}")
    lines = [f"{name}: {', '.join(about)}" if about else name]
    line_words, tables = _line_words(axes)
    lines += line_words
    bars = [one for one in axes.containers if type(one).__name__ == "BarContainer"]
    for number, container in enumerate(bars[:MOST_ARTISTS], 1):
        lines += _bar_words(axes, container, number)
    points = [one for one in axes.collections if type(one).__name__ == "PathCollection"]
    for number, scatter in enumerate(points[:MOST_ARTISTS], 1):
        offsets = scatter.get_offsets()
        x, y = _axis_values(axes.xaxis, offsets[:, 0]), _axis_values(axes.yaxis, offsets[:, 1])
        lines.append(f"- scatter {_name(scatter, number)}: {_range_words(x, y)}")
    for image in axes.images[:MOST_ARTISTS]:
        data = image.get_array()
        height_width = " x ".join(map(str, data.shape[:2]))
        lines.append(f"- image: {height_width}, values {_range_of(data)}")
    in_bars = {id(patch) for container in bars for patch in container.patches}
    others = [one for one in axes.collections if one not in points]
    others += [one for one in axes.patches if id(one) not in in_bars]
    kinds = Counter(type(one).__name__ for one in others)
    lines += [f"- {kind}: {count}" for kind, count in kinds.items()]
    for count, kind in ((len(axes.lines), "line"), (len(bars), "group of bar"), (len(points), "scatter")):
        if count > MOST_ARTISTS:
            lines.append(f"[cut: {MOST_ARTISTS} of {counted(count, kind)} shown]")
    texts = [shortened(text.get_text(), 100) for text in axes.texts if text.get_text()]
    if texts:
        more = f", and {len(texts) - MOST_ARTISTS:,} more" if len(texts) > MOST_ARTISTS else ""
        lines.append(f"- texts: {', '.join(map(repr, texts[:MOST_ARTISTS]))}{more}")
    return "\n\n".join(["\n".join(lines), *tables])


def _line_words(axes: Any) -> tuple[list[str], list[str]]:
    """The lines with their ranges, and tables of their points, those of the same x in one table."""
    numpy: Any = sys.modules["numpy"]
    tables: list[str] = []
    words: list[str] = []
    groups: list[tuple[Any, list[tuple[str, Any]]]] = []
    for number, line in enumerate(axes.lines[:MOST_ARTISTS], 1):
        x, y = (_plain(data) for data in line.get_data(orig=True))
        if len(x) != len(y):  # matplotlib repeats the one of length 1
            x, y = (_plain(data) for data in line.get_data(orig=False))
        if x.dtype.kind in "iuf":
            x = _axis_values(axes.xaxis, x)
        words.append(f"- line {_name(line, number)}: {_range_words(x, y)}")
        name = _name(line, f"line {number}").strip("'")
        if not len(x):
            continue
        for group_x, members in groups:
            if numpy.array_equal(group_x, x):
                members.append((name, y))
                break
        else:
            groups.append((x, [(name, y)]))
    for x, members in groups:
        count = len(x)
        picked = sorted(
            {round(step * (count - 1) / (SAMPLED_POINTS - 1)) for step in range(SAMPLED_POINTS)}
            if count > SAMPLED_POINTS
            else range(count)
        )
        rows = [[_value_words(x[at]), *(_value_words(y[at]) for _, y in members)] for at in picked]
        header = [axes.get_xlabel() or "x", *(name for name, _ in members)]
        cut = f"\n[cut: {len(picked)} of {counted(count, 'point')} shown]" if len(picked) < count else ""
        tables.append(markdown_table(header, rows) + cut)
    return words, tables


def _bar_words(axes: Any, container: Any, number: int) -> list[str]:
    flat = getattr(container, "orientation", "vertical") == "horizontal"
    values = [patch.get_width() if flat else patch.get_height() for patch in container.patches]
    begins = [patch.get_y() if flat else patch.get_x() for patch in container.patches]
    ends = [
        begin + (patch.get_height() if flat else patch.get_width())
        for begin, patch in zip(begins, container.patches, strict=True)
    ]
    names = _bar_names(axes.yaxis if flat else axes.xaxis, begins, ends)
    pairs = [f"{name}: {compact_number(value)}" for name, value in zip(names, values, strict=True)]
    shown = "; " + ", ".join(pairs[:MOST_ARTISTS]) if pairs else ""
    cut = f" [cut: {MOST_ARTISTS} of {len(pairs):,} bars shown]" if len(pairs) > MOST_ARTISTS else ""
    return [f"- bars {_name(container, number)}: {counted(len(pairs), 'bar')}{shown}{cut}"]


def _bar_names(axis: Any, begins: list[float], ends: list[float]) -> list[str]:
    """The ticks' texts where these are no numbers; of bars side by side (a histogram) from where to where."""
    centres = [(begin + end) / 2 for begin, end in zip(begins, ends, strict=True)]
    formatter = axis.get_major_formatter()
    if type(formatter).__name__ in ("StrCategoryFormatter", "FixedFormatter", "FuncFormatter"):
        places = [float(place) for place in axis.get_majorticklocs()]
        ticks = list(zip(places, formatter.format_ticks(places), strict=False))
        return [
            next((text for place, text in ticks if text and abs(place - centre) < 0.5), compact_number(centre))
            for centre in centres
        ]
    gaps = [abs(end - begin) for end, begin in zip(ends, begins[1:], strict=False)]
    if gaps and max(gaps) <= 1e-6 * (ends[-1] - begins[0]):
        return [
            f"{compact_number(begin)} to {compact_number(end)}" for begin, end in zip(begins, ends, strict=True)
        ]
    return [_value_words(value) for value in _axis_values(axis, centres)]


def _axis_values(axis: Any, numbers: Any) -> Any:
    """Numbers of an axis as what they stand for, where that is a date."""
    formatter = axis.get_major_formatter()
    if type(formatter).__name__ == "TimeSeries_DateFormatter":  # of pandas: counts periods
        pandas: Any = sys.modules["pandas"]
        return _plain([str(pandas.Period(ordinal=int(number), freq=formatter.freq)) for number in numbers])
    if "DateFormatter" in type(formatter).__name__:
        dates: Any = sys.modules["matplotlib.dates"]
        return _plain(dates.num2date(numbers))
    return _plain(numbers)


def _plain(values: Any) -> Any:
    """Data of an artist as a one-dimensional array of numbers or texts."""
    numpy: Any = sys.modules["numpy"]
    array = numpy.atleast_1d(numpy.asarray(values))
    if array.size and type(array.flat[0]).__name__ in ("datetime", "Timestamp"):
        array = numpy.asarray([one.replace(tzinfo=None) for one in array.tolist()], dtype="datetime64[us]")
    return numpy.datetime_as_string(array, unit="auto") if array.dtype.kind == "M" else array


def _range_words(x: Any, y: Any) -> str:
    return f"{counted(len(x), 'point')}" + (f", x {_range_of(x)}, y {_range_of(y)}" if len(x) else "")


def _range_of(values: Any) -> str:
    """From the least to the largest number; from the first to the last of what are no numbers."""
    numpy: Any = sys.modules["numpy"]
    if values.dtype.kind in "biuf":
        finite = values[numpy.isfinite(values)]
        if not finite.size:
            return "not finite"
        return f"{compact_number(float(finite.min()))} to {compact_number(float(finite.max()))}"
    return f"{_value_words(values[0])} to {_value_words(values[-1])}"


def _value_words(value: Any) -> str:
    is_number = isinstance(value, int | float) or (hasattr(value, "dtype") and value.dtype.kind in "biuf")
    return compact_number(float(value)) if is_number else str(value)


def _name(artist: Any, number: int | str) -> str:
    """The artist's label, or its number where it has none (matplotlib's own begin with an underscore)."""
    label = str(artist.get_label() or "")
    return str(number) if not label or label.startswith("_") else f"'{label}'"
