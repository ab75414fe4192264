"""Nodes that are broken, hostile or no Ollama: each costs one clear line, never memory or time."""

from __future__ import annotations

import gzip
import time
from collections.abc import Iterator
from typing import Any

import pytest

from sollol_nb.errors import (
    ModelNotFoundError,
    OllamaResponseError,
    OllamaUnavailableError,
    RequestTimeoutError,
)
from sollol_nb.runtime import http_client
from sollol_nb.runtime.events import EventKind
from sollol_nb.sync_wrapper import HybridRouter, OllamaPool
from tests.support.engines import HANG_GUARD_S
from tests.support.fake_node import HEAD, HEALTHY, MODEL, Reply, fake_node, lines, reply


@pytest.fixture(autouse=True)
def as_long_as_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node has the time to send all of it (a flood, say) on a busy machine."""
    monkeypatch.setattr("sollol_nb.ollama.nodes.QUERY_TIMEOUT_S", HANG_GUARD_S)


def answer_of(replies: dict[str, Reply], **options: Any) -> dict[str, Any]:
    with fake_node(replies) as (url, _), OllamaPool(url) as pool:
        return dict(pool.chat("llama3.2", [{"role": "user", "content": "hi"}], **options))


def drip() -> Iterator[bytes]:
    yield HEAD
    while True:
        time.sleep(0.02)
        yield b" "


def flood(text: bytes, before: bytes = b"") -> Reply:
    def pieces() -> Iterator[bytes]:
        yield HEAD + before
        while True:
            yield text

    return pieces


# --- nodes that cannot be used: the error has the address and the reason --------------------------------------


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        (
            reply({"error": "unauthorized"}, "401 Unauthorized"),
            "answered 401: unauthorized; this package sends no login",
        ),
        (reply(b"", "403 Forbidden"), "answered 403: Forbidden; this package sends no login"),
        (
            reply(b"", "301 Moved", "Location: https://ollama.example.org/"),
            "answered 301: it redirects to https://ollama.example.org/; use that address instead",
        ),
        (reply(b"<!doctype html><title>Sign in</title>"), r"sent a web page \(Sign in\)"),
        (reply({"detail": "Not Found"}, "404 Not Found"), "answered 404: .*; that server is not Ollama"),
        (
            reply({"error": "Unexpected endpoint or method. (GET /api/tags)"}),
            r" is not an Ollama server \(it answered: Unexpected endpoint or method",
        ),
        (reply({"object": "list", "data": []}), "is not an Ollama server: it has no list of models"),
        (reply([]), "is not an Ollama server: it has no list of models"),
        (
            reply(b"<html><head><title>502 Bad Gateway</title></head>", "502 Bad Gateway"),
            "answered 502: Bad Gateway; the proxy there does not reach Ollama",
        ),
        (reply(b"[" * 200_000), "sent an answer that is not JSON"),
        (reply(gzip.compress(b"{}"), "200 OK", "Content-Encoding: gzip"), "sent a compressed answer"),
        (flood(b"a" * 2**20, before=b'"'), "the answer is longer than 32 MiB"),
        (b"SSH-2.0-OpenSSH\r\n", "is incomplete or not HTTP"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)
def test_why_a_node_cannot_be_used_is_in_the_error_with_its_address(tags: Reply, reason: str) -> None:
    with (
        fake_node({"/api/tags": tags}) as (url, _),
        HybridRouter(OllamaPool(url), auto_discover_rpc=False) as router,
    ):
        for backend in (None, "ollama"):
            with pytest.raises(
                ModelNotFoundError, match=f"no Ollama node can be used \\({url}.*{reason}"
            ) as error:
                router.route_request("qwen3:8b", "hi", backend=backend)
            assert "\n" not in str(error.value)
        with pytest.raises(OllamaUnavailableError, match=reason):
            OllamaPool(url).list()


def test_an_unknown_host_and_an_unusable_certificate_file_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/missing.pem")
    for node, reason in [
        ("xn--a", r"is running at http://xn--a:11434 \(the address is not valid\)"),
        ("no.such.host.invalid", r"is running at http://no\.such\.host\.invalid:11434 \(no host has this name\)"),
        ("https://127.0.0.1:9", r"can be used \(https://127\.0\.0\.1:9: SSL_CERT_FILE='/missing.pem'"),
    ]:
        with (
            HybridRouter(OllamaPool(node), auto_discover_rpc=False) as router,
            pytest.raises(ModelNotFoundError, match=reason),
        ):
            router.route("qwen3:8b")


def test_a_node_in_trouble_is_named_beside_one_that_lacks_the_model() -> None:
    with (
        fake_node({"/api/tags": reply({"error": "unauthorized"}, "401 Unauthorized")}) as (troubled, _),
        fake_node({}) as (healthy, _),
        HybridRouter(OllamaPool([troubled, healthy]), auto_discover_rpc=False) as router,
    ):
        assert router.route_request("llama3.2", "hi").routing["node_url"] == healthy
        with pytest.raises(ModelNotFoundError, match=f"no Ollama node has it \\(not usable: {troubled}.*401"):
            router.route_request("qwen3:8b", "hi")


def test_a_node_that_fails_does_not_keep_the_others_from_unloading_a_model() -> None:
    loaded = reply({"models": [{"name": MODEL, "digest": "d"}]})
    failing = {"/api/ps": loaded, "/api/generate": b""}
    healthy = {"/api/ps": loaded, "/api/generate": reply({"done": True, "done_reason": "unload"})}
    with (
        fake_node(failing) as (first, _),
        fake_node(healthy) as (second, received),
        OllamaPool([first, second]) as pool,
    ):
        with pytest.raises(OllamaUnavailableError, match=f"llama3.2 may still be loaded: .*{first}"):
            pool.unload("llama3.2")
        assert [body["keep_alive"] for path, body in received if path == "/api/generate"] == [0]


def test_a_named_node_where_nothing_runs_is_named_and_an_assumed_one_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with HybridRouter(auto_discover_rpc=False) as router:
        with pytest.raises(ModelNotFoundError, match=r"no Ollama node is running at http://127\.0\.0\.1:9, and"):
            router.route("qwen3:8b")
        assert [node.url for node in router.cluster().nodes] == ["http://127.0.0.1:9"]
    monkeypatch.delenv("OLLAMA_HOST")
    monkeypatch.setattr("sollol_nb.ollama.pool.LOOPBACK", "127.0.0.1:9")
    with HybridRouter(auto_discover_rpc=False) as router:
        with pytest.raises(ModelNotFoundError, match="no Ollama node is running, and"):
            router.route("qwen3:8b")
        assert router.cluster().nodes == ()
        assert "Ollama" not in str(router.cluster())


# --- lists of models -----------------------------------------------------------------------------------------


def test_a_malformed_entry_hides_only_itself() -> None:
    wrong: list[Any] = [
        None,
        7,
        [],
        {},
        {"name": 5},
        {"name": "\x1b[31mevil<script>"},
        {"name": None, "model": None},
    ]
    spoiled = {"name": MODEL, "size": "x", "digest": 7, "details": [1], "context_length": -5, "size_vram": 1e999}
    listed = reply({"models": [*wrong, spoiled, {"model": "other:7b", "size": 5}]})
    with (
        fake_node({"/api/tags": listed, "/api/ps": listed}) as (url, _),
        HybridRouter(OllamaPool(url), auto_discover_rpc=False) as router,
        OllamaPool(url) as pool,
    ):
        assert [entry["name"] for entry in pool.list()["models"]] == [MODEL, "other:7b"]
        assert pool.ps()["models"] == [
            {"name": MODEL, "node": url},
            {"name": "other:7b", "model": "other:7b", "size": 5, "node": url},
        ]
        assert pool.nodes[0].loaded_bytes == 5
        assert {"llama3.2", "other:7b"} <= {*router.models()["model"]}
        assert router.route_request("llama3.2", "hi").text == "hello"
        assert router.map([{"t": "a"}], "{{ t }}", model="llama3.2")["answer"].tolist() == ["hello"]


# --- answers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lines({"message": "text"}), "message is text, not an object"),
        (lines({"message": {"content": 7}}), "message.content is a number, not text"),
        (lines({"message": {"thinking": ["x"]}}), "message.thinking is a list, not text"),
        (lines({"message": {"content": "x", "tool_calls": "f"}}), "message.tool_calls has a call without"),
        (lines({"message": {"tool_calls": [{"function": {"name": 5}}]}}), "message.tool_calls has a call without"),
        (lines({"message": {"content": "x"}, "done": "yes"}), "done is text, not true or false"),
        (lines([1]), "a JSON object was expected, not a list"),
        (lines(b"{not json\n"), "sent a line that is not JSON"),
        (lines(b'{"a":' * 100_000 + b"\n"), "sent a line that is not JSON"),
        (lines(), "closed the connection before the answer was complete"),
        (flood(b"z" * 2**20, before=b'{"message": {"content": "'), "a line of the answer is longer than 16 MiB"),
        (reply(gzip.compress(b"{}"), "200 OK", "Content-Encoding: gzip"), "a compressed answer"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_an_answer_of_another_form_is_one_line_that_names_the_node(answer: Reply, reason: str) -> None:
    with pytest.raises(OllamaUnavailableError, match=reason) as error:
        answer_of({"/api/chat": answer})
    assert "http://127.0.0.1:" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (
            reply(b"", "307 Elsewhere", "Location: http://127.0.0.1:9/steal"),
            "it redirects to http://127.0.0.1:9/steal",
        ),
        (
            reply({"error": "unauthorized"}, "401 Unauthorized"),
            "unauthorized; a cloud model needs `ollama signin`",
        ),
        (reply({"error": "E" * 50_000}, "400 Bad"), "E" * 400),
        (lines({"error": {"message": "two\nlines \x1b[2J"}, "status": 400}), r"two lines \[2J$"),
        (lines({"error": ["x"], "status": "y"}), r"\['x'\]"),
    ],
    ids=["redirect", "no login", "a long error", "an error in the stream", "an error of wrong types"],
)
def test_a_refusal_is_one_line_of_limited_length(answer: Reply, reason: str) -> None:
    with pytest.raises(OllamaResponseError, match=reason) as error:
        answer_of({"/api/chat": answer})
    assert len(str(error.value)) < 700
    assert "\n" not in str(error.value)


def test_wrong_figures_are_left_out_and_marks_of_a_node_are_not_believed() -> None:
    last = {
        "message": {"role": 5, "content": "hello"},
        "done": True,
        "done_reason": 7,
        "eval_count": "NaN",
        "prompt_eval_count": -1,
        "load_duration": 1e300,
        "total_duration": [],
        "eval_duration": True,
        "_routing": {"backend": "x", "node": 5},
        "_restarted": True,
        "_dropped": "evil",
        "_context_full": "x",
    }
    with (
        fake_node({"/api/chat": lines({"message": None}, {"message": {"content": None}}, last)}) as (url, _),
        HybridRouter(OllamaPool(url), auto_discover_rpc=False) as router,
    ):
        answer = router.route_request("llama3.2", "hi")
        assert answer.text == "hello"
        assert (answer.routing["backend"], answer.routing["node_url"]) == ("ollama-pool", url)
        assert "_dropped" not in answer
        row = router.latency.frame(last=1).iloc[0]
        assert (row.status, row.place) == ("ok", url)


@pytest.mark.parametrize("path", ["/api/chat", "/api/tags"])
def test_the_timeout_holds_for_an_answer_that_comes_a_byte_at_a_time(path: str) -> None:
    """Also while the node may be loading the model: it has it on disk."""
    with pytest.raises(RequestTimeoutError):
        answer_of({path: drip}, timeout=0.5)


def test_an_answer_in_many_small_chunks_ends_before_they_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "STREAM_LIMIT_BYTES", 20 * 2**20)
    chunk = lines({"message": {"content": "y"}, "done": False}).removeprefix(HEAD)
    with fake_node({"/api/chat": flood(chunk * 100)}) as (url, _), OllamaPool(url) as pool:
        stream = pool.stream_chat("llama3.2", [{"role": "user", "content": "hi"}])
        count = 0

        def read() -> None:
            nonlocal count
            for _ in stream:
                count += 1

        with pytest.raises(OllamaUnavailableError, match="the answer is longer than 20 MiB"):
            read()
        assert count < 20 * 2**20 / (len(chunk) + http_client.LINE_COST_BYTES) + 2_000


def test_an_endless_answer_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "STREAM_LIMIT_BYTES", 20 * 2**20)
    chunk = lines({"message": {"content": "y" * 4_000}, "done": False}).removeprefix(HEAD)
    with pytest.raises(OllamaUnavailableError, match="the answer is longer than 20 MiB"):
        answer_of({"/api/chat": flood(chunk * 20)})


def test_a_healthy_node_of_this_kind_answers() -> None:
    assert answer_of(dict(HEALTHY))["message"]["content"] == "hello"


def test_events_say_why_a_node_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_node({"/api/tags": reply({"error": "unauthorized"}, "401 Unauthorized")}) as (url, _):
        monkeypatch.setenv("OLLAMA_HOST", url)
        router = HybridRouter(auto_discover_rpc=False)
        (node,) = router.cluster().nodes
        assert "401: unauthorized" in str(node.last_error)
        assert [event.message for event in router.events.recent() if event.kind is EventKind.NODE_COOLING] == [
            f"Ollama at {url} cannot be used for a while: {node.last_error}"
        ]
        router.close()


def test_an_answer_without_embeddings_is_an_error() -> None:
    with (
        fake_node({"/api/embed": reply({"model": MODEL})}) as (url, _),
        OllamaPool(url) as pool,
        pytest.raises(OllamaResponseError, match=f"{url} sent an answer without embeddings"),
    ):
        pool.embed("llama3.2", "hi")


def test_the_status_of_a_pull_cannot_control_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with fake_node({"/api/pull": lines({"status": "\x1b[2Jpulling\n\n"})}) as (url, _), OllamaPool(url) as pool:
        pool.pull_with_bar("llama3.2")
    shown = capsys.readouterr().err
    assert "pulling" in shown
    assert "\x1b[2J" not in shown


def test_a_node_that_failed_just_now_is_not_asked_again_by_each_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sollol_nb.ollama.serving.INVENTORY_RECENT_S", 600.0)  # however slow the machine is
    monkeypatch.setattr("sollol_nb.ollama.nodes.FIRST_RETRY_S", 600.0)
    with fake_node({"/api/tags": reply(b"", "500 Oops")}) as (url, received), OllamaPool([url]) as pool:
        assert [pool.has_model(MODEL) for _ in range(5)] == [False] * 5
    assert [path for path, _ in received] == ["/api/tags"]
