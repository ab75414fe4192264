"""Pace: the time that a coordinator usually needs for a token. Its silence is judged by that: slow is not dead.

A worker that hangs makes its coordinator silent forever, while `/health` still reports that it is well. Only the
silence shows it, and how long a silence must be to mean that differs by a factor of thousands: a token takes a
millisecond on one machine and five seconds on another, and a long prompt takes minutes where a token takes one
second. So three times are measured:

* of a token: from a stream's token to its next one, while no prompt is processed (drafted tokens that are verified
  together count as one);
* of a prompt token: from the progress that llama-server reports after each batch of a prompt;
* of the coordinator's start, which is the cost of a wrong verdict.

    allowed silence = max(floor, MARGIN * (token + min(waiting prompt tokens, BATCH_TOKENS) * prompt token))

All slots of a coordinator take part in the same computation: a stream may be silent because the prompt of another
is processed. So silence is the time since the last event of any stream of the coordinator, or the last request to
it, and the waiting prompt tokens are those of all its streams.

Only time in which the silence was checked and a stream was read counts: not the time in which this process was
stopped (a closed lid, a debugger, a cell that blocks the loop), nor that in which the reader of a stream was busy
with the chunk before. A stream whose answer is complete does not count at all: the engine owes it nothing.

Other kernels may use the coordinator too. While their requests have all its slots, ours wait in silence. So after
half of the allowed silence its slots are looked at (see `streams.py`); one that moves ends the silence. A slot
moves from batch to batch, so while other kernels use it, the longest batch of a prompt that this process does not
know is allowed for. A context that another kernel saves or restores is announced in the registry entry.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from sollol_nb.llama_cpp.answers.protocol import progress_of

MARGIN = 10.0
"""Factor over what was measured. Growing contexts, shared machines and throttled clocks slow tokens by less."""

MIN_FLOOR_S, MAX_FLOOR_S = 2.0, 15.0
"""Bounds of the floor, which is the time that the coordinator took to start: whoever waits as long as a new start
takes loses at most twice what the best choice loses. The lower bound allows for short pauses of a system (paging,
a garbage collection); the upper one is for people: fast machines with slow starts are judged within it."""

BATCH_TOKENS = 2048
"""llama-server's default `--batch-size`; it reports progress after each batch of a prompt."""

DECAY = 0.1
"""A peak counts in full; each later, smaller value takes off this share of the difference."""

MIN_PROMPT_TOKENS = 32
"""Fewer take as long as a single one, and would make a prompt token look slow."""

MIN_CHECK_INTERVAL_S, MAX_CHECK_INTERVAL_S = 0.01, 1.0
"""The most time that counts between two checks, so also the longest wait between them."""


class HasPrompt(Protocol):
    """What Pace needs to know about an answer."""

    waiting_prompt_tokens: int


class Pace:
    """The pace of one coordinator, and how long it has been silent.

    Args:
        clock: a monotonic clock, in seconds.

    Attributes:
        seconds_per_token: measured; None until then.
        is_shared: whether other processes have requests there, whose prompts are not known here; it is asked when
            the silence becomes doubtful.
        at_next_token: called once, when the next token is received.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds_per_token: float | None = None
        self.is_shared = False
        self.at_next_token: Callable[[], None] | None = None
        self._clock = clock
        self._seconds_per_prompt_token: float | None = None
        self._floor_s = MAX_FLOOR_S
        self._streams: set[Stream] = set()
        self._silence_s = 0.0
        self._checked_at = 0.0

    def __repr__(self) -> str:
        token = "unmeasured" if self.seconds_per_token is None else f"{self.seconds_per_token:.4f} s per token"
        return f"<Pace: {token}, {len(self._streams)} streams>"

    @property
    def seconds_per_prompt_token(self) -> float | None:
        """At most the time of a generated token, and equal to it until measured."""
        if self.seconds_per_token is None or self._seconds_per_prompt_token is None:
            return self.seconds_per_token
        return min(self.seconds_per_token, self._seconds_per_prompt_token)

    def set_load_time(self, load_s: float) -> None:
        """Set how long the coordinator took to start."""
        self._floor_s = min(max(load_s, MIN_FLOOR_S), MAX_FLOOR_S)

    def calibrate(self, seconds_per_token: float) -> None:
        """Set a first estimate, from a tiny request at the start; 0 if there is none."""
        self.seconds_per_token = seconds_per_token or self.seconds_per_token

    def open(self, answer: HasPrompt) -> Stream:
        """Begin a request to the coordinator; report what happens to the stream that is returned."""
        stream = Stream(self, answer)
        self._streams.add(stream)
        self._reset_silence()
        return stream

    def allowed_silence_s(self, waiting_prompt_tokens: int) -> float:
        """How long it may be silent with so many prompt tokens to process; infinite while nothing is measured
        (the requests have their own limits)."""
        token_s, prompt_token_s = self.seconds_per_token, self.seconds_per_prompt_token
        if token_s is None or prompt_token_s is None:
            return math.inf
        prompt_s = min(waiting_prompt_tokens, BATCH_TOKENS) * prompt_token_s
        return max(self._floor_s, MARGIN * (token_s + prompt_s))

    def silence_s(self) -> float:
        """How long it has been silent, in the time that counts; calling this is a check."""
        now = self._clock()
        if any(stream.is_read for stream in self._streams):
            self._silence_s += min(now - self._checked_at, MAX_CHECK_INTERVAL_S)
        self._checked_at = now
        return self._silence_s

    def patience_s(self) -> float | None:
        """How long to wait before the next check; 0 or less once it has been silent for too long, None while it
        has no request."""
        if not self._streams:
            return None
        allowed_s, silence_s = self._allowed_s, self.silence_s()
        left_s = allowed_s - silence_s
        if not self.is_doubtful:
            left_s = max(allowed_s / 2 - silence_s, MIN_CHECK_INTERVAL_S)
        return min(left_s, MAX_CHECK_INTERVAL_S)

    @property
    def is_doubtful(self) -> bool:
        """Whether half of the allowed silence is over: time to look whether the engine works."""
        return self._silence_s >= self._allowed_s / 2

    @property
    def is_generating(self) -> bool:
        """Whether it has a request, and no prompt of one waits."""
        return bool(self._streams) and not self._waiting_prompt_tokens

    @property
    def streams(self) -> int:
        """How many requests of this process it has."""
        return len(self._streams)

    def on_moved(self) -> None:
        """Something else than our streams has moved in the engine now."""
        self._reset_silence()

    @property
    def _allowed_s(self) -> float:
        return self.allowed_silence_s(BATCH_TOKENS if self.is_shared else self._waiting_prompt_tokens)

    @property
    def _waiting_prompt_tokens(self) -> int:
        return sum(stream.answer.waiting_prompt_tokens for stream in self._streams)

    def _reset_silence(self) -> float:
        self._checked_at, self._silence_s, self.is_shared = self._clock(), 0.0, False
        return self._checked_at

    def _record_prompt(self, tokens: int, seconds: float) -> None:
        for stream in self._streams:  # this delays their next tokens
            stream.token_at = None
        if tokens >= MIN_PROMPT_TOKENS:
            self._seconds_per_prompt_token = _with_peak(self._seconds_per_prompt_token, seconds / tokens)

    def _record_token(self, stream: Stream, now: float) -> None:
        if stream.token_at is not None and not self._waiting_prompt_tokens:
            seconds = now - stream.token_at
            if stream.unread_s <= seconds / 2:  # else it may have waited to be read
                self.seconds_per_token = _with_peak(self.seconds_per_token, seconds)
        stream.token_at, stream.unread_s = now, 0.0
        if self.at_next_token is not None:
            call, self.at_next_token = self.at_next_token, None
            call()


class Stream:
    """One request at a coordinator, as its Pace sees it.

    Attributes:
        answer: has the number of its prompt tokens that wait.
        is_read: whether its reader waits for the next event.
        token_at: when its last token was received; None where the next one would not show the time of a token.
        unread_s: time since then in which it was not read.
    """

    def __init__(self, pace: Pace, answer: HasPrompt) -> None:
        self.answer = answer
        self.is_read = True
        self.token_at: float | None = None
        self.unread_s = 0.0
        self._busy_since = 0.0
        self._pace = pace
        self._processed: tuple[int, float] | None = None  # prompt tokens, and when
        self._engine_ms: float | None = None  # the engine's time of the last token

    def on_sent(self) -> None:
        """The request was sent now."""
        self._pace._reset_silence()
        self.token_at = self._processed = None

    def on_event(self, event: Mapping[str, Any]) -> None:
        """An event was received from the engine now; comments that only keep the connection open do not count."""
        now = self._pace._reset_silence()
        prompt = progress_of(event)
        if prompt is None:
            before, self._engine_ms = self._engine_ms, (event.get("timings") or {}).get("predicted_ms")
            # Drafted tokens that were verified together have the same time, and arrive together: one of them does
            # not show the time of a token.
            if self._engine_ms is None or self._engine_ms != before:
                self._pace._record_token(self, now)
            return
        if self._processed is not None:
            tokens, since = self._processed
            self._pace._record_prompt(prompt[0] - tokens, now - since)
        self._processed = (prompt[0], now)

    def reader_busy(self) -> Stream:
        """`with` it while the reader of the answer handles a chunk: this time is not the engine's."""
        return self

    def __enter__(self) -> None:
        self._busy_since = self._pace._reset_silence()
        self.is_read = False

    def __exit__(self, *_: object) -> None:
        self.is_read = True
        self.unread_s += self._pace._reset_silence() - self._busy_since

    def close(self) -> None:
        """The stream has ended, one way or another. Closing twice is fine."""
        self._pace._streams.discard(self)


def _with_peak(average: float | None, value: float) -> float:
    return value if average is None or value > average else average + DECAY * (value - average)
