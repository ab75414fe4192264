"""Python values as text that a model can read: tables as Markdown, figures as descriptions, plain data as JSON.

Texts are never changed, since somebody wrote them so. All other values are limited: a large one is shown by its
shape and its head, and a last line in brackets says what is missing (`[cut: 120 of 50,000 rows shown]`). Only the
head of a large value is read. pandas, numpy, matplotlib and pydantic are never imported here: a value can only be
one of theirs if they have been imported already.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import deque
from collections.abc import Collection, ItemsView, Iterator, KeysView, Mapping, ValuesView
from enum import Enum
from itertools import islice
from typing import Any

from sollol_nb.text.tables import compact_number, counted, escaped, markdown_table, shortened

LIMIT_CHARS = 8000
MAX_COLUMNS = 30
MAX_DEPTH = 40  # of containers inside containers
MIN_CELL_CHARS = 40

_MAX_SORTED = 10_000
_MAX_DIGITS = 4000  # Python refuses to convert longer integers to text


def readable(value: object, *, limit_chars: int = LIMIT_CHARS) -> str:
    """The value as text for a prompt.

    Texts, and objects with a method `_prompt_text_()` (such as a model's answer), are given whole. A DataFrame or
    Series becomes its shape, its dtypes and its head as a Markdown table; an array its shape, dtype, range and
    head; a matplotlib figure a description and sampled data; a dict, list, tuple, set, dataclass or pydantic model
    JSON in one line; anything else what `str` says.

    Args:
        limit_chars: maximum length of anything but a text; 100 or more.
    """
    if isinstance(value, Enum):
        return readable(value.value, limit_chars=limit_chars)
    whole = whole_text_of(value)
    if whole is not None:
        return whole
    text = _limited_text(value, limit_chars)
    return text if len(text) <= limit_chars else _cut(text, limit_chars)


def whole_text_of(value: object) -> str | None:
    """The text that a value is: a string, or what its method `_prompt_text_()` returns; None for all else.

    With this method a class says what its objects look like in a prompt, as it does for a page with
    `_repr_html_()`.
    """
    if isinstance(value, str):
        return str(value)
    method = getattr(type(value), "_prompt_text_", None)
    return None if method is None else str(method(value))


def is_instance_of(value: object, *names: str) -> bool:
    """Whether the value is an instance of one of these classes, named `module.Class`, without importing them."""
    for name in names:
        module, _, class_name = name.rpartition(".")
        found = getattr(sys.modules.get(module), class_name, None)
        if isinstance(found, type) and isinstance(value, found):
            return True
    return False


def _limited_text(value: object, limit_chars: int) -> str:
    if value is None or isinstance(value, bool | int | float):
        return _plain_number(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return _describe_bytes(value)
    if is_instance_of(value, "pandas.DataFrame"):
        return _describe_frame(value, limit_chars)
    if is_instance_of(value, "pandas.Series"):
        return _describe_series(value, limit_chars)
    if is_instance_of(value, "pandas.Index"):
        return _describe_index(value, limit_chars)
    if is_instance_of(value, "numpy.ndarray"):
        return _describe_array(value, limit_chars)
    if is_instance_of(value, "matplotlib.figure.FigureBase", "matplotlib.axes.Axes"):
        from sollol_nb.text.readable_figures import describe_figure

        return describe_figure(value)
    container = _container(value)
    return str(value) if container is None else _as_json(value, container, limit_chars)


def _cut(text: str, limit_chars: int) -> str:
    shown_chars = max(0, limit_chars - 60)
    return f"{text[:shown_chars]}\n[cut: {shown_chars:,} of {len(text):,} characters shown]"


def _plain_number(value: float | None) -> str:
    if isinstance(value, int) and value.bit_length() > _MAX_DIGITS * 3:
        return f"integer of {value.bit_length():,} bits"
    return str(value)


def _describe_bytes(value: bytes | bytearray | memoryview) -> str:
    count = value.nbytes if isinstance(value, memoryview) else len(value)
    head = bytes(value[:32]) if count and (not isinstance(value, memoryview) or value.ndim == 1) else b""
    begin = f", beginning with {head!r}" if head else ""
    return f"{type(value).__name__}: {counted(count, 'byte')}{begin}"


# --- frames -----------------------------------------------------------------------------------


def _describe_frame(frame: Any, limit_chars: int) -> str:
    row_count, column_count = frame.shape
    head = frame.iloc[: _max_rows(limit_chars, min(column_count, MAX_COLUMNS)), :MAX_COLUMNS]
    names = [_label(name) for name in head.columns]
    columns = [(name, head.iloc[:, position].tolist()) for position, name in enumerate(names)]
    dtypes = [f"{shortened(name, 60)} ({dtype})" for name, dtype in zip(names, head.dtypes, strict=True)]
    if column_count > len(names):
        dtypes.append(f"and {column_count - len(names):,} more")
    text = f"DataFrame: {counted(row_count, 'row')} x {counted(column_count, 'column')}"
    if dtypes:
        text += f"\nColumns: {', '.join(dtypes)}"
    return text + _table(_index_columns(head.index) + columns, row_count, column_count, limit_chars - len(text))


def _describe_series(series: Any, limit_chars: int) -> str:
    head = series.iloc[: _max_rows(limit_chars, 1)]
    name = "" if series.name is None else f" {shortened(_label(series.name), 60)}"
    text = f"Series{name}: {counted(len(series), 'value')}, {series.dtype}"
    columns = [*_index_columns(head.index), (_label(series.name) if name else "value", head.tolist())]
    return text + _table(columns, len(series), 1, limit_chars - len(text))


def _describe_index(index: Any, limit_chars: int) -> str:
    names = ", ".join(_label(name) for name in index.names if name is not None)
    dtype = "" if index.nlevels > 1 else f", {index.dtype}"
    text = f"{type(index).__name__}{' ' if names else ''}{names}: {counted(len(index), 'value')}{dtype}"
    return text + _head_list(index[: _max_rows(limit_chars, 1)].tolist(), len(index), limit_chars - len(text))


def _index_columns(index: Any) -> list[tuple[str, list[Any]]]:
    """The index as columns of a table; none if it only counts the rows."""
    if is_instance_of(index, "pandas.RangeIndex") and index.start == 0 and index.step == 1 and index.name is None:
        return []
    names = [_label(name) if name is not None else "index" for name in index.names]
    return [(name, index.get_level_values(level).tolist()) for level, name in enumerate(names)]


def _label(name: Any) -> str:
    return " / ".join(map(str, name)) if isinstance(name, tuple) else str(name)


def _max_rows(limit_chars: int, column_count: int) -> int:
    """More rows than this cannot fit: a cell takes at least four characters."""
    return max(1, limit_chars // (4 * column_count + 2))


def _table(columns: list[tuple[str, list[Any]]], row_count: int, column_count: int, chars_left: int) -> str:
    """The rows that fit as a Markdown table, and a notice of what is missing; "" without rows."""
    if not columns or not row_count:
        return ""
    chars_left -= 100  # for the notice
    cell_chars = max(MIN_CELL_CHARS, chars_left // (len(columns) * min(row_count, 10)))
    header = [shortened(name, cell_chars) for name, _ in columns]
    chars_left -= 2 * sum(len(escaped(name)) + 3 for name in header)
    rows: list[list[str]] = []
    long_cells = False
    for values in zip(*(values for _, values in columns), strict=True):
        texts = [_inline(value, cell_chars + 1) for value in values]
        row = [shortened(text, cell_chars) for text in texts]
        chars_left -= sum(len(escaped(text)) + 3 for text in row) + 2
        if rows and chars_left < 0:
            break
        long_cells = long_cells or row != texts
        rows.append(row)
    cuts = [f"{len(rows):,} of {row_count:,} rows"] if len(rows) < row_count else []
    if column_count > MAX_COLUMNS:
        cuts.append(f"{MAX_COLUMNS} of {column_count:,} columns")
    notices = [f"{' and '.join(cuts)} shown"] if cuts else []
    notices += ["long cells end in …"] if long_cells else []
    notice = f"\n[cut: {'; '.join(notices)}]" if notices else ""
    return f"\n\n{markdown_table(header, rows)}{notice}"


def _inline(value: Any, limit_chars: int) -> str:
    """A value as the text of a cell, only as long as needed to see that it is too long."""
    if isinstance(value, str):
        return value[:limit_chars]
    if isinstance(value, float):
        return compact_number(value)
    text = readable(value, limit_chars=max(limit_chars, 60))
    return text.removesuffix(" 00:00:00")  # pandas adds a time of day to dates


# --- arrays -----------------------------------------------------------------------------------

_MAX_COUNTED = 10_000_000  # values; the range of a larger array is that of a sample


def _describe_array(array: Any, limit_chars: int) -> str:
    if array.dtype == object and 0 < array.size <= 50 and is_instance_of(array.flat[0], "matplotlib.axes.Axes"):
        return "\n\n".join(readable(axes, limit_chars=limit_chars) for axes in array.flat)
    text = f"Array: shape {array.shape}, {array.dtype}{_describe_range(array)}"
    if array.ndim == 0:
        return f"{text}\nvalue: {_inline(array.item(), limit_chars)}"
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
        return text + _head_list(head.tolist(), len(part), limit_chars - len(text))
    rows = [(str(column), head[:, column].tolist()) for column in range(min(columns, MAX_COLUMNS))]
    return text + _table(rows, len(part), columns, limit_chars - len(text))


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


def _head_list(head: list[Any], count: int, chars_left: int) -> str:
    """The values that fit, as a list on a separate line."""
    shown: list[str] = []
    chars_left -= 60
    for value in head:
        text = shortened(_inline(value, 201), 200)
        chars_left -= len(text) + 2
        if shown and chars_left < 0:
            break
        shown.append(text)
    notice = f"\n[cut: {len(shown):,} of {count:,} values shown]" if len(shown) < count else ""
    return f"\n[{', '.join(shown)}]{notice}"


# --- plain data -------------------------------------------------------------------------------


def _container(value: Any) -> Mapping[Any, Any] | Collection[Any] | None:
    """The value as a mapping or collection if it has parts, otherwise None."""
    if isinstance(value, Mapping):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    if is_instance_of(value, "pydantic.BaseModel"):
        return dict(value)
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return dict(value._asdict())
    if isinstance(value, set | frozenset) and len(value) <= _MAX_SORTED:
        try:
            return sorted(value)
        except TypeError:  # of different types
            return value
    collections = (list, tuple, set, frozenset, deque, KeysView, ValuesView, ItemsView)
    return value if isinstance(value, collections) else None


class _TooLargeError(Exception):
    """The data does not fit as a whole."""


@dataclasses.dataclass(slots=True)
class _PlainData:
    """Converts values to plain data for JSON, within a number of characters.

    Attributes:
        chars_left: how many characters may still be used.
        shorten: replace parts that do not fit by a mark; otherwise raise _TooLargeError.
    """

    chars_left: int
    shorten: bool
    max_items: int = 20
    max_text_chars: int = 200

    def of(self, value: object, inside: tuple[int, ...] = ()) -> Any:
        """A value as plain data; `inside` has the ids of the containers around it."""
        if self.chars_left < 0:
            if not self.shorten:
                raise _TooLargeError
            return "…"
        text = None if isinstance(value, Enum) else whole_text_of(value)
        if text is not None:
            return self._text(text)
        container = _container(value)
        if container is None:
            leaf = self._leaf(value)
            if not isinstance(leaf, list):
                return leaf
            container = leaf
        if id(value) in inside or len(inside) >= MAX_DEPTH:
            return "…"
        inside = (*inside, id(value))
        self.chars_left -= 2
        items: Iterator[Any] = iter(container.items() if isinstance(container, Mapping) else container)
        left_out = 0
        if self.shorten and len(container) > self.max_items:
            items, left_out = islice(items, self.max_items), len(container) - self.max_items
        if not isinstance(container, Mapping):
            listed = [self.of(item, inside) for item in items]
            return [*listed, f"… {left_out:,} more"] if left_out else listed
        named: dict[str, Any] = {}
        for key, item in items:
            name = self._text(str(key))
            named[repr(key) if name in named else name] = self.of(item, inside)
        return {**named, "…": f"{left_out:,} more"} if left_out else named

    def _leaf(self, value: Any) -> Any:
        if isinstance(value, Enum):
            value = value.value
        if value is None or isinstance(value, bool | int | float):
            text = _plain_number(value)
            self.chars_left -= len(text) + 2
            return text if text.startswith("integer of") else value
        if is_instance_of(value, "numpy.generic") and value.dtype.kind in "biuf":
            self.chars_left -= 8
            return float(str(value)) if value.dtype.kind == "f" else value.item()
        if is_instance_of(value, "numpy.ndarray") and value.ndim > 0 and value.size <= 100:
            return value.tolist()
        if isinstance(value, str):  # of an Enum
            return self._text(value)
        return self._text(readable(value, limit_chars=1000).partition("\n")[0])

    def _text(self, text: str) -> str:
        if self.shorten:
            text = shortened(text, self.max_text_chars)
        self.chars_left -= len(text) + 4
        return text


def _as_json(value: object, container: Mapping[Any, Any] | Collection[Any], limit_chars: int) -> str:
    """The data as JSON in one line; if it is too large, its beginning with large parts shortened, and a notice."""
    try:
        whole = _json(_PlainData(limit_chars, shorten=False).of(value))
        if len(whole) <= limit_chars:
            return whole
    except _TooLargeError:
        pass
    chars_left = limit_chars - 80  # for the notice
    shown: list[str] = []
    named = isinstance(container, Mapping)
    for item in container.items() if isinstance(container, Mapping) else container:
        part = dict([item]) if named else [item]
        text = _json(_PlainData(max(chars_left, 200), shorten=True).of(part, (id(value),)))[1:-1]
        chars_left -= len(text) + 2
        if shown and chars_left < 0:
            break
        shown.append(text)
    opening, closing = "{}" if named else "[]"
    left_out = f"{len(shown):,} of {len(container):,} items shown; " if len(shown) < len(container) else ""
    return f"{opening}{', '.join(shown)}{closing}\n[cut: {left_out}… marks what is missing]"


def _json(data: Any) -> str:
    return json.dumps(data, ensure_ascii=False)
