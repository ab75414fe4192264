"""Batches: the same question about many rows.

- `batch.py`: one batch: its requests, what is asked again and what is not, how it ends.
- `rows.py`: the rows, and the template that makes a question of each.
- `frame.py`: the result, as a frame.
- `store.py`: answers kept in SQLite, for later batches.
"""
