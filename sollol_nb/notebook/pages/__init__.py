"""Answers whose page was closed or opened again: their end in the saved notebook, and the hint in the next cell.

- `jupyter_server.py`: this kernel's Jupyter server: how many pages are connected, and the saved notebook.
- `saved_file.py`: the notebook's file, changed and restored.
- `saved_outputs.py`: answers put into the outputs of a saved notebook.
- `watch.py`: when that is done, and undone; which answers a page has missed.
- `clients.py`: which clients the kernel hears from.
"""
