"""What silence of a coordinator means, on a clock that the tests set."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from sollol_nb.llama_cpp.coordinators.pace import BATCH_TOKENS, MARGIN, MAX_FLOOR_S, MIN_FLOOR_S, Pace, Stream

TOKEN = {"content": "a"}


@dataclass
class Question:
    """The part of an answer that Pace needs."""

    waiting_prompt_tokens: int = 0


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Watched:
    """A Pace that is checked as often as it says."""

    def __init__(self, *, seconds_per_token: float = 0.0, load_s: float | None = None) -> None:
        self.clock = Clock()
        self.pace = Pace(clock=self.clock)
        self.pace.calibrate(seconds_per_token)
        if load_s is not None:
            self.pace.set_load_time(load_s)

    def open(self, prompt_tokens: int = 0) -> tuple[Stream, Question]:
        question = Question(prompt_tokens)
        stream = self.pace.open(question)
        stream.on_sent()
        return stream, question

    def tokens(self, stream: Stream, gap_s: float, count: int) -> None:
        for _ in range(count):
            self.clock.now += gap_s
            stream.on_event(TOKEN)

    def prompt(self, stream: Stream, question: Question, total: int, *, token_s: float, batch: int = 2048) -> None:
        """The engine takes the request and processes its prompt, batch by batch."""
        for processed in (*range(0, total, batch), total):
            self.clock.now += (
                token_s * (processed - (total - question.waiting_prompt_tokens)) if processed else 0.0
            )
            stream.on_event({"prompt_progress": {"processed": processed, "total": total}})
            question.waiting_prompt_tokens = total - processed
        stream.on_event(TOKEN)

    def dies_after_s(self, limit_s: float = 1e5) -> float:
        """How long it may be silent from now on until it is given up."""
        began = self.clock.now
        while self.clock.now - began < limit_s:
            patience_s = self.pace.patience_s()
            assert patience_s is not None
            if patience_s <= 0:
                return self.clock.now - began
            self.clock.now += patience_s
        return math.inf


@pytest.mark.parametrize(
    ("seconds_per_token", "load_s", "waiting", "allowed_s"),
    [
        (0.001, 0.4, 0, MIN_FLOOR_S),  # a fast machine with a fast start
        (0.001, 6.0, 0, 6.0),  # waits as long as the remedy would take
        (0.001, 300.0, 0, MAX_FLOOR_S),
        (0.001, None, 0, MAX_FLOOR_S),  # nothing known of its start
        (0.5, 0.4, 0, 5.0),
        (5.0, 0.4, 0, 50.0),  # a slow machine
        (5.0, 300.0, 0, 50.0),
        (0.01, 0.4, 100, MARGIN * 1.01),
        (0.01, 0.4, BATCH_TOKENS, MARGIN * 20.49),
        (0.01, 0.4, 100 * BATCH_TOKENS, MARGIN * 20.49),  # it reports after each batch
    ],
)
def test_silence_is_allowed_by_what_was_measured(
    seconds_per_token: float, load_s: float | None, waiting: int, allowed_s: float
) -> None:
    watched = Watched(seconds_per_token=seconds_per_token, load_s=load_s)
    watched.open(waiting)

    assert watched.pace.allowed_silence_s(waiting) == pytest.approx(allowed_s)
    assert watched.dies_after_s() == pytest.approx(allowed_s)


def test_slow_machine_is_not_dead() -> None:
    watched = Watched(seconds_per_token=0.01, load_s=1.0)  # the measurement at its start was far too good
    stream, _ = watched.open()
    for gap_s in (0.05, 0.3, 1.5, 5.0, 5.0, 4.0):
        for _ in range(int(gap_s * 10)):
            watched.clock.now += 0.1
            patience_s = watched.pace.patience_s()
            assert patience_s is not None
            assert patience_s > 0
        stream.on_event(TOKEN)

    assert watched.pace.seconds_per_token == pytest.approx(4.9, abs=0.15)


def test_fast_machine_that_went_silent_is_found_soon() -> None:
    watched = Watched(seconds_per_token=0.02, load_s=0.5)
    stream, _ = watched.open()
    watched.tokens(stream, 0.02, 50)

    assert watched.dies_after_s() == pytest.approx(MIN_FLOOR_S)
    assert watched.pace.silence_s() == pytest.approx(MIN_FLOOR_S)


def test_peaks_count_at_once_and_fade() -> None:
    watched = Watched(seconds_per_token=0.1)
    stream, _ = watched.open()
    watched.tokens(stream, 0.1, 2)
    watched.tokens(stream, 1.0, 1)
    assert watched.pace.seconds_per_token == pytest.approx(1.0)

    watched.tokens(stream, 0.1, 5)
    assert watched.pace.seconds_per_token == pytest.approx(0.1 + 0.9 * 0.9**5)
    watched.tokens(stream, 0.1, 60)
    assert watched.pace.seconds_per_token == pytest.approx(0.1, abs=0.01)


def test_huge_prompt_on_a_slow_machine_is_waited_for_a_batch_at_a_time() -> None:
    watched = Watched(seconds_per_token=2.0, load_s=10.0)
    stream, question = watched.open(30000)
    assert watched.dies_after_s(limit_s=40000) > 2048 * 2.0  # unmeasured: as dear as generated tokens
    stream, question = watched.open(30000)

    watched.prompt(stream, question, 30000, token_s=0.1)

    assert watched.pace.seconds_per_prompt_token == pytest.approx(0.1)
    assert watched.pace.allowed_silence_s(30000) == pytest.approx(MARGIN * (2.0 + 2048 * 0.1))


@pytest.mark.parametrize(
    ("total", "token_s", "measured"),
    [
        (2000, 0.01, 0.01),
        (32, 0.01, 0.01),
        (31, 0.01, 0.1),  # too few to measure
        (2000, 0.3, 0.1),  # a prompt token never takes longer than a generated one
    ],
)
def test_prompt_token_is_measured_where_it_can_be(total: int, token_s: float, measured: float) -> None:
    watched = Watched(seconds_per_token=0.1)
    stream, question = watched.open(total)

    watched.prompt(stream, question, total, token_s=token_s)

    assert watched.pace.seconds_per_prompt_token == pytest.approx(measured)
    assert watched.pace.seconds_per_token == pytest.approx(0.1)


def test_cached_part_of_a_prompt_does_not_count_for_its_speed() -> None:
    watched = Watched(seconds_per_token=0.1)
    stream, _ = watched.open(1000)
    stream.on_event({"prompt_progress": {"processed": 900, "total": 1000}})
    watched.clock.now += 1.0
    stream.on_event({"prompt_progress": {"processed": 1000, "total": 1000}})

    assert watched.pace.seconds_per_prompt_token == pytest.approx(0.01)


def test_each_batch_of_a_prompt_is_measured_by_itself() -> None:
    watched = Watched(seconds_per_token=0.1)
    stream, _ = watched.open(3000)
    for processed, seconds in ((0, 0.0), (1000, 10.0), (2000, 30.0)):  # attention grows with the context
        watched.clock.now += seconds
        stream.on_event({"prompt_progress": {"processed": processed, "total": 3000}})

    assert watched.pace.seconds_per_prompt_token == pytest.approx(0.03)


def test_token_received_with_the_prompt_of_another_does_not_count() -> None:
    watched = Watched(seconds_per_token=0.1)
    writing, _ = watched.open()
    watched.tokens(writing, 0.1, 5)
    asking, question = watched.open(2000)
    asking.on_event({"prompt_progress": {"processed": 0, "total": 2000}})
    watched.tokens(writing, 0.1, 1)
    watched.tokens(writing, 60.0, 1)  # received before the progress of the same batch
    asking.on_event({"prompt_progress": {"processed": 2000, "total": 2000}})
    question.waiting_prompt_tokens = 0

    assert watched.pace.seconds_per_token == pytest.approx(0.1)


def test_stream_may_wait_for_the_prompt_of_another() -> None:
    watched = Watched(seconds_per_token=0.1, load_s=0.5)
    writing, _ = watched.open()
    watched.tokens(writing, 0.1, 20)
    asking, question = watched.open(2000)
    asking.on_event({"prompt_progress": {"processed": 0, "total": 2000}})

    watched.clock.now += 60.0  # both are silent
    assert watched.pace.patience_s() == 1.0
    asking.on_event({"prompt_progress": {"processed": 2000, "total": 2000}})
    question.waiting_prompt_tokens = 0
    writing.on_event(TOKEN)
    asking.on_event(TOKEN)

    assert watched.pace.seconds_per_token == pytest.approx(0.1)  # that wait was the prompt's
    watched.tokens(writing, 0.1, 1)
    assert watched.dies_after_s() == pytest.approx(MIN_FLOOR_S)


def test_any_stream_that_moves_shows_life() -> None:
    watched = Watched(seconds_per_token=0.01, load_s=0.5)
    watched.open()  # never gets a token
    moving, _ = watched.open()
    for _ in range(20):
        watched.tokens(moving, 0.5, 1)
        patience_s = watched.pace.patience_s()
        assert patience_s is not None
        assert patience_s > 0

    moving.close()
    moving.close()
    assert watched.dies_after_s() == pytest.approx(10 * 0.5, rel=0.1)


def test_streams_beside_each_other_do_not_make_tokens_look_cheap() -> None:
    watched = Watched()
    streams = [watched.open()[0] for _ in range(16)]
    for _ in range(30):
        watched.clock.now += 2.0
        for stream in streams:
            stream.on_event(TOKEN)

    assert watched.pace.seconds_per_token == pytest.approx(2.0)


def test_time_without_a_request_is_not_silence() -> None:
    watched = Watched(seconds_per_token=0.01, load_s=0.5)
    assert watched.pace.patience_s() is None
    stream, _ = watched.open()
    stream.close()
    watched.clock.now += 3600.0
    assert watched.pace.patience_s() is None

    watched.pace.open(Question())  # a new request is not blamed for the hour before
    assert watched.pace.patience_s() == 1.0
    assert watched.dies_after_s() == pytest.approx(MIN_FLOOR_S)


def test_silence_of_an_earlier_request_is_not_held_against_the_next() -> None:
    watched = Watched(seconds_per_token=0.01, load_s=0.5)
    stream, _ = watched.open()
    watched.clock.now += 0.9
    watched.pace.patience_s()
    watched.clock.now += 0.9
    watched.pace.patience_s()
    stream.close()
    watched.pace.open(Question())

    assert watched.dies_after_s() == pytest.approx(MIN_FLOOR_S)


def test_request_starts_the_clock_when_it_is_sent() -> None:
    watched = Watched(seconds_per_token=0.01, load_s=0.5)
    stream, _ = watched.open()
    for _ in range(3):
        watched.clock.now += 0.6
        watched.pace.patience_s()
    stream.on_sent()

    assert watched.dies_after_s() == pytest.approx(MIN_FLOOR_S)


def test_second_request_of_a_stream_is_measured_by_itself() -> None:
    watched = Watched(seconds_per_token=0.01)
    stream, question = watched.open(1000)
    watched.prompt(stream, question, 1000, token_s=0.001)
    watched.tokens(stream, 0.01, 3)
    watched.clock.now += 50.0
    stream.on_sent()
    watched.clock.now += 50.0
    stream.on_event({"prompt_progress": {"processed": 1040, "total": 1100}})
    watched.tokens(stream, 0.0, 1)

    assert watched.pace.seconds_per_token == pytest.approx(0.01)
    assert watched.pace.seconds_per_prompt_token == pytest.approx(0.001)


def test_unmeasured_is_never_judged_and_measured_by_its_first_tokens() -> None:
    watched = Watched(load_s=0.5)
    stream, _ = watched.open(100)
    assert watched.pace.seconds_per_token is None
    assert watched.pace.seconds_per_prompt_token is None
    assert watched.pace.allowed_silence_s(0) == math.inf
    assert watched.dies_after_s(limit_s=5000) == math.inf

    stream.answer.waiting_prompt_tokens = 0
    watched.tokens(stream, 0.3, 1)
    assert watched.pace.seconds_per_token is None  # one token shows no gap
    watched.tokens(stream, 0.3, 1)
    assert watched.pace.seconds_per_token is not None
    assert watched.dies_after_s() == pytest.approx(3.0)


@pytest.mark.parametrize("estimate", [0.0, 0.7])
def test_calibration_keeps_what_is_known(estimate: float) -> None:
    watched = Watched(seconds_per_token=0.2)

    watched.pace.calibrate(estimate)

    assert watched.pace.seconds_per_token == (estimate or 0.2)


def test_time_in_which_this_process_was_stopped_is_not_silence() -> None:
    watched = Watched(seconds_per_token=0.01, load_s=0.5)
    watched.open()
    watched.clock.now += 3600.0  # nothing was checked

    assert watched.pace.patience_s() == pytest.approx(1.0)
    assert watched.dies_after_s() == pytest.approx(MIN_FLOOR_S - 1.0)


def test_reader_may_take_its_time() -> None:
    watched = Watched(seconds_per_token=0.05, load_s=0.5)
    stream, _ = watched.open()
    watched.tokens(stream, 0.05, 3)
    with stream.reader_busy():
        assert watched.dies_after_s(limit_s=100) == math.inf
    watched.tokens(stream, 0.0, 1)  # it waited to be read

    assert watched.pace.seconds_per_token == pytest.approx(0.05)
    assert watched.dies_after_s() == pytest.approx(MIN_FLOOR_S)
    stream.on_event(TOKEN)
    watched.tokens(stream, 5.0, 1)
    assert watched.pace.seconds_per_token == pytest.approx(5.0)  # it is read again


def test_hurried_reader_does_not_hide_the_time_of_a_token() -> None:
    watched = Watched()
    stream, _ = watched.open()
    for _ in range(5):
        watched.tokens(stream, 1.0, 1)
        with stream.reader_busy():
            watched.clock.now += 0.2

    assert watched.pace.seconds_per_token == pytest.approx(1.2)


def test_engine_is_watched_while_one_stream_is_read() -> None:
    watched = Watched(seconds_per_token=0.01, load_s=0.5)
    slow, _ = watched.open()
    watched.open()
    with slow.reader_busy():
        assert watched.dies_after_s() == pytest.approx(MIN_FLOOR_S)


def test_repr_has_the_pace() -> None:
    watched = Watched()
    assert repr(watched.pace) == "<Pace: unmeasured, 0 streams>"
    watched.pace.calibrate(0.25)
    watched.open()
    assert repr(watched.pace) == "<Pace: 0.2500 s per token, 1 streams>"


# --- coordinators that other kernels use too ----------------------------------------------------


def test_an_engine_whose_slots_move_is_not_silent_however_long_other_kernels_keep_them_busy() -> None:
    watched = Watched(seconds_per_token=0.001, load_s=0.5)
    watched.open()  # waits for a slot that another kernel uses
    for _ in range(1000):
        patience_s = watched.pace.patience_s()
        assert patience_s is not None
        assert patience_s > 0
        if watched.pace.is_doubtful:
            watched.pace.on_moved()
        watched.clock.now += patience_s


def test_an_engine_is_doubtful_when_half_of_its_silence_is_over() -> None:
    watched = Watched(seconds_per_token=0.001, load_s=0.5)
    watched.open()
    watched.clock.now += 0.9
    assert watched.pace.patience_s() == pytest.approx(0.1)
    assert not watched.pace.is_doubtful
    watched.clock.now += 0.1
    assert watched.pace.patience_s() == pytest.approx(1.0)
    assert watched.pace.is_doubtful


def test_a_prompt_of_another_kernel_is_waited_for() -> None:
    watched = Watched(seconds_per_token=0.01, load_s=0.5)
    watched.open()
    watched.pace.is_shared = True
    assert watched.dies_after_s() == pytest.approx(MARGIN * (0.01 + BATCH_TOKENS * 0.01))
