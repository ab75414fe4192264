"""Prompts that an engine has rendered, kept for the next request with the same messages.

Rendering is a request to the engine, before the one that streams the answer (1.2 ms on a busy machine of two
cores). It need not be repeated where the same messages are sent again: by a retry, after their tokens were
counted, or for several answers to one question.
"""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from sollol_nb.llama_cpp.answers.tokens import Post

MOST_PROMPTS = 32
MOST_CHARACTERS = 65_536
"""Of a request; a longer one is not kept."""
_CHANGES = re.compile("date|time|random", re.IGNORECASE)
"""In all templates whose prompt may be another one tomorrow: `strftime_now`, `date_string`, `datetime`."""


class RenderedPrompts:
    """Posts requests to one engine, except for a prompt that it has rendered already.

    Args:
        post: sends a request to the engine.
        chat_template: of the model.
    """

    def __init__(self, post: Post, chat_template: str) -> None:
        self._send = post
        self._is_lasting = not _CHANGES.search(chat_template)
        self._prompts: OrderedDict[str, Any] = OrderedDict()

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """As `Post`."""
        key = json.dumps(body) if path == "/apply-template" and self._is_lasting else ""
        if not key or len(key) > MOST_CHARACTERS:
            return await self._send(path, body)
        if key in self._prompts:
            self._prompts.move_to_end(key)
            return self._prompts[key]
        answer = self._prompts[key] = await self._send(path, body)
        while len(self._prompts) > MOST_PROMPTS:
            self._prompts.popitem(last=False)
        return answer
