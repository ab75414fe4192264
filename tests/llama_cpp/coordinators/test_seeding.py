"""A machine that has the model's file itself seeds its worker's cache from it, and next to nothing is sent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sollol_nb.gguf.facts import read_facts
from sollol_nb.llama_cpp.coordinators import seeding
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.runtime.events import Event, EventKind
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import posix_only
from tests.support.gguf_files import write_heavy
from tests.support.machines import Machine, running_machines, short_folder, wait_gone
from tests.support.supervised import nothing_is_left

pytestmark = [pytest.mark.engine, posix_only]


@pytest.fixture(scope="module")
def gpu1() -> Iterator[Machine]:
    with short_folder() as folder, running_machines(folder, ["gpu1"]) as (machine,):
        yield machine


@pytest.fixture(autouse=True)
def over_a_slow_link(gpu1: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The machine counts as another one, at the end of a link on which nobody wants to wait."""
    state = tmp_path / "state"
    monkeypatch.setenv("SOLLOL_STATE_DIR", str(state))
    monkeypatch.setenv("SOLLOL_SSH", gpu1.ssh)
    monkeypatch.setenv("SOLLOL_TENSOR_CACHE_GB", "50")
    monkeypatch.setattr(seeding, "boot_id", lambda: "another machine")
    monkeypatch.setattr(seeding, "USUAL_BYTES_PER_S", 1e6)
    yield
    wait_gone(gpu1)
    nothing_is_left(state)


def received_bytes(machine: Machine) -> int:
    """What came over its link so far."""
    (line,) = (line for line in machine.run("cat", "/proc/net/dev").splitlines() if "eth0" in line)
    return int(line.partition(":")[2].split()[0])


def test_next_to_nothing_is_sent_to_a_machine_that_has_the_file(
    gpu1: Machine, engine: Engine, tmp_path: Path
) -> None:
    model = write_heavy(tmp_path / "heavy.gguf", blocks=4)  # at the same path there
    weights = sum(read_facts(model).layer_bytes)
    before: list[int] = []
    messages: list[str] = []

    def note(event: Event) -> None:
        if event.kind == EventKind.WORKER_SEEDED:
            before.append(received_bytes(gpu1))
        if event.kind in (EventKind.WORKER_SEEDED, EventKind.COORDINATOR_LOADING):
            messages.append(event.message)

    with HybridRouter(
        rpc_backends=[gpu1.target], auto_discover_rpc=False, auto_setup_rpc=False, context_tokens=512
    ) as router:
        router.events.subscribe(note)
        answer = router.route_request(str(model), "hello", backend="sharded", max_tokens=1, temperature=0)
        assert answer.routing["load_ms"] > 0
        sent = received_bytes(gpu1) - before[0]
    assert len(before) == 1
    assert messages[0].startswith("seeding gpu1 from its own copy of heavy: 0 % (0 B of ")
    assert [message for message in messages if message.startswith("gpu1 was")] == [
        "gpu1 was seeded from its own copy of heavy: 144.0 MiB need not be sent"
    ]
    assert sent <= 0.01 * weights


def test_what_cannot_be_seeded_is_sent_and_one_event_says_why(
    gpu1: Machine, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_heavy(tmp_path / "heavy.gguf", blocks=2, feed_forward=41_000)
    monkeypatch.setattr(seeding, "SHORTEST_LIMIT_S", 0.1)
    monkeypatch.setattr(seeding, "USUAL_BYTES_PER_S", 1e12)
    monkeypatch.setattr(seeding, "LEAST_GAIN_S", -1e9)
    with HybridRouter(
        rpc_backends=[gpu1.target], auto_discover_rpc=False, auto_setup_rpc=False, context_tokens=512
    ) as router:
        answer = router.route_request(str(model), "hello", backend="sharded", max_tokens=1, temperature=0)
        assert answer.routing["load_ms"] > 0
        events = [event for event in router.events.recent() if event.kind == EventKind.WORKER_SEEDED]
    (event,) = events
    why = "seeding gpu1 took longer than 0.1 s"
    assert event.message == f"gpu1 was not seeded from its own copy of heavy, so its layers are sent: {why}"
