"""Measure how fast free workers and the devices of this machine are, with throw-away coordinators of small
generated models.

Each device runs four models alone, one after the other (`calibration_models.py`). Their times for a token are the
unknowns of equations: with r the round trip, which is measured by probes,

    narrow = own + r + hop + 1 block
    deep   = own + r + hop + 17 blocks
    wide   = own + r + hop + 10 blocks + 72 MB in Q4_K
    light  = own + r + hop + 5 blocks + 69 MB in Q8_0

and the wide model's tokens behind a longer prompt take longer by what its K and V take, where own is what the
coordinator itself spends, which is measured without workers. Bytes per second are those that the operating system
counts while the wide model is sent.

A worker is claimed as for a model, so that nobody else takes it during the measurement; one that is held or busy
is left alone. Workers of one machine are measured one after the other, different machines at the same time.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from statistics import median

from sollol_nb.errors import (
    ConfigError,
    CoordinatorError,
    CoordinatorStartError,
    SollolError,
    TransportError,
    WorkersUnavailableError,
)
from sollol_nb.gguf.facts import read_facts
from sollol_nb.layers.plan import THIS_MACHINE, is_own
from sollol_nb.layers.planner import plan_from_counts
from sollol_nb.layers.strategies import WorkerCapacity
from sollol_nb.llama_cpp.coordinators.calibration_models import (
    ALL,
    CONTEXT_TOKENS,
    DEEP,
    LIGHT,
    NARROW,
    Q4_K_BYTES,
    Q4_K_WEIGHTS,
    Q8_0_BYTES,
    Q8_0_WEIGHTS,
    WIDE,
    CalibrationModel,
)
from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.llama_cpp.coordinators.readiness import PortTakenError
from sollol_nb.llama_cpp.coordinators.settings import CoordinatorSettings
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.machine import free_ports
from sollol_nb.llama_cpp.processes.traffic import delivered_bytes
from sollol_nb.llama_cpp.workers.calibrations import Calibration, identity_of
from sollol_nb.llama_cpp.workers.status import WorkerStatus
from sollol_nb.llama_cpp.workers.workers import Workers
from sollol_nb.runtime.events import EventBus, EventKind
from sollol_nb.settings.endpoints import SSH, addresses_of, is_loopback, is_target, parse_endpoint

MODEL_NAME = "a calibration"
LIMIT_S = 120.0
"""For one worker; over a slow network, sending the model takes most of it."""
LEFT_ALONE_S = 15.0
"""A coordinator ends this long after its kernel has died."""
PROBES = 5
PROMPT_TOKENS = 64
LONG_PROMPT_TOKENS = 320
"""Behind a prompt of these, the wide model's K and V take about as long as its weights."""
LIGHTER = 1 - (Q8_0_WEIGHTS / Q8_0_BYTES) / (Q4_K_WEIGHTS / Q4_K_BYTES)
"""By which share a byte of Q8_0 holds fewer weights than one of Q4_K."""
GENERATED_TOKENS = 8
MIN_MEASUREMENTS, MIN_MEASURED_S = 3, 0.2
"""Each time is measured at least this often, and for at least this long."""
TOKENS_LIMIT_S, PROMPTS_LIMIT_S = 0.8, 0.8
"""No measurement is repeated after this time: for the tokens and the prompts of one model."""
CLOSE_SHARE = 0.05
"""Measurements are close together if they differ by at most this share."""
COUNT_EVERY_S = 0.01
FIRST_SHARE, LAST_SHARE = 0.15, 0.98


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """The result of measuring a worker.

    Attributes:
        endpoint: the worker, `THIS_MACHINE`, or what stands for one of its GPUs.
        name: how people call it.
        calibration: the result; None if it could not be measured.
        problem: why not; "" if it was measured.
    """

    endpoint: str
    name: str
    calibration: Calibration | None = None
    problem: str = ""

    def __str__(self) -> str:
        return f"{self.name}: {self.calibration.describe() if self.calibration else self.problem}"


@dataclass(frozen=True, slots=True)
class _Run:
    """One model on one worker.

    Attributes:
        token_ms: for a token.
        prompt_ms, behind_ms: for a prompt, and for a token behind a long one; 0 if that was not measured.
        weight_bytes: which it reads for a token.
        kv_bytes: which it reads more behind a long prompt.
        bytes_per_s: at which it was sent.
    """

    token_ms: float
    prompt_ms: float
    behind_ms: float
    weight_bytes: int
    kv_bytes: int
    bytes_per_s: float | None


class Calibrator:
    """Measures the workers of one router. Lives on the I/O loop."""

    def __init__(self, workers: Workers, events: EventBus) -> None:
        self._workers = workers
        self._events = events
        self._next_port = 0
        self._ending: set[asyncio.Task[object]] = set()

    async def calibrate(
        self, engine: Engine, endpoints: Iterable[str] | None, first_port: int
    ) -> list[Calibrated]:
        """Measure this machine with its GPUs and all known workers, or these; keep the results.

        Args:
            endpoints: workers, by endpoint or name; `THIS_MACHINE` (also its GPUs), or one of its GPUs.
            first_port: the first port to try for the coordinators.

        Returns:
            This machine first, then the workers in the order of `endpoints`. A worker that is not free, or is lost
            during the measurement, is among them with its problem.

        Raises:
            ConfigError: a worker of `endpoints` is not known.
            EngineError: the models cannot be written.
            EngineIncompatibleError: the engine speaks another RPC protocol than workers do.
        """
        self._workers.use_engine(engine)
        await self._workers.own.refresh(engine)
        gpus = [endpoint for endpoint in self._workers.own.endpoints() if endpoint != THIS_MACHINE]
        self._next_port = 0
        statuses = {worker.endpoint: worker for worker in await self._workers.refresh()}
        if endpoints is None:
            wanted = [THIS_MACHINE, *gpus, *(known for known in statuses if statuses[known].state != "duplicate")]
        else:
            found = (_named(name, statuses, gpus) for name in endpoints)
            wanted = list(dict.fromkeys(chain.from_iterable(found)))
        for model in ALL:
            await asyncio.to_thread(model.path)
        own = self._workers.calibrations.of(identity_of(THIS_MACHINE))
        results: dict[str, Calibrated] = {}
        if THIS_MACHINE in wanted or own is None:
            results[THIS_MACHINE] = await self._reported(engine, THIS_MACHINE, first_port, own_ms=0.0)
            own = results[THIS_MACHINE].calibration or own
        own_ms = own.hop_ms if own else 0.0
        for gpu in gpus:
            if gpu in wanted:
                results[gpu] = await self._reported(engine, gpu, first_port, own_ms=own_ms)
        machines: defaultdict[str, list[WorkerStatus]] = defaultdict(list)
        for endpoint in wanted:
            if not is_own(endpoint):
                machines[_machine_of(statuses[endpoint])].append(statuses[endpoint])

        async def measure(of_one_machine: Sequence[WorkerStatus]) -> list[Calibrated]:
            return [
                await self._reported(engine, worker.endpoint, first_port, own_ms=own_ms)
                for worker in of_one_machine
            ]

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(measure(of_one_machine)) for of_one_machine in machines.values()]
        results |= {result.endpoint: result for result in chain.from_iterable(task.result() for task in tasks)}
        order = [endpoint for endpoint in results if endpoint not in wanted] + wanted
        return [results[endpoint] for endpoint in order]

    async def _reported(self, engine: Engine, endpoint: str, first_port: int, *, own_ms: float) -> Calibrated:
        """Measure one worker or own device; keep the result, and publish it."""
        name = self._workers.name_of(endpoint)
        problem, calibration = "", None
        try:
            async with asyncio.timeout(LIMIT_S):
                calibration = await self._measure(engine, endpoint, name, first_port, own_ms)
            await self._workers.calibrations.keep([calibration])
        except TimeoutError:
            problem = f"not measured within {LIMIT_S:g} s; check its network and what else runs there"
        except (CoordinatorError, TransportError) as error:
            was_lost = not is_own(endpoint) and await self._workers.find_lost([endpoint])
            problem = "it was lost while it was measured" if was_lost else f"not measured: {error}"
        except SollolError as error:
            problem = f"not measured: {error}"
        result = Calibrated(endpoint=endpoint, name=name, calibration=calibration, problem=problem)
        self._events.publish(EventKind.WORKER_CALIBRATED, endpoint, str(result), error=problem or None)
        return result

    async def _measure(
        self, engine: Engine, endpoint: str, name: str, first_port: int, own_ms: float
    ) -> Calibration:
        round_trip_ms = None if is_own(endpoint) else await self._round_trip_ms(self._status(endpoint))
        runs = []
        for step, model in enumerate(ALL, start=1):
            message = f"measuring {name}: {step} of {len(ALL)}"
            self._events.report(EventKind.WORKER_CALIBRATING, endpoint, message, step=step, steps=len(ALL))
            runs.append(await self._run(engine, endpoint, model, first_port))
        narrow, deep, wide, light = runs
        block_ms = max(0.0, deep.token_ms - narrow.token_ms) / (DEEP.blocks - NARROW.blocks)
        overhead_ms = max(0.0, narrow.token_ms - NARROW.blocks * block_ms)
        weights_ms = wide.token_ms - overhead_ms - WIDE.blocks * block_ms
        prompt_overhead_ms = overhead_ms + WIDE.blocks * block_ms
        # Where a device is too fast for the difference to show, the whole is an upper limit.
        weights_ms = weights_ms if weights_ms > 0 else wide.token_ms
        light_ms = light.token_ms - overhead_ms - LIGHT.blocks * block_ms
        faster = 1 - (light_ms / light.weight_bytes) / (weights_ms / wide.weight_bytes)
        return Calibration(
            identity=self._workers.identity_of(endpoint),
            engine=engine.version,
            endpoint=endpoint,
            name=name,
            measured_at=time.time(),
            round_trip_ms=round_trip_ms,
            bytes_per_s=wide.bytes_per_s,
            hop_ms=max(0.0, overhead_ms - own_ms - (round_trip_ms or 0.0)),
            block_ms=block_ms,
            ms_per_byte=weights_ms / wide.weight_bytes,
            prompt_ms_per_byte=max(wide.prompt_ms - prompt_overhead_ms, 0.0) / PROMPT_TOKENS / wide.weight_bytes,
            threads=await self._threads_of(endpoint),
            weight_share=min(max(faster / LIGHTER, 0.0), 1.0),
            context_ms_per_byte=max(wide.behind_ms - wide.token_ms, 0.0) / wide.kv_bytes,
        )

    async def _round_trip_ms(self, worker: WorkerStatus) -> float:
        """The median of probes, each the fastest of its own round trips.

        Raises:
            WorkersUnavailableError: it does not answer, or somebody has taken it.
        """
        found = []
        if is_target(worker.endpoint) or worker.state == "duplicate":  # there is nothing to probe
            raise WorkersUnavailableError(worker.problem)
        for _ in range(PROBES):
            await self._workers.probe([worker.endpoint])
            seen = self._status(worker.endpoint)
            if seen.state != "free" or seen.probe is None or seen.probe.round_trip_ms is None:
                raise WorkersUnavailableError(seen.problem)
            found.append(seen.probe.round_trip_ms)
        return median(found)

    async def _threads_of(self, endpoint: str) -> int | None:
        """Threads of a worker that was started on this machine, by whichever kernel."""
        entries = await asyncio.to_thread(self._workers.entries_of, [endpoint])
        threads = [entry.about.get("threads") for entry in entries if entry.kind == registry.WORKER]
        return threads[0] if threads and isinstance(threads[0], int) else None

    def _status(self, endpoint: str) -> WorkerStatus:
        for worker in self._workers.statuses():
            if worker.endpoint == endpoint:
                return worker
        raise WorkersUnavailableError(f"{endpoint} was removed")

    async def _run(self, engine: Engine, endpoint: str, model: CalibrationModel, first_port: int) -> _Run:
        """One model on one worker, or on one own device."""
        try:
            return await self._run_once(engine, endpoint, model, first_port)
        except PortTakenError:  # another kernel was quicker
            return await self._run_once(engine, endpoint, model, first_port)
        except CoordinatorStartError as error:
            own = self._workers.own
            if endpoint != THIS_MACHINE or not error.is_crash or not own.repacks_weights:
                raise
            own.repacks_weights = False  # as for models with layers there
            return await self._run_once(engine, endpoint, model, first_port)

    def _capacity_of(self, endpoint: str) -> WorkerCapacity:
        if not is_own(endpoint):
            return self._status(endpoint).capacity
        for capacity in self._workers.own.capacities():
            if capacity.endpoint == endpoint:
                return capacity
        raise WorkersUnavailableError(f"{endpoint} is not found any more")

    async def _run_once(self, engine: Engine, endpoint: str, model: CalibrationModel, first_port: int) -> _Run:
        facts = await asyncio.to_thread(lambda: read_facts(model.path()))
        plan = plan_from_counts(
            facts, [self._capacity_of(endpoint)], [facts.layer_count + 1], context_tokens=CONTEXT_TOKENS
        )
        settings = CoordinatorSettings(
            model=MODEL_NAME,
            model_path=facts.path,
            facts=facts,
            plan=plan,
            context_tokens=CONTEXT_TOKENS,
            slots=1,
            may_use_gpus=self._workers.may_be_gpus([endpoint]),
            repacks_weights=self._workers.own.repacks_weights,
        )
        async with self._launched(engine, settings, first_port) as coordinator:
            counting = asyncio.create_task(_count_bytes(coordinator))
            try:
                await coordinator.until_ready(LIMIT_S)
            finally:
                counting.cancel()
                await asyncio.wait({counting})
            sent = [] if counting.cancelled() else counting.result()
            long_prompt = [3 + position % 256 for position in range(LONG_PROMPT_TOKENS)]
            prompt = long_prompt[:PROMPT_TOKENS]

            async def token_ms() -> float:
                return (await coordinator.timings(prompt[:1], GENERATED_TOKENS, timeout_s=LIMIT_S)).token_ms

            async def prompt_ms() -> float:
                return (await coordinator.timings(prompt, 1, timeout_s=LIMIT_S)).prompt_ms

            async def behind_ms() -> float:
                timings = await coordinator.timings(long_prompt, GENERATED_TOKENS, timeout_s=LIMIT_S, anew=False)
                return timings.token_ms

            return _Run(
                token_ms=await _measured(token_ms, TOKENS_LIMIT_S),
                prompt_ms=await _measured(prompt_ms, PROMPTS_LIMIT_S) if model is WIDE else 0.0,
                behind_ms=await _measured(behind_ms, TOKENS_LIMIT_S) if model is WIDE else 0.0,
                weight_bytes=sum(facts.layer_bytes) + facts.output_bytes,
                kv_bytes=(LONG_PROMPT_TOKENS - 1) * sum(facts.layer_kv_bytes_per_token),
                bytes_per_s=_speed(sent),
            )

    @asynccontextmanager
    async def _launched(
        self, engine: Engine, settings: CoordinatorSettings, first_port: int
    ) -> AsyncGenerator[Coordinator, None]:
        """A coordinator that holds its worker, and has ended afterwards, whatever happens."""
        launching = asyncio.create_task(self._launch(engine, settings, first_port))
        try:
            coordinator = await asyncio.shield(launching)
        except asyncio.CancelledError:
            with suppress(SollolError):
                await (await launching).stop(grace_s=0.0)
            raise
        try:
            yield coordinator
        finally:
            # Also if this is cancelled once more, which would lose the task without a reference.
            ending: asyncio.Task[object] = asyncio.create_task(coordinator.stop(grace_s=0.0))
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)
            await asyncio.shield(ending)

    async def _launch(self, engine: Engine, settings: CoordinatorSettings, first_port: int) -> Coordinator:
        endpoints = settings.plan.endpoints if settings.plan else ()
        async with registry.claims():
            if await self._workers.held_among(endpoints):
                raise WorkersUnavailableError(self._status(endpoints[0]).problem)
            # One that was launched just now does not listen yet.
            (port,) = free_ports(max(first_port, self._next_port), 1)
            self._next_port = port + 1
            coordinator = await Coordinator.launch(
                engine,
                settings,
                port=port,
                keep_alive_s=LEFT_ALONE_S,
                about={"probes": self._workers.probes_of(endpoints)},
                holds=self._workers.entries_of(endpoints),
            )
        await coordinator.hold()
        return coordinator


def _named(name: str, statuses: Mapping[str, WorkerStatus], gpus: Sequence[str]) -> list[str]:
    """The endpoints of the workers with an endpoint or a name, or of own devices."""
    if name == THIS_MACHINE:
        return [THIS_MACHINE, *gpus]
    if name in statuses or name in gpus:
        return [name]
    found = [endpoint for endpoint, worker in statuses.items() if name in (worker.name, worker.target)]
    if not found:
        known = ", ".join(worker.label for worker in statuses.values()) or "none"
        raise ConfigError(f"{name} is not a known worker; known workers: {known}")
    return found


def _machine_of(worker: WorkerStatus) -> str:
    """Equal for workers that would disturb each other."""
    if worker.target.startswith(SSH) or is_target(worker.endpoint):
        return worker.target or worker.endpoint
    if worker.machine or is_loopback(worker.endpoint):
        return worker.machine or worker.target
    return parse_endpoint(worker.endpoint)[0]


async def _measured(measure: Callable[[], Awaitable[float]], limit_s: float) -> float:
    """The usual undisturbed value: the median of the lower half of measurements, which are repeated until that
    half is close together, or for a limited time. Whatever else a machine does at times only makes it slower."""
    found: list[float] = []
    began = time.monotonic()
    while True:
        found.append(await measure())
        lower = sorted(found)[: (len(found) + 1) // 2]
        is_close = lower[-1] - lower[0] <= CLOSE_SHARE * lower[0]
        seconds = time.monotonic() - began
        is_enough = len(found) >= MIN_MEASUREMENTS and seconds >= MIN_MEASURED_S
        if is_enough and (is_close or seconds > limit_s):
            return median(lower)


async def _count_bytes(coordinator: Coordinator) -> list[tuple[float, int]]:
    """Follow what a loading coordinator sends to its worker, until cancelled: seconds, and bytes by then."""
    found: list[tuple[float, int]] = []
    if not coordinator.rpc_backends:
        return found
    with suppress(asyncio.CancelledError):
        addresses = await asyncio.to_thread(addresses_of, coordinator.rpc_backends[0])
        while (counts := await asyncio.to_thread(delivered_bytes, coordinator.pid)) is not None:
            found.append((time.monotonic(), sum(counts.get(address, 0) for address in addresses)))
            await asyncio.sleep(COUNT_EVERY_S)
    return found


def _speed(sent: Sequence[tuple[float, int]]) -> float | None:
    """Bytes per second in the middle of a transfer; None where there is too little to tell.

    What the buffers on the way take at once is left out, and the few bytes after the weights.
    """
    total = sent[-1][1] if sent else 0
    middle = [(at, count) for at, count in sent if FIRST_SHARE * total <= count <= LAST_SHARE * total]
    if total and len(middle) < 2:  # it was too quick for that
        before = [step for step in sent if step[1] < FIRST_SHARE * total][-1:]
        after = [step for step in sent if step[1] > LAST_SHARE * total][:1]
        middle = [*before, *middle, *after]
    if len(middle) < 2 or middle[-1][0] <= middle[0][0] or middle[-1][1] <= middle[0][1]:
        return None
    return (middle[-1][1] - middle[0][1]) / (middle[-1][0] - middle[0][0])
