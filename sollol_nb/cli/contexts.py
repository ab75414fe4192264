"""The saved contexts of conversations, for `sollol-nb contexts` and the doctor: listed, and deleted."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sollol_nb.errors import ConfigError
from sollol_nb.llama_cpp.contexts.store import ContextStore, SavedContext
from sollol_nb.llama_cpp.coordinators.settings import file_identity
from sollol_nb.settings import config
from sollol_nb.text.short_names import short_name
from sollol_nb.text.tables import counted, format_age, format_bytes, shortened

SHOWN_ID_CHARS = 8
LEAST_COLUMN_CHARS = 10
"""Columns with names are not made narrower than this, in however narrow a terminal."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A saved context, and why it cannot be used.

    Attributes:
        why_not: one line; "" where an engine can restore it.
    """

    context: SavedContext
    why_not: str

    def as_dict(self) -> dict[str, Any]:
        """As plain data for JSON, without the text of the conversation."""
        shown = {name: value for name, value in asdict(self.context).items() if name not in ("text", "checksum")}
        return {**shown, "age_s": time.time() - self.context.used_at, "why_not": self.why_not}


def listed(ids: Sequence[str] = (), model: str | None = None) -> list[Listed]:
    """The saved contexts, the most recently used first.

    Args:
        ids: only these: ids, or beginnings of them that fit one only.
        model: only those of this model.

    Raises:
        ConfigError: no saved context has such an id, or several have; or none is of this model.
    """
    store = ContextStore()
    contexts = [*reversed(store.list())]
    if ids:
        chosen = {_by_id(wanted, contexts).id for wanted in ids}
        contexts = [context for context in contexts if context.id in chosen]
    if model is not None:
        of_model = [context for context in contexts if model in (context.model, short_name(context.model))]
        if not of_model:
            known = sorted({short_name(context.model) for context in contexts})
            raise ConfigError(f"no saved context is of {model} (there are some of: {', '.join(known) or 'none'})")
        contexts = of_model
    return [Listed(context, _why_not(store, context)) for context in contexts]


def forget(chosen: Sequence[Listed]) -> str:
    """Delete these; returns what was deleted, as one line."""
    ids = {each.context.id for each in chosen}
    deleted = ContextStore().forget(lambda context: context.id in ids)
    size = format_bytes(sum(context.size for context in deleted))
    return f"deleted {counted(len(deleted), 'saved context')} ({size})"


def total(contexts: Sequence[SavedContext]) -> str:
    """How much they take, and how much they may, as one line."""
    limit_gb, size = config.default("context_cache_gb"), sum(context.size for context in contexts)
    taken = f"{counted(len(contexts), 'saved context')}, {format_bytes(size)}"
    if not limit_gb:
        return f"{taken}; nothing is saved, since context_cache_gb = 0"
    return f"{taken} of {limit_gb:g} GB (setting context_cache_gb)"


def as_table(rows: Sequence[Listed], width: int | None = None) -> str:
    """A table for a terminal; in one that is too narrow for it, some lines for each context.

    Args:
        width: columns of the terminal; by default those of the present one, and no limit where the output goes
            elsewhere.
    """
    if not rows:
        return "there are no saved contexts"
    if width is None:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize
    cells = [("ID", "MODEL", "TOKENS", "SIZE", "USED", "OF", "STATE")]
    for each in rows:
        context = each.context
        cells.append(
            (
                context.id[:SHOWN_ID_CHARS],
                short_name(context.model),
                f"{context.tokens:,}",
                format_bytes(context.size),
                f"{format_age(time.time() - context.used_at)} ago",
                context.title,
                each.why_not or "usable",
            )
        )
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    # The names give way first, the wider one before the other; then the reason why one is not usable.
    for columns in ((1, 5), (6,)):
        while sum(widths) + 2 * (len(widths) - 1) > width:
            widest = max(columns, key=lambda column: widths[column])
            if widths[widest] <= LEAST_COLUMN_CHARS:
                break
            widths[widest] -= 1
    if sum(widths) + 2 * (len(widths) - 1) > width:
        return "\n".join(_as_lines(row, max(width, LEAST_COLUMN_CHARS)) for row in cells[1:])
    rights = (2, 3)
    lines = []
    for row in cells:
        fitted = [shortened(cell, size) for cell, size in zip(row, widths, strict=True)]
        aligned = [
            cell.rjust(size) if column in rights else cell.ljust(size)
            for column, (cell, size) in enumerate(zip(fitted, widths, strict=True))
        ]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def _as_lines(row: Sequence[str], width: int) -> str:
    context_id, model, tokens, size, used, title, state = row
    about = f"{tokens} tokens, {size}, used {used}, of {title}: {state}"
    lines = [shortened(f"{context_id}  {model}", width)]
    return "\n".join(lines + textwrap.wrap(about, width, initial_indent="  ", subsequent_indent="  "))


def _by_id(wanted: str, contexts: Sequence[SavedContext]) -> SavedContext:
    found = [context for context in contexts if wanted and context.id.startswith(wanted.lower())]
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"{wanted} is the beginning of {len(found)} ids of saved contexts; give more of it")
    raise ConfigError(f"no saved context has the id {wanted}; `sollol-nb contexts` lists them")


def _why_not(store: ContextStore, context: SavedContext) -> str:
    """Why an engine of this machine cannot restore it, as far as can be said without reading all of it."""
    try:
        size = (store.folder / context.file_name).stat().st_size
    except OSError as error:
        return f"its file cannot be read: {error.strerror or error}"
    if size != context.size:
        return f"damaged: {format_bytes(size)} of {format_bytes(context.size)}"
    of_model = context.made_of.get("model_file")
    path = of_model.get("path") if isinstance(of_model, dict) else None
    if path is not None:
        try:
            if file_identity(Path(str(path))) != of_model:
                return "outdated: its model file has changed"
        except (OSError, ValueError):
            return "outdated: its model file is gone"
    return ""
