"""Pace: what a coordinator usually needs, so that its silence is judged by that. A slow machine is not a dead one.

A worker that hangs makes its coordinator silent for ever, while `/health` says that all is well. Only silence
shows it, and how much silence means anything differs by a factor of thousands: a token takes a millisecond here
and five seconds there, and a long prompt minutes where a token takes one second. So it is measured:

* the time of a token: how long after a stream's token its next one comes, as long as no prompt is in the way;
* the time of a prompt token, from the progress that llama-server reports after each batch of a prompt;
* how long the coordinator took to start, which is what a wrong verdict costs.

    allowed silence = max(floor, MARGIN * (token + min(waiting prompt tokens, BATCH_TOKENS) * prompt token))

All slots of a coordinator take part in the same computation: a stream may be silent because another one's prompt
is processed. So silence is the time since any stream of the coordinator moved, or a request was sent to it, and
the prompt tokens that wait are those of all its streams.

Only time in which somebody looked and read counts: not that in which this process was stopped (a closed lid, a
debugger, a cell that blocks the loop), nor that in which the reader of a stream was busy with what it had got.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from sollol_nb.llama_cpp.answers.protocol import progress_of

MARGIN = 10.0
"""Of what was measured. Contexts grow, machines are shared, clocks are throttled: a factor of some, not of ten."""

MIN_FLOOR_S, MAX_FLOOR_S = 2.0, 15.0
"""Bounds of the floor, which is the time that the coordinator took to start: who waits for as long as the remedy
takes loses at most twice of what the best choice loses. The lower bound is for hiccups of a system (paging, a
garbage collection), the upper one for people: fast machines with slow starts are judged within it."""

BATCH_TOKENS = 2048
"""llama-server's default `--batch-size`: after so many tokens of a prompt it reports progress."""

DECAY = 0.1
"""Peaks count in full at once, and each later, smaller value takes off this share of the difference."""

MIN_PROMPT_TOKENS = 32
"""Fewer are processed in the time of a single one, and would make a prompt token look dear."""

LOOK_AGAIN_S = 1.0
"""One look counts for no more than this. So it is also how long to wait between looks."""


class HasPrompt(Protocol):
    """What Pace wants to know of an answer."""

    waiting_prompt_tokens: int


class Pace:
    """Of one coordinator: what it needs for a token, and how long it has been silent.

    Args:
        clock: seconds, going forward only.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds_per_token: float | None = None
        self._clock = clock
        self._seconds_per_prompt_token: float | None = None
        self._floor_s = MAX_FLOOR_S
        self._streams: set[Stream] = set()
        self._silence_s = 0.0
        self._looked_at = 0.0

    def __repr__(self) -> str:
        token = "unmeasured" if self.seconds_per_token is None else f"{self.seconds_per_token:.4f} s a token"
        return f"<Pace: {token}, {len(self._streams)} streams>"

    @property
    def is_calibrated(self) -> bool:
        """Whether the time of a token is known."""
        return self.seconds_per_token is not None

    @property
    def seconds_per_prompt_token(self) -> float | None:
        """No more than a generated token takes, and as much as that until it is measured."""
        if self.seconds_per_token is None or self._seconds_per_prompt_token is None:
            return self.seconds_per_token
        return min(self.seconds_per_token, self._seconds_per_prompt_token)

    def loaded(self, load_s: float) -> None:
        """So long the coordinator took to start."""
        self._floor_s = min(max(load_s, MIN_FLOOR_S), MAX_FLOOR_S)

    def calibrate(self, seconds_per_token: float) -> None:
        """A first estimate, as of a tiny request made at the start; 0 is none."""
        self.seconds_per_token = seconds_per_token or self.seconds_per_token

    def open(self, answer: HasPrompt) -> Stream:
        """A request goes to the coordinator; its stream is to be told what happens."""
        stream = Stream(self, answer)
        self._streams.add(stream)
        self._move()
        return stream

    def allowed_silence_s(self, waiting_prompt_tokens: int) -> float:
        """How long it may be silent with so many prompt tokens to process; without end while nothing is measured
        (the requests have limits of their own)."""
        token_s, prompt_token_s = self.seconds_per_token, self.seconds_per_prompt_token
        if token_s is None or prompt_token_s is None:
            return math.inf
        prompt_s = min(waiting_prompt_tokens, BATCH_TOKENS) * prompt_token_s
        return max(self._floor_s, MARGIN * (token_s + prompt_s))

    def silence_s(self) -> float:
        """How long it has been silent, of the time in which somebody looked; a look in itself."""
        now = self._clock()
        if any(stream.is_read for stream in self._streams):
            self._silence_s += min(now - self._looked_at, LOOK_AGAIN_S)
        self._looked_at = now
        return self._silence_s

    def patience_s(self) -> float | None:
        """How long to wait before the next look; 0 or less once it has been silent for too long, None while
        nothing is asked of it."""
        if not self._streams:
            return None
        left_s = self.allowed_silence_s(self._waiting_prompt_tokens) - self.silence_s()
        return min(left_s, LOOK_AGAIN_S)

    @property
    def _waiting_prompt_tokens(self) -> int:
        return sum(stream.answer.waiting_prompt_tokens for stream in self._streams)

    def _move(self) -> float:
        self._looked_at, self._silence_s = self._clock(), 0.0
        return self._looked_at

    def _saw_prompt(self, tokens: int, seconds: float) -> None:
        for stream in self._streams:  # their next tokens come late because of it
            stream.token_at = None
        if tokens >= MIN_PROMPT_TOKENS:
            self._seconds_per_prompt_token = _with_peak(self._seconds_per_prompt_token, seconds / tokens)

    def _saw_token(self, stream: Stream, now: float) -> None:
        if stream.token_at is not None and not self._waiting_prompt_tokens:
            seconds = now - stream.token_at
            if stream.handed_s <= seconds / 2:  # else it may have lain there unread
                self.seconds_per_token = _with_peak(self.seconds_per_token, seconds)
        stream.token_at, stream.handed_s = now, 0.0


class Stream:
    """One request at a coordinator, as its Pace sees it.

    Attributes:
        answer: tells how much of its prompt waits.
        is_read: somebody waits for its next event.
        token_at: when its last token came, if the next one shows the time of a token.
        handed_s: time since then in which it was not read.
    """

    def __init__(self, pace: Pace, answer: HasPrompt) -> None:
        self.answer = answer
        self.is_read = True
        self.token_at: float | None = None
        self.handed_s = 0.0
        self._pace = pace
        self._processed: tuple[int, float] | None = None  # prompt tokens, and when

    def sent(self) -> None:
        """The request has just been sent."""
        self._pace._move()
        self.token_at = self._processed = None

    def progress(self, event: Mapping[str, Any]) -> None:
        """An event came from the engine; a comment that only keeps the connection open is none."""
        now = self._pace._move()
        prompt = progress_of(event)
        if prompt is None:
            self._pace._saw_token(self, now)
            return
        if self._processed is not None:
            tokens, since = self._processed
            self._pace._saw_prompt(prompt[0] - tokens, now - since)
        self._processed = (prompt[0], now)

    @contextmanager
    def handing_on(self) -> Iterator[None]:
        """While what came is handed to the reader of the answer: its time is not the engine's."""
        began = self._pace._move()
        self.is_read = False
        try:
            yield
        finally:
            self.is_read = True
            self.handed_s += self._pace._move() - began

    def close(self) -> None:
        """The stream has ended, one way or another. Closing twice is fine."""
        self._pace._streams.discard(self)


def _with_peak(average: float | None, value: float) -> float:
    return value if average is None or value > average else average + DECAY * (value - average)
