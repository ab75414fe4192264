"""What a cluster's controls do: each action runs on the I/O loop, one of a kind at a time, and ends in an event.

The router itself publishes what it did; a failure is published here, as `action.failed`. What the last action
does, or how it ended, is in `progress`, for a line below the controls.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Coroutine
from typing import Any

from sollol_nb.errors import SollolError
from sollol_nb.router.router import Router
from sollol_nb.runtime.events import EventKind
from sollol_nb.runtime.io_loop import submit

logger = logging.getLogger(__name__)


class ClusterActions:
    """The actions of one router, which they do not keep alive.

    Args:
        router: what the actions act on.
        on_change: called on the I/O loop when an action starts or ends.

    Attributes:
        progress: what the last action is doing, or how it ended; empty before the first one.
    """

    def __init__(self, router: Router, on_change: Callable[[], None]) -> None:
        self._router = weakref.ref(router)
        self._events = router.events
        self._on_change = on_change
        self._running: set[str] = set()
        self.progress = ""

    def is_unavailable(self, kind: str) -> bool:
        """Whether an action cannot start now: one of its kind is running, or the router was closed or is gone."""
        router = self._router()
        return router is None or router.state.is_closed or kind in self._running

    def start(
        self, kind: str, description: str, action: Callable[[Router], Coroutine[Any, Any, str | None]]
    ) -> None:
        """Start an action, unless it is unavailable; from any thread.

        Args:
            kind: what the control does, such as `discover`.
            description: such as `loading demo`, for the event of a failure.
            action: does it; returns a message for an event, or None where the router publishes one.
        """
        router = self._router()
        if router is None or self.is_unavailable(kind):
            return
        self._running.add(kind)
        submit(self._run(kind, description, action(router)))

    async def _run(self, kind: str, description: str, work: Coroutine[Any, Any, str | None]) -> None:
        self.progress = f"{description} …"
        self._on_change()
        try:
            message = await work
            self.progress = message or f"{description}: done"
            if message:
                self._events.publish(EventKind.ACTION_DONE, kind, message)
        except SollolError as error:
            self._fail(kind, f"{description} failed: {error}")
        except Exception as error:
            logger.exception("%s failed", description)
            self._fail(kind, f"{description} failed: {type(error).__name__}: {error}")
        finally:
            self._running.discard(kind)
            self._on_change()

    def _fail(self, kind: str, message: str) -> None:
        self.progress = f"⚠ {message}"
        self._events.publish(EventKind.ACTION_FAILED, kind, message)
