"""The status page at `/`: the widget's map of the cluster, live, from the same JavaScript, and how to connect.

All addresses in it are relative, so it also works below another path, such as behind jupyter-server-proxy.
Its Content-Security-Policy allows nothing but files and events of the gateway itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from html import escape
from pathlib import Path
from string import Template

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from sollol_nb._version import __version__
from sollol_nb.gateway.calls import key_of
from sollol_nb.gateway.failures import ApiError
from sollol_nb.gateway.keys import ANYBODY, WITHOUT_KEY
from sollol_nb.runtime.amounts import shown
from sollol_nb.widget import drawing

ASSETS = Path(__file__).parent / "assets"
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


@cache
def _assets() -> Mapping[str, bytes]:
    """The files of the page by name."""
    own = {name: (ASSETS / name).read_bytes() for name in ("status_page.js", "status_page.css", "icon.svg")}
    return {
        **own,
        "cluster_map.js": drawing.SOURCE.encode(),
        "cluster_map.css": drawing.STYLE.encode(),
    }


@cache
def _page() -> Template:
    return Template((ASSETS / "status_page.html").read_text(encoding="utf-8"))


async def _answer_page(request: Request) -> Response:
    if "text/html" not in request.headers.get("accept", ""):
        return PlainTextResponse("Ollama is running")  # Ollama's answer, which its clients check
    address = str(request.base_url).rstrip("/")
    key = "not required" if key_of(request) in (ANYBODY, WITHOUT_KEY) else "the key that you entered for this page"
    page = _page().substitute(address=escape(address), version=escape(__version__), key=key)
    return Response(page, media_type="text/html", headers=_HEADERS)


async def _answer_asset(request: Request) -> Response:
    name = request.path_params["name"]
    content = _assets().get(name)
    if content is None:
        raise ApiError(404, "not_found", f"GET {shown(request.url.path)}: not found")
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**_HEADERS, "ETag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type=_TYPES[Path(name).suffix], headers=headers)


ROUTES: list[BaseRoute] = [
    Route("/", _answer_page, methods=["GET"]),
    Route("/assets/{name}", _answer_asset, methods=["GET"]),
]
