"""Access control: the ASGI application around all routes.

It checks, in this order: the host name of the request, its origin, the key, and the limits. Every request passes
it, so it reads the headers once.

* The host name: if an attacker's DNS name resolves to this machine (DNS rebinding), pages of that name have the
  same origin as the gateway. So only known names of this machine are accepted; IP addresses are not resolved, so
  they are safe.
* The origin: a web page may send simple requests to any server, without a preflight and without reading the
  answer. So requests of pages of other origins are refused, except of those that the user allows.
* The key: required if other machines reach the gateway. Otherwise a text that does not look like a key of this
  gateway counts as no key, since most clients send something (`api_key="none"`).
"""

from __future__ import annotations

import binascii
import ipaddress
import re
import secrets
import socket
import threading
import time
from base64 import b64decode
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from urllib.parse import urlsplit

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sollol_nb.errors import ConfigError
from sollol_nb.gateway.failures import ApiError
from sollol_nb.gateway.gateway import FinishedRequest, Gateway
from sollol_nb.gateway.keys import ANYBODY, PREFIX, WITHOUT_KEY, Key
from sollol_nb.gateway.limits import Failures
from sollol_nb.runtime.amounts import shown

OPEN_PATH = "/health"
"""Needs no key: supervisors of the process have none."""
WHILE_DRAINING = frozenset((OPEN_PATH, "/ready", "/metrics"))
"""Paths that are still answered while the gateway drains."""
STATUS_PAGE = "/"
"""Browsers ask for a key there."""
UNCOUNTED = ("/api/show", "/sollol/call/")
COUNTED = ("/sollol/call/embed", "/sollol/call/count_tokens", "/sollol/call/preload")
"""Limits count POST requests, except below `UNCOUNTED`, where requests need no engine; there they count only
`COUNTED`. GET requests are not counted."""
ASSETS = "/assets/"
"""Files of the status page, which have no data of the cluster. Browsers send an origin when they load modules, and
behind a proxy this is the proxy's origin."""
DRAIN_RETRY_S = 10
PREFLIGHT_S = 600
_ASK_IN_BROWSER = 'Basic realm="the password is the key"'
_METHODS = b"GET, POST, DELETE, PUT, PATCH, OPTIONS"
_REQUEST_ID_HEADERS = (b"request-id", b"x-request-id")
"""Anthropic's clients read the first, OpenAI's the second; the id is also in the log."""
_EXPOSED = b"X-Sollol-Route, X-Sollol-Failovers, Retry-After, " + b", ".join(_REQUEST_ID_HEADERS)
_HEADER_NAMES = re.compile(rb"[A-Za-z0-9_, -]{1,1024}")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@,]+")

ErrorResponse = Callable[[Scope, ApiError], Response]
"""Makes the response of an error on a path."""


class AccessRules:
    """Which requests are allowed.

    Args:
        requires_key: whether requests need a key.
        hosts: further host names of this machine.
        origins: of web pages that may send requests, such as `https://chat.example.org`.

    Raises:
        ConfigError: an origin or a name is not one.
    """

    def __init__(
        self, *, requires_key: bool = False, hosts: Iterable[str] = (), origins: Iterable[str] = ()
    ) -> None:
        self.requires_key = requires_key
        own = socket.gethostname().lower()
        self._hosts = {"localhost", own, f"{own}.local", *(_checked_host(name) for name in hosts)}
        self._origins = frozenset(_checked_origin(origin) for origin in origins)

    def learn_full_name(self) -> None:
        """Look up this machine's full name in the background (DNS may be slow), and add it to the names."""

        def learn() -> None:
            self._hosts.add(socket.getfqdn().lower())

        threading.Thread(target=learn, name="sollol_nb full name", daemon=True).start()

    def knows_host(self, host: str) -> bool:
        """Whether a request's host name is one of this machine."""
        name = _without_port(host.strip().lower()).removesuffix(".")
        return name in self._hosts or name.endswith(".localhost") or _is_address(name)

    def allows_origin(self, origin: str) -> bool:
        """Whether pages of this origin may send requests."""
        return origin.strip().lower() in self._origins


class Access:
    """Passes allowed requests to the routes, and refuses all others.

    Args:
        app: the routes.
        error_response: writes an error in the shape of the API that the request belongs to.
    """

    def __init__(self, app: ASGIApp, gateway: Gateway, rules: AccessRules, error_response: ErrorResponse) -> None:
        self._app = app
        self._gateway = gateway
        self._rules = rules
        self._error_response = error_response
        self._failures = Failures()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        status, began, request_id = 0, time.perf_counter(), f"req_{secrets.token_hex(12)}"
        scope["sollol.key"] = WITHOUT_KEY
        scope["sollol.stopped"] = self._gateway.stopped
        scope["sollol.limits"] = self._gateway.limits
        headers = _Headers(scope)
        added = self._cross_origin_headers(headers)
        added += ((name, request_id.encode()) for name in _REQUEST_ID_HEADERS)

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *added]
            await send(message)

        try:
            refusal = self._refusal(scope, headers)
            path: str = scope["path"]
            counted = scope["method"] == "POST" and (path in COUNTED or not path.startswith(UNCOUNTED))
            if refusal is not None:
                await refusal(scope, receive, send_noted)
            else:
                try:
                    admission = self._gateway.limits.admitted(scope["sollol.key"]) if counted else nullcontext()
                    with admission:
                        await self._app(scope, receive, send_noted)
                except ApiError as error:  # from the limits; the routes handle their own errors
                    await self._refused(scope, error)(scope, receive, send_noted)
        finally:
            self._gateway.limits.forget_body(scope)
            self._finish(scope, request_id, status, time.perf_counter() - began)

    def _refusal(self, scope: Scope, headers: _Headers) -> ASGIApp | None:
        """The response to a request that does not reach the routes, else None. The key is noted in the scope."""
        path: str = scope["path"]
        try:
            self._check_origin(headers, path)
            if scope["method"] == "OPTIONS" and headers.is_preflight:
                return _preflight(headers)
            if path != OPEN_PATH:
                scope["sollol.key"] = self._key(scope, headers)
            if self._gateway.draining.is_set() and path not in WHILE_DRAINING:
                message = "the gateway is being stopped; try again later"
                raise ApiError(503, "unavailable", message, retry_after_s=DRAIN_RETRY_S)
        except ApiError as error:
            return self._refused(scope, error)
        return None

    def _check_origin(self, headers: _Headers, path: str) -> None:
        if headers.hosts > 1:
            raise ApiError(400, "invalid", "the request has more than one Host header")
        if headers.host is not None and not self._rules.knows_host(headers.host):
            name = shown(_without_port(headers.host))
            raise ApiError(
                403,
                "forbidden",
                f"{name} is not a known host name of the gateway; use the machine's address, or start the gateway "
                "with --allow-host and this name",
            )
        if headers.origin is None or headers.is_same_origin or self._rules.allows_origin(headers.origin):
            return
        if path.startswith(ASSETS):
            return
        raise ApiError(
            403,
            "forbidden",
            f"web pages of {shown(headers.origin)} may not use the gateway; start the gateway with --allow-origin "
            "and this origin to allow them",
        )

    def _key(self, scope: Scope, headers: _Headers) -> Key:
        keys = self._gateway.keys
        texts = headers.keys()
        for text in texts:
            if (key := keys.find(text)) is not None:
                return key
        if not self._rules.requires_key and not any(text.startswith(PREFIX) for text in texts):
            return WITHOUT_KEY if keys.exist else ANYBODY
        if not texts:
            raise ApiError(
                401,
                "unauthorized",
                "the request has no API key; send one as Authorization: Bearer KEY or x-api-key: KEY",
            )
        address = (scope.get("client") or ("",))[0]
        if (wait_s := self._failures.note(address)) is not None:
            message = f"this address has sent too many wrong keys; try again in {wait_s} s"
            raise ApiError(429, "unauthorized", message, retry_after_s=wait_s)
        raise ApiError(401, "unauthorized", "the gateway does not know this key; check it, or add a new one")

    def _refused(self, scope: Scope, error: ApiError) -> ASGIApp:
        scope["sollol.error"] = error.kind
        response = self._error_response(scope, error)
        if error.status == 401:
            is_page = scope["path"] == STATUS_PAGE and scope["method"] in ("GET", "HEAD")
            response.headers["WWW-Authenticate"] = _ASK_IN_BROWSER if is_page else "Bearer"
        if error.kind == "unauthorized" or self._gateway.draining.is_set():
            response.headers["Connection"] = "close"
        return response

    def _cross_origin_headers(self, headers: _Headers) -> list[tuple[bytes, bytes]]:
        """The headers that let an allowed page of another origin read the response."""
        if headers.origin is None or headers.is_same_origin or not self._rules.allows_origin(headers.origin):
            return []
        return [
            (b"access-control-allow-origin", headers.origin.encode("latin-1")),
            (b"access-control-expose-headers", _EXPOSED),
            (b"vary", b"Origin"),
        ]

    def _finish(self, scope: Scope, request_id: str, status: int, duration_s: float) -> None:
        answer = scope.get("sollol.answer")
        finished = FinishedRequest(
            request_id=request_id,
            method=scope["method"],
            path=scope["path"],
            status=status,
            duration_s=duration_s,
            key=scope["sollol.key"].name,
            client=(scope.get("client") or ("",))[0],
            error_kind=scope.get("sollol.error") or (answer.error_kind if answer is not None else ""),
            answer=answer,
        )
        for note in self._gateway.on_finished:
            note(finished)


class _Headers:
    """The headers of a request that access control needs."""

    __slots__ = ("_authorization", "_x_api_key", "asked_headers", "asks_method", "host", "hosts", "origin")

    def __init__(self, scope: Scope) -> None:
        self.host: str | None = None
        self.hosts = 0
        self.origin: str | None = None
        self.asks_method = False
        self.asked_headers = b""
        self._authorization = self._x_api_key = b""
        for name, value in scope["headers"]:
            if name == b"host":
                self.host = value.decode("latin-1")
                self.hosts += 1
            elif name == b"authorization":
                self._authorization = value
            elif name == b"x-api-key":
                self._x_api_key = value
            elif name == b"origin":
                self.origin = value.decode("latin-1")
            elif name == b"access-control-request-method":
                self.asks_method = True
            elif name == b"access-control-request-headers":
                self.asked_headers = value

    @property
    def is_preflight(self) -> bool:
        """Whether this is a CORS preflight: a browser checks whether it may send a page's request."""
        return self.origin is not None and self.asks_method

    @property
    def is_same_origin(self) -> bool:
        """Whether the request comes from a page of the gateway itself."""
        return self.origin is not None and self.host is not None and _authority(self.origin) == self.host.lower()

    def keys(self) -> list[str]:
        """The texts that may be a key; a client may send several."""
        found = []
        scheme, _, credentials = self._authorization.decode("latin-1").partition(" ")
        credentials = credentials.strip()
        if scheme.lower() == "bearer":
            found.append(credentials)
        elif scheme.lower() == "basic":
            found.append(_password(credentials))
        found.append(self._x_api_key.decode("latin-1").strip())
        return [text for text in found if text]


def _preflight(headers: _Headers) -> Response:
    """The response to a preflight of an allowed page."""
    allowed = headers.asked_headers if _HEADER_NAMES.fullmatch(headers.asked_headers) else b""
    response = Response(status_code=204)
    response.raw_headers = [
        (b"access-control-allow-methods", _METHODS),
        (b"access-control-allow-headers", allowed),
        (b"access-control-max-age", str(PREFLIGHT_S).encode()),
    ]
    return response


def _password(credentials: str) -> str:
    try:
        return b64decode(credentials, validate=True).decode("utf-8", "replace").partition(":")[2]
    except (binascii.Error, ValueError):
        return ""


def _authority(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0] if host.count(":") == 1 else host


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _checked_host(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,253}", name):
        raise ConfigError(f"{shown(name)} is not the name of a machine; give it as in a URL, without the port")
    return name.lower().removesuffix(".")


def _checked_origin(origin: str) -> str:
    if not _ORIGIN.fullmatch(origin.lower()):
        raise ConfigError(
            f"{shown(origin)} is not an origin; give it such as https://chat.example.org, without a path"
        )
    return origin.lower()
