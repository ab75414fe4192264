"""Batches: the same question about many rows.

- `batch.py`: one batch: its requests, what is asked again and what is not, how it ends.
- `rows.py`: the rows, and the template that makes a question of each.
- `order.py`: in which order they are asked, so that a common beginning is processed once.
- `frame.py`: the result, as a frame.
- `store.py`: answers kept in SQLite, for later batches.
"""
