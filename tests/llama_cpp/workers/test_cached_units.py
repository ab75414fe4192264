"""What workers have cached, as remembered: added up, shared by kernels, bounded, ignored where it is damaged."""

from __future__ import annotations

import asyncio
import json
import stat
from pathlib import Path
from typing import Any

import pytest

from sollol_nb.llama_cpp.workers import cached_units
from sollol_nb.llama_cpp.workers.cached_units import RECORDS_KEPT, CachedUnits, runs_of
from sollol_nb.settings import config
from tests.support.engines import eventually_async, run

pytestmark = pytest.mark.usefixtures("alone")

MODEL = {"path": "/models/big.gguf", "size": 40 * 10**9, "mtime_ns": 1}


def stored() -> Path:
    return config.state_file("cached_layers.json")


async def noted(known: CachedUnits, *loads: tuple[dict[str, Any], str, range]) -> None:
    for model, cache, units in loads:
        known.note(model, [(cache, units)])
    await known.saved()


def test_units_of_several_loads_add_up_and_other_kernels_know_them() -> None:
    run(
        noted(
            CachedUnits(), (MODEL, "gpu1", range(4)), (MODEL, "gpu1", range(8, 12)), (MODEL, "gpu2", range(4, 8))
        )
    )
    other = CachedUnits()
    assert other.of("gpu1", MODEL) == {0, 1, 2, 3, 8, 9, 10, 11}
    assert other.of("gpu2", MODEL) == set(range(4, 8))
    assert other.of("gpu3", MODEL) == set()
    assert stat.S_IMODE(stored().stat().st_mode) == 0o600


def test_another_version_of_the_file_is_another_model() -> None:
    run(noted(known := CachedUnits(), (MODEL, "gpu1", range(4))))
    assert known.of("gpu1", MODEL | {"mtime_ns": 2}) == set()


def test_two_kernels_that_note_at_the_same_time_lose_nothing() -> None:
    async def both() -> None:
        first, second = CachedUnits(), CachedUnits()
        await asyncio.gather(
            noted(first, (MODEL, "gpu1", range(4))),
            noted(second, (MODEL, "gpu1", range(4, 8)), (MODEL, "gpu2", range(2))),
        )
        await eventually_async(lambda: first.of("gpu2", MODEL), "the first sees what the second noted")

    run(both())
    assert CachedUnits().of("gpu1", MODEL) == set(range(8))


def test_what_is_forgotten_is_forgotten_by_all() -> None:
    run(noted(CachedUnits(), (MODEL, "gpu1", range(4)), (MODEL, "gpu2", range(4))))

    async def forget() -> None:
        known = CachedUnits()
        known.forget(["gpu1"])
        assert known.of("gpu1", MODEL) == set()
        await noted(known)

    run(forget())
    assert CachedUnits().of("gpu1", MODEL) == set()
    assert CachedUnits().of("gpu2", MODEL) == set(range(4))


def test_what_is_noted_after_it_was_forgotten_is_all_that_is_known() -> None:
    other = MODEL | {"path": "/models/other.gguf"}
    run(noted(CachedUnits(), (MODEL, "gpu1", range(8)), (other, "gpu1", range(8)), (MODEL, "gpu2", range(8))))

    async def found_empty() -> None:
        known = CachedUnits()
        known.note(other, [("gpu1", range(8, 12))])
        known.forget(["gpu1"])
        await noted(known, (MODEL, "gpu1", range(2)))

    run(found_empty())
    known = CachedUnits()
    assert known.of("gpu1", MODEL) == {0, 1}
    assert known.of("gpu1", other) == set()
    assert known.of("gpu2", MODEL) == set(range(8))


def test_the_file_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cached_units, "RECORDS_KEPT", 3)
    assert RECORDS_KEPT > 3
    run(noted(CachedUnits(), *((MODEL, f"gpu{number}", range(1)) for number in range(5))))
    assert [bool(CachedUnits().of(f"gpu{number}", MODEL)) for number in range(5)] == [
        False,
        False,
        True,
        True,
        True,
    ]


@pytest.mark.parametrize(
    "text",
    [
        "[{",
        "7",
        "[7]",
        '[{"cache": "gpu1"}]',
        json.dumps([{"cache": 1, "model": "m", "loaded_at": 0, "units": []}]),
        json.dumps([{"cache": "gpu1", "model": "m", "loaded_at": 0, "units": [[0, 10**9]]}]),
        json.dumps([{"cache": "gpu1", "model": "m", "loaded_at": 0, "units": [[3, 1]]}]),
        json.dumps([{"cache": "g" * 9999, "model": "m", "loaded_at": 0, "units": []}]),
    ],
)
def test_a_damaged_file_is_ignored_and_written_again(text: str) -> None:
    path = stored()
    path.write_text(text)
    path.chmod(0o600)
    known = CachedUnits()
    assert known.of("gpu1", MODEL) == set()
    run(noted(known, (MODEL, "gpu1", range(4))))
    assert CachedUnits().of("gpu1", MODEL) == set(range(4))


def test_runs() -> None:
    assert runs_of([5, 1, 2, 0, 7, 6]) == [range(3), range(5, 8)]
