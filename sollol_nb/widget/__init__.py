"""The live view of a router's cluster with its controls, for notebooks (ipywidgets and anywidget).

- `cluster_widget.py`: the widget: what it shows, when it watches, and what a saved notebook keeps.
- `map.py`: the drawing in the browser; `drawing.py` has its JavaScript and style sheet, which are in `assets/`.
- `controls.py`: add, remove and discover workers; load and stop models.
- `what_if_panel.py`: sliders for the layout of a running model.
- `fixes.py`: what the buttons of problems do.
- `suggestion.py`: a better layout, and the button that applies it; for front ends without a map.
- `actions.py`: what the controls do, on the I/O loop.
"""
