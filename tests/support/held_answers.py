"""Answers that go no further than to where a test wants them, however quick their engine is."""

from __future__ import annotations

from pathlib import Path

_CELL = """
import asyncio, contextlib, pathlib
from sollol_nb.router.active_request import ActiveRequest

def held(whole, at_chars, until):
    async def chunks(request, *arguments):
        text = ""
        async with contextlib.aclosing(whole(request, *arguments)) as answer:
            async for chunk in answer:
                yield chunk
                text += chunk["message"].get("content", "")
                while len(text) >= at_chars and not until.exists():
                    await asyncio.sleep(0.02)
    return chunks

ActiveRequest._answer = held(ActiveRequest._answer, {at_chars}, pathlib.Path({until!r}))
"""


PATIENT = "from sollol_nb.llama_cpp.coordinators import pace\npace.MARGIN = float('inf')"
"""Code after which its process takes no silence of an engine for the end of it: one may be suspended for long."""


def holding(at_chars: int, until: Path) -> str:
    """A cell after which the answers of its kernel wait once they have so many characters, until a file exists."""
    return _CELL.format(at_chars=at_chars, until=str(until))
