"""What a chat template says about its model: whether it thinks, and whether it takes tools. Pure."""

from __future__ import annotations

import re

_THINKS = re.compile("think|thought|reason|channel", re.IGNORECASE)
"""In all chat templates of models that think: a variable, or the markup of thoughts."""
_TOOLS = re.compile("tools|functions")
"""In all chat templates that have tools: a variable."""


def supports_thinking(template: str) -> bool:
    """Whether the model can think before it answers."""
    return bool(_THINKS.search(template))


def takes_tools(template: str) -> bool:
    """Whether the template shows tools to the model."""
    return bool(_TOOLS.search(template))
