"""The event bus: each subscriber gets each event once, and a broken subscriber breaks no other."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from sollol_nb.runtime.events import KEPT_EVENTS, Event, EventBus, EventKind


def publish(bus: EventBus, number: int) -> None:
    bus.publish(EventKind.WORKER_STARTED, f"127.0.0.1:{number}", f"started worker {number}", number=number)


def test_subscriber_gets_every_event_from_then_on_in_order() -> None:
    bus = EventBus()
    seen: list[Event] = []
    publish(bus, 0)
    bus.subscribe(seen.append)

    publish(bus, 1)
    publish(bus, 2)

    assert [event.data["number"] for event in seen] == [1, 2]
    assert seen[0].kind == "worker.started"
    assert seen[0].subject == "127.0.0.1:1"
    assert seen[0].message == "started worker 1"
    assert seen[0].at <= seen[1].at


def test_a_kind_of_event_is_shown_as_its_text() -> None:
    kinds = {EventKind.WORKER_LOST: [EventKind.NODE_READY]}

    assert repr(kinds) == str(kinds) == "{'worker.lost': ['node.ready']}"
    assert f"{EventKind.WORKER_LOST}" == "worker.lost"
    assert "kind='worker.lost'" in repr(Event(EventKind.WORKER_LOST, "10.0.0.1:50052", "lost it"))


def test_subscription_can_be_ended_twice() -> None:
    bus = EventBus()
    seen: list[Event] = []
    still_subscribed: list[Event] = []
    end = bus.subscribe(seen.append)
    bus.subscribe(still_subscribed.append)

    publish(bus, 1)
    end()
    end()
    publish(bus, 2)

    assert [event.data["number"] for event in seen] == [1]
    assert [event.data["number"] for event in still_subscribed] == [1, 2]


def test_subscriber_that_raises_is_dropped_and_the_others_stay(caplog: pytest.LogCaptureFixture) -> None:
    bus = EventBus()
    calls: list[Event] = []
    seen: list[Event] = []

    def broken(event: Event) -> None:
        calls.append(event)
        raise ValueError("a broken view")

    bus.subscribe(broken)
    bus.subscribe(seen.append)
    with caplog.at_level(logging.ERROR):
        publish(bus, 1)
        publish(bus, 2)

    assert len(calls) == 1
    assert len(seen) == 2
    assert "was dropped" in caplog.text


def test_later_subscriber_finds_the_last_events_oldest_first() -> None:
    bus = EventBus()

    for number in range(KEPT_EVENTS + 10):
        publish(bus, number)

    assert [event.data["number"] for event in bus.recent()] == list(range(10, KEPT_EVENTS + 10))


def test_subscriber_may_subscribe_publish_and_unsubscribe_while_it_is_called() -> None:
    bus = EventBus()
    seen: list[Event] = []

    def once(event: Event) -> None:
        end()
        bus.subscribe(seen.append)
        publish(bus, 2)

    end = bus.subscribe(once)
    publish(bus, 1)

    assert [event.data["number"] for event in seen] == [2]


def test_events_of_many_threads_all_arrive() -> None:
    bus = EventBus()
    seen: list[Event] = []
    lock = threading.Lock()

    def note(event: Event) -> None:
        with lock:
            seen.append(event)

    bus.subscribe(note)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: publish(bus, number), range(400)))

    assert sorted(event.data["number"] for event in seen) == list(range(400))


def test_what_is_only_reported_is_sent_and_not_kept() -> None:
    bus = EventBus()
    seen: list[Event] = []
    bus.subscribe(seen.append)

    bus.report(EventKind.PROBE_DONE, "127.0.0.1:1", "free", round_trip_ms=0.1)

    assert [event.data["round_trip_ms"] for event in seen] == [0.1]
    assert bus.recent() == []
