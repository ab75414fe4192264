"""The schema of the latency log: what is recorded about one request, with dtypes, units and meanings.

A column is never renamed or removed and keeps its meaning; a new version only adds columns, each with a default
for older rows. `notebooks/latency_schema.md` shows the same table.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from sollol_nb.text.tables import markdown_table

SCHEMA_VERSION = 6
STATUSES = ("ok", "error", "timeout", "cancelled")

TEXT, FLOAT, INTEGER, TIME = "string", "float64", "Int64", "datetime64[ms, UTC]"
"""The dtypes of a frame; text is `pandas.StringDtype("python")`, whether pyarrow is installed or not."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the log.

    Attributes:
        name: the same in the file, in a frame and as an attribute of `LatencyRow`.
        sql_type: its type in SQLite, with the default for rows of older versions.
        dtype: its type in a frame.
        unit: the unit of its numbers; "" for texts.
        meaning: one line.
        since: the schema version that added it.
    """

    name: str
    sql_type: str
    dtype: str
    unit: str
    meaning: str
    since: int


def _column(sql_type: str, dtype: str, unit: str, meaning: str, *, since: int = 1, **default: Any) -> Any:
    metadata = {"sql_type": sql_type, "dtype": dtype, "unit": unit, "meaning": meaning, "since": since}
    return field(metadata=metadata, **default)


def _text(meaning: str, **more: Any) -> Any:
    sql_type = "TEXT NOT NULL" + " DEFAULT ''" * ("default" in more)
    return _column(sql_type, TEXT, "", meaning, **more)


def _number(unit: str, meaning: str, *, dtype: str = FLOAT, required: bool = False, **more: Any) -> Any:
    sql_type = ("REAL" if dtype == FLOAT else "INTEGER") + " NOT NULL" * required
    return _column(sql_type, dtype, unit, meaning, **more)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyRow:
    """What is recorded about one request. None where a number does not apply, "" where a text does not.

    `COLUMNS` has units and meanings. In a row, `started_at` is in seconds since the epoch.
    """

    started_at: float = _column("REAL NOT NULL", TIME, "UTC, ms", "when the router got the request")
    model: str = _text("name in the request; in a frame, of a path the short name")
    backend: str = _text(
        "`ollama-pool`, `llama.cpp-distributed` or `llama.cpp-local`; empty when none was reached"
    )
    layout: str = _text(
        "layers per worker in order, such as `5/4/4` (the output layer counts as one); empty if not sharded"
    )
    place: str = _text("URL of the coordinator or Ollama node; after a failover, of the last one")
    queue_ms: float | None = _number("ms", "waited for a free slot")
    load_ms: float | None = _number(
        "ms", "waited for the coordinator or node to become ready (start, load the model)"
    )
    ttft_ms: float | None = _number("ms", "from the request to the first token, waiting and loading included")
    total_ms: float = _number("ms", "from the request to the last token", required=True)
    prompt_tokens: int | None = _number("tokens", "tokens of the prompt", dtype=INTEGER)
    completion_tokens: int | None = _number("tokens", "tokens generated", dtype=INTEGER)
    tokens_per_s: float | None = _number("tokens/s", "generation speed as the engine measured it")
    router_overhead_ms: float | None = _number(
        "ms", "part of `ttft_ms` spent in the router itself (profile, route, plan, bookkeeping)"
    )
    failovers: int = _number(
        "count", "how often the request was moved to another coordinator or node", dtype=INTEGER, required=True
    )
    status: str = _text("`ok`, `error`, `timeout` or `cancelled`")
    error: str = _text("the error's message")
    partial_text: str = _text("the text received so far, if the answer did not end with `ok`", since=2, default="")
    priority: int | None = _number("1 to 10", "priority of the request", dtype=INTEGER, since=3, default=None)
    done_reason: str = _text("why the answer ended: `stop`, `length`, ...", since=3, default="")
    predicted_ms_per_token: float | None = _number(
        "ms/token", "the layer plan's prediction; compare with `1000 / tokens_per_s`", since=3, default=None
    )
    failover_details: str = _text(
        "JSON list, one object per failover: `what`, `when` (seconds since the epoch), `cost_ms`, `continued`, "
        "`tokens_before`, `lost_workers`, `recovery`",
        since=3,
        default="",
    )
    drafted_tokens: int | None = _number(
        "tokens", "tokens that were drafted; null without speculation", dtype=INTEGER, since=5, default=None
    )
    accepted_tokens: int | None = _number(
        "tokens", "drafted tokens that the model accepted", dtype=INTEGER, since=5, default=None
    )
    cached_tokens: int | None = _number(
        "tokens",
        "tokens of the prompt that were in the engine's slot already; after a failover, of the continued prompt",
        dtype=INTEGER,
        since=6,
        default=None,
    )
    restored_tokens: int | None = _number(
        "tokens",
        "those of `cached_tokens` that a saved context had brought there",
        dtype=INTEGER,
        since=6,
        default=None,
    )


COLUMNS = tuple(Column(name=column.name, **column.metadata) for column in fields(LatencyRow))
"""All columns, in order; those of a newer version come after those of an older one."""


def schema_table() -> str:
    """The columns as a Markdown table: name, dtype, unit, meaning, and the version that added it."""
    rows = [
        (f"`{column.name}`", f"`{column.dtype}`", column.unit, column.meaning, str(column.since))
        for column in COLUMNS
    ]
    return markdown_table(["name", "dtype", "unit", "meaning", "since"], rows)
