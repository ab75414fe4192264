"""What llama-server refuses, in our words. Source: llama.cpp's `tools/server/server-context.cpp` (send_error)."""

from __future__ import annotations

import re

from sollol_nb.chat.context_window import overflow_error
from sollol_nb.errors import ContextOverflowError, RequestRejectedError

_PROMPT_TOO_LONG = re.compile(r"\((\d+) tokens\) .*context size \((\d+)")
# Of requests that run at the same time in one pool of context: no room for another token, and all of them end.
_POOL_USED_UP = re.compile(r"context size has been exceeded", re.IGNORECASE)


def refusal(model: str, reason: str, context_tokens: int) -> RequestRejectedError:
    """The error for a reason that the engine gives.

    Args:
        context_tokens: what the engine holds for one request.
    """
    too_long = _PROMPT_TOO_LONG.search(reason)
    if too_long is not None:
        return overflow_error(model, int(too_long[1]), int(too_long[2]))
    if _POOL_USED_UP.search(reason):
        return ContextOverflowError(
            f"{model}: the requests that ran on it together have filled the {context_tokens:,} tokens of context "
            "that they share, which ended them all; ask again, with a larger context_tokens= or slots=1 to the "
            "router",
            context_tokens=context_tokens,
        )
    return RequestRejectedError(f"{model} refused the request: {reason}")
