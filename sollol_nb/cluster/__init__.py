"""The state of a router's whole cluster: workers, coordinators with their layers, and Ollama nodes.

- `coordinator_status.py`: one running coordinator, with its layers as planned and as placed.
- `status.py`: a snapshot, as text and as HTML (`templates/`).
- `live_figures.py`: what only events report.
- `cards/`: all of it as people look at it; every view is drawn from that.
- `data.py`: the state as plain data for a live view, and the patch between two states.
- `state.py`: the live state, kept up to date while somebody watches and sent as patches.
"""
