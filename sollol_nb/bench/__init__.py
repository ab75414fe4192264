"""Benchmarks through a router: models, layouts, strategies and concurrency, measured in turns.

- `plan.py`: what a benchmark sends, and in which order.
- `targets.py`: a router for each target, and which coordinators are loaded on which workers.
- `bench.py`: runs a benchmark, async or blocking.
- `rows.py`: the metrics, and one row for each request.
- `statistics.py`: medians with bootstrap intervals.
- `result.py`: the result, as frame, summary, table and file.
- `figure.py`: its plots.
"""
