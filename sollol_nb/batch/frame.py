"""The result of a batch as a frame: the rows, joined with the outcome of each.

| column | is |
|---|---|
| `answer` | the answer's text; missing where there is none |
| one per field | of a schema that is an object: the field's value; `answer_NAME` where that name is taken |
| `value` | with a schema: the answer as a value of the schema; missing where it does not match |
| `status` | `ok`, `cached` (answered in an earlier batch), `skipped` (a missing or blank value: nothing to ask), |
| | `error`, `cancelled` (the batch was stopped) |
| `error` | the error's message, or "" |
| `backend`, `finish_reason` | where the answer ran, and why it ended; "" without an answer |
| `ttft_ms`, `total_ms`, `tokens_per_s`, `completion_tokens` | as in the latency log, of the request sent |

`frame.attrs["sollol"]` has the model and the counts by status.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sollol_nb.batch.rows import object_column
from sollol_nb.chat.completion import Completion
from sollol_nb.errors import ConfigError
from sollol_nb.schema.schema import field_names

if TYPE_CHECKING:
    import pandas as pd

_NULLABLE: dict[frozenset[type], str] = {
    frozenset({bool}): "boolean",
    frozenset({int}): "Int64",
    frozenset({float}): "float64",
    frozenset({float, int}): "float64",
}
"""The types of values -> a dtype that can hold None beside them."""

OK, CACHED, SKIPPED, ERROR, CANCELLED = STATUSES = ("ok", "cached", "skipped", "error", "cancelled")


@dataclass(frozen=True, slots=True)
class RowResult:
    """The outcome of one row.

    Attributes:
        status: one of `STATUSES`.
        completion: the answer, also one that does not match its schema.
        value: the answer as a value of the schema.
        error: the error's message.
    """

    status: str = CANCELLED
    completion: Completion | None = None
    value: Any = None
    error: str = ""


def check_columns(frame: pd.DataFrame, prefix: str, schema: object) -> None:
    """Refuse a frame whose columns would be overwritten.

    Raises:
        ConfigError: the frame has columns with the names of the result's columns.
    """
    taken = [name for name in _columns([], prefix, schema) if name in frame.columns]
    if taken:
        raise ConfigError(
            f"the rows have {', '.join(taken)} already; give the new columns a prefix, such as prefix='second_'"
        )


def joined(
    frame: pd.DataFrame, results: Sequence[RowResult], *, model: str, schema: object, prefix: str
) -> pd.DataFrame:
    """The frame with the columns of the result; one result for each of its rows, in their order."""
    import pandas as pd

    columns = _columns(results, prefix, schema)
    names = field_names(schema) if schema is not None else ()
    taken = {*frame.columns.get_level_values(0), *columns}
    fields: dict[str, Any] = {}
    for name in names:
        column = f"{prefix}{name}"
        while column in taken:
            column = f"{prefix}answer_{column.removeprefix(prefix)}"
        taken.add(column)
        fields[column] = _typed([_field(result.value, name) for result in results], frame.index)
    answer = f"{prefix}answer"
    new = pd.DataFrame({answer: columns.pop(answer), **fields, **columns}, index=frame.index)
    if (levels := frame.columns.nlevels) > 1:  # else the names of all columns would become tuples
        below = [""] * (levels - 1)
        new.columns = pd.MultiIndex.from_tuples([(name, *below) for name in new], names=frame.columns.names)
    whole = pd.concat([frame, new], axis=1)
    counts = Counter(result.status for result in results)
    about = {"model": model, **{name: counts[name] for name in STATUSES if name != SKIPPED or counts[name]}}
    whole.attrs = {**frame.attrs, "sollol": about}
    return whole


def _columns(results: Sequence[RowResult], prefix: str, schema: object) -> dict[str, Any]:
    """The columns of the result by name, without those of the schema's fields."""
    import pandas as pd

    answers = [result.completion for result in results]
    routings = [{} if answer is None else answer.routing for answer in answers]
    texts = [None if answer is None else answer.text for answer in answers]
    columns: dict[str, Any] = {"answer": object_column(texts)}
    if schema is not None:
        columns["value"] = object_column([result.value for result in results])
    columns["status"] = object_column([result.status for result in results])
    columns["error"] = object_column([result.error for result in results])
    columns["backend"] = object_column([str(routing.get("backend") or "") for routing in routings])
    reasons = ["" if answer is None else answer.finish_reason for answer in answers]
    columns["finish_reason"] = object_column(reasons)
    for name, key in (("ttft_ms", "ttft_ms"), ("total_ms", "duration_ms"), ("tokens_per_s", "tokens_per_s")):
        columns[name] = pd.Series([routing.get(key) for routing in routings], dtype="float64").array
    columns["completion_tokens"] = pd.array(
        [None if answer is None else answer.get("eval_count") for answer in answers], dtype="Int64"
    )
    return {f"{prefix}{name}": column for name, column in columns.items()}


def _field(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


def _typed(values: Sequence[Any], index: pd.Index[Any]) -> pd.Series[Any]:
    """A column of the values' type; booleans and numbers keep theirs beside None."""
    import pandas as pd

    # Without a dtype, older pandas fails at an integer that is too large for a float.
    column: pd.Series[Any] = pd.Series(object_column(values), index=index, dtype=object)
    kinds: frozenset[type] = frozenset(type(value) for value in values if value is not None)
    dtype: Any = _NULLABLE.get(kinds)
    has_none = any(value is None for value in values)
    try:
        return column.astype(dtype) if dtype is not None and has_none else column.infer_objects()
    except (OverflowError, TypeError, ValueError):  # JSON's numbers have no limits
        return column
