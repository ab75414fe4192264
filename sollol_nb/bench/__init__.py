"""Benchmarks through a router: models, layouts, strategies and concurrency, measured in turns.

| file | holds |
|---|---|
| `plan.py` | what a benchmark sends, and in which order |
| `places.py` | the coordinators of a benchmark: which are loaded, on which workers |
| `bench.py` | runs a benchmark, async and blocking |
| `rows.py` | the metrics, and one row for each request |
| `statistics.py` | medians with bootstrap intervals |
| `result.py` | the result: frame, summary, table and file |
| `figure.py` | its plots |
"""
