"""Layer plans: which worker takes how many layers, and how fast that is. Pure functions.

- `plan.py`: the plan of a model over workers.
- `strategies.py`: how many units each worker gets.
- `token_time.py`: the time per token, predicted from measurements.
- `what_if.py`: the forecast for another layout.
"""
