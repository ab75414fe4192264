"""matplotlib figures as text: titles, axis labels, what is drawn with its range, and sampled data.

The text is made from the artists, so nothing is rendered. Whoever made the figure has imported numpy and
matplotlib.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

from sollol_nb.text.tables import compact_number, counted, markdown_table, shortened

MAX_AXES = 20
MAX_ARTISTS = 20  # of each kind, in one axes
SAMPLED_POINTS = 10


def describe_figure(value: Any) -> str:
    """A figure or one of its axes as text."""
    if hasattr(value, "get_lines"):
        return _describe_axes(value, "Axes")
    title = value.get_suptitle()
    parts = [f"Figure with {len(value.axes)} axes" + (f": {title}" if title else "")]
    parts += [_describe_axes(axes, f"Axes {number}") for number, axes in enumerate(value.axes[:MAX_AXES], 1)]
    if len(value.axes) > MAX_AXES:
        parts.append(f"[cut: {MAX_AXES} of {len(value.axes):,} axes shown]")
    return "\n\n".join(parts)


def _describe_axes(axes: Any, name: str) -> str:
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
    line_texts, tables = _describe_lines(axes)
    lines += line_texts
    bars = [container for container in axes.containers if type(container).__name__ == "BarContainer"]
    for number, container in enumerate(bars[:MAX_ARTISTS], 1):
        lines += _describe_bars(axes, container, number)
    points = [collection for collection in axes.collections if type(collection).__name__ == "PathCollection"]
    for number, scatter in enumerate(points[:MAX_ARTISTS], 1):
        offsets = scatter.get_offsets()
        x, y = _axis_values(axes.xaxis, offsets[:, 0]), _axis_values(axes.yaxis, offsets[:, 1])
        lines.append(f"- scatter {_name(scatter, number)}: {_describe_ranges(x, y)}")
    for image in axes.images[:MAX_ARTISTS]:
        data = image.get_array()
        height_width = " x ".join(map(str, data.shape[:2]))
        lines.append(f"- image: {height_width}, values {_range_of(data)}")
    in_bars = {id(patch) for container in bars for patch in container.patches}
    others = [collection for collection in axes.collections if collection not in points]
    others += [patch for patch in axes.patches if id(patch) not in in_bars]
    kinds = Counter(type(artist).__name__ for artist in others)
    lines += [f"- {kind}: {count}" for kind, count in kinds.items()]
    for count, kind in ((len(axes.lines), "line"), (len(bars), "group of bar"), (len(points), "scatter")):
        if count > MAX_ARTISTS:
            lines.append(f"[cut: {MAX_ARTISTS} of {counted(count, kind)} shown]")
    texts = [shortened(text.get_text(), 100) for text in axes.texts if text.get_text()]
    if texts:
        more = f", and {len(texts) - MAX_ARTISTS:,} more" if len(texts) > MAX_ARTISTS else ""
        lines.append(f"- texts: {', '.join(map(repr, texts[:MAX_ARTISTS]))}{more}")
    return "\n\n".join(["\n".join(lines), *tables])


def _describe_lines(axes: Any) -> tuple[list[str], list[str]]:
    """The lines with their ranges, and tables of their points; lines with the same x share a table."""
    numpy: Any = sys.modules["numpy"]
    tables: list[str] = []
    texts: list[str] = []
    groups: list[tuple[Any, list[tuple[str, Any]]]] = []
    for number, line in enumerate(axes.lines[:MAX_ARTISTS], 1):
        x, y = (_plain(data) for data in line.get_data(orig=True))
        if len(x) != len(y):  # matplotlib repeats data of length 1
            x, y = (_plain(data) for data in line.get_data(orig=False))
        if x.dtype.kind in "iuf":
            x = _axis_values(axes.xaxis, x)
        texts.append(f"- line {_name(line, number)}: {_describe_ranges(x, y)}")
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
        rows = [[_value_text(x[at]), *(_value_text(y[at]) for _, y in members)] for at in picked]
        header = [axes.get_xlabel() or "x", *(name for name, _ in members)]
        cut = f"\n[cut: {len(picked)} of {counted(count, 'point')} shown]" if len(picked) < count else ""
        tables.append(markdown_table(header, rows) + cut)
    return texts, tables


def _describe_bars(axes: Any, container: Any, number: int) -> list[str]:
    flat = getattr(container, "orientation", "vertical") == "horizontal"
    values = [patch.get_width() if flat else patch.get_height() for patch in container.patches]
    begins = [patch.get_y() if flat else patch.get_x() for patch in container.patches]
    ends = [
        begin + (patch.get_height() if flat else patch.get_width())
        for begin, patch in zip(begins, container.patches, strict=True)
    ]
    names = _bar_names(axes.yaxis if flat else axes.xaxis, begins, ends)
    pairs = [f"{name}: {compact_number(value)}" for name, value in zip(names, values, strict=True)]
    shown = "; " + ", ".join(pairs[:MAX_ARTISTS]) if pairs else ""
    cut = f" [cut: {MAX_ARTISTS} of {len(pairs):,} bars shown]" if len(pairs) > MAX_ARTISTS else ""
    return [f"- bars {_name(container, number)}: {counted(len(pairs), 'bar')}{shown}{cut}"]


def _bar_names(axis: Any, begins: list[float], ends: list[float]) -> list[str]:
    """A name for each bar: its tick's text if that is not a number; in a histogram, the bar's range."""
    centres = [(begin + end) / 2 for begin, end in zip(begins, ends, strict=True)]
    formatter = axis.get_major_formatter()
    if type(formatter).__name__ in ("StrCategoryFormatter", "FixedFormatter", "FuncFormatter"):
        positions = [float(position) for position in axis.get_majorticklocs()]
        ticks = list(zip(positions, formatter.format_ticks(positions), strict=False))
        return [
            next((text for at, text in ticks if text and abs(at - centre) < 0.5), compact_number(centre))
            for centre in centres
        ]
    gaps = [abs(end - begin) for end, begin in zip(ends, begins[1:], strict=False)]
    if gaps and max(gaps) <= 1e-6 * (ends[-1] - begins[0]):
        return [
            f"{compact_number(begin)} to {compact_number(end)}" for begin, end in zip(begins, ends, strict=True)
        ]
    return [_value_text(value) for value in _axis_values(axis, centres)]


def _axis_values(axis: Any, numbers: Any) -> Any:
    """Numbers on an axis, as dates where they stand for dates."""
    formatter = axis.get_major_formatter()
    if type(formatter).__name__ == "TimeSeries_DateFormatter":  # pandas counts periods
        pandas: Any = sys.modules["pandas"]
        return _plain([str(pandas.Period(ordinal=int(number), freq=formatter.freq)) for number in numbers])
    if "DateFormatter" in type(formatter).__name__:
        dates: Any = sys.modules["matplotlib.dates"]
        return _plain(dates.num2date(numbers))
    return _plain(numbers)


def _plain(values: Any) -> Any:
    """An artist's data as a one-dimensional array of numbers or texts."""
    numpy: Any = sys.modules["numpy"]
    array = numpy.atleast_1d(numpy.asarray(values))
    if array.size and type(array.flat[0]).__name__ in ("datetime", "Timestamp"):
        array = numpy.asarray([time.replace(tzinfo=None) for time in array.tolist()], dtype="datetime64[us]")
    return numpy.datetime_as_string(array, unit="auto") if array.dtype.kind == "M" else array


def _describe_ranges(x: Any, y: Any) -> str:
    return f"{counted(len(x), 'point')}" + (f", x {_range_of(x)}, y {_range_of(y)}" if len(x) else "")


def _range_of(values: Any) -> str:
    """From the smallest to the largest number; of other values, from the first to the last."""
    numpy: Any = sys.modules["numpy"]
    if values.dtype.kind in "biuf":
        finite = values[numpy.isfinite(values)]
        if not finite.size:
            return "not finite"
        return f"{compact_number(float(finite.min()))} to {compact_number(float(finite.max()))}"
    return f"{_value_text(values[0])} to {_value_text(values[-1])}"


def _value_text(value: Any) -> str:
    is_number = isinstance(value, int | float) or (hasattr(value, "dtype") and value.dtype.kind in "biuf")
    return compact_number(float(value)) if is_number else str(value)


def _name(artist: Any, number: int | str) -> str:
    """The artist's label, or its number without one (labels that matplotlib made begin with an underscore)."""
    label = str(artist.get_label() or "")
    return str(number) if not label or label.startswith("_") else f"'{label}'"
