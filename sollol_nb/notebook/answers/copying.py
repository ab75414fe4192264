"""Copy buttons on answers and their code blocks, in pages of a Jupyter server.

A script in an output would be saved with it. So the answer stays plain Markdown, and a widget that is never
displayed brings the script into the page (`assets/answer_tools.js`), with the answer's source. The page says when
it has read both, and the widget is closed: nothing of it is saved. A frontend without widgets ignores it.
"""

from __future__ import annotations

from collections import deque
from functools import cache
from pathlib import Path
from typing import Any

from sollol_nb.chat.completion import Completion
from sollol_nb.chat.completion_view import answer_key
from sollol_nb.settings import config

SOURCE = Path(__file__).parents[1] / "assets" / "answer_tools.js"
LONGEST_TEXT_CHARS = 500_000
"""Of a longer answer the page copies what it shows."""
MOST_OPEN = 4
"""A page that does not answer (it is closed, or knows no widgets) keeps no more of them open."""

_open: deque[Any] = deque()


def offer_copying(answer: Completion) -> None:
    """Let the page that shows an answer copy it; does nothing without a page of a Jupyter server."""
    if config.session_path() is None:
        return
    text = answer.text
    is_kept = 0 < len(text) <= LONGEST_TEXT_CHARS
    tools = _tools_class()(key=answer_key(text) if is_kept else "", text=text if is_kept else "")
    tools.on_msg(_close)
    while len(_open) >= MOST_OPEN:
        _open.popleft().close()
    _open.append(tools)


def _close(tools: Any, *_: object) -> None:
    if tools in _open:
        _open.remove(tools)
    tools.close()


@cache
def _tools_class() -> Any:
    import anywidget  # with ipywidgets, so on first use
    import traitlets

    from sollol_nb.widget.drawing import CLIPBOARD

    class AnswerTools(anywidget.AnyWidget):
        _esm = CLIPBOARD + SOURCE.read_text(encoding="utf-8")
        key = traitlets.Unicode().tag(sync=True)
        text = traitlets.Unicode().tag(sync=True)

    return AnswerTools
