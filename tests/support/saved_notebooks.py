"""Notebooks as they are saved, with one cell of an answer."""

from __future__ import annotations

from typing import Any

import nbformat

from sollol_nb.notebook.pages.saved_outputs import SavedDisplay

CODE = "%sollol demo hello"
"""What the cell of the answer runs."""


def notebook(*outputs: Any, source: str = CODE) -> dict[str, Any]:
    """A notebook with one cell of the answer between two others."""
    above, cell, below = (
        nbformat.v4.new_code_cell(text, id=f"c{at}") for at, text in enumerate(["1", source, "2"])
    )
    cell.outputs = list(outputs)
    above.outputs = [nbformat.v4.new_output("stream", name="stdout", text="1")]
    document: dict[str, Any] = nbformat.v4.new_notebook(
        cells=[above, cell, below, nbformat.v4.new_markdown_cell("x")]
    )
    return document


def shown(of: SavedDisplay, text: str = "asking") -> Any:
    return nbformat.v4.new_output("display_data", data={"text/plain": text}, metadata=of.metadata)
