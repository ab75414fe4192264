"""Limits: requests at the same time in the gateway and with each key, requests per minute with each key, and the
memory of all bodies together."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from math import ceil
from typing import Any

from sollol_nb.gateway.failures import ApiError
from sollol_nb.gateway.keys import Key

DEFAULT_MAX_REQUESTS = 1024
WINDOW_S = 60.0
RETRY_WHEN_FULL_S = 1
BODIES_LIMIT_BYTES = 512 * 1024 * 1024
"""Of the bodies of all requests that run."""
ALLOWED_FAILURES = 10
"""Wrong keys of one address in `WINDOW_S`."""
KNOWN_ADDRESSES = 1024
"""How many addresses of wrong keys are remembered; the oldest are forgotten."""

_BODY = "sollol.body_bytes"


class Limits:
    """The requests that run. Lives on the I/O loop.

    Args:
        max_requests: of all keys at the same time. They also bound how many wait at the gates of the engines.
        clock: the time in seconds.

    Attributes:
        running: how many run now.
        max_requests: see Args.
    """

    def __init__(
        self, max_requests: int = DEFAULT_MAX_REQUESTS, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.max_requests = max_requests
        self.running = 0
        self._bodies_bytes = 0
        self._clock = clock
        self._running_by_key: Counter[str] = Counter()
        self._starts: dict[str, deque[float]] = {}

    @contextmanager
    def admitted(self, key: Key) -> Iterator[None]:
        """Count a request while it runs.

        Raises:
            ApiError: 429 if the key's limits do not allow it, 503 if the gateway's do not.
        """
        self._check(key)
        self.running += 1
        self._running_by_key[key.name] += 1
        try:
            yield
        finally:
            self.running -= 1
            self._running_by_key[key.name] -= 1
            if not self._running_by_key[key.name]:
                del self._running_by_key[key.name]

    def add_to_body(self, scope: MutableMapping[str, Any], size_bytes: int) -> None:
        """Count a piece of a request's body, until `forget_body`.

        Raises:
            ApiError: the bodies of the requests that run are too long together.
        """
        if self._bodies_bytes + size_bytes > BODIES_LIMIT_BYTES:
            raise ApiError(
                503,
                "busy",
                "the requests that the gateway has now use all memory for bodies; try again later",
                retry_after_s=RETRY_WHEN_FULL_S,
            )
        self._bodies_bytes += size_bytes
        scope[_BODY] = scope.get(_BODY, 0) + size_bytes

    def forget_body(self, scope: MutableMapping[str, Any]) -> None:
        """Stop counting the body of a request that has ended."""
        self._bodies_bytes -= scope.pop(_BODY, 0)

    def _check(self, key: Key) -> None:
        if self.running >= self.max_requests:
            raise ApiError(
                503,
                "busy",
                f"the gateway already has {self.max_requests} requests; try again later",
                retry_after_s=RETRY_WHEN_FULL_S,
            )
        if key.max_requests is not None and self._running_by_key[key.name] >= key.max_requests:
            raise ApiError(
                429,
                "busy",
                f"the key {key.name} already has {key.max_requests} requests; wait until one of them ends",
                retry_after_s=RETRY_WHEN_FULL_S,
            )
        if key.requests_per_minute is not None:
            self._check_rate(key.name, key.requests_per_minute)

    def _check_rate(self, name: str, most: int) -> None:
        now = self._clock()
        starts = self._starts.setdefault(name, deque())
        while starts and starts[0] <= now - WINDOW_S:
            starts.popleft()
        if len(starts) >= most:
            wait_s = max(1, ceil(starts[0] + WINDOW_S - now))
            message = f"the key {name} has used its {most} requests of this minute; try again in {wait_s} s"
            raise ApiError(429, "busy", message, retry_after_s=wait_s)
        starts.append(now)


class Failures:
    """The wrong keys of each address.

    A key cannot be guessed, so this slows down clients with a wrong key that try again and again. A valid key is
    never refused: other clients may have the same address.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: OrderedDict[str, deque[float]] = OrderedDict()

    def note(self, address: str) -> int | None:
        """Note a wrong key; returns the seconds until the address may try again, None if there is no wait."""
        now = self._clock()
        times = self._times.setdefault(address, deque(maxlen=ALLOWED_FAILURES + 1))
        self._times.move_to_end(address)
        if len(self._times) > KNOWN_ADDRESSES:
            self._times.popitem(last=False)
        times.append(now)
        while times[0] <= now - WINDOW_S:
            times.popleft()
        return None if len(times) <= ALLOWED_FAILURES else max(1, ceil(times[0] + WINDOW_S - now))
