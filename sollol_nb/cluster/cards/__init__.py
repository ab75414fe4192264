"""A cluster as people look at it: cards of models, rows of workers and nodes, problems with their fix, and events.

Every view (the widget, the status page, the static HTML and the text) is drawn from these, so that all of them use
the same words, units and order.

- `shapes.py`: the parts of a view, as plain data.
- `models.py`: a coordinator as a card.
- `workers.py`: workers and Ollama nodes as rows.
- `problems.py`: what needs attention, with the command and the button that fix it.
- `events.py`: events as lines, grouped where they repeat.
- `cards.py`: all of it, from a status.
- `views.py`: cards as text and as HTML (`templates/` of the folder above).
"""
