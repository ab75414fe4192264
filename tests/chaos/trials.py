"""Trials: questions asked while faults strike, and the undisturbed answers to compare theirs with.

A trial is a function of the cluster and a seed. It returns its answers, or raises if an answer is missing or the
router reports the fault incorrectly.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest import mock

import psutil

from sollol_nb.errors import AnswerInterruptedError
from sollol_nb.llama_cpp.coordinators import pace
from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.runtime.events import Event, EventKind
from sollol_nb.runtime.io_loop import run_blocking
from sollol_nb.runtime.priority import Priority
from sollol_nb.sync_wrapper import HybridRouter
from tests.chaos.faults import FAULTS, QUICK_FAULTS, WORKER_KILLED, Fault, Scene
from tests.chaos.machines import COORDINATOR_PORT, Cluster
from tests.support.engines import HANG_GUARD_S, eventually, suspended
from tests.support.smollm2 import smollm2_path

MODEL = "demo:sharded"
WORKERS = 3
SLOTS = 4
STALL_S = 5.0
"""In place of the coordinators' `LOAD_STALL_S`, which is meant for models that take minutes to load."""
LIMIT_S = 60.0
"""For each answer and each start; whatever takes longer has failed."""
SOON_CHUNKS = 50
"""Within so many chunks no answer to `LONG` or `NOT_SO_LONG` has come to its end."""
PROMPT_RESULTS = 3
"""At least as many results of a machine's layers as the prompt of a question gives."""
SOON_S = 0.3
"""About as long as the demo model takes to load over three workers, or to read the long prompt."""


@dataclass(frozen=True)
class Question:
    """Something to ask at temperature 0.

    Attributes:
        options: further options of the request.
    """

    name: str
    text: str
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.name


_SCHEMA = {
    "type": "object",
    "properties": {
        "what": {"type": "string", "maxLength": 60},
        "parts": {"type": "array", "items": {"type": "string", "maxLength": 60}, "minItems": 2, "maxItems": 4},
        "count": {"type": "integer"},
    },
    "required": ["what", "parts", "count"],
}
HELLO = Question("a greeting", "Hello!", {"max_tokens": 1})
LONG = Question("a long answer", "Tell me everything about sharding.")
ACCENTS = Question("characters of many bytes", "Say something with accents and symbols.")
JSON = Question("a JSON schema", "What is a worker?", {"format": _SCHEMA, "max_tokens": 250})
LONG_PROMPT = Question("a long prompt", "A worker holds layers. " * 300 + "What is a worker?", {"max_tokens": 40})
NOT_SO_LONG = Question("200 tokens", LONG.text, {"max_tokens": 200})
QUESTIONS = (LONG, ACCENTS, JSON)


@dataclass(frozen=True)
class Subject:
    """A model, and what it is asked.

    Attributes:
        model: a name or the path of a file.
        options: of each request.
        questions: that a fault may strike.
        long: one with a long answer.
        long_prompt: one with a long prompt.
        others: that only some trials ask.
        always_identical: whether a fault must not change an answer.
    """

    model: str
    options: Mapping[str, Any]
    questions: tuple[Question, ...]
    long: Question
    long_prompt: Question
    others: tuple[Question, ...] = ()
    always_identical: bool = True

    @property
    def all(self) -> tuple[Question, ...]:
        """All questions, each once."""
        return tuple(dict.fromkeys((*self.questions, self.long, self.long_prompt, *self.others)))


def demo(**options: Any) -> Subject:
    """The demo model, which has learned its answers by heart: it never wavers between two tokens."""
    return Subject(MODEL, options, QUESTIONS, LONG, LONG_PROMPT, (NOT_SO_LONG,))


def smollm2(**options: Any) -> Subject:
    """A real instruct model, which does waver; over workers, though it is small."""
    engine = Question("an explanation", "Explain step by step how a steam engine works.", {"max_tokens": 80})
    story = Question("a story", "Write a long story about a lighthouse keeper.", {"max_tokens": 80})
    forest = Question("a description", "Describe a forest in winter.", {"max_tokens": 80})
    prompt = Question("a long prompt", "The lamp was lit. " * 60 + "What was lit?", {"max_tokens": 30})
    return Subject(
        str(smollm2_path()),
        {"backend": "sharded", **options},
        (engine, story, forest),
        engine,
        prompt,
        always_identical="deterministic" in options,
    )


@dataclass(frozen=True)
class Answer:
    """One answer, and how it was received.

    Attributes:
        chunks: how many were received.
        first_at: `time.perf_counter()` of the first.
        silence_s: the longest time without a chunk since the first fault; None if none struck.
        struck_characters: how many were received before the first fault.
    """

    question: Question
    text: str
    eval_count: int
    done_reason: str
    routing: Mapping[str, Any]
    chunks: int = 0
    first_at: float = 0.0
    silence_s: float | None = None
    struck_characters: int = 0

    @property
    def failovers(self) -> list[dict[str, Any]]:
        """Those of `_routing`."""
        return list(self.routing["failovers"])

    def differences(self, undisturbed: Answer) -> list[str]:
        """Where it differs from the undisturbed one, one line each."""
        return [
            f"{self.question}: {name} is {getattr(self, name)!r}, undisturbed {getattr(undisturbed, name)!r}"
            for name in ("text", "eval_count", "done_reason")
            if getattr(self, name) != getattr(undisturbed, name)
        ]


class Chaos:
    """A cluster to be broken, and the undisturbed answers of its model."""

    def __init__(self, cluster: Cluster, subject: Subject | None = None) -> None:
        self.cluster = cluster
        self.subject = subject = subject or demo()
        with self.scene(random.Random(0)) as scene:
            self._undisturbed = {question: ask(scene, question) for question in subject.all}

    @contextmanager
    def scene(self, rng: random.Random, *, wired: bool = False, **settings: Any) -> Iterator[Scene]:
        """A fresh router over machines that are well."""
        self.cluster.make_well()
        endpoints = [machine.wired_endpoint if wired else machine.endpoint for machine in self.cluster.machines]
        usual = {
            "num_rpc_backends": WORKERS,
            "auto_discover_rpc": False,
            "coordinator_port": COORDINATOR_PORT,
            "coordinator_timeout": LIMIT_S,
            "timeout": LIMIT_S,
            "slots": SLOTS,
            "keep_alive": "20s",
        }
        with HybridRouter(rpc_backends=endpoints, **{**usual, **settings}) as router:
            yield Scene(self.cluster, router, rng, self.subject.model, self.subject.options, wired)

    def undisturbed(self, question: Question) -> Answer:
        """The answer without any fault."""
        return self._undisturbed[question]

    def somewhere(self, rng: random.Random, question: Question) -> int:
        """The number of a chunk, except the last."""
        return rng.randint(1, self.undisturbed(question).chunks - 1)

    def before_the_end(self, rng: random.Random, question: Question) -> int:
        """The number of a chunk in the first half, after which the answer has certainly not been completed."""
        return rng.randint(1, self.undisturbed(question).chunks // 2)

    def differences(self, answers: list[Answer]) -> list[str]:
        """Where the answers differ from the undisturbed ones, one line each."""
        return [line for answer in answers for line in answer.differences(self.undisturbed(answer.question))]

    def problems(self, answers: list[Answer]) -> list[str]:
        """What must not be: differences, or, for a model whose answers may differ after a fault, lost ones."""
        if self.subject.always_identical:
            return self.differences(answers)
        return self.differences([answer for answer in answers if self.outcome(answer) == "lost"])

    def outcome(self, answer: Answer) -> str:
        """What became of an answer: one of `OUTCOMES`.

        A finished one has kept all text from before the fault and ended as the undisturbed one did, after as many
        tokens where that was stopped at its limit.
        """
        undisturbed = self.undisturbed(answer.question)
        if not answer.differences(undisturbed):
            return "identical"
        kept = undisturbed.text.startswith(answer.text[: answer.struck_characters])
        at_limit = answer.done_reason == undisturbed.done_reason == "length"
        ended = (
            answer.eval_count == undisturbed.eval_count if at_limit else answer.done_reason in ("stop", "length")
        )
        return "finished" if kept and ended else "lost"


OUTCOMES = ("identical", "finished", "lost")
"""Of an answer that a fault struck: the same as undisturbed; ended, with another text after the fault; neither."""

Trial = Callable[[Chaos, random.Random], list[Answer]]


def ask(
    scene: Scene, question: Question, at: Mapping[int, Callable[[], object]] | None = None, **more: Any
) -> Answer:
    """Ask, and do something right after the chunks of these numbers (from 1), before anything more is read."""
    options = {"temperature": 0, **scene.options, **question.options, **more}

    async def read() -> Answer:
        text, number, first_at, silence_s, struck_characters = "", 0, 0.0, None, 0
        seen_at = time.perf_counter()
        chunk: dict[str, Any] = {}
        async with aclosing(scene.router.stream_async(scene.model, question.text, **options)) as stream:
            async for chunk in stream:
                number += 1
                now = time.perf_counter()
                first_at = first_at or now
                if scene.struck_at is not None:
                    silence_s = max(silence_s or 0.0, now - max(seen_at, scene.struck_at))
                    struck_characters = struck_characters or len(text)
                seen_at = now
                text += chunk["message"]["content"]
                if at is not None and number in at:
                    at[number]()
        return Answer(
            question,
            text,
            chunk["eval_count"],
            chunk["done_reason"],
            chunk["_routing"],
            number,
            first_at,
            silence_s,
            struck_characters,
        )

    return run_blocking(read())


def coordinator_of(scene: Scene) -> Coordinator:
    """The scene's coordinator, which is started if none runs."""
    ask(scene, HELLO)
    coordinator = scene.router.coordinator
    assert coordinator is not None
    return coordinator


def _check_reported(scene: Scene, answer: Answer) -> None:
    """The answer reports the one fault that struck. If the engine had completed it before, nothing was started.

    The lost workers are those that were struck, and those that the end of their coordinator ended.
    """
    starts = [event.kind for event in scene.router.events.recent()].count(EventKind.COORDINATOR_STARTING)
    assert len(answer.failovers) == 1 or (not answer.failovers and starts == 1), answer.failovers
    for failover in answer.failovers:
        assert failover["continued"], failover
        assert failover["cost_ms"] is not None, failover
        lost = set(failover["lost_workers"])
        assert set(scene.lost) <= lost, failover
        for endpoint in lost - set(scene.lost):
            assert scene.cluster.machine(endpoint).has_broken_pipe, failover


# --- trials -----------------------------------------------------------------------------------


def one_fault(
    fault: Fault, chaos: Chaos, rng: random.Random, question: Question | None = None, *, at: int = 0
) -> list[Answer]:
    """A fault in mid-answer, which the answer's `_routing` and the latency row report.

    Args:
        at: the chunk after which it strikes; a random one by default.
    """
    question = question or rng.choice(chaos.subject.questions)
    at = at or chaos.somewhere(rng, question)
    with chaos.scene(rng, wired=fault.needs_wire) as scene:
        ask(scene, HELLO)
        answer = ask(scene, question, {at: partial(scene.strike, fault)})
        _check_reported(scene, answer)
        (row,) = scene.router.latency.frame(last=1).itertuples()
        assert (row.failovers, row.status, row.partial_text) == (len(answer.failovers), "ok", "")
        return [answer]


def two_faults(chaos: Chaos, rng: random.Random) -> list[Answer]:
    """A second fault later in the same answer, or while the first is being survived."""
    first, second, long = rng.choice(QUICK_FAULTS), rng.choice(FAULTS), chaos.subject.long
    with chaos.scene(rng, wired=first.needs_wire or second.needs_wire) as scene:
        ask(scene, HELLO)
        if rng.random() < 0.5:

            def both() -> None:
                scene.strike(first)
                late.append(scene.strike_later(second, SOON_S))

            late: list[Any] = []
            answer = ask(scene, long, {chaos.somewhere(rng, long): both})
            late[0].join()
        else:
            places = sorted((chaos.somewhere(rng, long), chaos.somewhere(rng, long)))
            strikes = [partial(scene.strike, first), partial(scene.strike, second)]
            answer = ask(scene, long, dict(zip(places, strikes, strict=True)))
        return [answer]


def all_dead_then_one_back(chaos: Chaos, rng: random.Random) -> list[Answer]:
    """No worker is left: the answer is interrupted, keeps its text, and is resumed once a worker is back."""
    question = rng.choice(chaos.subject.questions)
    with chaos.scene(rng, wired=True, speculation="off") as scene:  # a result for each token
        ask(scene, HELLO)
        at, undisturbed = chaos.before_the_end(rng, question), chaos.undisturbed(question)
        # A chunk may have several tokens. However late the reader is, the answer does not end before.
        scene.victim().swallow_after(at + undisturbed.eval_count - undisturbed.chunks + PROMPT_RESULTS)

        def all_die() -> None:
            for machine in chaos.cluster.machines:
                machine.kill()

        try:
            ask(scene, question, {at: all_die})
        except AnswerInterruptedError as error:
            interrupted = error
        else:
            raise AssertionError("it answered without workers")
        partial_text = interrupted.partial.text
        assert partial_text
        assert chaos.undisturbed(question).text.startswith(partial_text), partial_text
        (row,) = scene.router.latency.frame(last=1).itertuples()
        assert (row.status, row.partial_text) == ("error", partial_text)
        rng.choice(chaos.cluster.machines).make_well()
        done = scene.router.resume(interrupted)
        return [
            Answer(
                question,
                done.text,
                done["eval_count"],
                done.finish_reason,
                done.routing,
                silence_s=done.routing["ttft_ms"] / 1000,
                struck_characters=len(partial_text),
            )
        ]


def while_loading(chaos: Chaos, rng: random.Random) -> list[Answer]:
    """A worker dies while the model is being loaded over it; the load is tried again without it."""
    with chaos.scene(rng) as scene:
        strikes: list[Any] = []

        def strike_once(event: Event) -> None:
            if event.kind == "coordinator.starting" and not strikes:
                strikes.append(scene.strike_later(WORKER_KILLED, SOON_S))

        scene.router.events.subscribe(strike_once)
        answer = ask(scene, chaos.subject.long)
        strikes[0].join()
        return [answer]


def in_the_prompt(chaos: Chaos, rng: random.Random) -> list[Answer]:
    """A fault while a long prompt is being processed, or soon after the first tokens."""
    fault = rng.choice(QUICK_FAULTS)
    with chaos.scene(rng, wired=fault.needs_wire) as scene:
        ask(scene, HELLO)
        late = scene.strike_later(fault, SOON_S)
        answer = ask(scene, chaos.subject.long_prompt)
        late.join()
        return [answer]


def all_slots_busy(chaos: Chaos, rng: random.Random) -> list[Answer]:
    """Four answers run and two wait when a fault strikes; all are completed, the waiting ones in order."""
    fault = rng.choice(QUICK_FAULTS)
    with chaos.scene(rng, wired=fault.needs_wire) as scene, ThreadPoolExecutor(SLOTS + 2) as threads:
        coordinator = coordinator_of(scene)
        gate = coordinator.gate
        answers: list[Future[Answer]] = []

        def all_at_the_gate() -> bool:
            done = [answer.result() for answer in answers if answer.done()]
            assert not done, done
            return gate.running + gate.waiting == len(answers)

        def asked(question: Question, priority: int, at: Mapping[int, Callable[[], object]] | None = None) -> None:
            answers.append(threads.submit(ask, scene, question, at, priority=priority))
            eventually(all_at_the_gate, f"{len(answers)} requests are at the gate")

        # However quick the engine is, none of them ends before all are there.
        with mock.patch.object(pace, "MARGIN", math.inf), suspended(psutil.Process(coordinator.pid)):
            asked(LONG, Priority.NORMAL, {rng.randint(1, SOON_CHUNKS): partial(scene.strike, fault)})
            # A request that ends early frees a slot for the waiting ones, one after the other.
            for question in (*[LONG] * (SLOTS - 2), NOT_SO_LONG):
                asked(question, Priority.NORMAL)
            asked(ACCENTS, Priority.BATCH)
            asked(ACCENTS, Priority.HIGH)
        *running, low, high = (answer.result(HANG_GUARD_S) for answer in answers)
        assert high.first_at < low.first_at, "the request with the higher priority is first"
        for answer in running:
            _check_reported(scene, answer)
            assert len(answer.failovers) == 1, "they were far from their end"
        # The waiting requests were silent for other reasons.
        return [*running, replace(low, silence_s=None), replace(high, silence_s=None)]


ALL_SLOTS_BUSY = "all slots busy"
"""Only with the demo model: its answers do not depend on those beside them."""

TRIALS: dict[str, Trial] = {
    **{fault.name: partial(one_fault, fault) for fault in FAULTS},
    "two faults": two_faults,
    "all dead, one back": all_dead_then_one_back,
    "while loading": while_loading,
    "in the prompt": in_the_prompt,
    ALL_SLOTS_BUSY: all_slots_busy,
}
