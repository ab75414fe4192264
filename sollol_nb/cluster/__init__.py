"""The state of a router's whole cluster: workers, coordinators with their layers, and Ollama nodes.

- `status.py`: a snapshot, as text and as HTML (`templates/`).
- `data.py`: the state as plain data for a live view, and the patch between two states.
- `state.py`: the live state, kept up to date while somebody watches and sent as patches.
"""
