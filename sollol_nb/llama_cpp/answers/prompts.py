"""Prompts foreseen from earlier ones, so that an answer need not wait until its prompt is rendered.

The engine renders chat templates in a separate request (`/apply-template`), which takes as long as a token of a
small model. Prompts of requests with the same roles and settings usually differ only in the contents of their
messages, so the text between the contents of one is kept, and the next prompt of this kind is foreseen. The answer
is requested with it while the engine renders the real one, and nothing of the answer is read before the two were
found equal (`RawAnswer.confirm`). Where they differ, the answer is requested again, with the real prompt: so a
template that changes contents, or adds the date, costs time but never another answer.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

MOST_KINDS = 100
MOST_CHARACTERS = 8_000
"""A longer prompt takes so long that rendering it does not matter; the work of a wrong one would."""
MOST_MISTAKES = 3
"""After so many wrong prompts of a kind, none is foreseen any more."""


class ForeseenPrompts:
    """What is known of the prompts of one engine."""

    def __init__(self) -> None:
        self._frames: OrderedDict[str, list[str]] = OrderedDict()
        self._mistakes: dict[str, int] = {}

    def foresee(self, request: Mapping[str, Any]) -> str | None:
        """The prompt of a request to `/apply-template`; None if nothing like it was seen."""
        split = _split(request)
        frame = self._frames.get(split[0]) if split is not None else None
        if split is None or frame is None or self._mistakes.get(split[0], 0) >= MOST_MISTAKES:
            return None
        return "".join(text for pair in zip(frame, [*split[1], ""], strict=True) for text in pair)

    def learn(self, request: Mapping[str, Any], prompt: str, *, foreseen: str | None = None) -> None:
        """Note the prompt that the engine has rendered, and what was foreseen for it, if anything."""
        if prompt == foreseen or (split := _split(request)) is None:
            return
        kind, contents = split
        if foreseen is not None:
            self._mistakes[kind] = self._mistakes.get(kind, 0) + 1
        frame, rest = [], prompt
        for content in contents:
            before, found, rest = rest.partition(content)
            if not found:
                return
            frame.append(before)
        self._frames[kind] = [*frame, rest]
        if len(self._frames) > MOST_KINDS:
            forgotten, _ = self._frames.popitem(last=False)
            self._mistakes.pop(forgotten, None)


def _split(request: Mapping[str, Any]) -> tuple[str, list[str]] | None:
    """The kind of a request, and the contents of its messages; None where they are no texts, or too long."""
    contents = [message.get("content") for message in request["messages"]]
    texts = [content for content in contents if isinstance(content, str) and content]
    if len(texts) < len(contents) or sum(map(len, texts)) > MOST_CHARACTERS:
        return None
    messages = [{**message, "content": ""} for message in request["messages"]]
    return json.dumps({**request, "messages": messages}), texts
