"""Run a notebook headless in a real kernel and print what its cells show.

python tools/run_notebook.py notebooks/01_quickstart.ipynb [--save]
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

CELL_TIMEOUT_S = 900
COLORS = re.compile(r"\x1b\[[0-9;]*m")


def shown(output: Any) -> str:
    """An output as text."""
    if output.output_type == "stream":
        return str(output.text)
    if output.output_type == "error":
        return COLORS.sub("", "\n".join(output.traceback))
    data = output.get("data", {})
    if "image/png" in data:
        return "[plot]"
    text = str(data.get("text/plain", ""))
    return str(data["text/markdown"]) if text.startswith("<") and "text/markdown" in data else text


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("notebook", type=Path)
    parser.add_argument("--save", action="store_true", help="write the outputs into the notebook")
    arguments = parser.parse_args()
    os.environ.setdefault("SOLLOL_KEEP_ALIVE", "10s")  # nobody uses these engines later
    notebook = nbformat.read(arguments.notebook, as_version=4)
    folder = str(arguments.notebook.resolve().parent)
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT_S,
        coalesce_streams=True,
        store_widget_state=False,  # a text version is shown beside each widget
        extra_arguments=["--IPKernelApp.log_level=ERROR"],  # not that TCP is not encrypted: it is on loopback
        resources={"metadata": {"path": folder}},
    )
    try:
        client.execute()
    except CellExecutionError as error:
        print(error, file=sys.stderr)
        return 1
    for cell in notebook.cells:
        if cell.cell_type == "code":
            print(textwrap.indent(cell.source, "> "))
            print("".join(shown(output).rstrip() + "\n" for output in cell.outputs))
    if arguments.save:
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times of this run
        nbformat.write(notebook, arguments.notebook)
    print(f"To continue in JupyterLab: make lab, then open {arguments.notebook.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
