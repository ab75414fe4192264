"""The cluster's status: the same state as text and as HTML, whatever the names in it."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sollol_nb.cluster.coordinator_status import CoordinatorStatus
from sollol_nb.cluster.status import ClusterStatus
from sollol_nb.layers.plan import LayerPlan, Shard
from sollol_nb.layers.token_time import TokenTime
from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.llama_cpp.coordinators.placement import DevicePlacement, Placement
from sollol_nb.llama_cpp.coordinators.speculation import NO_SPECULATION, Speculation
from sollol_nb.llama_cpp.workers.status import WorkerStatus
from sollol_nb.models.files import DEMO_MODEL_PATH, DEMO_NOTE
from sollol_nb.ollama.nodes import NodeStatus
from sollol_nb.text.palette import SEGMENTS
from tests.support.cluster_statuses import coordinator, segment, worker
from tests.support.simulated_cluster import node as simulated_node

MIB = 2**20
VOID = {"meta", "link", "br", "hr", "img", "input"}


class _Text(HTMLParser):
    """The visible text, the tooltips and the tags of an HTML fragment; fails on tags that do not nest."""

    def __init__(self, fragment: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.titles: list[str] = []
        self.tags: set[str] = set()
        self._open: list[str] = []
        self.feed(fragment)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.titles += [value or "" for name, value in attrs if name == "title"]
        assert not [name for name, _ in attrs if name.startswith("on") or name in ("src", "href")]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


def as_html(status: ClusterStatus) -> _Text:
    return _Text(status._repr_html_())


SHARDED = ClusterStatus(
    (
        worker(1, "held", "held by the coordinator of llama3.1:70b", held_by="llama3.1:70b"),
        worker(2, is_local=True),
    ),
    (
        coordinator(
            segment("10.0.0.1:50052", "0-5", 6),
            segment("10.0.0.2:50052", "6-8 + output", 4, actual_units=3, actual_weight_bytes=None),
            differences=("10.0.0.2:50052: planned 4 units from unit 6, the engine placed 3 from unit 7",),
        ),
    ),
)


# --- the same state, twice --------------------------------------------------------------------


@pytest.mark.parametrize(
    "fact",
    [
        "llama3.1:70b",
        "http://127.0.0.1:18080",
        "memory_aware",
        "8,192 tokens of context",
        "answering 1, 2 waiting",
        "1 of 4 busy, 2 waiting",
        "0-5",
        "6-8 + output",
        "3.0 MiB (planned 2.0 MiB)",
        "2.0 MiB planned",
        "3 (planned 4)",
        "10.0.0.2:50052: planned 4 units from unit 6, the engine placed 3 from unit 7",
        "held by llama3.1:70b",
        "3.0 of 4.0 GiB free",
        "0.46 ms",
        "2 workers: 1 held, 1 free",
    ],
)
def test_text_and_html_have_the_same_facts(fact: str) -> None:
    page = as_html(SHARDED)

    assert fact in str(SHARDED)
    assert fact in page.text


def test_tooltips_have_what_is_too_long_for_the_line() -> None:
    titles = as_html(SHARDED).titles

    assert titles == [
        "10.0.0.1:50052\nlayers 0-5\nweights 3.0 MiB (planned 2.0 MiB)\nKV cache 1.0 MiB planned",
        "10.0.0.2:50052\nlayers 6-8 + output\nweights 2.0 MiB planned\nKV cache 1.0 MiB planned",
        "held by the coordinator of llama3.1:70b\nRPC 7.0.3",
        "started on this machine\nRPC 7.0.3",
    ]


def test_notebook_gets_both() -> None:
    assert SHARDED._repr_mimebundle_() == {"text/plain": str(SHARDED), "text/html": SHARDED._repr_html_()}


def test_empty_cluster_says_so_and_what_to_do_next() -> None:
    empty = ClusterStatus((), ())

    assert str(empty).splitlines() == [
        "○ Nothing runs yet: start workers on this machine, over which a model can be spread",
        "  run: %sollol_cluster start 3",
        "no coordinator is running",
        "no worker is known",
    ]
    page = as_html(empty)
    assert "Nothing runs yet" in page.text
    assert "Run: %sollol_cluster start 3" in page.text


@pytest.mark.parametrize(
    ("status", "pill", "facts"),
    [
        (
            worker(1, "busy", "10.0.0.1:50052 accepts but does not answer"),
            "◐ busy",
            ["accepts but does not answer"],
        ),
        (worker(1, "down", "nothing listens on 10.0.0.1:50052"), "✕ down", ["nothing listens on 10.0.0.1:50052"]),
        (
            worker(1, "incompatible", "speaks RPC protocol 3.6.1"),
            "✕ incompatible",
            [
                "10.0.0.1:50052: speaks RPC protocol 3.6.1; repair or remove it",
                "%sollol_cluster remove 10.0.0.1:50052",
            ],
        ),
        (worker(1, "down", "has not been checked yet", probe=None), "✕ down", ["has not been checked yet"]),
        (worker(1, "held", "held by the coordinator of a", probe=None, held_by="a"), "◐ held", ["held by a"]),
        (worker(1, "unknown", "not probed yet", probe=None), "○ not checked yet", ["not probed yet"]),
        (worker(1), "● free", ["3.0 of 4.0 GiB free", "0.46 ms"]),
    ],
)
def test_each_worker_shows_its_state_and_what_is_wrong(status: WorkerStatus, pill: str, facts: list[str]) -> None:
    cluster = ClusterStatus((status,), ())

    (line,) = [line for line in str(cluster).splitlines() if line.startswith("  10.0.0.1:50052 ")]
    assert line.split("  ")[2] == pill
    assert pill in as_html(cluster).text
    for fact in facts:
        assert fact in str(cluster)
        assert fact in as_html(cluster).text


# --- hostile and large ------------------------------------------------------------------------

HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(1)> {{ 7*7 }} ' &amp;"


def test_hostile_names_are_text_in_html() -> None:
    status = ClusterStatus(
        (worker(1, "busy", HOSTILE, endpoint=HOSTILE),),
        (
            coordinator(
                segment(HOSTILE, HOSTILE, 1),
                model=HOSTILE,
                note=HOSTILE,
                url=HOSTILE,
                differences=(HOSTILE,),
                reasons=(HOSTILE, HOSTILE),
            ),
        ),
    )

    fragment = status._repr_html_()
    page = _Text(fragment)

    assert not page.tags & {"script", "img"}
    assert "<script" not in fragment
    assert "49" not in page.text
    assert HOSTILE in unescape(fragment)


def test_sixty_four_workers_render() -> None:
    segments = [segment(f"10.0.0.{n}:50052", str(n), 1, share=1 / 64, color=SEGMENTS[n % 8]) for n in range(64)]
    status = ClusterStatus(tuple(worker(n) for n in range(64)), (coordinator(*segments),))

    page = as_html(status)

    assert len(page.titles) == 128, "segments and workers"
    text = status.describe(verbose=True)
    assert all(f"10.0.0.{n}:50052" in page.text and f"10.0.0.{n}:50052" in text for n in range(64))
    assert "64 workers: all free" in str(status)
    assert "52 more workers: all free (shown with -v)" in str(status)
    assert "http" not in status._repr_html_().replace("http://127.0.0.1:18080", "")  # nothing is fetched


def test_several_coordinators_are_all_shown() -> None:
    status = ClusterStatus((), (coordinator(model="one"), coordinator(model="two", waiting=0)))

    assert "one  ◐ answering 1, 2 waiting" in str(status)
    assert "two  ◐ answering 1 of 4" in str(status)
    assert {"one", "two"} <= set(as_html(status).text.split())


# --- from a coordinator -----------------------------------------------------------------------


def stand_in(**changes: Any) -> Coordinator:
    """What the status reads of a coordinator."""
    first = Shard(
        endpoint="a:1",
        first_layer=0,
        layer_count=3,
        has_output=False,
        weight_bytes=10,
        kv_bytes=1,
        reserve_bytes=0,
        free_bytes=0,
    )
    second = Shard(
        endpoint="b:2",
        first_layer=3,
        layer_count=1,
        has_output=True,
        weight_bytes=20,
        kv_bytes=2,
        reserve_bytes=0,
        free_bytes=0,
    )
    values: dict[str, Any] = {
        "model": "demo",
        "base_url": "http://127.0.0.1:18080",
        "log_path": Path("log"),
        "plan": LayerPlan(strategy="even", layer_count=4, context_tokens=4096, shards=(first, second)),
        "placement": Placement((DevicePlacement("a:1", (0, 1, 2), 11, 1),)),
        "settings": SimpleNamespace(
            model_path=Path("m.gguf"),
            context_tokens=4096,
            facts=SimpleNamespace(layer_count=4),
            speculation=NO_SPECULATION,
        ),
        "gate": SimpleNamespace(running=1, waiting=0, slots=2),
        "uptime_s": 5.0,
        "load_ms": 10.0,
        "bytes_sent": None,
        "sent_description": "",
        "standby_of": "",
        "placement_differences": ["b:2: planned 2 units from unit 3, the engine placed none"],
    }
    return cast(Coordinator, SimpleNamespace(**(values | changes)))


def test_segments_put_plan_and_placement_side_by_side() -> None:
    status = CoordinatorStatus.of(stand_in())

    assert [segment.layers for segment in status.segments] == ["0-2", "3 + output"]
    assert [(segment.units, segment.actual_units) for segment in status.segments] == [(3, 3), (2, None)]
    assert [(segment.weight_bytes, segment.actual_weight_bytes) for segment in status.segments] == [
        (10, 11),
        (20, None),
    ]
    assert sum(segment.share for segment in status.segments) == pytest.approx(1)
    assert len({segment.color for segment in status.segments}) == 2
    assert status.differences == ("b:2: planned 2 units from unit 3, the engine placed none",)
    assert status.strategy == "even"


@pytest.mark.parametrize(
    "changes", [{"plan": None}, {"plan": None, "placement": None, "placement_differences": []}]
)
def test_local_coordinator_has_no_segments(changes: dict[str, Any]) -> None:
    status = CoordinatorStatus.of(stand_in(**changes))

    assert status.segments == ()
    assert status.strategy == "this machine only"
    assert "this machine only" in as_html(ClusterStatus((), (status,))).text


def test_what_is_drafted_is_shown_and_why_nothing_is_belongs_to_the_reasons() -> None:
    drafting = stand_in()
    speculation = Speculation(kind="ngram", max_tokens=16, why="round trips take 62 %")
    drafting.settings.speculation = speculation  # type: ignore[misc]
    text = str(ClusterStatus((), (CoordinatorStatus.of(drafting),)))
    assert "drafts: n-gram drafts of up to 16 tokens (round trips take 62 %)" in text
    without = stand_in(plan=replace(stand_in().plan, reasons=REASONS[:1]))  # type: ignore[type-var]
    without.settings.speculation = Speculation(why="round trips take 2 %")  # type: ignore[misc]
    assert CoordinatorStatus.of(without).reasons == (REASONS[0], "no drafts (round trips take 2 %)")
    assert CoordinatorStatus.of(without).drafts == ""


def test_the_demo_model_is_marked() -> None:
    settings = stand_in().settings
    demo = SimpleNamespace(
        model_path=DEMO_MODEL_PATH, context_tokens=256, facts=settings.facts, speculation=NO_SPECULATION
    )

    status = ClusterStatus((), (CoordinatorStatus.of(stand_in(settings=demo)),))

    assert DEMO_NOTE in str(status)
    assert DEMO_NOTE in as_html(status).text
    assert CoordinatorStatus.of(stand_in()).note == ""


# --- token times, local devices, Ollama nodes -------------------------------------------------


def test_predicted_and_measured_token_times_are_shown_side_by_side() -> None:
    plan = replace(stand_in().plan, predicted_token_ms=20.0)  # type: ignore[type-var]
    status = CoordinatorStatus.of(stand_in(plan=plan), token_ms=25.0, token=TokenTime((15.0, 5.0)))

    for shown in (str(ClusterStatus((), (status,))), as_html(ClusterStatus((), (status,))).text):
        assert "40 tokens/s · 25 ms per token (20 predicted)" in shown
    assert [segment.time_share for segment in status.segments] == [0.75, 0.25]
    assert "15 ms of each token (75%)" in status.segments[0].description
    assert "15 ms (75%)" in as_html(ClusterStatus((), (status,))).text


def test_an_unknown_token_time_is_not_invented() -> None:
    status = CoordinatorStatus.of(stand_in(), token=TokenTime((), "nothing was measured"))

    assert (status.token_ms, status.predicted_token_ms) == (None, None)
    assert [(segment.token_ms, segment.time_share) for segment in status.segments] == [(None, None)] * 2
    assert "ms of each token" not in str(ClusterStatus((), (status,)))


def test_of_a_load_whose_weights_were_cached_it_is_said_how_much_was_sent() -> None:
    sent = "sent 1.0 MiB of 4.0 GiB, the rest was cached on the workers"
    status = ClusterStatus((), (CoordinatorStatus.of(stand_in(bytes_sent=MIB, sent_description=sent)),))

    assert status.coordinators[0].bytes_sent == MIB
    assert f" s, {sent}" in as_html(status).text
    assert "cached" not in as_html(ClusterStatus((), (CoordinatorStatus.of(stand_in()),))).text


def test_devices_of_the_coordinators_own_machine_are_shown() -> None:
    placement = Placement((DevicePlacement("a:1", (0,), 11, 1), DevicePlacement("CPU", (), 3 * MIB, 0)))
    status = ClusterStatus((), (CoordinatorStatus.of(stand_in(placement=placement)),))

    assert "this machine (CPU): 3.0 MiB weights" in str(status)
    assert "this machine (CPU)" in as_html(status).text


REASONS = ("over 2 of 3 workers: 21 ms per token", "left out: c:3, it adds 4 ms", "next best: a:1 alone, 30 ms")


def test_a_plan_is_explained_in_one_line_that_opens() -> None:
    status = ClusterStatus((), (coordinator(segment("a:1", "0-9", 10), reasons=REASONS),))

    assert f"\n  why: {REASONS[0]} (2 more reasons with -v)\n" in str(status)
    assert REASONS[1] not in str(status)
    assert "\n".join(REASONS).replace("\n", "\n       ") in status.describe(verbose=True)
    page = as_html(status)
    assert {"details", "summary"} <= page.tags
    assert all(reason in page.text for reason in REASONS)


def test_a_plan_with_one_reason_has_nothing_to_open_and_one_without_any_no_line() -> None:
    one = ClusterStatus((), (coordinator(segment("a:1", "0-9", 10), reasons=REASONS[:1]),))
    none = ClusterStatus((), (coordinator(segment("a:1", "0-9", 10)),))

    assert f"\n  why: {REASONS[0]}\n" in str(one)
    assert f"<summary>why: {REASONS[0]}" not in one._repr_html_()
    assert "why:" not in str(none) + as_html(none).text


@pytest.mark.parametrize(
    ("node", "pill", "facts"),
    [
        (simulated_node(1), "● ready", ["llama3.2", "46.7 tokens/s · 1 model on disk"]),
        (simulated_node(1, loaded_models=(), ms_per_token=None), "● ready", ["nothing loaded", "1 model on disk"]),
        (simulated_node(1, running=1, waiting=2), "◐ answering 1 of 1, 2 waiting", ["llama3.2"]),
        (
            simulated_node(1, "absent"),
            "✕ down",
            ["Ollama is down: nothing accepts connections at http://10.0.1.1:11434", "ollama serve"],
        ),
        (
            simulated_node(1, "cooling", last_error="it broke off"),
            "✕ failed",
            ["Ollama at 10.0.1.1:11434 failed: it broke off; it will be tried again automatically"],
        ),
        (simulated_node(1, "unknown"), "○ not checked yet", []),
    ],
)
def test_each_ollama_node_shows_what_it_has_or_what_is_wrong(
    node: NodeStatus, pill: str, facts: list[str]
) -> None:
    status = ClusterStatus((), (), (node,))

    assert f"  10.0.1.1:11434  {pill}" in str(status)
    for fact in [pill, *facts]:
        assert fact in str(status)
        assert fact in as_html(status).text


def test_workers_of_other_machines_are_shown_by_name_and_a_command_as_code() -> None:
    hidden = "127.0.0.1:40123"
    linked = worker(1, "held", endpoint=hidden, name="gpu1/CUDA0", target="ssh://gpu1", held_by="big")
    failed = worker(
        2,
        "down",
        "gpu2 is not known to ssh; run `ssh gpu2` once, and confirm its key",
        endpoint="ssh://gpu2",
        name="ssh://gpu2",
        probe=None,
    )
    running = coordinator(segment(hidden, "0-9", 10, name="gpu1/CUDA0"))
    status = ClusterStatus((linked, failed), (running,))

    text = str(status)
    assert hidden not in text
    assert "0-9  gpu1/CUDA0  10 units" in text
    assert "\n  gpu1/CUDA0  ◐ held " in text
    assert "\n  ssh://gpu2  ✕ down" in text
    assert "✕ gpu2 is not known to ssh; run `ssh gpu2` once" in text
    html = status._repr_html_()
    page = as_html(status)
    assert html.count(hidden) == sum(title.count(hidden) for title in page.titles) == 3, "it is a tooltip only"
    assert page.text.count("gpu1/CUDA0") == 3, "the bar, the table below it, and the workers"
    assert "run <code>ssh gpu2</code> once, and confirm its key" in html
