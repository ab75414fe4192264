"""What a cluster's controls do: each action runs on the I/O loop, one of a kind at a time, and ends in an event.

A router tells what it did by events of its own; what it could not do is told here, as `action.failed`.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from sollol_nb.errors import SollolError
from sollol_nb.runtime.events import EventKind
from sollol_nb.runtime.io_loop import submit

if TYPE_CHECKING:
    from sollol_nb.router.router import Router

logger = logging.getLogger(__name__)


class ClusterActions:
    """The actions of one router, which is not kept alive by them.

    Args:
        router: acted on.
        on_change: called on the I/O loop when an action begins or ends.
    """

    def __init__(self, router: Router, on_change: Callable[[], None]) -> None:
        self._router = weakref.ref(router)
        self._events = router.events
        self._on_change = on_change
        self._under_way: set[str] = set()

    def is_unavailable(self, kind: str) -> bool:
        """Whether such an action cannot begin now: one runs, or the router was closed or is gone."""
        router = self._router()
        return router is None or router.state.is_closed or kind in self._under_way

    def begin(self, kind: str, words: str, action: Callable[[Router], Coroutine[Any, Any, str | None]]) -> None:
        """Begin an action, unless it is unavailable; from any thread.

        Args:
            kind: what the control does, such as `discover`.
            words: what is being done, for the event of a failure.
            action: does it; gives words for an event, or None where the router tells by itself.
        """
        router = self._router()
        if router is None or self.is_unavailable(kind):
            return
        self._under_way.add(kind)
        submit(self._run(kind, words, action(router)))

    async def _run(self, kind: str, words: str, work: Coroutine[Any, Any, str | None]) -> None:
        self._on_change()
        try:
            done = await work
            if done:
                self._events.publish(EventKind.ACTION_DONE, kind, done)
        except SollolError as error:
            self._events.publish(EventKind.ACTION_FAILED, kind, f"{words} failed: {error}")
        except Exception as error:
            logger.exception("%s failed", words)
            self._events.publish(EventKind.ACTION_FAILED, kind, f"{words} failed: {type(error).__name__}: {error}")
        finally:
            self._under_way.discard(kind)
            self._on_change()
