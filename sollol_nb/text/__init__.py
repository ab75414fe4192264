"""Values, numbers and what models write, as text and colours. Pure.

- `tables.py`: Markdown tables, and numbers, bytes and durations as people read them.
- `readable.py`: Python values as text that a model can read; tables are in `readable_frames.py`, figures of
  matplotlib in `readable_figures.py`.
- `own_forms.py`: what an object says about itself to a model. `images.py`: the image that a value is.
- `expansion.py`: `{{ expression }}` in a text, replaced by its value. `insertions.py`: the images of these values.
- `short_names.py`: which names of models are files, and how people read those.
- `nearest.py`: the name that somebody meant to write.
- `safe_markdown.py`: Markdown from a model, so that nothing in it runs or is fetched.
- `code_blocks.py`: the code blocks of such a text.
- `palette.py`: the colours of the cluster and of all plots.
"""
