"""Who may ask: the application around all routes.

It checks, in this order: by which name the gateway was called, which web page asks, the key, and the limits. It is
on the way of every request, so it reads the headers once.

* The name: a web page whose own name is made to lead here (DNS rebinding) would be of the same origin as the
  gateway. So names count only if they are known to be those of this machine; addresses cannot be made to lead
  here.
* The origin: a web page may send simple requests anywhere, without a preflight and without reading the answer. So
  requests of pages of other origins are refused, except of those that the user allows.
* The key: required beyond this machine. Where none is required, a text that does not look like a key of this
  gateway counts as none, since most clients send something (`api_key="none"`).
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
"""Needs no key: what watches the process has none."""
WHILE_DRAINING = frozenset((OPEN_PATH, "/ready", "/metrics"))
"""What is still answered while the gateway ends."""
STATUS_PAGE = "/"
"""Browsers ask for a key there."""
UNCOUNTED = ("/api/show", "/sollol/call/")
COUNTED = ("/sollol/call/embed", "/sollol/call/count_tokens", "/sollol/call/preload")
"""POST requests below the first paths are not counted, since no engine works for them; those to the second ones
are. GET requests are never counted."""
ASSETS = "/assets/"
"""Files of the status page, which hold nothing of the cluster. Browsers name an origin when they load them as
modules, and behind a proxy that is the proxy's."""
DRAIN_RETRY_S = 10
PREFLIGHT_S = 600
_ASK_IN_BROWSER = 'Basic realm="the password is the key"'
_METHODS = b"GET, POST, DELETE, PUT, PATCH, OPTIONS"
_REQUEST_ID_HEADERS = (b"request-id", b"x-request-id")
"""Anthropic's clients read the first, OpenAI's the second; the log has it, too."""
_EXPOSED = b"X-Sollol-Route, X-Sollol-Failovers, Retry-After, " + b", ".join(_REQUEST_ID_HEADERS)
_HEADER_NAMES = re.compile(rb"[A-Za-z0-9_, -]{1,1024}")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@,]+")

ErrorResponse = Callable[[Scope, ApiError], Response]
"""Makes the response of an error on a path."""


class AccessRules:
    """What may come in.

    Args:
        requires_key: whether requests need a key.
        hosts: names of this machine by which it may be called, besides those that it knows.
        origins: of web pages that may ask, such as `https://chat.example.org`.

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
        """Ask the name service for this machine's full name, which may take a while, and add it to the names."""

        def learn() -> None:
            self._hosts.add(socket.getfqdn().lower())

        threading.Thread(target=learn, name="sollol_nb full name", daemon=True).start()

    def knows_host(self, host: str) -> bool:
        """Whether a name by which the gateway is called is one of this machine."""
        name = _without_port(host.strip().lower()).removesuffix(".")
        return name in self._hosts or name.endswith(".localhost") or _is_address(name)

    def allows_origin(self, origin: str) -> bool:
        """Whether pages of this other origin may ask."""
        return origin.strip().lower() in self._origins


class Access:
    """Lets requests in.

    Args:
        app: the routes.
        error_response: writes an error as the API does that the request belongs to.
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
                except ApiError as error:  # of the limits: the routes answer theirs
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
                f"the gateway does not know the name {name} of its machine; use the machine's address, or start "
                "the gateway with --allow-host and this name",
            )
        if headers.origin is None or headers.is_same_origin or self._rules.allows_origin(headers.origin):
            return
        if path.startswith(ASSETS):
            return
        raise ApiError(
            403,
            "forbidden",
            f"web pages of {shown(headers.origin)} may not use the gateway; to allow it, start the gateway with "
            "--allow-origin and this origin",
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
                "give a key, as Authorization: Bearer KEY or x-api-key: KEY (`sollol-nb key add`)",
            )
        address = (scope.get("client") or ("",))[0]
        if (wait_s := self._failures.note(address)) is not None:
            message = f"this address has sent too many wrong keys; try again in {wait_s} s"
            raise ApiError(429, "unauthorized", message, retry_after_s=wait_s)
        raise ApiError(401, "unauthorized", "this key is not, or no longer, one of the gateway's")

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
        """What lets an allowed page of another origin read the response."""
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
    """The headers of a request that say who asks."""

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
        """Whether a browser asks, with OPTIONS, whether it may send the request of a page."""
        return self.origin is not None and self.asks_method

    @property
    def is_same_origin(self) -> bool:
        """Whether the page that asks comes from the gateway itself."""
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
    """What browsers ask before they send the request of an allowed page."""
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
