"""A cluster as cards: short names, figures with units, problems with their fix, what is folded, grouped events."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import pytest

from sollol_nb.cluster.cards.cards import cards_of
from sollol_nb.cluster.cards.events import ICONS
from sollol_nb.cluster.cards.problems import command_of
from sollol_nb.cluster.cards.shapes import Action, ClusterCards, EventLine, Pill, as_data
from sollol_nb.cluster.cards.views import GLYPHS, LAST_EVENTS, NAME_CHARS, as_html, as_text
from sollol_nb.cluster.live_figures import LiveFigures, RequestCounts
from sollol_nb.cluster.status import ClusterStatus
from sollol_nb.llama_cpp.workers.probe import Probe, ProbeOutcome
from sollol_nb.llama_cpp.workers.status import WorkerStatus
from sollol_nb.models.files import DEMO_NOTE
from sollol_nb.runtime.events import Event, EventKind
from sollol_nb.text.short_names import fitted_name
from tests.support.cluster_statuses import coordinator, segment, worker
from tests.support.simulated_cluster import node

NOW = time.mktime((2026, 3, 1, 12, 0, 0, 0, 0, -1))
LONG_PATH = "/home/user/models/snapshots/83fb6e83d0a8aada42d4/Llama-3.1-70B-Instruct-Q4_K_M-00001-of-00003.gguf"


def live(*events: Event, **more: Any) -> LiveFigures:
    return LiveFigures(RequestCounts(), events=dict(enumerate(events)), **more)


def dead(number: int, **more: Any) -> WorkerStatus:
    endpoint = f"10.0.0.{number}:50052"
    probe = Probe(endpoint=endpoint, outcome=ProbeOutcome.REFUSED, detail=f"nothing listens on {endpoint}")
    return worker(number, "down", probe.detail, probe=probe, **more)


def started(number: int, at: float) -> Event:
    endpoint = f"127.0.0.1:{number}"
    return Event(EventKind.WORKER_STARTED, endpoint, f"started worker {endpoint} with 1 thread", at=at)


# --- models -----------------------------------------------------------------------------------


def test_a_models_title_is_short_and_its_path_a_tooltip() -> None:
    status = ClusterStatus(
        (worker(1, "held", "held", held_by=LONG_PATH),), (coordinator(model=LONG_PATH, model_path=LONG_PATH),)
    )

    cards = cards_of(status)

    (card,) = cards.models
    assert card.title == "Llama-3.1-70B-Instruct-Q4_K_M"
    assert card.tooltip == dict(card.facts)["file"] == LONG_PATH
    assert cards.workers[0].held_by == card.title


def test_the_static_view_names_no_home_folder_and_not_where_the_demo_model_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/home/user")
    held = worker(1, "held", f"held by the coordinator of {LONG_PATH}", held_by=LONG_PATH)
    own = coordinator(model=LONG_PATH, model_path=LONG_PATH)
    demo = coordinator(model="demo", model_path="/srv/env/sollol_nb/models/demo.gguf", note=DEMO_NOTE)

    html = as_html(cards_of(ClusterStatus((held,), (own, demo), live=live(starting={LONG_PATH: ("", None)}))))

    assert "~/models/snapshots/" in html
    assert "demo.gguf" in html
    assert "/home/user" not in html
    assert "/srv/env" not in html


@pytest.mark.parametrize(
    ("predicted_ms", "measured_ms", "drift", "figure"),
    [
        (20.0, 25.0, 1.25, "25 ms per token (20 predicted)"),
        (20.0, 39.0, None, "39 ms per token (20 predicted)"),
        (20.0, 60.0, 3.0, "60 ms per token"),
        (20.0, 60.0, None, "60 ms per token"),
        (20.0, 6.0, 0.3, "6 ms per token"),
        (20.0, 25.0, 2.5, "25 ms per token"),
        (None, 25.0, None, "25 ms per token"),
        (20.0, None, None, "50 tokens/s predicted"),
    ],
)
def test_a_prediction_is_shown_beside_a_measurement_only_within_a_factor_of_two(
    predicted_ms: float | None, measured_ms: float | None, drift: float | None, figure: str
) -> None:
    running = coordinator(predicted_token_ms=predicted_ms, token_ms=measured_ms, drift=drift)

    (card,) = cards_of(ClusterStatus((), (running,))).models

    assert figure in card.figures
    assert sum("predicted" in each for each in card.figures) == ("predicted" in figure)
    assert "predicted" not in " ".join(value for _, value in card.facts)


@pytest.mark.parametrize(
    ("state", "pill"),
    [
        ({"running": 0, "waiting": 0}, Pill("ready", "ok")),
        ({"running": 1, "waiting": 0}, Pill("answering 1 of 4", "busy")),
        ({"running": 1, "waiting": 0, "slots": 1}, Pill("answering", "busy")),
        ({"running": 4, "waiting": 2}, Pill("answering 4, 2 waiting", "busy")),
        ({"standby": "ready", "running": 0, "waiting": 0}, Pill("standby", "idle")),
        ({"standby": "starting", "running": 0, "waiting": 0}, Pill("standby, loading", "idle")),
    ],
)
def test_the_pill_of_a_model_is_its_state(state: dict[str, Any], pill: Pill) -> None:
    assert cards_of(ClusterStatus((), (coordinator(**state),))).models[0].pill == pill


def test_a_model_that_is_being_loaded_has_a_card_and_standbys_come_last() -> None:
    status = ClusterStatus((), (coordinator(standby="ready", url="http://b:1"), coordinator(url="http://a:1")))
    loading = live(starting={LONG_PATH: ("12 of 40 GiB", 0.304)})

    first, second, third = cards_of(replace(status, live=loading), own=["http://a:1"]).models

    assert (first.title, first.pill, first.progress) == (
        "Llama-3.1-70B-Instruct-Q4_K_M",
        Pill("loading 30%", "busy"),
        0.304,
    )
    assert (second.key, second.is_own) == ("http://a:1", True)
    assert (third.key, third.is_own) == ("http://b:1", False)


def test_the_labels_of_a_layer_bar_are_short_and_the_names_of_its_table_whole() -> None:
    names = ("gpu1.lab.example.org:50052", "gpu2.lab.example.org:50052")
    running = coordinator(*(segment(name, "0-4", 5) for name in names))

    (card,) = cards_of(ClusterStatus((), (running,))).models

    assert [part.worker for part in card.segments] == ["gpu1", "gpu2"]
    assert [part.name for part in card.segments] == list(names)
    assert sum(part.share for part in card.segments) == 1


def test_an_actual_bar_is_drawn_only_where_it_differs_from_the_plan() -> None:
    as_planned = coordinator(segment("a:1", "0-4", 5), segment("b:1", "5-9", 5))
    otherwise = coordinator(segment("a:1", "0-4", 5, actual_units=4), segment("b:1", "5-9", 5, actual_units=6))

    first, second = (cards_of(ClusterStatus((), (each,))).models[0] for each in (as_planned, otherwise))

    assert [part.actual_share for part in first.segments] == [None, None]
    assert [part.actual_share for part in second.segments] == [0.4, 0.6]
    assert [part.units for part in second.segments] == ["4 (planned 5)", "6 (planned 5)"]


# --- workers and nodes ------------------------------------------------------------------------


def test_ten_dead_workers_are_one_problem_and_one_line_that_unfolds() -> None:
    status = ClusterStatus((worker(1), *(dead(number) for number in range(20, 30))), ())

    cards = cards_of(status)

    (problem,) = cards.problems
    names = "10.0.0.20:50052, 10.0.0.21:50052, 10.0.0.22:50052 and 7 more"
    assert problem.text == f"10 workers do not answer: {names}; start them again, or remove them"
    assert problem.action is not None
    assert problem.action.name == "remove"
    assert problem.action.arguments == tuple(f"10.0.0.{number}:50052" for number in range(20, 30))
    assert problem.command == "%sollol_cluster remove " + " ".join(problem.action.arguments)
    assert len(problem.details) == 10
    assert cards.workers_summary == "11 workers: 1 free, 10 down"
    assert cards.folds == {"bad": "10 workers: all down"}
    assert [row.fold for row in cards.workers] == ["", *["bad"] * 10]
    assert "10.0.0.29:50052" not in str(status).replace(problem.command, "")
    assert "  10.0.0.29:50052  ✕ down" in status.describe(verbose=True)
    assert "<details><summary>✕ 10 workers: all down</summary>" in status._repr_html_()


def test_two_dead_workers_are_two_problems_with_what_to_start_there() -> None:
    cards = cards_of(ClusterStatus((dead(7), dead(8, is_local=True)), ()))

    first, second = cards.problems
    assert first.text == "10.0.0.7:50052 does not answer: nothing listens there; start a worker there"
    assert first.command == "ggml-rpc-server -H 10.0.0.7 -p 50052"
    assert first.action == Action(name="remove", arguments=("10.0.0.7:50052",), label="Remove")
    assert second.action == Action(name="start", arguments=("1",), label="Start 1 worker")
    assert second.command == "%sollol_cluster start 1"
    assert cards.folds == {}


def test_names_lose_the_domain_that_tells_nothing_apart() -> None:
    status = ClusterStatus(tuple(worker(n, endpoint=f"gpu{n}.lab.example.org:50052") for n in (1, 2)), ())

    rows = cards_of(status).workers

    assert [row.name for row in rows] == ["gpu1:50052", "gpu2:50052"]
    assert rows[0].tooltip.startswith("gpu1.lab.example.org:50052\n")


def test_long_names_in_a_row_of_the_static_view_lose_their_middle_and_are_whole_in_the_tooltip() -> None:
    name, model = f"{'gpu' * 20}:50052", f"{'Llama' * 12}-Q4_K_M"
    held = worker(1, "held", "held", endpoint=name, held_by=model)

    html = as_html(cards_of(ClusterStatus((held,), ())))

    assert f">{fitted_name(name, NAME_CHARS)}<" in html
    assert f"held by {fitted_name(model, NAME_CHARS)}<" in html
    assert f'title="{name}' in html
    assert f'title="held by {model}"' in html


def test_what_a_standby_holds_is_named_so() -> None:
    held = worker(1, "held", "held by the standby of demo, started by this kernel", held_by="demo")

    (row,) = cards_of(ClusterStatus((held,), ())).workers

    assert row.held_by == "demo (standby)"


def test_a_round_trip_and_free_memory_are_the_newest_that_are_known() -> None:
    status = ClusterStatus((worker(1),), ())
    known = live(round_trips_ms={"10.0.0.1:50052": {4: 3.0, 9: 12.34}}, free_bytes={"10.0.0.1:50052": 2**30})

    (row,) = cards_of(replace(status, live=known)).workers

    assert (row.round_trip, row.memory, row.used) == ("12 ms", "983.0 MiB of 4.0 GiB free", 0.76)


def test_an_ollama_node_that_is_down_is_a_problem_and_one_that_answers_has_figures() -> None:
    status = ClusterStatus((), (), (node(1, loaded_bytes=5 * 2**30, round_trip_ms=0.9), node(2, "absent")))

    cards = cards_of(status)

    assert cards.nodes_summary == "2 Ollama nodes: 1 ready, 1 down"
    assert cards.nodes[0].figures == ("46.7 tokens/s", "5.0 GiB loaded", "1 model on disk")
    assert cards.nodes[0].round_trip == "0.9 ms"
    assert [(problem.command, problem.action) for problem in cards.problems] == [("ollama serve", None)]


# --- problems ---------------------------------------------------------------------------------


def test_a_model_that_could_not_be_loaded_is_a_problem_until_it_is_loaded() -> None:
    message = "/m/x.gguf cannot be read: Permission denied; make it readable: chmod u+r /m/x.gguf"
    failed = Event(EventKind.COORDINATOR_FAILED, "x", message)
    ready = Event(EventKind.COORDINATOR_READY, "x", "x is ready")
    status = ClusterStatus((worker(1),), ())

    (problem,) = cards_of(replace(status, live=live(failed))).problems

    assert (problem.text, problem.command) == (message, "%sollol_log x")
    assert cards_of(replace(status, live=live(failed, ready))).problems == ()


def test_a_load_that_the_user_interrupted_is_no_problem() -> None:
    data = {"cancelled": True}
    cancelled = Event(EventKind.COORDINATOR_FAILED, "x", "the start of x was cancelled", data)

    cards = cards_of(ClusterStatus((worker(1),), (), live=live(cancelled)))

    assert cards.problems == ()
    assert [line.text for line in cards.events] == ["the start of x was cancelled"]


def test_a_better_layout_is_a_hint_whose_command_applies_it() -> None:
    advice = (
        f"{LONG_PATH} has a faster layout: 4/5 over a:1, b:1 would take 20 ms; `%sollol_cluster replan` applies it"
    )
    running = coordinator(model=LONG_PATH, advice=advice, advised_layout=(("a:1", 4), ("b:1", 5)))

    (problem,) = cards_of(ClusterStatus((), (running,))).problems

    assert problem.text == (
        "Llama-3.1-70B-Instruct-Q4_K_M has a faster layout: 4/5 over a:1, b:1 would take 20 ms"
    )
    assert (problem.role, problem.command) == ("busy", f"%sollol_cluster replan {LONG_PATH}")


def test_names_with_spaces_are_quoted_in_a_command() -> None:
    action = Action(name="replan", arguments=("/my models/a.gguf",), label="Apply")

    assert command_of(action) == '%sollol_cluster replan "/my models/a.gguf"'


# --- events -----------------------------------------------------------------------------------


def lines(*events: Event) -> tuple[EventLine, ...]:
    return cards_of(ClusterStatus((), (), live=live(*events))).events


def test_events_that_repeat_are_one_line_that_names_their_subjects() -> None:
    (line,) = lines(started(50052, NOW - 12), started(50053, NOW - 11))

    assert line.text == "started workers 127.0.0.1:50052 and 127.0.0.1:50053 with 1 thread"
    assert (line.count, line.at, line.icon) == (2, NOW - 11, "added")
    assert line.messages[0] == "started worker 127.0.0.1:50053 with 1 thread"


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ("worker {} was stopped", "workers a:1 and b:1 were stopped"),
        ("worker {} is back", "workers a:1 and b:1 are back"),
        ("{} was seeded", "a:1 and b:1 were seeded"),
        ("the link to {} was stopped", "the link to a:1 and b:1 was stopped"),
        ("Ollama at {} is not running", "Ollama at a:1 and b:1 is not running"),
    ],
)
def test_a_verb_whose_subjects_are_several_is_plural(message: str, text: str) -> None:
    events = [Event(EventKind.WORKER_STOPPED, name, message.format(name), at=NOW) for name in ("a:1", "b:1")]

    assert lines(*events)[0].text == text


def test_of_many_repeated_events_three_are_named() -> None:
    (line,) = lines(*(started(50052 + number, NOW) for number in range(10)))

    assert line.text == (
        "started workers 127.0.0.1:50052, 127.0.0.1:50053, 127.0.0.1:50054 and 7 more with 1 thread"
    )


def test_the_same_event_again_is_counted() -> None:
    failed = [Event(EventKind.NODE_COOLING, "http://a:1", "http://a:1 broke off", at=NOW - at) for at in (30, 20)]

    (line,) = lines(*failed)

    assert (line.text, line.count) == ("http://a:1 broke off", 2)
    assert "http://a:1 broke off (2 times)" in as_text(ClusterCards(events=(line,)))
    assert "http://a:1 broke off (2 times)" in as_html(ClusterCards(events=(line,)))


@pytest.mark.parametrize(
    "second",
    [
        Event(EventKind.WORKER_STOPPED, "127.0.0.1:2", "stopped worker 127.0.0.1:2", at=NOW),
        started(2, NOW + 61),
        Event(EventKind.WORKER_STARTED, "127.0.0.1:2", "started worker 127.0.0.1:2 with 2 threads", at=NOW),
    ],
)
def test_events_of_another_kind_time_or_wording_are_lines_of_their_own(second: Event) -> None:
    assert [line.text for line in lines(started(1, NOW), second)] == [second.message, started(1, NOW).message]


def test_earlier_events_are_folded() -> None:
    cards = ClusterCards(events=lines(*(started(number, NOW + 100 * number) for number in range(LAST_EVENTS + 2))))
    newest, oldest = (time.strftime("%H:%M:%S", time.localtime(NOW + 100 * n)) for n in (LAST_EVENTS + 1, 0))

    text, html = as_text(cards), as_html(cards)

    assert f"  {newest}  + started worker 127.0.0.1:{LAST_EVENTS + 1} with 1 thread" in text
    assert text.endswith("\n  2 earlier (shown with -v)")
    assert oldest not in text
    assert oldest in as_text(cards, verbose=True)
    assert html.index(newest) < html.index("<summary>2 earlier</summary>") < html.index(oldest)


def test_every_icon_has_a_glyph() -> None:
    assert {icon for icon, _ in ICONS.values()} | {"info"} == GLYPHS.keys()


# --- as data ----------------------------------------------------------------------------------


def test_cards_are_json_in_which_parts_have_keys_and_empty_values_are_left_out() -> None:
    status = ClusterStatus((worker(1), dead(2)), (coordinator(segment("a:1", "0-9", 10)),), (node(1),))

    data = as_data(cards_of(replace(status, live=live(started(1, NOW)))))

    assert json.loads(json.dumps(data)) == data
    assert list(data["workers"]) == ["10.0.0.1:50052", "10.0.0.2:50052"]
    assert [row["n"] for row in data["workers"].values()] == [0, 1]
    assert "held_by" not in data["workers"]["10.0.0.1:50052"]
    (problem,) = data["problems"].values()
    assert problem["action"] == {"name": "remove", "arguments": ["10.0.0.2:50052"], "label": "Remove"}
    (event,) = data["events"].values()
    assert event["at"] == NOW
