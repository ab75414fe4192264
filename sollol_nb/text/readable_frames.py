"""Frames, series, indexes and arrays as text: their shape, their dtypes and their head as a Markdown table.

pandas, polars, pyarrow and numpy are not imported here: whoever made the value has imported them. Only the head of
a value is read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeAlias

from sollol_nb.text.tables import compact_number, counted, escaped, markdown_table, shortened

MAX_COLUMNS = 30
MIN_CELL_CHARS = 40

Readable: TypeAlias = Callable[[Any, int], str]
"""Makes a value in a cell a text of at most so many characters."""

_MAX_COUNTED = 10_000_000  # values; the range of a larger array is that of a sample


def is_instance_of(value: object, *names: str) -> bool:
    """Whether the value is an instance of one of these classes, named `module.Class`, without importing them."""
    for name in names:
        module, _, class_name = name.rpartition(".")
        found = getattr(sys.modules.get(module), class_name, None)
        if isinstance(found, type) and isinstance(value, found):
            return True
    return False


def describe_table(value: Any, limit_chars: int, readable: Readable) -> str | None:
    """A frame, a series, an index or an array of pandas, polars, pyarrow or numpy as text; None for all else."""
    for names, describe in _FORMS:
        if is_instance_of(value, *names):
            return describe(value, limit_chars, readable)
    return None


# --- pandas -----------------------------------------------------------------------------------


def _pandas_frame(frame: Any, limit_chars: int, readable: Readable) -> str:
    row_count, column_count = frame.shape
    head = frame.iloc[: _max_rows(limit_chars, min(column_count, MAX_COLUMNS)), :MAX_COLUMNS]
    names = [_label(name) for name in head.columns]
    columns = [(name, head.iloc[:, position].tolist()) for position, name in enumerate(names)]
    text = _title("DataFrame", row_count, column_count, list(zip(names, head.dtypes, strict=True)))
    columns = _index_columns(head.index) + columns
    return text + _table(columns, row_count, column_count, limit_chars - len(text), readable)


def _pandas_series(series: Any, limit_chars: int, readable: Readable) -> str:
    head = series.iloc[: _max_rows(limit_chars, 1)]
    name = "" if series.name is None else f" {shortened(_label(series.name), 60)}"
    text = f"Series{name}: {counted(len(series), 'value')}, {series.dtype}"
    columns = [*_index_columns(head.index), (_label(series.name) if name else "value", head.tolist())]
    return text + _table(columns, len(series), 1, limit_chars - len(text), readable)


def _pandas_index(index: Any, limit_chars: int, readable: Readable) -> str:
    names = ", ".join(_label(name) for name in index.names if name is not None)
    dtype = "" if index.nlevels > 1 else f", {index.dtype}"
    text = f"{type(index).__name__}{' ' if names else ''}{names}: {counted(len(index), 'value')}{dtype}"
    head = index[: _max_rows(limit_chars, 1)].tolist()
    return text + _head_list(head, len(index), limit_chars - len(text), readable)


def _index_columns(index: Any) -> list[tuple[str, list[Any]]]:
    """The index as columns of a table; none if it only counts the rows."""
    if is_instance_of(index, "pandas.RangeIndex") and index.start == 0 and index.step == 1 and index.name is None:
        return []
    names = [_label(name) if name is not None else "index" for name in index.names]
    return [(name, index.get_level_values(level).tolist()) for level, name in enumerate(names)]


def _label(name: Any) -> str:
    return " / ".join(map(str, name)) if isinstance(name, tuple) else str(name)


# --- polars -----------------------------------------------------------------------------------


def _polars_frame(frame: Any, limit_chars: int, readable: Readable) -> str:
    row_count, column_count = frame.shape
    names = frame.columns[:MAX_COLUMNS]
    head = frame.select(names).head(_max_rows(limit_chars, len(names)))
    text = _title("DataFrame", row_count, column_count, list(zip(names, head.dtypes, strict=True)))
    columns = [(name, head[name].to_list()) for name in names]
    return text + _table(columns, row_count, column_count, limit_chars - len(text), readable)


def _polars_lazy_frame(frame: Any, limit_chars: int, readable: Readable) -> str:
    """The head of a query: so many rows are computed, and one more to see whether there are more."""
    schema = frame.collect_schema()
    names = schema.names()[:MAX_COLUMNS]
    max_rows = _max_rows(limit_chars, len(names))
    head = frame.select(names).head(max_rows + 1).collect()
    row_count = head.height if head.height <= max_rows else None
    text = _title("LazyFrame", row_count, len(schema), [(name, schema[name]) for name in names])
    columns = [(name, head[name].to_list()) for name in names]
    return text + _table(columns, row_count, len(schema), limit_chars - len(text), readable)


def _polars_series(series: Any, limit_chars: int, readable: Readable) -> str:
    name = f" {shortened(series.name, 60)}" if series.name else ""
    text = f"Series{name}: {counted(len(series), 'value')}, {series.dtype}"
    columns = [(series.name or "value", series.head(_max_rows(limit_chars, 1)).to_list())]
    return text + _table(columns, len(series), 1, limit_chars - len(text), readable)


# --- pyarrow ----------------------------------------------------------------------------------


def _arrow_table(table: Any, limit_chars: int, readable: Readable) -> str:
    row_count, column_count = table.num_rows, table.num_columns
    names = table.schema.names[:MAX_COLUMNS]
    head = table.slice(0, _max_rows(limit_chars, len(names)))
    columns = [(name, head.column(position).to_pylist()) for position, name in enumerate(names)]
    text = _title(
        type(table).__name__, row_count, column_count, list(zip(names, table.schema.types, strict=False))
    )
    return text + _table(columns, row_count, column_count, limit_chars - len(text), readable)


def _arrow_array(array: Any, limit_chars: int, readable: Readable) -> str:
    text = f"{type(array).__name__}: {counted(len(array), 'value')}, {array.type}"
    head = array.slice(0, _max_rows(limit_chars, 1)).to_pylist()
    return text + _head_list(head, len(array), limit_chars - len(text), readable)


# --- numpy ------------------------------------------------------------------------------------


def _numpy_array(array: Any, limit_chars: int, readable: Readable) -> str:
    if array.dtype == object and 0 < array.size <= 50 and is_instance_of(array.flat[0], "matplotlib.axes.Axes"):
        return "\n\n".join(readable(axes, limit_chars) for axes in array.flat)
    text = f"Array: shape {array.shape}, {array.dtype}{_describe_range(array)}"
    if array.ndim == 0:
        return f"{text}\nvalue: {_inline(array.item(), limit_chars, readable)}"
    if array.size == 0:
        return text
    part, where = array, ""
    while part.ndim > 2:
        part, where = part[0], f"{where}0, "
    if where:
        text += f"\nThe part [{where}:, :] of it:"
    columns = 1 if part.ndim == 1 else part.shape[1]
    head = part[: _max_rows(limit_chars, min(columns, MAX_COLUMNS))]
    if part.ndim == 1:
        return text + _head_list(head.tolist(), len(part), limit_chars - len(text), readable)
    rows = [(str(column), head[:, column].tolist()) for column in range(min(columns, MAX_COLUMNS))]
    return text + _table(rows, len(part), columns, limit_chars - len(text), readable)


def _describe_range(array: Any) -> str:
    """Minimum, maximum and mean of the finite values in an array of numbers."""
    if array.dtype.kind not in "biuf" or not array.size:
        return ""
    numpy: Any = sys.modules["numpy"]
    values = numpy.ma.compressed(array) if is_instance_of(array, "numpy.ma.MaskedArray") else array
    sampled = values.size > _MAX_COUNTED
    if sampled:
        values = values.flat[:: values.size // (_MAX_COUNTED // 10)]
    if array.dtype.kind == "b":
        text = f", {counted(int(numpy.count_nonzero(values)), 'value')} true"
    else:
        missing = 0
        if values.size and not (numpy.isfinite(values.min()) and numpy.isfinite(values.max())):
            finite = numpy.isfinite(values)
            missing = int(finite.size - numpy.count_nonzero(finite))
            values = values[finite]
        if not values.size:
            return ", no finite values"
        least, largest = compact_number(float(values.min())), compact_number(float(values.max()))
        text = f", min {least}, max {largest}, mean {compact_number(float(values.mean(dtype=float)))}"
        text += f", {counted(missing, 'value')} not finite" if missing else ""
    return f"{text} (of a sample)" if sampled else text


# --- tables and lists -------------------------------------------------------------------------


def _max_rows(limit_chars: int, column_count: int) -> int:
    """More rows than this cannot fit: a cell takes at least four characters."""
    return max(1, limit_chars // (4 * column_count + 2))


def _title(kind: str, row_count: int | None, column_count: int, dtypes: list[tuple[str, Any]]) -> str:
    """The first lines: shape, and columns with their dtypes."""
    columns = counted(column_count, "column")
    shape = f"{columns}, more rows than shown" if row_count is None else f"{counted(row_count, 'row')} x {columns}"
    text = f"{kind}: {shape}"
    described = [f"{shortened(name, 60)} ({shortened(str(dtype), 200)})" for name, dtype in dtypes]
    if column_count > len(dtypes):
        described.append(f"and {column_count - len(dtypes):,} more")
    return f"{text}\nColumns: {', '.join(described)}" if described else text


def _table(
    columns: list[tuple[str, list[Any]]],
    row_count: int | None,
    column_count: int,
    chars_left: int,
    readable: Readable,
) -> str:
    """The rows that fit as a Markdown table, and a notice of what is missing; "" without rows.

    Args:
        row_count: None if there are more rows than in the columns, and nobody knows how many.
    """
    if not columns or row_count == 0:
        return ""
    chars_left -= 100  # for the notice
    cell_chars = max(MIN_CELL_CHARS, chars_left // (len(columns) * min(row_count or 10, 10)))
    header = [shortened(name, cell_chars) for name, _ in columns]
    chars_left -= 2 * sum(len(escaped(name)) + 3 for name in header)
    rows: list[list[str]] = []
    long_cells = False
    for values in zip(*(values for _, values in columns), strict=True):
        texts = [_inline(value, cell_chars + 1, readable) for value in values]
        row = [shortened(text, cell_chars) for text in texts]
        chars_left -= sum(len(escaped(text)) + 3 for text in row) + 2
        if rows and chars_left < 0:
            break
        long_cells = long_cells or row != texts
        rows.append(row)
    if row_count is None:
        cuts = [f"only the first {counted(len(rows), 'row')}"]
    else:
        cuts = [f"{len(rows):,} of {row_count:,} rows"] if len(rows) < row_count else []
    if column_count > MAX_COLUMNS:
        cuts.append(f"{MAX_COLUMNS} of {column_count:,} columns")
    notices = [f"{' and '.join(cuts)} shown"] if cuts else []
    notices += ["long cells end in …"] if long_cells else []
    notice = f"\n[cut: {'; '.join(notices)}]" if notices else ""
    return f"\n\n{markdown_table(header, rows)}{notice}"


def _inline(value: Any, limit_chars: int, readable: Readable) -> str:
    """A value as the text of a cell, only as long as needed to see that it is too long."""
    if isinstance(value, str):
        return value[:limit_chars]
    if isinstance(value, float):
        return compact_number(value)
    text = readable(value, max(limit_chars, 60))
    return text.removesuffix(" 00:00:00")  # pandas adds a time of day to dates


def _head_list(head: list[Any], count: int, chars_left: int, readable: Readable) -> str:
    """The values that fit, as a list on a separate line."""
    shown: list[str] = []
    chars_left -= 60
    for value in head:
        text = shortened(_inline(value, 201, readable), 200)
        chars_left -= len(text) + 2
        if shown and chars_left < 0:
            break
        shown.append(text)
    notice = f"\n[cut: {len(shown):,} of {count:,} values shown]" if len(shown) < count else ""
    return f"\n[{', '.join(shown)}]{notice}"


_FORMS: tuple[tuple[tuple[str, ...], Callable[[Any, int, Readable], str]], ...] = (
    (("pandas.DataFrame",), _pandas_frame),
    (("pandas.Series",), _pandas_series),
    (("pandas.Index",), _pandas_index),
    (("numpy.ndarray",), _numpy_array),
    (("polars.DataFrame",), _polars_frame),
    (("polars.LazyFrame",), _polars_lazy_frame),
    (("polars.Series",), _polars_series),
    (("pyarrow.Table", "pyarrow.RecordBatch"), _arrow_table),
    (("pyarrow.Array", "pyarrow.ChunkedArray"), _arrow_array),
)
"""Names of classes, and what describes their objects."""
