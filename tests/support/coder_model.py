"""A model whose answer has code, and that answer."""

from __future__ import annotations

from pathlib import Path

from tests.support.scripted_model import write_scripted

_SAID = (
    "Use this:\n\n```python\n",
    "total = 40\n```\n\nThen:\n\n",
    "```bash\nls -l\n```\n\nAt **last**:\n\n```\n",
    "total += 2\n```\n\nThat is all.",
)
ANSWER = "".join(_SAID)
CODE = (("total = 40", "python"), ("ls -l", "bash"), ("total += 2", ""))
"""Its code blocks with their languages."""


def write_coder(path: Path) -> Path:
    """Write the model; returns its path."""
    return write_scripted(path, _SAID)
