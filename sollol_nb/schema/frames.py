"""Frames as schemas, and answers as frames: from objects, rows, Markdown tables, CSV and JSON."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from datetime import date
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from sollol_nb.errors import ConfigError, StructureError
from sollol_nb.schema.checks import FENCE, SchemaMismatch, decimal_of, json_in, plain
from sollol_nb.text.readable import whole_text_of
from sollol_nb.text.readable_frames import is_instance_of
from sollol_nb.text.tables import parse_markdown_table, shortened

if TYPE_CHECKING:
    import pandas as pd

_NUMBER = re.compile(r"[+-]?(\d{1,3}(,\d{3})+|0|[1-9]\d*)?(\.\d+)?([eE][+-]?\d+)?")
_MISSING = frozenset(["", "-", "\u2013", "\u2014", "n/a", "na", "nan", "none", "null"])
_EMPHASIS = re.compile(r"^(\*\*|`)(.+)\1$")


def schema_of_frame(frame: Any) -> dict[str, Any]:
    """The schema of an object whose `rows` are objects with the columns of an example.

    The type of a column of numbers, booleans, texts, dates or categories follows its dtype; any other object
    column may hold any value. A column may hold null if it does so in the example, or if its dtype is nullable.
    The index is ignored.

    Raises:
        ConfigError: a dtype that JSON cannot represent, no columns, or two columns with the same name.
    """
    names = [str(name) for name in frame.columns]
    if not names or len(set(names)) < len(names):
        raise ConfigError("a DataFrame as an example needs columns with distinct names")
    columns = {name: _schema_of_column(name, frame.iloc[:, position]) for position, name in enumerate(names)}
    row = {"type": "object", "properties": columns, "required": names, "additionalProperties": False}
    return {
        "type": "object",
        "properties": {"rows": {"type": "array", "items": row}},
        "required": ["rows"],
        "additionalProperties": False,
    }


def _schema_of_column(name: str, column: pd.Series[Any]) -> dict[str, Any]:
    import pandas as pd

    dtype: Any = column.dtype
    kinds = pd.api.types
    has_null = bool(column.isna().any()) or isinstance(getattr(dtype, "na_value", None), type(pd.NA))
    if isinstance(dtype, pd.CategoricalDtype):
        choices = dtype.categories.tolist()
        if not choices or not all(isinstance(choice, str | int | float) for choice in choices):
            raise ConfigError(f"column {name}: the categories must be texts or numbers")
        return {"enum": [*choices, None] if has_null else choices}
    schema: dict[str, Any]
    if kinds.is_bool_dtype(dtype):
        schema = {"type": "boolean"}
    elif kinds.is_integer_dtype(dtype):
        numpy_dtype = getattr(dtype, "numpy_dtype", getattr(dtype, "subtype", dtype))  # nullable, sparse
        schema = {"type": "integer", **_bounds(numpy_dtype)}
    elif kinds.is_float_dtype(dtype) or _is_arrow_decimal(dtype):
        schema = {"type": "number"}
    elif kinds.is_datetime64_any_dtype(dtype):
        times = column.dropna()
        has_days_only = len(times) > 0 and bool((times == times.dt.normalize()).all())
        days_only = has_days_only and getattr(dtype, "tz", None) is None
        schema = {"type": "string", "format": "date" if days_only else "date-time"}
    elif kinds.is_object_dtype(dtype):
        schema = _schema_of_objects(column)
    elif kinds.is_string_dtype(dtype):
        schema = {"type": "string"}
        has_null = bool(column.isna().any())  # its dtype is nullable whether or not a text is missing
    else:
        raise ConfigError(f"column {name}: JSON has no type for {dtype}; use numbers, texts or dates")
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    return {**schema, "type": [*types, "null"]} if has_null and "null" not in types else schema


def _is_arrow_decimal(dtype: Any) -> bool:
    import pandas as pd

    return isinstance(dtype, pd.ArrowDtype) and dtype.type is Decimal


def _bounds(dtype: Any) -> dict[str, int]:
    """The smallest and largest integer of a dtype; int64 has no bounds here, since JSON needs none for it."""
    if dtype.itemsize == 8:
        return {"minimum": 0} if dtype.kind == "u" else {}
    bits = 8 * dtype.itemsize
    return (
        {"minimum": 0, "maximum": 2**bits - 1}
        if dtype.kind == "u"
        else {"minimum": -(2 ** (bits - 1)), "maximum": 2 ** (bits - 1) - 1}
    )


def _schema_of_objects(column: pd.Series[Any]) -> dict[str, Any]:
    from pandas.api.types import infer_dtype

    known = {
        "string": {"type": "string"},
        "empty": {"type": "string"},
        "boolean": {"type": "boolean"},
        "integer": {"type": "integer"},
        "floating": {"type": "number"},
        "mixed-integer-float": {"type": "number"},
        "date": {"type": "string", "format": "date"},
        "decimal": {"type": "number"},
    }
    schema: dict[str, Any] | None = known.get(infer_dtype(column, skipna=True))
    values = column.dropna()
    if schema is None and len(values):
        for type_name, python_type in (("array", list | tuple), ("object", Mapping)):
            if all(isinstance(value, python_type) for value in values):
                schema = {"type": type_name}
    return schema or {"type": ["string", "number", "boolean", "object", "array", "null"]}


def frame_like(example: Any, rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows that match `schema_of_frame`, as a frame with the columns and dtypes of the example.

    Times get the example's time zone; if it has none, they are UTC.

    Raises:
        SchemaMismatch: a column cannot be converted to its dtype.
    """
    import pandas as pd

    columns = {}
    for position, name in enumerate(map(str, example.columns)):
        try:
            columns[position] = _column_like(example.iloc[:, position], [row[name] for row in rows])
        except (ValueError, TypeError, OverflowError) as error:
            raise SchemaMismatch(("rows", name), f"{type(error).__name__}: {shortened(str(error), 100)}") from None
    frame = pd.DataFrame(columns)
    frame.columns = example.columns
    return frame


def _column_like(example: pd.Series[Any], values: list[Any]) -> pd.Series[Any]:
    import pandas as pd

    dtype: Any = example.dtype
    kinds = pd.api.types
    data: Any = plain(values)
    if not isinstance(dtype, pd.CategoricalDtype):
        if kinds.is_datetime64_any_dtype(dtype):
            data = pd.to_datetime(values, utc=True, format="ISO8601").tz_convert(getattr(dtype, "tz", None))
        elif kinds.is_object_dtype(dtype) and kinds.infer_dtype(example, skipna=True) == "date":
            data = [None if value is None else date.fromisoformat(value) for value in values]
        elif kinds.is_object_dtype(dtype) and kinds.infer_dtype(example, skipna=True) == "decimal":
            return pd.Series([None if value is None else decimal_of(value) for value in values], dtype=object)
        elif _is_arrow_decimal(dtype):
            data = [None if value is None else decimal_of(value) for value in values]
        elif kinds.is_integer_dtype(dtype):  # JSON's 3.0 is an integer too
            data = [None if value is None else int(value) for value in values]
    column: pd.Series[Any] = pd.Series(data, dtype=dtype)
    return column


# --- any answer -------------------------------------------------------------------------------


def frame_of(value: object) -> pd.DataFrame:
    """A value as a frame: an object is one row, a list of objects one row each.

    An object that contains only a list, such as `{"rows": [...]}`, stands for that list. Other lists become one
    column. A text or a model's answer is read by `frame_from_text`.

    Raises:
        StructureError: the value has no rows.
    """
    import pandas as pd

    if isinstance(value, pd.DataFrame):
        return value
    text = whole_text_of(value)
    if text is not None:
        return frame_from_text(text)
    value = _as_mapping(value)
    name = "value"
    if isinstance(value, Mapping):
        only = next(iter(value.values())) if len(value) == 1 else None
        if isinstance(only, list | tuple):
            name, value = str(next(iter(value))), only
        else:
            value = [value]
    if not isinstance(value, list | tuple | set | frozenset):
        raise StructureError(
            f"cannot make a DataFrame of {shortened(repr(value), 60)}: it has no rows", text=str(value)
        )
    rows = [_as_mapping(row) for row in value]
    if not any(isinstance(row, Mapping) for row in rows):
        return pd.DataFrame({name: rows}) if rows else pd.DataFrame()
    if not all(isinstance(row, Mapping) for row in rows):
        raise StructureError(
            "cannot make a DataFrame of a list that mixes objects and other values", text=str(value)
        )
    return pd.DataFrame(rows)


def _as_mapping(value: Any) -> Any:
    """An object with fields as a mapping; anything else unchanged."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if is_instance_of(value, "pydantic.BaseModel"):
        return dict(value)
    return value._asdict() if isinstance(value, tuple) and hasattr(value, "_asdict") else value


def frame_from_text(text: str) -> pd.DataFrame:
    """The frame in an answer: its first Markdown table, otherwise JSON or CSV.

    JSON and CSV are searched in fenced blocks; without any, in the whole text and its paragraphs. CSV has a
    header, two or more columns, and rows of equal length. Columns whose texts are all numbers (also `1,234.5`)
    or all true and false are converted.

    Raises:
        StructureError: the text has none of them.
    """
    table = parse_markdown_table(text)
    if table is not None:
        return _frame_of_texts(table[0], [[_EMPHASIS.sub(r"\2", cell) for cell in row] for row in table[1]])
    whole = text.strip()
    blocks = FENCE.findall(text) or [whole, *sorted(re.split(r"\n\s*\n", whole), key=len, reverse=True)]
    for block in map(str.strip, blocks):
        if block.startswith(("[", "{")):
            try:
                return frame_of(plain(json_in(block)))
            except (SchemaMismatch, StructureError):
                continue
        rows = _csv_rows(block)
        if rows is not None:
            return _frame_of_texts(rows[0], rows[1:])
    raise StructureError("the answer has no Markdown table, CSV or JSON records (the text is in .text)", text=text)


def _csv_rows(block: str) -> list[list[str]] | None:
    for delimiter in ",;\t":
        try:
            lines = csv.reader(io.StringIO(block), delimiter=delimiter, skipinitialspace=True, strict=True)
            rows = [row for row in lines if row]
        except csv.Error:
            continue
        header = rows[0] if rows else []
        if len(header) > 1 and len(rows) > 1 and all(len(row) == len(header) for row in rows) and all(header):
            return rows
    return None


def _frame_of_texts(header: Sequence[str], rows: Sequence[Sequence[str]]) -> pd.DataFrame:
    import pandas as pd

    columns = {position: _typed([row[position] for row in rows]) for position in range(len(header))}
    frame = pd.DataFrame(columns)
    frame.columns = pd.Index(header)
    return frame


def _typed(texts: Sequence[str]) -> list[Any]:
    """The texts as numbers or booleans if all of them can be, with None for missing ones; otherwise unchanged."""
    present = [text for text in texts if text.lower() not in _MISSING]
    if present and all(any(map(str.isdigit, text)) and _NUMBER.fullmatch(text) for text in present):
        plain = [text.replace(",", "") if text.lower() not in _MISSING else None for text in texts]
        whole = all(text.lstrip("+-").replace(",", "").isdigit() for text in present)
        return [None if text is None else int(text) if whole else float(text) for text in plain]
    if present and all(text.lower() in ("true", "false") for text in present):
        return [None if text.lower() in _MISSING else text.lower() == "true" for text in texts]
    return [text or None for text in texts]
