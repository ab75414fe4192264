"""Layer plans: which worker takes how many layers, and how fast that is. Pure functions.

- `plan.py`: the plan of a model over workers and the coordinator's own devices, as data.
- `strategies.py`: what a plan needs to know of workers; spreading a model over all of them.
- `token_time.py`: the time per token, predicted from measurements and calibrations.
- `costs.py`: what units cost on each device, as arrays.
- `search.py`: the search for the layout with the shortest token.
- `reasons.py`: why a layout was chosen, in sentences.
- `fastest.py`: the workers and units with the shortest token (`latency_aware`).
- `throughput.py`: those with which several requests with long prompts are through soonest (`throughput`).
- `planner.py`: the plan by a strategy, or from given counts.
- `cached.py`: the order and counts of a plan's workers with which the fewest weights have to be sent.
- `replan.py`: when a running model moves to a better layout.
- `what_if.py`: the forecast for another layout.
"""
