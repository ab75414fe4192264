"""`recovery` and `deterministic`: as a setting, an argument of the router and an option of a request."""

from __future__ import annotations

import re
from typing import Any, cast

import pytest

from sollol_nb.errors import ConfigError
from sollol_nb.llama_cpp.answers.base import Answer
from sollol_nb.llama_cpp.answers.kinds import answer_for
from sollol_nb.router import active_request
from sollol_nb.sync_wrapper import HybridRouter


class AnyCoordinator:
    """Makes the answer that a coordinator would stream."""

    def answer(self, messages: Any, options: Any, *, model: str) -> Answer:
        return answer_for(model, messages, options, chat_template="")


def asked(monkeypatch: pytest.MonkeyPatch, router: HybridRouter, **options: Any) -> tuple[bool, bool]:
    """Whether an answer recovers exactly, and whether its request runs alone."""
    seen: list[tuple[bool, bool]] = []

    async def stand_in(_pool: object, _route: object, _record: object, begin: Any, **settings: Any) -> Any:
        seen.append((begin(AnyCoordinator()).recovers_exactly, settings["alone"]))
        yield {"model": "demo", "message": {"role": "assistant", "content": "Hi"}, "done": True}

    monkeypatch.setattr(active_request, "stream_answer", stand_in)
    router.route_request("demo", "Hi", backend="local", **options)
    return seen[0]


@pytest.mark.parametrize(
    ("variables", "arguments", "options", "exact_and_alone"),
    [
        ({}, {}, {}, (False, False)),
        ({}, {}, {"recovery": "exact"}, (True, False)),
        ({}, {}, {"deterministic": True}, (True, True)),
        ({}, {"recovery": "exact"}, {}, (True, False)),
        ({}, {"recovery": "exact"}, {"recovery": "fast"}, (False, False)),
        ({}, {"deterministic": True}, {}, (True, True)),
        ({}, {"deterministic": True}, {"deterministic": False}, (False, False)),
        ({"SOLLOL_RECOVERY": "exact"}, {}, {}, (True, False)),
        ({"SOLLOL_RECOVERY": "exact"}, {"recovery": "fast"}, {}, (False, False)),
        ({"SOLLOL_DETERMINISTIC": "1"}, {}, {}, (True, True)),
    ],
)
def test_the_nearest_place_that_says_it_counts(
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    arguments: dict[str, Any],
    options: dict[str, Any],
    exact_and_alone: tuple[bool, bool],
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with HybridRouter(auto_discover_rpc=False, **arguments) as router:
        assert asked(monkeypatch, router, **options) == exact_and_alone
        with router.sibling() as sibling:
            assert asked(monkeypatch, sibling, **options) == exact_and_alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recovery": "quick"}, 'recovery=\'quick\' must be "fast" or "exact"'),
        ({"recovery": True}, "recovery=True must be"),
        ({"deterministic": "yes"}, "deterministic='yes' must be True or False"),
        ({"deterministic": 1}, "deterministic=1 must be True or False"),
    ],
)
def test_other_values_are_refused_before_anything_is_loaded(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        HybridRouter(**cast(Any, options))
    with HybridRouter(auto_discover_rpc=False) as router, pytest.raises(ConfigError, match=re.escape(message)):
        router.route_request("demo", "Hi", **options)
