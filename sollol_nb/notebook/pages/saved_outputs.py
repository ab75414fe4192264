"""Answers put into the outputs of a saved notebook, and nothing else in it changed.

A display of an answer has an id in the metadata of its output, which is saved with the notebook; the id that
updates a display is not saved.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

KEY = "sollol_nb"


@dataclass
class SavedDisplay:
    """A display of an answer.

    Attributes:
        cell_id: of the cell that shows it; "" where the frontend does not tell.
        code: which that cell has run.
        request: the id of that run.
        bundle: what it shows now.
    """

    cell_id: str
    code: str
    request: str
    bundle: dict[str, Any]
    display_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def metadata(self) -> dict[str, Any]:
        """The output's metadata, by which it is found again."""
        return {KEY: {"display": self.display_id, "run": self.request}}


def put(document: dict[str, Any], display: SavedDisplay, bundle: dict[str, Any], *, may_add: bool) -> bool:
    """Put what a display shows into a notebook.

    Args:
        document: the notebook, of which the outputs are changed.
        may_add: also where the notebook was saved before the display was there: at the end of its cell, if this
            cell still has the code that it ran, and nothing but displays of the same run.

    Returns:
        Whether the notebook has it now.
    """
    found = [output for output in _outputs(document) if _mark(output).get("display") == display.display_id]
    for output in found:
        output["data"] = dict(bundle)
    if found or not may_add:
        return bool(found)
    for cell in _code_cells(document):
        is_same = cell.get("id") == display.cell_id != "" and cell.get("source") == display.code
        if is_same and all(_mark(output).get("run") == display.request for output in cell["outputs"]):
            new = {"output_type": "display_data", "data": dict(bundle), "metadata": display.metadata}
            cell["outputs"].append(new)
            return True
    return False


def has_text_file(document: dict[str, Any]) -> bool:
    """Whether jupytext keeps the notebook in a text file, too. It would write that file with the notebook, and an
    editor may have it open."""
    metadata = document.get("metadata")
    return isinstance(metadata, dict) and "jupytext" in metadata


def _code_cells(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    cells: Iterable[Any] = document.get("cells") or ()
    for cell in cells:
        if isinstance(cell, dict) and cell.get("cell_type") == "code" and isinstance(cell.get("outputs"), list):
            yield cell


def _outputs(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for cell in _code_cells(document):
        yield from (output for output in cell["outputs"] if isinstance(output, dict))


def _mark(output: Any) -> dict[str, Any]:
    metadata = output.get("metadata") if isinstance(output, dict) else None
    mark = metadata.get(KEY) if isinstance(metadata, dict) else None
    return mark if isinstance(mark, dict) else {}
