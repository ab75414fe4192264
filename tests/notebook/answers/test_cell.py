"""A cell that waits for its answer: what it says when a server is lost, and when it is stopped."""

from __future__ import annotations

from sollol_nb.chat.completion import Completion
from sollol_nb.notebook.answers.cell import follow_events, stopped_error
from sollol_nb.notebook.answers.views import LiveAnswer
from sollol_nb.runtime.events import EventBus, EventKind


def test_the_loss_of_a_worker_is_shown_until_the_answer_continues() -> None:
    events, answer = EventBus(), LiveAnswer("demo")
    seen: list[str] = []
    with follow_events(events, "demo", answer):
        for kind, subject, message in (
            (EventKind.WORKER_LOST, "10.0.0.9:1", "lost worker 10.0.0.9:1: of another model"),
            (EventKind.COORDINATOR_LOST, "other", "other ended because a worker was lost"),
            (EventKind.COORDINATOR_LOST, "demo", "demo ended because a worker was lost"),
            (EventKind.WORKER_LOST, "10.0.0.1:1", "lost worker 10.0.0.1:1: nothing listens there"),
            (EventKind.COORDINATOR_STARTING, "demo", "starting demo on 2 workers (7/6 layers)"),
            (EventKind.COORDINATOR_LOADING, "demo", "loading demo: 50 %"),
            (EventKind.ANSWER_CONTINUED, "demo", "resumed an answer"),
            (EventKind.COORDINATOR_STARTING, "demo", "starting demo on 1 worker"),
            (EventKind.WORKER_LOST, "10.0.0.2:1", "lost worker 10.0.0.2:1: killed (signal 9)"),
            (EventKind.COORDINATOR_LOST, "demo", "demo ended because worker 10.0.0.2:1 was lost"),
        ):
            events.publish(kind, subject, message)
            seen.append(answer.status)
    assert seen == [
        "lost worker 10.0.0.9:1: of another model",
        "lost worker 10.0.0.9:1: of another model",
        "demo ended because a worker was lost",
        "lost worker 10.0.0.1:1",
        "lost worker 10.0.0.1:1; starting demo on 2 workers (7/6 layers)",
        "lost worker 10.0.0.1:1; loading demo: 50 %",
        "lost worker 10.0.0.1:1; loading demo: 50 %",
        "starting demo on 1 worker",
        "lost worker 10.0.0.2:1: killed (signal 9)",
        "lost worker 10.0.0.2:1",
    ]


def test_a_stopped_answer_says_whether_some_of_it_is_kept() -> None:
    assert str(stopped_error("demo", Completion())) == "demo: stopped; the partial answer is kept"
    assert str(stopped_error("/m/a.gguf", None)) == "a: stopped before any text arrived"


def test_a_cell_says_that_known_tokens_are_generated_again() -> None:
    events, answer = EventBus(), LiveAnswer("demo")
    with follow_events(events, "demo", answer):
        message = "generating 39 known tokens of an answer from demo again on 2 workers (7/6 layers)"
        events.publish(EventKind.ANSWER_CONTINUED, "demo", message, repeats=True)
    assert answer.status == message
