"""Rows of the latency log as columns, which is how a million of them are read in under a second.

Python objects are what makes reading slow: a million rows are twenty million of them. So rows are also kept in
blocks of a few thousand: numbers as numpy holds them, a text as its position among the few different texts of the
block. Building a frame from blocks copies memory and makes no object per value.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sollol_nb.latency.schema import COLUMNS, FLOAT, INTEGER, TEXT, TIME

if TYPE_CHECKING:
    from sollol_nb.latency.filter import RowFilter

BLOCK_ROWS = 4096
_MISSING = np.iinfo(np.int64).min  # stands for an integer that does not apply
_STORED = {TIME: "<f8", FLOAT: "<f8", INTEGER: "<i8", TEXT: "<u2"}
_FIELDS = [(one.name, _STORED[one.dtype]) for one in COLUMNS]
_DTYPE = np.dtype(_FIELDS)


@dataclass(frozen=True, slots=True)
class Block:
    """Rows in their order.

    Attributes:
        values: a structured array, one record per row; in it a text is its position in `texts`.
        texts: the different texts of each text column.
    """

    values: np.ndarray[Any, np.dtype[np.void]]
    texts: Mapping[str, Sequence[str]]

    def __len__(self) -> int:
        return len(self.values)

    @classmethod
    def of_rows(cls, rows: Sequence[tuple[Any, ...]]) -> Block:
        """At most `BLOCK_ROWS` rows as SQLite gives them, values in the order of `COLUMNS`."""
        values = np.empty(len(rows), _DTYPE)
        texts: dict[str, list[str]] = {}
        cells_by_column = zip(*rows, strict=True) if rows else [()] * len(COLUMNS)
        for column, cells in zip(COLUMNS, cells_by_column, strict=True):
            if column.dtype == TEXT:
                positions = {text: position for position, text in enumerate(dict.fromkeys(cells))}
                texts[column.name] = list(positions)
                values[column.name] = [positions[text] for text in cells]
            elif column.dtype == INTEGER:
                values[column.name] = [_MISSING if cell is None else cell for cell in cells]
            else:
                values[column.name] = np.array(cells, dtype=float)  # None becomes NaN
        return cls(values, texts)

    def packed(self) -> tuple[str, bytes]:
        """A JSON header that describes the block, and the bytes of its values."""
        return json.dumps({"fields": _FIELDS, "texts": self.texts}), self.values.tobytes()

    @classmethod
    def unpacked(cls, header: str, data: bytes) -> Block | None:
        """The block again; None if it was packed by an older version, which did not know all columns."""
        about = json.loads(header)
        stored = [(name, kind) for name, kind in about["fields"]]
        if not set(stored) >= set(_FIELDS):
            return None
        return cls(np.frombuffer(data, stored), about["texts"])

    def where(self, wanted: RowFilter) -> Block:
        """The rows that are wanted, however many."""
        values = self.values
        for name, text in wanted.equal:
            texts = self.texts[name]
            values = values[values[name] == texts.index(text)] if text in texts else values[:0]
        if wanted.since_s is not None:
            values = values[values["started_at"] >= wanted.since_s]
        if wanted.until_s is not None:
            values = values[values["started_at"] < wanted.until_s]
        return Block(values, self.texts)

    def newest(self, count: int) -> Block:
        """Its last rows, at most `count`."""
        return Block(self.values[-count:], self.texts)


def frame_of(blocks: Sequence[Block]) -> pd.DataFrame:
    """The rows of all blocks as one frame, with the dtypes of `COLUMNS`."""
    columns: dict[str, Any] = {}
    for column in COLUMNS:
        if column.dtype == TEXT:
            columns[column.name] = _text_column(column.name, blocks)
            continue
        values = np.concatenate([np.empty(0, _DTYPE[column.name]), *(one.values[column.name] for one in blocks)])
        if column.dtype == INTEGER:
            columns[column.name] = pd.arrays.IntegerArray(values, values == _MISSING)
        elif column.dtype == TIME:
            milliseconds = np.round(values * 1000).astype("int64").astype("datetime64[ms]")
            columns[column.name] = pd.Series(milliseconds).dt.tz_localize("UTC")
        else:
            columns[column.name] = values
    return pd.DataFrame(columns, copy=False)


def _text_column(name: str, blocks: Sequence[Block]) -> Any:
    """The texts of one column; equal texts share one object."""
    positions: dict[str, int] = {}
    codes = [np.empty(0, np.int64)]
    for block in blocks:
        in_all = [positions.setdefault(text, len(positions)) for text in block.texts[name]]
        codes.append(np.array(in_all, np.int64)[block.values[name]])
    different = pd.array(list(positions), dtype=pd.StringDtype("python"))
    return different.take(np.concatenate(codes))
