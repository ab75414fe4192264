"""Models in the shape of Anthropic's API."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request

from sollol_nb.gateway.failures import invalid
from sollol_nb.models.listing import ListedModel
from sollol_nb.runtime.amounts import shown
from sollol_nb.text.short_names import short_name

MOST_PER_PAGE = 1000
_LIMIT = re.compile("[0-9]{1,4}")


def asks(request: Request) -> bool:
    """Whether a client of Anthropic's API sent the request."""
    return "anthropic-version" in request.headers


def shape(model: ListedModel) -> dict[str, Any]:
    """One model. When it was made is not known."""
    return {
        "type": "model",
        "id": model.model,
        "display_name": short_name(model.model),
        "created_at": "1970-01-01T00:00:00Z",
        "lifecycle": "active",
    }


def page(models: Sequence[ListedModel], query: Mapping[str, str]) -> dict[str, Any]:
    """A page of the list: `limit` models after the one with the name `after_id`, or before that of `before_id`.

    Raises:
        ApiError: `limit` is not 1 to 1000.
    """
    given = query.get("limit", str(MOST_PER_PAGE))
    limit = int(given) if _LIMIT.fullmatch(given) else 0
    if not 1 <= limit <= MOST_PER_PAGE:
        raise invalid(f"limit={shown(given)} must be 1 to {MOST_PER_PAGE}", "limit")
    names = [model.model for model in models]
    after, before = query.get("after_id"), query.get("before_id")
    begin = names.index(after) + 1 if after in names else 0
    end = names.index(before) if before in names else len(names)
    found = list(models[begin:end])
    shown_models = found[-limit:] if before in names else found[:limit]
    return {
        "data": [shape(model) for model in shown_models],
        "has_more": len(shown_models) < len(found),
        "first_id": shown_models[0].model if shown_models else None,
        "last_id": shown_models[-1].model if shown_models else None,
    }
