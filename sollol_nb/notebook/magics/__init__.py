"""The magics, by subject. The docstring of each magic is the help that its `?` shows.

- `ask.py`: `%%sollol`, `%sollol_last`, `%sollol_chat`.
- `answers.py`: `%sollol_answers`.
- `reuse.py`: `%sollol_insert`.
- `cluster.py`: `%sollol_cluster`, `%sollol_stop`, `%sollol_log`; `cluster_actions.py`: the actions of the first.
- `models.py`: `%sollol_models`, `%sollol_route`, `%sollol_profile`.
- `latency.py`: `%sollol_latency`.
- `bench.py`: `%sollol_bench`.
- `connect.py`: `%sollol_connect`.
- `trust.py`: `%sollol_trust`.
"""
