"""Values, numbers and what models write, as text and colours. Pure.

- `tables.py`: Markdown tables, and numbers, bytes and durations as people read them.
- `readable.py`, `readable_figures.py`: Python values, and matplotlib figures, as text that a model can read.
- `expansion.py`: `{{ expression }}` in a text, replaced by its value.
- `short_names.py`: which names of models are files, and how people read those.
- `nearest.py`: the name that somebody meant to write.
- `safe_markdown.py`: Markdown from a model, so that nothing in it runs or is fetched.
- `palette.py`: the colours of the cluster and of all plots.
"""
