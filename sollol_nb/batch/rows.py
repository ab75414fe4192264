"""The rows of a batch: read from a frame, a series or any iterable, and filled into a template. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Number
from typing import TYPE_CHECKING, Any, TypeAlias

from sollol_nb.chat.messages import WITHOUT_IMAGES, check_messages
from sollol_nb.errors import ConfigError
from sollol_nb.text.expansion import Template
from sollol_nb.text.insertions import Insertions
from sollol_nb.text.readable_frames import is_instance_of
from sollol_nb.text.tables import shortened

if TYPE_CHECKING:
    import pandas as pd

Messages: TypeAlias = "Sequence[Mapping[str, Any]]"
Rows: TypeAlias = "pd.DataFrame | pd.Series[Any] | Iterable[Any]"
RowTemplate: TypeAlias = "str | Callable[[Any], str | Messages]"


@dataclass(frozen=True, slots=True)
class RowTable:
    """The rows of a batch.

    Attributes:
        frame: the rows, unchanged if they were a pandas frame.
        items: what a template gets of each row: a dict, or the value itself where it is not a dict.
    """

    frame: pd.DataFrame
    items: list[Any]

    @classmethod
    def read(cls, rows: Rows) -> RowTable:
        """Read a frame (each row a dict by column; also one of polars or pyarrow), a series, or any iterable (to
        its end).

        Dicts become the columns of a frame, other values its column `item`; a series keeps its name.

        Raises:
            ConfigError: `rows` is none of these, or two columns have the same name.
        """
        import pandas as pd

        if isinstance(rows, pd.DataFrame):
            if not rows.columns.is_unique:
                twice = rows.columns[rows.columns.duplicated()][0]
                raise ConfigError(f"the frame has two columns named {twice!r}; rename one of them")
            names = list(rows.columns)
            # Older pandas has no tuples for rows without columns.
            values = rows.itertuples(index=False, name=None) if names else ((),) * len(rows)
            return cls(rows, [dict(zip(names, row, strict=True)) for row in values])
        if isinstance(rows, pd.Series):
            return cls(rows.to_frame("item" if rows.name is None else rows.name), list(rows))
        rows = _rows_of_table(rows)
        if isinstance(rows, str | bytes | Mapping) or not isinstance(rows, Iterable):
            raise ConfigError(
                "rows must be a DataFrame, a Series, or a list of dicts or values, not "
                f"{shortened(' '.join(repr(rows).split()), 60)}"
            )
        items = list(rows)
        if items and all(isinstance(item, Mapping) for item in items):
            items = [dict(item) for item in items]
            return cls(pd.DataFrame(items), items)
        return cls(pd.DataFrame({"item": object_column(items)}).infer_objects(), items)


def _rows_of_table(rows: Any) -> Any:
    """The rows of a table of another library; iterated, it would yield its columns. All else unchanged."""
    if callable(getattr(rows, "collect", None)) and hasattr(rows, "collect_schema"):  # a LazyFrame of polars
        rows = rows.collect()
    if callable(getattr(rows, "iter_rows", None)):  # a DataFrame of polars
        return rows.iter_rows(named=True)
    if callable(getattr(rows, "to_pylist", None)):  # a Table, an Array or a ChunkedArray of pyarrow
        return rows.to_pylist()
    return rows


def object_column(values: Sequence[Any]) -> Any:
    """An array of objects; numpy by itself would make a table of values that are lists."""
    import numpy as np

    column = np.empty(len(values), dtype=object)
    for position, value in enumerate(values):
        column[position] = value
    return column


def questions(
    items: Sequence[Any], template: RowTemplate, system: str | None
) -> list[list[dict[str, Any]] | None]:
    """The messages of each row; None where there is nothing to ask.

    That is a row of which the template inserts a missing value (None, NaN, NaT, NA) or a blank column, a missing
    or blank value that is the row itself, and one for which a function returns a missing value or a blank text.
    Line ends become `\\n`: in a table they depend on the program that wrote it.

    Args:
        template: a text with `{{ expression }}` (see `text/expansion.py`) over the row: its columns by their names
            and `row` for all of it; `item`, `value` and `row` for a value that is not a dict. Or a function of the
            row that returns a text or messages.
        system: if given, the system message before each prompt.

    Raises:
        ConfigError: the template cannot be used, or cannot be filled with a row; the message has the position of
            the row, from 0.
    """
    if not isinstance(template, str) and not callable(template):
        raise ConfigError(f"the template must be a text or a function of a row, not {type(template).__name__}")
    if isinstance(template, str) and "{{" not in template and len(items) > 1:
        raise ConfigError(
            "the template has no {{ column }} in it, so all rows would ask the same; write two braces: {{ name }}"
        )
    ask = _filling(Template(template)) if isinstance(template, str) else template
    before = [{"role": "system", "content": system}] if system is not None else []
    filled: list[list[dict[str, Any]] | None] = []
    for position, item in enumerate(items):
        try:
            asked = None if _is_blank_row(item) else ask(item)
            if asked is None or _is_missing(asked) or (isinstance(asked, str) and not asked.strip()):
                filled.append(None)
            else:
                filled.append(before + [_with_line_feeds(message) for message in check_messages(asked)])
        except _NothingToAsk:
            filled.append(None)
        except ConfigError as error:
            raise ConfigError(f"row {position}: {error}") from error
        except Exception as error:  # the user's function can raise anything
            reason = shortened(" ".join(f"{type(error).__name__}: {error}".split()), 300)
            raise ConfigError(f"row {position}: the template function failed with {reason}") from error
    return filled


class _NothingToAsk(Exception):
    """The template inserts a value that is missing."""


def _filling(template: Template) -> Callable[[Any], str | list[dict[str, Any]]]:
    def check(value: Any, is_plain: bool) -> None:
        # `{{ note or "" }}` is blank on purpose; `{{ note }}` is not.
        if _is_missing(value) or (is_plain and isinstance(value, str) and not value.strip()):
            raise _NothingToAsk

    def fill(item: Any) -> str | list[dict[str, Any]]:
        insertions = Insertions(text_chars=None)  # nobody would see that a text was cut
        if isinstance(item, Mapping):
            # pandas' marks are not false, so `{{ note or "" }}` would not work with them.
            row = {name: None if _is_missing(value) else value for name, value in item.items()}
            variables = {"row": row, **{str(name): value for name, value in row.items()}}
        else:
            variables = {"row": item, "item": item, "value": item}
        text, images, without_images = insertions.sent(template.fill(variables, check, insertions))
        if not images:
            return text
        return [{"role": "user", "content": text, "images": images, WITHOUT_IMAGES: without_images}]

    return fill


def _is_missing(value: Any) -> bool:
    """Whether a value is None, NaN, or pandas' or numpy's mark of a missing one."""
    if value is None or type(value).__name__ in ("NAType", "NaTType", "MaskedConstant"):
        return True
    if not isinstance(value, Number) and not is_instance_of(value, "numpy.generic"):
        return False
    try:
        return bool(value != value)
    except (ArithmeticError, TypeError, ValueError):  # a signalling NaN of Decimal
        return True


def _is_blank_row(item: Any) -> bool:
    values = list(item.values()) if isinstance(item, Mapping) else [item]
    return bool(values) and all(
        _is_missing(value) or (isinstance(value, str) and not value.strip()) for value in values
    )


def _with_line_feeds(message: dict[str, Any]) -> dict[str, Any]:
    changed = {
        name: message[name].replace("\r\n", "\n").replace("\r", "\n")
        for name in ("content", WITHOUT_IMAGES)
        if isinstance(message.get(name), str)
    }
    return {**message, **changed}
