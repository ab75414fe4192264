"""The gateway as an ASGI application: what its routes share, and which API answers where."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from sollol_nb.gateway import (
    cluster_view,
    health,
    metrics,
    ollama_api,
    ollama_parts,
    openai_api,
    openai_parts,
    status_page,
)
from sollol_nb.gateway.access import Access
from sollol_nb.gateway.failures import ApiError, Kind, api_error
from sollol_nb.gateway.gateway import Gateway

ErrorShape = Callable[[ApiError], Any]
"""Writes an error as an API does."""


@dataclass(frozen=True, slots=True)
class Api:
    """One API: the paths that it owns, and its routes.

    Attributes:
        prefixes: of the paths whose errors have this API's shape.
    """

    prefixes: tuple[str, ...]
    routes: list[BaseRoute]
    error_shape: ErrorShape


APIS: tuple[Api, ...] = (
    Api(("/api/",), ollama_api.ROUTES, ollama_parts.error_shape),
    Api(("/",), openai_api.ROUTES, openai_parts.error_shape),
)
"""The first API with a fitting prefix counts."""
_KINDS: Mapping[int, Kind] = {404: "not_found", 405: "wrong_method"}


def application(gateway: Gateway) -> ASGIApp:
    """The application of a gateway."""
    app = Starlette(
        routes=[
            *(route for api in APIS for route in api.routes),
            *health.routes(gateway),
            *metrics.routes(gateway),
            *cluster_view.routes(gateway),
            *status_page.ROUTES,
        ],
        exception_handlers={ApiError: _answer_error, HTTPException: _answer_http_error, Exception: _answer_error},
    )
    app.state.gateway = gateway
    return Access(app, gateway)


def error_response(path: str, error: ApiError) -> Response:
    """An error as the response of the API that owns the path."""
    api = next(api for api in APIS if path.startswith(api.prefixes))
    return JSONResponse(api.error_shape(error), error.status, headers=error.headers)


async def _answer_error(request: Request, error: Exception) -> Response:
    return error_response(request.url.path, api_error(error))


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail.lower()}"
    failure = ApiError(error.status_code, _KINDS.get(error.status_code, "invalid"), message)
    return error_response(request.url.path, failure)
