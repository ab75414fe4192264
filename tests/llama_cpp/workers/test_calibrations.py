"""The file of calibrations: what a worker is known by, what is kept, and what a damaged file does."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from sollol_nb.layers.plan import THIS_MACHINE
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.workers import calibrations
from sollol_nb.llama_cpp.workers.calibrations import (
    CALIBRATIONS_KEPT,
    Calibration,
    Calibrations,
    calibrations_frame,
    identity_of,
)
from sollol_nb.llama_cpp.workers.workers import Workers
from sollol_nb.runtime.events import EventBus
from sollol_nb.settings import config
from tests.support.engines import run

pytestmark = pytest.mark.usefixtures("alone")

LOCAL = "127.0.0.1:50052"


def calibration(endpoint: str = LOCAL, **changes: Any) -> Calibration:
    values: dict[str, Any] = {
        "identity": identity_of(endpoint),
        "engine": "b1",
        "endpoint": endpoint,
        "name": endpoint,
        "measured_at": 1000.0,
        "round_trip_ms": 0.31,
        "bytes_per_s": 940e6,
        "hop_ms": 0.1,
        "block_ms": 0.02,
        "ms_per_byte": 1000 / 8.2e9,
        "prompt_ms_per_byte": 1000 / 95e9,
    }
    return Calibration(**{**values, **changes})


@pytest.fixture
def known() -> Calibrations:
    return Calibrations()


def stored() -> Path:
    return config.state_file("calibrations.json")


def test_it_describes_itself_as_networks_and_memories_are_named() -> None:
    assert calibration().describe() == "0.31 ms round trip, 940 MB/s, 8.2 GB/s tokens, 95 GB/s prompts"
    here = calibration(THIS_MACHINE, round_trip_ms=None, bytes_per_s=None, ms_per_byte=1000 / 1.2e12)
    assert here.describe() == "1.2 TB/s tokens, 95 GB/s prompts"


def test_another_process_reads_what_was_kept(known: Calibrations) -> None:
    mine, there = calibration(threads=2), calibration("10.0.0.7:50052", measured_at=2000.0)
    run(known.keep([there, mine]))

    assert Calibrations().all == [mine, there]
    assert known.of(mine.identity) == mine
    assert stored().stat().st_mode & 0o077 == 0


def test_a_worker_behind_a_link_is_known_by_its_name_not_by_its_port() -> None:
    before, after = (identity_of(f"127.0.0.1:{port}", target="ssh://gpu1", name="gpu1/CUDA0") for port in (1, 2))

    assert before == after != identity_of("127.0.0.1:1", target="ssh://gpu2", name="gpu1/CUDA0")


def test_a_loopback_worker_is_one_of_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    here = {endpoint: identity_of(endpoint) for endpoint in (LOCAL, THIS_MACHINE, "10.0.0.7:50052")}
    monkeypatch.setattr(calibrations.platform, "node", lambda: "another")

    assert identity_of(LOCAL) != here[LOCAL], "home folders are shared between machines"
    assert identity_of(THIS_MACHINE) != here[THIS_MACHINE]
    assert identity_of("10.0.0.7:50052") == here["10.0.0.7:50052"]


def test_a_local_worker_stands_for_those_with_as_many_threads(known: Calibrations) -> None:
    run(known.keep([calibration(threads=2)]))

    assert known.of(identity_of("127.0.0.1:50053"), threads=2) == calibration(threads=2)
    assert known.of(identity_of("127.0.0.1:50053"), threads=1) is None
    assert known.of(identity_of(LOCAL), threads=1) is None, "it was started again with another number"
    assert known.of(identity_of("127.0.0.1:50053")) is None, "nothing is known about who started it"


def test_only_the_build_that_is_used_counts(known: Calibrations) -> None:
    old, new = calibration(measured_at=2000.0), calibration(engine="b2")
    run(known.keep([old, new]))

    assert known.of(old.identity) == old, "the newest, while the build is not known"
    known.engine = "b2"
    assert known.of(old.identity) == new
    known.engine = "b3"
    assert known.of(old.identity) is None


def test_a_router_predicts_from_calibrations_of_the_build_that_it_uses(known: Calibrations) -> None:
    older, newer = calibration(), calibration(engine="b2", measured_at=2000.0)
    run(known.keep([older, newer]))
    router_workers = Workers([LOCAL], EventBus())

    assert router_workers.calibration_of(LOCAL) == newer
    router_workers.use_engine(Engine(server=Path("server"), worker=Path("worker"), version="b1", source="PATH"))
    assert router_workers.calibration_of(LOCAL) == older


def test_answers_correct_a_calibration_step_by_step(known: Calibrations) -> None:
    slow, other = calibration(), calibration("10.0.0.7:50052")
    run(known.keep([slow, other]))
    for _ in range(8):
        factor = 4 * slow.ms_per_byte / known.of(slow.identity).ms_per_byte  # type: ignore[union-attr]
        run(known.correct({slow.identity: factor, "never measured": 2.0}))

    corrected = known.of(slow.identity)
    assert corrected is not None
    assert corrected.corrections == 8
    assert corrected.ms_per_byte == pytest.approx(4 * slow.ms_per_byte, rel=0.15)
    assert replace(corrected, ms_per_byte=slow.ms_per_byte, corrections=0) == slow
    assert known.of(other.identity) == other


def test_answers_of_a_local_worker_correct_the_calibration_that_stands_for_it(
    known: Calibrations, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, earlier = "127.0.0.1:50053", calibration("127.0.0.1:50053", threads=1)
    run(known.keep([calibration(threads=2), earlier]))
    router_workers = Workers([here], EventBus())
    monkeypatch.setattr(router_workers.local, "threads_of", lambda _: 2)

    run(router_workers.correct_calibrations({here: 4.0, "10.0.0.7:50052": 4.0}))

    found = {kept.endpoint: kept for kept in Calibrations().all}
    assert found[here] == earlier
    assert found[LOCAL].corrections == 1


def test_the_oldest_are_forgotten(known: Calibrations) -> None:
    count = CALIBRATIONS_KEPT + 5
    run(known.keep(calibration(f"10.0.0.7:{port}", measured_at=port) for port in range(1, count + 1)))

    assert [kept.measured_at for kept in Calibrations().all] == list(range(6, count + 1))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{not JSON",
        "[" * 100_000,
        "17",
        "[17]",
        '[{"identity": "x"}]',
        json.dumps([asdict(calibration()) | {"ms_per_byte": "fast"}]),
        json.dumps([asdict(calibration()) | {"ms_per_byte": -1}]),
        json.dumps([asdict(calibration()) | {"hop_ms": float("nan")}]),
        json.dumps([asdict(calibration()) | {"identity": 3}]),
        json.dumps([asdict(calibration()) | {"threads": [1]}]),
    ],
    ids=range(11),
)
def test_a_damaged_file_is_ignored_with_one_line(text: str, caplog: pytest.LogCaptureFixture) -> None:
    stored().write_text(text)
    known = Calibrations()

    assert (known.all, known.all) == ([], [])
    assert [record.message for record in caplog.records] == [
        f"{stored()} is damaged and is ignored; `sollol-nb calibrate` writes it again"
    ]
    run(known.keep([calibration()]))
    assert Calibrations().all == [calibration()]


def test_a_newer_version_may_have_added_keys(known: Calibrations) -> None:
    stored().write_text(json.dumps([asdict(calibration()) | {"colour": "red"}]))

    assert known.all == [calibration()]


def test_the_frame_has_a_row_for_each(known: Calibrations) -> None:
    here = calibration(THIS_MACHINE, round_trip_ms=None, bytes_per_s=None)
    frame = calibrations_frame([here, calibration(threads=2)])

    assert list(frame["name"]) == [THIS_MACHINE, LOCAL]
    assert list(frame["round_trip_ms"].isna()) == [True, False]
    assert str(frame["measured_at"].dt.tz) == "UTC"
    assert calibrations_frame([]).dtypes.equals(frame.dtypes)
