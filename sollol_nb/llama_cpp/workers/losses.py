"""How often each worker was lost lately, and how long it is therefore avoided."""

from __future__ import annotations

import time

LOSSES_COUNT_FOR_S = 600.0
FIRST_COOL_DOWN_S = 30.0
LONGEST_COOL_DOWN_S = 300.0


class WorkerLosses:
    """How often each worker was lost lately, and how long it is therefore avoided.

    One loss may have any cause. A worker that is lost for the second time within ten minutes cools down for half a
    minute, and for twice as long after each further loss.
    """

    def __init__(self) -> None:
        self._lost_at: dict[str, list[float]] = {}

    def __contains__(self, endpoint: object) -> bool:
        return endpoint in self._lost_at

    def record(self, endpoint: str) -> None:
        """Record that a worker was lost now."""
        self._lost_at[endpoint] = [*self._recent(endpoint), time.monotonic()]

    def cool_down_s(self, endpoint: str) -> float:
        """Seconds during which it is still avoided; 0 if it is not."""
        losses = self._recent(endpoint)
        if len(losses) < 2:
            return 0.0
        pause_s = min(FIRST_COOL_DOWN_S * 2.0 ** (len(losses) - 2), LONGEST_COOL_DOWN_S)
        return max(0.0, losses[-1] + pause_s - time.monotonic())

    def _recent(self, endpoint: str) -> list[float]:
        now = time.monotonic()
        return [at for at in self._lost_at.get(endpoint, ()) if now - at < LOSSES_COUNT_FOR_S]
