"""Bodies of requests: JSON that is bounded in length, depth and time. The APIs check its fields."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn

from starlette.requests import ClientDisconnect, Request

from sollol_nb.gateway.failures import ApiError, invalid
from sollol_nb.gateway.limits import Limits

BODY_LIMIT_BYTES = 32 * 1024 * 1024
"""Enough for several pictures, or a million tokens of text."""
DEEPEST = 64
"""Nested lists and objects; a JSON schema that is deeper is a mistake or an attack."""
MOST_PARTS = 2_000_000
"""Brackets, braces and commas of a body, those in texts included. The parser lets nothing else run meanwhile: ten
million empty lists, which fit into a body, take it ten seconds, and this many parts less than one."""
BODY_TIMEOUT_S = 60.0


async def read_json(request: Request) -> dict[str, Any]:
    """The body of a request, which must be a JSON object.

    Raises:
        ApiError: it is not, or it is too long, too deep, or too slow.
    """
    content = await _read(request)
    if len(content) > MOST_PARTS and sum(map(content.count, (b"[", b"{", b","))) > MOST_PARTS:
        raise ApiError(413, "too_large", "the body has too many lists, objects and values; send fewer at once")
    try:
        body = json.loads(content.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise invalid(f"the body is not JSON: {reason}") from None
    if not isinstance(body, dict):
        raise invalid("the body must be a JSON object")
    _check_depth(body)
    return body


async def _read(request: Request) -> bytes:
    announced = request.headers.get("content-length", "0")
    if announced.isascii() and announced.isdigit() and int(announced[:20]) > BODY_LIMIT_BYTES:
        raise _too_large()
    content = bytearray()
    limits: Limits = request.scope["sollol.limits"]
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for piece in request.stream():
                limits.add_to_body(request.scope, len(piece))
                content += piece
                if len(content) > BODY_LIMIT_BYTES:
                    raise _too_large()
    except TimeoutError:
        message = f"the body had not arrived after {BODY_TIMEOUT_S:.0f} s; send it faster"
        raise ApiError(408, "timeout", message) from None
    except ClientDisconnect:
        raise ApiError(400, "cancelled", "the connection ended within the body") from None
    return bytes(content)


def _too_large() -> ApiError:
    return ApiError(413, "too_large", f"the body is longer than {BODY_LIMIT_BYTES >> 20} MiB; send a shorter one")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _check_depth(body: dict[str, Any]) -> None:
    level: list[Any] = [body]
    for _ in range(DEEPEST):
        level = [
            value
            for container in level
            for value in (container.values() if isinstance(container, dict) else container)
            if isinstance(value, dict | list)
        ]
        if not level:
            return
    raise invalid(f"the body is nested deeper than {DEEPEST} levels")
