"""Machines and requests after a fault: they return, cool down, give up, are given up."""

from __future__ import annotations

import asyncio
import random
import re
import sys
import threading
from collections.abc import Callable
from contextlib import aclosing

import pytest

from sollol_nb.errors import AnswerInterruptedError, WorkersUnavailableError
from sollol_nb.llama_cpp.coordinators import running
from sollol_nb.llama_cpp.workers import losses
from sollol_nb.runtime.events import Event
from tests.chaos.faults import COORDINATOR_FROZEN, COORDINATOR_KILLED, WORKER_KILLED, Scene
from tests.chaos.machines import Machine
from tests.chaos.trials import ACCENTS, HELLO, LONG, MODEL, SOON_S, Answer, Chaos, ask, coordinator_of
from tests.support.engines import HANG_GUARD_S, eventually

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals"),
]

HELD_AFTER = 20
"""Results of a machine's layers, after which its wire holds an answer: more than 5 chunks of `ACCENTS`, and less
than all, however late the reader is."""


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(request.node.name)


def used(scene: Scene) -> list[Machine]:
    """The machines of a newly planned coordinator."""
    scene.router.stop_coordinator()
    return [scene.cluster.machine(endpoint) for endpoint in coordinator_of(scene).rpc_backends]


def kinds(scene: Scene) -> list[str]:
    return [event.kind for event in scene.router.events.recent()]


def is_undisturbed(chaos: Chaos, answer: Answer) -> bool:
    assert not chaos.differences([answer])
    return True


# --- machines ---------------------------------------------------------------------------------


def test_a_spare_machine_takes_the_place_of_a_lost_one_until_that_is_back(
    chaos: Chaos, rng: random.Random
) -> None:
    *first, spare = chaos.cluster.machines
    with chaos.scene(rng) as scene:
        assert used(scene) == first
        answer = ask(scene, ACCENTS, {5: lambda: scene.strike(WORKER_KILLED)})
        assert is_undisturbed(chaos, answer)
        lost = scene.cluster.machine(scene.lost[0])
        assert set(used(scene)) == {*first, spare} - {lost}
        assert "worker.lost" in kinds(scene)
        lost.make_well()
        assert used(scene) == first
        assert "worker.returned" in kinds(scene)


def test_a_machine_that_is_lost_again_and_again_cools_down(
    chaos: Chaos, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    *first, spare = chaos.cluster.machines
    flapping = first[1]
    with chaos.scene(rng, wired=True, speculation="off") as scene:  # a result for each token
        for _ in range(2):
            assert used(scene) == first
            flapping.swallow_after(HELD_AFTER)
            assert is_undisturbed(chaos, ask(scene, ACCENTS, {5: flapping.kill}))
            flapping.make_well()
        calm = {first[0], first[2], spare}
        assert set(used(scene)) == calm, "it is well, but not used"
        for machine in calm:
            machine.kill()
        assert used(scene) == [flapping], "better than none"
        chaos.cluster.make_well()
        monkeypatch.setattr(losses, "FIRST_COOL_DOWN_S", 0.0)
        assert used(scene) == first


def test_a_machine_that_dies_between_answers_costs_the_next_one_nothing(
    chaos: Chaos, rng: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "CHECK_INTERVAL_S", 0.1)
    with chaos.scene(rng) as scene:
        before = coordinator_of(scene)
        scene.strike(WORKER_KILLED)
        eventually(lambda: not before.is_running(), "the idle coordinator is ended")
        answer = ask(scene, ACCENTS)
        assert is_undisturbed(chaos, answer)
        assert answer.failovers == []


@pytest.mark.parametrize(
    ("wired", "begins", "ends"),
    [(False, Machine.freeze, Machine.thaw), (True, Machine.swallow, Machine.pass_again)],
    ids=["worker", "link"],
)
def test_a_short_silence_is_waited_for(
    chaos: Chaos,
    rng: random.Random,
    wired: bool,
    begins: Callable[[Machine], None],
    ends: Callable[[Machine], None],
) -> None:
    with chaos.scene(rng, wired=wired) as scene:
        before = coordinator_of(scene)
        victim = scene.victim()

        def pauses() -> None:
            begins(victim)
            threading.Timer(SOON_S, ends, (victim,)).start()

        answer = ask(scene, ACCENTS, {5: pauses})
        assert is_undisturbed(chaos, answer)
        assert answer.failovers == []
        assert scene.router.coordinator is before


def test_a_coordinator_that_freezes_is_ended_for_its_silence(chaos: Chaos, rng: random.Random) -> None:
    with chaos.scene(rng) as scene:
        ask(scene, HELLO)
        answer = ask(scene, LONG, {5: lambda: scene.strike(COORDINATOR_FROZEN)})
        assert is_undisturbed(chaos, answer)
        (failover,) = answer.failovers
        assert re.search(r"ended \(signal 9\): it went silent for \d+\.\d s; log: ", failover["what"])

        def ended() -> list[str]:
            return [event.message for event in scene.router.events.recent() if event.kind == "coordinator.stopped"]

        message, *_ = eventually(ended, "its end is published")
        assert re.fullmatch(rf"{MODEL} ended: it went silent for \d+\.\d s", message)


def test_a_machine_that_freezes_while_it_is_being_loaded_is_given_up(chaos: Chaos, rng: random.Random) -> None:
    frozen = chaos.cluster.machines[1]

    def freeze_once(event: Event) -> None:
        if event.kind == "coordinator.starting" and frozen.is_well:
            frozen.freeze()

    with chaos.scene(rng) as scene:
        scene.router.events.subscribe(freeze_once)
        answer = ask(scene, ACCENTS)
        assert is_undisturbed(chaos, answer)
        assert scene.router.coordinator is not None
        assert frozen.endpoint not in scene.router.coordinator.rpc_backends
        assert "coordinator.failed" in kinds(scene)


# --- requests ---------------------------------------------------------------------------------


def test_a_request_that_loses_every_coordinator_gives_up_and_can_be_resumed(
    chaos: Chaos, rng: random.Random
) -> None:
    def kill_it(event: Event) -> None:
        if event.kind == "coordinator.ready":
            COORDINATOR_KILLED.strike(scene)

    with chaos.scene(rng) as scene:
        ask(scene, HELLO)
        unsubscribe = scene.router.events.subscribe(kill_it)
        with pytest.raises(AnswerInterruptedError, match="lost") as caught:
            ask(scene, LONG, {50: lambda: scene.strike(COORDINATOR_KILLED)})
        unsubscribe()
        undisturbed = chaos.undisturbed(LONG)
        assert undisturbed.text.startswith(caught.value.partial.text)
        done = scene.router.resume(caught.value)
        assert (done.text, done["eval_count"]) == (undisturbed.text, undisturbed.eval_count)


def test_a_second_resume_is_possible_when_the_first_finds_nobody(chaos: Chaos, rng: random.Random) -> None:
    with chaos.scene(rng) as scene:
        ask(scene, HELLO)

        def all_die() -> None:
            for machine in chaos.cluster.machines:
                machine.kill()

        with pytest.raises(AnswerInterruptedError) as caught:
            ask(scene, LONG, {50: all_die})
        with pytest.raises(WorkersUnavailableError, match="none of 4 is free"):
            scene.router.resume(caught.value)
        chaos.cluster.make_well()
        assert scene.router.resume(caught.value).text == chaos.undisturbed(LONG).text


def test_a_request_can_be_cancelled_while_its_coordinator_is_replaced(chaos: Chaos, rng: random.Random) -> None:
    restarts = threading.Event()

    def on_event(event: Event) -> None:
        if event.kind == "coordinator.starting":
            restarts.set()

    async def cancelled() -> None:
        async def read() -> None:
            async with aclosing(scene.router.stream_async(MODEL, LONG.text, temperature=0)) as stream:
                async for _ in stream:
                    if not restarts.is_set():
                        COORDINATOR_KILLED.strike(scene)

        reading = asyncio.create_task(read())
        await asyncio.to_thread(restarts.wait, HANG_GUARD_S)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading

    with chaos.scene(rng) as scene:
        gate = coordinator_of(scene).gate
        scene.router.events.subscribe(on_event)
        asyncio.run(cancelled())
        eventually(lambda: not gate.running, "its slot is free")
        assert is_undisturbed(chaos, ask(scene, ACCENTS))


def test_a_router_can_be_closed_while_a_coordinator_is_replaced(chaos: Chaos, rng: random.Random) -> None:
    restarts = threading.Event()

    def on_event(event: Event) -> None:
        if event.kind == "coordinator.starting":
            restarts.set()

    with chaos.scene(rng) as scene:
        ask(scene, HELLO)
        scene.router.events.subscribe(on_event)

        def closed() -> None:
            restarts.wait(HANG_GUARD_S)
            scene.router.close()

        closing = threading.Thread(target=closed)
        closing.start()
        with pytest.raises(AnswerInterruptedError, match="closed"):
            ask(scene, LONG, {50: lambda: scene.strike(COORDINATOR_KILLED)})
        closing.join(HANG_GUARD_S)
        assert not closing.is_alive()
