"""Who may ask: names of the machine, origins of web pages, keys."""

from __future__ import annotations

import asyncio
import json
from base64 import b64encode
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from sollol_nb.errors import ConfigError
from sollol_nb.gateway import limits as limits_module
from sollol_nb.gateway.access import Access, AccessRules
from sollol_nb.gateway.app import error_response
from sollol_nb.gateway.bodies import read_json
from sollol_nb.gateway.failures import ApiError
from sollol_nb.gateway.gateway import FinishedRequest, Gateway
from sollol_nb.gateway.keys import ANYBODY, WITHOUT_KEY, Key, add_key, remove_key
from sollol_nb.gateway.keys import Keys as KeysOfFile
from sollol_nb.gateway.limits import ALLOWED_FAILURES, WINDOW_S, Failures, Limits
from sollol_nb.runtime.io_loop import run_blocking
from tests.support.engines import posix_only
from tests.support.gateway import gateway_without_engines

PAGE = "https://chat.example.org"


async def _who_asked(scope: Any, receive: Any, send: Any) -> None:
    await PlainTextResponse(repr(scope["sollol.key"]))(scope, receive, send)


class Site:
    """An application that says who asked, behind `Access`."""

    def __init__(self, keys: KeysOfFile, rules: AccessRules | None = None, limits: Limits | None = None) -> None:
        nothing = cast(Any, None)
        self.gateway = Gateway(nothing, nothing, keys=keys, limits=limits)
        self.finished: list[FinishedRequest] = []
        self.gateway.on_finished.append(self.finished.append)
        app = Access(_who_asked, self.gateway, rules or AccessRules(), error_response)
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost:11440")


def on_site(test: Callable[[Site], Awaitable[None]], *arguments: Any) -> None:
    async def run() -> None:
        await test(Site(*arguments))

    asyncio.run(run())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "127.0.0.1:11440"}, 200),
        ({"Host": "[::1]:11440"}, 200),
        ({"Host": "192.168.1.7"}, 200),
        ({"Host": "LOCALHOST."}, 200),
        ({"Host": "notes.localhost:1"}, 200),
        ({"Host": "head.lab:11440"}, 200),
        ({"Host": "evil.example.org:11440"}, 403),
        ({"Host": "localhost.example.org"}, 403),
        ({"Host": "127.0.0.1.example.org"}, 403),
        ({"Host": "[::1].example.org"}, 200),  # no name that can be resolved
        ({"Host": ""}, 403),
        ({"Origin": "http://localhost:11440"}, 200),
        ({"Origin": "http://localhost:8888"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://[broken"}, 403),
        ({"Origin": "https://evil.example.org"}, 403),
        ({"Origin": PAGE}, 200),
        ({"Origin": PAGE, "Host": "evil.example.org"}, 403),
    ],
)
def test_only_known_host_names_and_origins_are_allowed(file: Path, headers: dict[str, str], status: int) -> None:
    async def test(site: Site) -> None:
        response = await site.client.post("/v1/chat/completions", headers=headers)
        assert response.status_code == status
        if status == 403:
            assert response.json()["error"]["message"].isprintable()
        allowed = response.headers.get("access-control-allow-origin")
        assert allowed == (PAGE if headers.get("Origin") == PAGE else None)

    on_site(test, KeysOfFile(file), AccessRules(hosts=["head.lab"], origins=[PAGE]))


def test_browsers_of_allowed_pages_get_their_preflight_without_a_key(file: Path) -> None:
    async def test(site: Site) -> None:
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, x-a"}
        response = await site.client.options("/v1/chat/completions", headers={"Origin": PAGE, **asked})
        assert response.status_code == 204
        assert response.headers["access-control-allow-origin"] == PAGE
        assert response.headers["access-control-allow-headers"] == "authorization, x-a"
        refused = await site.client.options("/v1/models", headers={"Origin": "https://a.example.org", **asked})
        assert refused.status_code == 403
        assert "access-control-allow-origin" not in refused.headers

    on_site(test, KeysOfFile(file), AccessRules(origins=[PAGE], requires_key=True))


@pytest.mark.parametrize(
    "origin", ["*", "chat.example.org", "https://chat.example.org/path", "https://a, https://b"]
)
def test_an_invalid_origin_is_refused_at_the_start(origin: str) -> None:
    with pytest.raises(ConfigError, match="is not an origin"):
        AccessRules(origins=[origin])


def _asked_with(key: str) -> list[dict[str, str]]:
    basic = b64encode(f"anybody:{key}".encode()).decode()
    return [{"Authorization": f"Bearer {key}"}, {"x-api-key": key}, {"Authorization": f"Basic {basic}"}]


def test_a_key_is_valid_from_when_it_is_made_until_it_is_removed(file: Path) -> None:
    async def test(site: Site) -> None:
        refused = await site.client.post("/v1/chat/completions", json={})
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        key = add_key(Key(name="ada", priority=3, max_requests=2), file)
        for headers in _asked_with(key):
            response = await site.client.post("/v1/chat/completions", headers=headers)
            assert (response.status_code, response.text) == (
                200,
                repr(Key(name="ada", priority=3, max_requests=2)),
            )
            for wrong in _asked_with(f"{key[:-1]}!"):
                assert (await site.client.get("/v1/models", headers=wrong)).status_code in (401, 429)
        remove_key("ada", file)
        assert (await site.client.get("/v1/models", headers=headers)).status_code in (401, 429)
        assert {finished.key for finished in site.finished} == {"", "ada"}

    on_site(test, KeysOfFile(file), AccessRules(requires_key=True))


def test_browsers_ask_for_the_key_on_the_status_page_alone(file: Path) -> None:
    async def test(site: Site) -> None:
        assert (await site.client.get("/health")).status_code == 200
        page = await site.client.get("/")
        assert page.status_code == 401
        assert page.headers["www-authenticate"].startswith("Basic ")
        for path in ("/ready", "/cluster", "/health/more"):
            assert (await site.client.get(path)).headers["www-authenticate"] == "Bearer"

    on_site(test, KeysOfFile(file), AccessRules(requires_key=True))


def test_where_no_key_is_required_a_text_that_looks_like_a_key_must_be_valid(file: Path) -> None:
    async def test(site: Site) -> None:
        async def asks(text: str) -> httpx.Response:
            return await site.client.get("/v1/models", headers={"Authorization": f"Bearer {text}"})

        assert (await asks("none")).text == repr(ANYBODY)
        assert (await asks("snb-typo")).status_code == 401
        key = add_key(Key(name="ada", may_control=True), file)
        assert (await asks("none")).text == repr(WITHOUT_KEY)
        assert "name='ada'" in (await asks(key)).text

    on_site(test, KeysOfFile(file))


@posix_only
def test_only_hashes_are_kept_in_a_private_file(file: Path) -> None:
    key = add_key(Key(name="ada"), file)
    text = file.read_text()
    assert key not in text
    assert key.removeprefix("snb-") not in text
    assert len(key) >= 43
    assert {path.stat().st_mode & 0o777 for path in file.parent.iterdir()} == {0o600}
    with pytest.raises(ConfigError, match="the key ada exists already"):
        add_key(Key(name="ada"), file)
    with pytest.raises(ConfigError, match="keys: ada"):
        remove_key("bob", file)


@pytest.mark.parametrize(
    "key", [Key(name=""), Key(name="a b"), Key(name="a", priority=11), Key(name="a", max_requests=0)]
)
def test_an_invalid_key_is_not_made(file: Path, key: Key) -> None:
    with pytest.raises(ConfigError):
        add_key(key, file)
    assert not file.exists()


def test_with_a_damaged_key_file_only_the_known_keys_stay_valid(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = add_key(Key(name="ada"), file)
    keys = KeysOfFile(file)
    file.write_text('{"keys": [{"name": 1}]}')
    assert keys.find(key) is not None
    assert "damaged" in caplog.text
    with pytest.raises(ConfigError, match="damaged"):
        KeysOfFile(file)


@posix_only
def test_a_file_of_keys_that_cannot_be_reached_lets_nobody_else_in(file: Path) -> None:
    key = add_key(Key(name="ada"), file)
    keys = KeysOfFile(file)
    file.unlink()
    file.symlink_to(file)
    assert keys.exist
    assert keys.find(key) is not None
    with pytest.raises(ConfigError, match="cannot be read or trusted"):
        KeysOfFile(file)


def test_a_request_over_a_limit_gets_the_time_to_wait(file: Path) -> None:
    key = add_key(Key(name="ada", max_requests=1, requests_per_minute=3), file)
    now = [0.0]
    limits = Limits(2, clock=lambda: now[0])

    async def test(site: Site) -> None:
        async def ask(method: str = "POST", **headers: str) -> httpx.Response:
            return await site.client.request(method, "/v1/chat/completions", headers=headers)

        with limits.admitted(ANYBODY), limits.admitted(ANYBODY):
            full = await ask()
            assert (full.status_code, full.headers["retry-after"]) == (503, "1")
            assert (await ask("GET")).status_code == 200
        with limits.admitted(Key(name="ada")):
            assert (await ask(**{"x-api-key": key})).status_code == 429
            assert (await ask()).status_code == 200
        for _ in range(3):
            assert (await ask(**{"x-api-key": key})).status_code == 200
            now[0] += 10
        used = await ask(**{"x-api-key": key})
        assert (used.status_code, used.headers["retry-after"]) == (429, "30")
        assert used.json()["error"]["type"] == "rate_limit_error"
        now[0] += 30
        assert (await ask(**{"x-api-key": key})).status_code == 200
        assert limits.running == 0

    on_site(test, KeysOfFile(file), None, limits)


@pytest.mark.parametrize(
    ("path", "is_counted"),
    [
        ("/api/chat", True),
        ("/api/pull", True),
        ("/api/show", False),
        ("/sollol/chat", True),
        ("/sollol/call/status", False),
        *((f"/sollol/call/{name}", True) for name in ("embed", "count_tokens", "preload")),
    ],
)
def test_what_no_engine_works_for_is_answered_by_a_full_gateway(file: Path, path: str, is_counted: bool) -> None:
    limits = Limits(1)

    async def test(site: Site) -> None:
        with limits.admitted(ANYBODY):
            assert (await site.client.post(path)).status_code == (503 if is_counted else 200)
            assert (await site.client.get(path)).status_code == 200

    on_site(test, KeysOfFile(file), None, limits)


def test_bodies_that_are_too_long_together_are_refused_until_one_of_them_is_answered(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits_module, "BODIES_LIMIT_BYTES", 100)
    is_read, may_end = asyncio.Event(), asyncio.Event()
    short, long = b"{}", b"{" + b" " * 60 + b"}"

    async def read(request: Request) -> Response:
        if await read_json(request) == {} and int(request.headers["content-length"]) == len(long):
            is_read.set()
            await may_end.wait()
        return PlainTextResponse("read")

    async def test(site: Site) -> None:
        app = Starlette(routes=[Route("/", read, methods=["POST"])], exception_handlers={ApiError: refused})
        transport = httpx.ASGITransport(Access(app, site.gateway, AccessRules(), error_response))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            waiting = asyncio.create_task(client.post("/", content=long))
            await is_read.wait()
            full = await client.post("/", content=long)
            assert (full.status_code, full.headers["retry-after"]) == (503, "1")
            assert (await client.post("/", content=short)).status_code == 200
            may_end.set()
            assert (await waiting).status_code == 200
            assert (await client.post("/", content=long)).status_code == 200

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error_response(request.scope, error)

    on_site(test, KeysOfFile(file))


def test_a_body_of_millions_of_lists_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(*_: object, **__: object) -> None:
        raise AssertionError("the body is parsed")

    async def ask() -> httpx.Response:
        async with gateway_without_engines() as client:
            monkeypatch.setattr(json, "loads", parse)
            try:
                return await client.post("/api/chat", content=b'{"messages": [' + b"[]," * 1_000_000 + b"[]]}")
            finally:
                monkeypatch.undo()

    response = run_blocking(ask())
    assert response.status_code == 413
    assert "too many lists" in response.json()["error"]


def test_an_address_with_many_wrong_keys_waits_but_a_right_key_is_never_refused(file: Path) -> None:
    key = add_key(Key(name="ada"), file)

    async def test(site: Site) -> None:
        statuses = [
            (await site.client.get("/v1/models", headers={"x-api-key": "wrong"})).status_code
            for _ in range(ALLOWED_FAILURES + 1)
        ]
        assert statuses == [401] * ALLOWED_FAILURES + [429]
        assert (await site.client.get("/v1/models", headers={"x-api-key": key})).status_code == 200

    on_site(test, KeysOfFile(file), AccessRules(requires_key=True))
    now = [0.0]
    failures = Failures(clock=lambda: now[0])
    assert [failures.note("a") for _ in range(ALLOWED_FAILURES)] == [None] * ALLOWED_FAILURES
    assert failures.note("a") == WINDOW_S
    assert failures.note("b") is None
    now[0] = WINDOW_S
    assert failures.note("a") is None


def test_a_draining_gateway_refuses_requests_in_the_shape_of_each_api(file: Path) -> None:
    async def test(site: Site) -> None:
        site.gateway.draining.set()
        response = await site.client.post("/v1/chat/completions")
        assert response.status_code == 503
        assert (response.headers["retry-after"], response.headers["connection"]) == ("10", "close")
        assert "stopped" in response.json()["error"]["message"]
        assert (await site.client.get("/health")).status_code == 200

    on_site(test, KeysOfFile(file))
