"""The answer to a request with a schema: checked, and refused with the reason where it does not fit."""

from __future__ import annotations

from sollol_nb.chat.completion import Completion
from sollol_nb.errors import StructureError
from sollol_nb.schema.schema import parse_structured


def fitted(completion: Completion, schema: object) -> Completion:
    """The completion with its `schema`, which its text fits. Without a schema, and for calls of tools, as it came.

    Raises:
        StructureError: it does not fit; `.completion` has it. If it was cut at `max_tokens`, the message says so.
    """
    if schema is None or completion["message"].get("tool_calls"):
        return completion
    completion.schema = schema
    try:
        parse_structured(completion.text, schema)
    except StructureError as error:
        words = str(error)
        if completion.finish_reason == "length":
            tokens = completion.get("eval_count")
            words = (
                f"the answer was cut after {tokens} tokens, before it had the structure that was asked for; "
                "give a larger max_tokens; .text has it as it came"
            )
        raise StructureError(words, text=completion.text, completion=completion) from None
    return completion
