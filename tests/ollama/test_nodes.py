"""Which node a request goes to, what a node is called, and when a failed node is tried again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest

from sollol_nb.errors import ConfigError, ConnectFailedError, TransportTimeoutError
from sollol_nb.ollama import nodes as ollama_nodes
from sollol_nb.ollama.choice import NodeOffer, Residency, choose_node, worth_waiting_for
from sollol_nb.ollama.nodes import NodeState, OllamaNode, node_url
from sollol_nb.ollama.pool import OllamaPool
from sollol_nb.runtime.gate import first_slot

LOADED, ON_DISK, NOTHING = Residency.LOADED, Residency.ON_DISK, Residency.MISSING
KEY = "llama3.2:latest"


def offer(name: str, residency: Residency, expected_ms: float, *, busy: bool = False) -> NodeOffer:
    return NodeOffer(name, residency, not busy, expected_ms)


@pytest.mark.parametrize(
    ("offers", "chosen"),
    [
        pytest.param([], None, id="no nodes"),
        pytest.param([offer("a", NOTHING, 0)], "a", id="the only one, though it would have to pull"),
        pytest.param(
            [offer("pull", NOTHING, 0), offer("disk", ON_DISK, 10_000), offer("loaded", LOADED, 900)],
            "loaded",
            id="loaded before on disk before nothing",
        ),
        pytest.param(
            [offer("pull", NOTHING, 0), offer("disk", ON_DISK, 10_000)], "disk", id="on disk before nothing"
        ),
        pytest.param(
            [offer("disk", ON_DISK, 100), offer("loaded", LOADED, 60_000)],
            "loaded",
            id="an idle node that has it loaded, however slow",
        ),
        pytest.param(
            [offer("a", LOADED, 300), offer("b", LOADED, 200), offer("c", LOADED, 400)],
            "b",
            id="of the loaded ones the first to finish",
        ),
        pytest.param(
            [offer("fast", LOADED, 200, busy=True), offer("slow", LOADED, 900)],
            "fast",
            id="a short queue at a fast node beats a free slow one",
        ),
        pytest.param(
            [offer("loaded", LOADED, 9_000, busy=True), offer("disk", ON_DISK, 10_000)],
            "loaded",
            id="a line shorter than loading elsewhere",
        ),
        pytest.param(
            [offer("loaded", LOADED, 11_000, busy=True), offer("disk", ON_DISK, 10_000)],
            "disk",
            id="a line longer than loading elsewhere",
        ),
        pytest.param(
            [offer("loaded", LOADED, 11_000, busy=True), offer("pull", NOTHING, 0)],
            "loaded",
            id="nothing is pulled because of a line",
        ),
        pytest.param(
            [
                offer("busy", LOADED, 11_000, busy=True),
                offer("free", LOADED, 30_000),
                offer("disk", ON_DISK, 10_000),
            ],
            "busy",
            id="nothing is loaded elsewhere while a node that has it loaded is free",
        ),
    ],
)
def test_the_node_for_a_request(offers: list[NodeOffer], chosen: str | None) -> None:
    choice = choose_node(offers)
    assert (choice.url if choice else None) == chosen


def test_only_equal_nodes_are_chosen_at_random() -> None:
    offers = [offer("a", LOADED, 100), offer("b", LOADED, 100), offer("c", LOADED, 101), offer("d", ON_DISK, 100)]
    considered: list[list[str]] = []

    def pick(equals: Sequence[NodeOffer]) -> NodeOffer:
        considered.append([each.url for each in equals])
        return equals[-1]

    choice = choose_node(offers, pick=pick)
    assert considered == [["a", "b"]]
    assert choice is offers[1]
    assert {choose_node(offers) for _ in range(100)} == {offers[0], offers[1]}


@pytest.mark.parametrize(
    ("offers", "waited_at"),
    [
        pytest.param([offer("a", LOADED, 1), offer("b", LOADED, 1)], ["a"], id="nowhere, with a free slot"),
        pytest.param(
            [offer("a", LOADED, 100, busy=True), offer("b", LOADED, 150, busy=True)],
            ["a", "b"],
            id="at all equals",
        ),
        pytest.param(
            [offer("a", LOADED, 100, busy=True), offer("b", LOADED, 201, busy=True)],
            ["a"],
            id="not at a far slower one",
        ),
        pytest.param(
            [offer("a", LOADED, 100, busy=True), offer("b", ON_DISK, 150, busy=True)],
            ["a"],
            id="not where it would have to be loaded",
        ),
    ],
)
def test_where_a_request_waits_once_its_node_is_chosen(offers: list[NodeOffer], waited_at: list[str]) -> None:
    assert [each.url for each in worth_waiting_for(offers[0], offers)] == waited_at


@pytest.mark.parametrize(
    ("written", "url"),
    [
        ("localhost", "http://localhost:11434"),
        ("192.168.1.10:1234", "http://192.168.1.10:1234"),
        ("http://gpu-box:11434", "http://gpu-box:11434"),
        ("http://gpu-box", "http://gpu-box:80"),
        ("HTTPS://ollama.example.org", "https://ollama.example.org:443"),
        ("https://example.org/ollama/", "https://example.org:443/ollama"),
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("0.0.0.0:5000", "http://127.0.0.1:5000"),
        ("[::]:11434", "http://[::1]:11434"),
        ("[fe80::1]", "http://[fe80::1]:11434"),
        ("::1", "http://[::1]:11434"),
        ("::", "http://[::1]:11434"),
        ("[::]", "http://[::1]:11434"),
        ("2001:db8::5", "http://[2001:db8::5]:11434"),
        ("http://::1", "http://[::1]:80"),
        ("https://[::1]:1234/ollama", "https://[::1]:1234/ollama"),
        ('"127.0.0.1:5000"', "http://127.0.0.1:5000"),
        ("'gpu-box'", "http://gpu-box:11434"),
        (' "http://gpu-box:11434/" ', "http://gpu-box:11434"),
        ("ollama.com", "https://ollama.com:443"),
        ("ollama.com:8080", "http://ollama.com:8080"),
        ("http://", "http://127.0.0.1:80"),
        ("gpu-box:", "http://gpu-box:11434"),
        ({"host": "::1", "port": 5}, "http://[::1]:5"),
        (":11435", "http://127.0.0.1:11435"),
        ({"host": "10.0.0.5", "port": 11436}, "http://10.0.0.5:11436"),
        ({"host": "10.0.0.5"}, "http://10.0.0.5:11434"),
    ],
)
def test_forms_of_a_node(written: str | dict[str, object], url: str) -> None:
    assert node_url(written) == url


@pytest.mark.parametrize(
    "written",
    [
        "",
        "a b",
        "host:port",
        "host:0",
        "host:99999",
        "ftp://host",
        "http://user:secret@host",
        {"port": 1},
        "x?y",
        "::1::2",
        "http://h#f",
    ],
)
def test_an_invalid_node_is_refused_without_showing_a_password(written: str | dict[str, object]) -> None:
    with pytest.raises(ConfigError) as refused:
        node_url(written)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("variable", "urls"),
    [
        ('"127.0.0.1:5000"', ["http://127.0.0.1:5000"]),
        ("::1", ["http://[::1]:11434"]),
        ("'a, ::1'", ["http://a:11434", "http://[::1]:11434"]),
        ('""', ["http://127.0.0.1:11434"]),
        (" ", ["http://127.0.0.1:11434"]),
    ],
)
def test_the_variable_is_read_as_ollama_reads_it(
    monkeypatch: pytest.MonkeyPatch, variable: str, urls: list[str]
) -> None:
    monkeypatch.setenv("OLLAMA_HOST", variable)
    assert [node.url for node in OllamaPool().nodes] == urls
    assert [node.url for node in OllamaPool({"host": "::1", "port": 5}).nodes] == ["http://[::1]:5"]


def on_a_loop(test: Callable[[OllamaNode], object], slots: int = 1) -> None:
    """Run `test` with a node, on an event loop, with the tasks that the node starts ended after it."""

    async def run() -> None:
        node = OllamaNode("http://127.0.0.1:9", slots, lambda node, *, has_new_state: None)
        try:
            made = test(node)
            if asyncio.iscoroutine(made):
                await made
        finally:
            await node.aclose()

    asyncio.run(run())


def final(tokens: int, eval_ms: float, load_ms: float = 0) -> dict[str, int]:
    return {"eval_count": tokens, "eval_duration": int(eval_ms * 1e6), "load_duration": int(load_ms * 1e6)}


def test_the_offer_of_a_node_follows_its_measurements() -> None:
    async def test(node: OllamaNode) -> None:
        assert node.offer(KEY, 100).expected_ms == 0  # never measured and idle: worth a try
        node.record_answer(KEY, KEY, final(10, 200), had_to_load=False)
        assert node.offer(KEY, 100) == NodeOffer(node.url, LOADED, True, 2_000)
        node.record_answer(KEY, KEY, final(10, 300), had_to_load=False)
        assert node.offer(KEY, 100).expected_ms == pytest.approx(2_300)  # 20 + 0.3 * (30 - 20) ms per token
        await first_slot([node.gate])
        await first_slot([node.gate])
        two_there = node.offer(KEY, 100)
        assert not two_there.has_free_slot
        assert two_there.expected_ms == pytest.approx(4_600)
        assert node.offer("other:latest", 100).expected_ms == 2 * 100 * ollama_nodes.ASSUMED_MS_PER_TOKEN
        assert node.status(100).expected_wait_ms == pytest.approx(2_300 / 2)

    on_a_loop(test, slots=2)


def test_loading_a_model_is_expected_to_take_as_long_as_last_time() -> None:
    def test(node: OllamaNode) -> None:
        node._on_disk = {KEY: KEY}
        assert node.offer(KEY, 100) == NodeOffer(node.url, ON_DISK, True, ollama_nodes.ASSUMED_LOAD_MS)
        node.record_answer(KEY, KEY, final(10, 200, load_ms=1_500), had_to_load=True)
        node.record_answer(KEY, KEY, final(10, 200, load_ms=30), had_to_load=False)
        node.record_unload(KEY)
        assert node.offer(KEY, 100) == NodeOffer(node.url, ON_DISK, True, 2_000 + 1_500)

    on_a_loop(test)


def test_a_failure_reported_by_many_requests_counts_once() -> None:
    async def test(node: OllamaNode) -> None:
        for _ in range(20):
            node.record_failure(TransportTimeoutError("silent"))
        status = node.status(100)
        assert status.state == NodeState.COOLING
        assert status.last_error == "silent"
        assert status.retry_in_s is not None
        assert status.retry_in_s <= 1.2 * ollama_nodes.FIRST_RETRY_S

    on_a_loop(test)


def test_the_pause_doubles_with_every_failure_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ollama_nodes, "time", SimpleNamespace(monotonic=lambda: 1000.0))

    async def test(node: OllamaNode) -> None:
        pauses_s = []
        for _ in range(12):
            node._retry_at_s = 0.0  # the pause is over
            node.record_failure(ConnectFailedError("nothing listens"))
            pauses_s.append(node.status(100).retry_in_s or 0.0)
        assert node.state is NodeState.ABSENT
        expected = [min(60.0, 2.0**failure) for failure in range(12)]
        assert all(0.79 * e <= pause_s <= 1.21 * e for pause_s, e in zip(pauses_s, expected, strict=True)), (
            pauses_s
        )
        node.record_answer(KEY, KEY, final(1, 1), had_to_load=False)
        node._retry_at_s = 0.0
        node.record_failure(ConnectFailedError("nothing listens"))
        assert (node.status(100).retry_in_s or 0.0) <= 1.2 * ollama_nodes.FIRST_RETRY_S

    on_a_loop(test)
