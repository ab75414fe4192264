"""How often each worker was lost lately, and for how long it is therefore left alone.

Once may happen to anyone. A worker that is lost for the second time within ten minutes cools down for half a
minute, and for twice as long each time after that.
"""

from __future__ import annotations

import time

LOSSES_COUNT_FOR_S = 600.0
FIRST_COOL_DOWN_S = 30.0
LONGEST_COOL_DOWN_S = 300.0


class WorkerLosses:
    """The losses of a router's workers."""

    def __init__(self) -> None:
        self._at: dict[str, list[float]] = {}

    def __contains__(self, endpoint: object) -> bool:
        return endpoint in self._at

    def note(self, endpoint: str) -> None:
        """It was lost now."""
        self._at[endpoint] = [*self._recent(endpoint), time.monotonic()]

    def cools_down_s(self, endpoint: str) -> float:
        """Seconds for which it is still only used if no other suffices."""
        losses = self._recent(endpoint)
        if len(losses) < 2:
            return 0.0
        pause_s = min(FIRST_COOL_DOWN_S * 2.0 ** (len(losses) - 2), LONGEST_COOL_DOWN_S)
        return max(0.0, losses[-1] + pause_s - time.monotonic())

    def _recent(self, endpoint: str) -> list[float]:
        now = time.monotonic()
        return [at for at in self._at.get(endpoint, ()) if now - at < LOSSES_COUNT_FOR_S]
