"""The gateway as an ASGI application: what its routes share, and which API answers where."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Scope

from sollol_nb.errors import SollolError
from sollol_nb.gateway import (
    anthropic_api,
    anthropic_models,
    cluster_view,
    health,
    metrics,
    notebook_api,
    ollama_api,
    ollama_parts,
    openai_api,
    openai_completions,
    openai_embeddings,
    openai_models,
    openai_parts,
    openapi,
    responses_api,
    status_page,
)
from sollol_nb.gateway.access import Access, AccessRules
from sollol_nb.gateway.failures import ApiError, Kind, api_error
from sollol_nb.gateway.gateway import Gateway
from sollol_nb.runtime.amounts import shown

ErrorShape = Callable[[ApiError], Any]
"""Writes an error as an API does."""


@dataclass(frozen=True, slots=True)
class Api:
    """One API: the paths that it owns, and its routes.

    Attributes:
        prefixes: beginnings of the paths whose errors have this API's shape.
    """

    prefixes: tuple[str, ...]
    routes: list[BaseRoute]
    error_shape: ErrorShape


APIS: tuple[Api, ...] = (
    Api(("/api/",), ollama_api.ROUTES, ollama_parts.error_shape),
    Api(("/v1/messages",), anthropic_api.ROUTES, anthropic_api.error_shape),
    Api(("/sollol/",), notebook_api.ROUTES, notebook_api.error_shape),
    Api(("/v1/responses",), responses_api.ROUTES, openai_parts.error_shape),
    Api(
        ("/",),
        [*openai_api.ROUTES, *openai_completions.ROUTES, *openai_embeddings.ROUTES, *openai_models.ROUTES],
        openai_parts.error_shape,
    ),
)
"""The first API with a matching prefix owns the path."""
_KINDS: Mapping[int, Kind] = {404: "not_found", 405: "wrong_method"}


def application(gateway: Gateway, rules: AccessRules | None = None) -> ASGIApp:
    """The ASGI application of a gateway. Without rules, requests need no key."""
    app = Starlette(
        routes=[
            *(route for api in APIS for route in api.routes),
            *health.routes(gateway),
            *metrics.routes(gateway),
            *cluster_view.routes(gateway),
            *openapi.ROUTES,
            *status_page.ROUTES,
        ],
        exception_handlers={
            ApiError: _answer_error,
            SollolError: _answer_error,
            HTTPException: _answer_http_error,
            Exception: _answer_error,  # the server logs these
        },
    )
    app.state.gateway = gateway
    return Access(app, gateway, rules or AccessRules(), error_response)


def error_response(scope: Scope, error: ApiError) -> Response:
    """An error as a response in the shape of the API that owns the path; Anthropic's shape for its clients, which
    share paths with OpenAI's."""
    path: str = scope["path"]
    api = next((api for api in APIS if path.startswith(api.prefixes)), APIS[-1])  # OPTIONS may have the path *
    shape = api.error_shape
    if path.startswith("/v1/") and anthropic_models.asks(Request(scope)):
        shape = anthropic_api.error_shape
    content = json.dumps(shape(error))  # ASCII: paths and messages may have lone surrogates
    return Response(content, error.status, error.headers, "application/json")


async def _answer_error(request: Request, error: Exception) -> Response:
    failure = api_error(error)
    request.scope["sollol.error"] = failure.kind
    return error_response(request.scope, failure)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path: str = request.scope["path"]
    message = f"{request.method} {shown(path)}: {error.detail.lower()}"
    failure = ApiError(error.status_code, _KINDS.get(error.status_code, "invalid"), message)
    request.scope["sollol.error"] = failure.kind
    response = error_response(request.scope, failure)
    response.headers.update(error.headers or {})  # the header "Allow"
    return response
