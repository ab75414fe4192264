"""The latency log: one row per request in SQLite, read as a pandas frame.

- `schema.py`: the columns, with dtypes, units and meanings
- `filter.py`: which rows to read
- `writer.py`: rows written in the background
- `log.py`: the log itself
- `frames.py`: rows as a frame, and a frame as a file; needs pandas
"""
