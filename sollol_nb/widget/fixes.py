"""What the buttons of problems do: the action that the cluster's state offers for a problem, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sollol_nb.errors import SollolError
from sollol_nb.router.router import Router
from sollol_nb.text.tables import counted
from sollol_nb.widget.actions import ClusterActions


class Fixes:
    """Runs the actions of problems (`cards.shapes.Action`).

    Args:
        actions: run them, one of a kind at a time.
        state: returns the cluster's plain state.
    """

    def __init__(self, actions: ClusterActions, state: Callable[[], Mapping[str, Any]]) -> None:
        self._actions = actions
        self._state = state

    def run(self, key: str) -> None:
        """Run the action of the problem with this key; without effect if there is none now. From any thread."""
        action = self._action(key)
        if action is None:
            return
        name, arguments = action["name"], list(action.get("arguments", ()))
        kind, description, work = _FIXES[name]
        self._actions.start(kind, description(arguments), lambda router: work(router, arguments))

    def subject(self, key: str) -> str:
        """What the action of the problem with this key is about, such as a model; "" if there is none now."""
        action = self._action(key) or {}
        return str(next(iter(action.get("arguments", ())), ""))

    def _action(self, key: str) -> Mapping[str, Any] | None:
        problem: Mapping[str, Any] = self._state().get("cards", {}).get("problems", {}).get(key, {})
        return problem.get("action")


async def _start(router: Router, arguments: Sequence[str]) -> str | None:
    started = await router.ensure_workers(int(arguments[0]))
    return None if started else "so many workers already run"


async def _remove(router: Router, endpoints: Sequence[str]) -> None:
    errors = []
    for endpoint in endpoints:
        try:
            await router.remove_worker(endpoint)
        except SollolError as error:
            errors.append(error)
    if errors:
        raise errors[0]


async def _replan(router: Router, models: Sequence[str]) -> str:
    return "; ".join([line for model in models for line in await router.replan(model)])


_FIXES: Mapping[str, tuple[str, Callable[[Sequence[str]], str], Callable[[Router, Sequence[str]], Any]]] = {
    "start": ("start workers", lambda given: f"starting {counted(int(given[0]), 'worker')}", _start),
    "remove": (
        "remove",
        lambda given: f"removing {given[0] if len(given) == 1 else counted(len(given), 'worker')}",
        _remove,
    ),
    "replan": ("apply", lambda given: f"applying the suggested layout of {', '.join(given)}", _replan),
}
"""By the action's name: the kind of which one runs at a time, what it does in words, and what does it."""
