"""From the options of a `%%sollol` cell to the answer that streams into it.

- `request.py`: the options of a cell as one request.
- `tools.py`: the functions that the model of a cell may call.
- `views.py`: an answer while it streams, and how a notebook or a terminal shows it.
- `copying.py`: copy buttons on answers and code blocks.
- `cell.py`: the cell waits for its answer.
- `journaled.py`: the answers of the journal: listed, shown, followed.
- `background.py`: the cell ends at once, and a handle represents the answer.
"""
