"""A merge patch turns one state into another, and is as small as their difference."""

from __future__ import annotations

import random
from typing import Any

import pytest

from sollol_nb.cluster.data import patch_between
from tests.support.merge_patch import patched, random_state


@pytest.mark.parametrize(
    ("before", "after", "patch"),
    [
        ({}, {}, {}),
        ({"a": 1}, {"a": 1}, {}),
        ({"a": 1}, {"a": 2}, {"a": 2}),
        ({"a": 1}, {}, {"a": None}),
        ({}, {"a": {"b": 1}}, {"a": {"b": 1}}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}}, {"a": {"c": 3}}),
        ({"a": {"b": 1}}, {"a": {}}, {"a": {"b": None}}),
        ({"a": {"b": 1}}, {"a": 5}, {"a": 5}),
        ({"a": 5}, {"a": {"b": 1}}, {"a": {"b": 1}}),
        ({"a": 5}, {"a": {}}, {"a": {}}),
        ({"a": [1, 2]}, {"a": [1, 2, 3]}, {"a": [1, 2, 3]}),
        ({"a": 0}, {"a": False, "b": ""}, {"b": ""}),
    ],
)
def test_a_patch_is_the_difference(before: dict[str, Any], after: dict[str, Any], patch: dict[str, Any]) -> None:
    assert patch_between(before, after) == patch
    assert patched(before, patch) == after


def test_a_patch_between_any_two_states_turns_one_into_the_other() -> None:
    chance = random.Random(2)
    for _ in range(500):
        before, after = random_state(chance, 3), random_state(chance, 3)
        assert patched(before, patch_between(before, after)) == after
        assert patched(after, patch_between(before, after)) == after, "a patch may come twice"


def test_what_a_patch_does_not_touch_stays_the_same_object() -> None:
    before = {"a": {"x": 1}, "b": {"y": {"z": 1}}}

    after = patched(before, {"b": {"w": 1}})

    assert after["a"] is before["a"]
    assert after["b"]["y"] is before["b"]["y"]
    assert before == {"a": {"x": 1}, "b": {"y": {"z": 1}}}
