"""The measured time of tokens on each layout of each model, from which token times are predicted.

The time that the engine measured counts if its answer was the only one on its coordinator; the event at the end of
a request has it. Until there is such an answer, the coordinator's pace is used instead. Before the first token of
a model, its time is predicted from the calibrations of its workers.

How much of a token's time each worker takes is measured (`waits.py`) after the first answers of a coordinator, and
again when its tokens take another time than then. What was measured earlier does not count for a worker that
was measured or calibrated since: machines change.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from sollol_nb.gguf.facts import ModelFacts
from sollol_nb.layers.plan import THIS_MACHINE, LayerPlan
from sollol_nb.layers.replan import Layout, layout_of
from sollol_nb.layers.token_time import Measurement, TokenTime, WorkerSpeeds, calibrate, predict, worker_parts
from sollol_nb.llama_cpp.coordinators.calibration_models import Q4_K_BYTES, Q4_K_WEIGHTS
from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.llama_cpp.coordinators.speculation import NGRAM
from sollol_nb.llama_cpp.workers.calibrations import Calibration
from sollol_nb.runtime.events import Event, EventBus, EventKind

ANSWERS_KEPT = 5
"""The median of so many answers is what tokens take now."""
ANSWERS_BEFORE_WAITS = 2
SAME_TIME = 0.15
"""Share by which tokens may take longer or shorter than when the waits for workers were measured."""
MEANINGFUL_ANSWERS = 5
"""Fewer do not show that tokens take another time than predicted."""
SLOWER = 1.5
SLOW_WORKER, SLOW_SHARE = 1.5, 0.1
"""A worker is slow that takes this many times as long as expected, relative to the others, where that is at least
this share of the time of a token."""
LAYOUTS_KEPT = 20
TYPICAL_CONTEXT_TOKENS = 128
"""Predicted and measured times are those of a token behind so many others: each takes a little longer than the one
before it (with SmolLM2 on a processor 1.3 times as long behind 200 tokens, 1.7 times behind 500)."""
QUERY_SHARE = 0.4
"""Of the time for K and V, what each query head takes that uses them; measured for up to 16 heads."""
FASTEST_CORRECTION, SLOWEST_CORRECTION = 0.5, 8.0
"""Of a worker, relative to its calibration."""


@dataclass(frozen=True, slots=True)
class _Shares:
    """How much of a token's time each worker takes, and that time when it was measured."""

    of: Mapping[str, float]
    token_ms: float


@dataclass(frozen=True, slots=True)
class _Kept:
    """A measurement, and when it was made (`time.time()`)."""

    measurement: Measurement
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowWorker:
    """A worker that takes longer than expected.

    Attributes:
        endpoint: the worker.
        factor: how many times as long, relative to the other workers.
        token_ms: how long it takes for each token.
    """

    endpoint: str
    factor: float
    token_ms: float


class TokenMeasurements:
    """Collects measurements from the event bus, and gives speeds. Lives on the I/O loop."""

    def __init__(
        self, events: EventBus, calibration_of: Callable[[str], Calibration | None] = lambda _: None
    ) -> None:
        """Args:
        calibration_of: how fast a worker, or `THIS_MACHINE`, is.
        """
        self._calibration_of = calibration_of
        self._under_way: Counter[str] = Counter()  # requests by model
        self._concurrent: set[str] = set()  # models with several requests, until the last of these has ended
        self._answers_ms: dict[str, deque[float]] = {}  # by the URL of the coordinator
        self._counts: Counter[str] = Counter()  # answers since `take_answers`, by the URL of the coordinator
        self._shares: dict[str, _Shares] = {}  # the last, by the URL of the coordinator
        self._new_shares: dict[str, Mapping[str, float]] = {}  # of the answer that is being generated
        self._expected_ms: dict[str, Mapping[str, float]] = {}  # of each worker, by the URL of the coordinator
        self._context_ms: dict[str, tuple[float, float]] = {}  # for each token, and for each before it
        self._kept: dict[Path, dict[Layout, _Kept]] = {}
        events.subscribe(self._on_event)

    def token_ms(self, coordinator: Coordinator) -> float | None:
        """Milliseconds per token of one answer alone; None before the first token."""
        answers_ms = self._answers_ms.get(coordinator.base_url)
        if answers_ms:
            return median(answers_ms)
        seconds = coordinator.pace.seconds_per_token
        speculation = coordinator.settings.speculation
        if speculation.is_on:  # that is the pace of several tokens verified together
            # There was nothing to copy yet; a draft model drafts from the first token on.
            seconds = coordinator.first_seconds_per_token if speculation.kind == NGRAM else None
        return None if seconds is None else seconds * 1000

    def meaningful_ms(self, coordinator: Coordinator) -> float | None:
        """As `token_ms`, but None until enough answers were measured."""
        answers_ms = self._answers_ms.get(coordinator.base_url, ())
        return median(answers_ms) if len(answers_ms) >= MEANINGFUL_ANSWERS else None

    def drift(self, coordinator: Coordinator) -> float | None:
        """The measured time of a token relative to the one predicted when the layers were planned; None until
        enough answers were measured, and without a prediction."""
        measured_ms, plan = self.meaningful_ms(coordinator), coordinator.plan
        if measured_ms is None or plan is None or not plan.predicted_token_ms:
            return None
        return measured_ms / plan.predicted_token_ms

    def expect(self, coordinator: Coordinator, round_trips_ms: Mapping[str, float | None]) -> None:
        """Note how long each worker of a coordinator that was just started should take, by its calibration."""
        if coordinator.plan is None:
            return
        facts, endpoints = coordinator.settings.facts, [shard.endpoint for shard in coordinator.plan.shards]
        speeds = self.calibrated(facts, endpoints)
        parts = worker_parts(
            coordinator.plan, self.round_trips_ms(coordinator.plan.endpoints, round_trips_ms), facts
        )
        expected = predict(speeds, parts)
        if expected.part_ms:
            self._expected_ms[coordinator.base_url] = dict(zip(endpoints, expected.part_ms, strict=True))
        if expected.token_ms is not None:
            context_ms = 0.0
            for shard in coordinator.plan.shards:
                if (calibration := self._calibration_of(shard.endpoint)) is not None:
                    context_ms += shard.layer_count * _context_ms(calibration, facts)
            self._context_ms[coordinator.base_url] = (expected.token_ms, context_ms)

    def wants_waits(self, coordinator: Coordinator) -> bool:
        """Whether it is time to measure how long a coordinator waits for each worker."""
        answers_ms = self._answers_ms.get(coordinator.base_url)
        if coordinator.plan is None or not answers_ms or len(answers_ms) < ANSWERS_BEFORE_WAITS:
            return False
        shares = self._shares.get(coordinator.base_url)
        return shares is None or not _is_same_time(answers_ms[-1], shares.token_ms)

    def set_waits(self, coordinator: Coordinator, shares: Mapping[str, float]) -> None:
        """Note how much of a token's time a coordinator waits for each worker, as measured in its current answer,
        or in the last one if it is over."""
        url = coordinator.base_url
        answers_ms = self._answers_ms.get(url)
        if coordinator.pace.streams or not answers_ms:
            self._new_shares[url] = shares
        else:
            self._set_shares(url, shares, answers_ms[-1])

    def _set_shares(self, url: str, shares: Mapping[str, float], token_ms: float) -> None:
        self._shares[url] = _Shares(shares, token_ms)
        # Where nothing was calibrated, the first measurement says what is usual.
        self._expected_ms.setdefault(
            url, {endpoint: share * token_ms for endpoint, share in shares.items() if share}
        )

    def shares(self, coordinator: Coordinator) -> Mapping[str, float] | None:
        """How much of a token's time each worker of a coordinator takes now, by endpoint: the same object until
        that is measured again; None where not known."""
        shares, token_ms = self._shares.get(coordinator.base_url), self.token_ms(coordinator)
        if shares is None or token_ms is None or not _is_same_time(token_ms, shares.token_ms):
            return None
        return shares.of

    def part_ms(self, coordinator: Coordinator) -> dict[str, float]:
        """How long each worker of a coordinator takes for a token now, by endpoint; empty where not known."""
        shares, token_ms = self.shares(coordinator), self.token_ms(coordinator)
        if shares is None or token_ms is None:
            return {}
        return {endpoint: share * token_ms for endpoint, share in shares.items()}

    def slow_workers(self, coordinator: Coordinator) -> list[SlowWorker]:
        """The workers that take much longer for a token than expected when the coordinator was started, the
        slowest first. Where all take longer, none of them is slow."""
        measured_ms = self.part_ms(coordinator)
        expected_ms = self._expected_ms.get(coordinator.base_url, {})
        factors = {
            endpoint: ms / expected_ms[endpoint]
            for endpoint, ms in measured_ms.items()
            if expected_ms.get(endpoint)
        }
        found = []
        for endpoint, factor in factors.items():
            others = [other for name, other in factors.items() if name != endpoint]
            usual = median(others) if others else 1.0
            excess_ms = measured_ms[endpoint] - expected_ms[endpoint] * usual
            is_much = excess_ms >= SLOW_SHARE * sum(measured_ms.values())
            if usual and factor / usual >= SLOW_WORKER and is_much:
                found.append(SlowWorker(endpoint=endpoint, factor=factor / usual, token_ms=measured_ms[endpoint]))
        return sorted(found, key=lambda slow: -slow.factor)

    def is_unexplained(self, coordinator: Coordinator) -> bool:
        """Whether tokens take at least `SLOWER` times as long as predicted when the layers were planned, and it is
        not known how much of that each worker takes."""
        drift, plan = self.drift(coordinator), coordinator.plan
        if drift is None or plan is None or len(plan.workers) < 2:
            return False
        return drift >= SLOWER and coordinator.base_url not in self._shares

    def take_answers(self, coordinator: Coordinator, at_least: int) -> bool:
        """Whether so many answers of a coordinator were measured alone since this was last true."""
        if self._counts[coordinator.base_url] < at_least:
            return False
        del self._counts[coordinator.base_url]
        return True

    def keep(self, coordinator: Coordinator, round_trips_ms: Mapping[str, float | None]) -> None:
        """Remember what was measured on a coordinator that is about to end."""
        measurement = self._measurement(coordinator, round_trips_ms)
        known = (
            self._answers_ms,
            self._counts,
            self._shares,
            self._new_shares,
            self._expected_ms,
            self._context_ms,
        )
        for values in known:
            values.pop(coordinator.base_url, None)
        if measurement is None or coordinator.plan is None:
            return
        kept = self._kept.setdefault(coordinator.settings.model_path, {})
        layout = layout_of(coordinator.plan)
        kept.pop(layout, None)  # so that the newest is the last
        kept[layout] = _Kept(measurement, time.time())
        while len(kept) > LAYOUTS_KEPT:
            del kept[next(iter(kept))]

    def speeds(
        self,
        model_path: Path,
        running: Iterable[Coordinator],
        round_trips_ms: Mapping[str, float | None],
        *,
        facts: ModelFacts | None = None,
        endpoints: Iterable[str] = (),
    ) -> WorkerSpeeds | None:
        """How fast workers run a model, from its layouts so far and those that run now, and from calibrations;
        None where there is neither.

        Args:
            facts: the model's, for calibrations.
            endpoints: workers whose calibrations are wanted, besides those of measured layouts.
        """
        found = dict(self._kept.get(model_path, {}))
        for coordinator in running:
            if coordinator.settings.model_path == model_path and coordinator.plan is not None:
                measurement = self._measurement(coordinator, round_trips_ms)
                if measurement is not None:
                    found[layout_of(coordinator.plan)] = _Kept(measurement, time.time())
        measurements = self._up_to_date(found.values())
        parts = [part.endpoint for measurement in measurements for part in measurement.parts]
        known = self.calibrated(facts, {*endpoints, *parts}) if facts is not None else None
        return calibrate(measurements, known)

    def _up_to_date(self, found: Iterable[_Kept]) -> list[Measurement]:
        """The measurements without what is known better by now, the newest first."""
        measured_at: dict[str, float] = {}
        usable = []
        for kept in sorted(found, key=lambda kept: -kept.at):
            measurement, is_old = kept.measurement, []
            for part in measurement.parts:
                calibration = self._calibration_of(part.endpoint)
                known_at = max(
                    calibration.measured_at if calibration else 0.0, measured_at.get(part.endpoint, 0.0)
                )
                is_old.append(kept.at < known_at)
            if measurement.part_ms:
                for part in measurement.parts:
                    measured_at.setdefault(part.endpoint, kept.at)
                measurement = _without(measurement, is_old)
            elif any(is_old):
                continue
            if measurement.parts:
                usable.append(measurement)
        return usable

    def predict(
        self,
        model_path: Path,
        plan: LayerPlan,
        running: Iterable[Coordinator],
        round_trips_ms: Mapping[str, float | None],
        facts: ModelFacts,
    ) -> TokenTime:
        """The time of a token under a plan for a model file, from what its tokens took so far, else from the
        calibrations of its workers.

        Args:
            round_trips_ms: of workers; where one is missing, that of its calibration counts.
            facts: the model's.
        """
        endpoints = [shard.endpoint for shard in plan.shards]
        speeds = self.speeds(model_path, running, round_trips_ms, facts=facts, endpoints=endpoints)
        return predict(speeds, worker_parts(plan, self.round_trips_ms(plan.endpoints, round_trips_ms), facts))

    def calibrated(self, facts: ModelFacts, endpoints: Iterable[str]) -> WorkerSpeeds | None:
        """How fast workers would run a model according to their calibrations; None without any."""
        known = {endpoint: self._calibration_of(endpoint) for endpoint in endpoints}
        found = {endpoint: calibration for endpoint, calibration in known.items() if calibration is not None}
        if not found:
            return None
        own = self._calibration_of(THIS_MACHINE)
        block_factor = {endpoint: _block_factor(calibration, facts) for endpoint, calibration in found.items()}
        return WorkerSpeeds(
            {
                endpoint: calibration.ms_per_byte * block_factor[endpoint]
                for endpoint, calibration in found.items()
            },
            None,
            0.0,
            # What this machine spends for each token anyway is the own part.
            {
                endpoint: 0.0 if endpoint == THIS_MACHINE else calibration.hop_ms
                for endpoint, calibration in found.items()
            },
            {
                endpoint: calibration.bytes_per_s
                for endpoint, calibration in found.items()
                if calibration.bytes_per_s
            },
            own.hop_ms if own else 0.0,
            {
                endpoint: calibration.block_ms + TYPICAL_CONTEXT_TOKENS * _context_ms(calibration, facts)
                for endpoint, calibration in found.items()
            },
            {endpoint: calibration.prompt_ms_per_byte for endpoint, calibration in found.items()},
            {
                endpoint: facts.output_bytes
                * calibration.ms_per_byte
                * (_output_factor(calibration, facts) - block_factor[endpoint])
                for endpoint, calibration in found.items()
            },
        )

    def corrections(
        self, coordinator: Coordinator, running: Iterable[Coordinator], round_trips_ms: Mapping[str, float | None]
    ) -> dict[str, float]:
        """How much slower than calibrated the workers of a coordinator have proven to be: factors, by endpoint.

        That all workers are much faster than calibrated is a property of the model (a mixture of experts reads
        only a part of its weights), so then only the differences between them count.
        """
        facts, plan = coordinator.settings.facts, coordinator.plan
        endpoints = [shard.endpoint for shard in plan.shards] if plan else []
        before = self.calibrated(facts, endpoints)
        if before is None:
            return {}
        after = self.speeds(
            coordinator.settings.model_path, running, round_trips_ms, facts=facts, endpoints=endpoints
        )
        if after is None:
            return {}
        factors = {
            endpoint: after.ms_per_byte[endpoint] / ms
            for endpoint, ms in before.ms_per_byte.items()
            if ms > 0 and after.ms_per_byte.get(endpoint, 0.0) > 0
        }
        usual = median(factors.values()) if factors else 1.0
        if usual < FASTEST_CORRECTION:
            factors = {endpoint: factor / usual for endpoint, factor in factors.items()}
        return {
            endpoint: min(max(factor, FASTEST_CORRECTION), SLOWEST_CORRECTION)
            for endpoint, factor in factors.items()
        }

    def round_trips_ms(
        self, endpoints: Iterable[str], measured: Mapping[str, float | None]
    ) -> dict[str, float | None]:
        """Round trips of workers: as measured, else those of their calibrations."""
        known = dict(measured)
        for endpoint in endpoints:
            calibration = self._calibration_of(endpoint) if known.get(endpoint) is None else None
            if calibration is not None:
                known[endpoint] = calibration.round_trip_ms
        return known

    def _measurement(
        self, coordinator: Coordinator, round_trips_ms: Mapping[str, float | None]
    ) -> Measurement | None:
        token_ms = self.token_ms(coordinator)
        if token_ms is None or coordinator.plan is None:
            return None
        parts = worker_parts(coordinator.plan, round_trips_ms, coordinator.settings.facts)
        waits_ms = self.part_ms(coordinator)
        return Measurement(parts, token_ms, tuple(waits_ms.get(part.endpoint, 0.0) for part in parts if waits_ms))

    def _typical_share(self, url: str, context_tokens: float | None) -> float:
        """What a token behind `TYPICAL_CONTEXT_TOKENS` others would have taken, relative to one behind these."""
        token_ms, context_ms = self._context_ms.get(url, (0.0, 0.0))
        if context_tokens is None or token_ms <= 0:
            return 1.0
        expected_ms = token_ms + (context_tokens - TYPICAL_CONTEXT_TOKENS) * context_ms
        return token_ms / expected_ms if expected_ms > 0 else 1.0

    def _on_event(self, event: Event) -> None:
        model = event.subject
        if event.kind == EventKind.REQUEST_STARTED:
            self._under_way[model] += 1
            if self._under_way[model] > 1:
                self._concurrent.add(model)
        elif event.kind == EventKind.REQUEST_FINISHED:
            url, token_ms = event.data.get("place"), event.data.get("token_ms")
            if url and token_ms and model not in self._concurrent:
                token_ms *= self._typical_share(url, event.data.get("context_tokens"))
                self._answers_ms.setdefault(url, deque(maxlen=ANSWERS_KEPT)).append(token_ms)
                self._counts[url] += 1
                if (shares := self._new_shares.pop(url, None)) is not None:
                    self._set_shares(url, shares, token_ms)
            self._new_shares.pop(url or "", None)
            self._under_way[model] -= 1
            if self._under_way[model] <= 0:
                del self._under_way[model]
                self._concurrent.discard(model)


def _type_factor(calibration: Calibration, weights: int, weight_bytes: int) -> float:
    """How long a worker takes for a byte of weights, relative to one in Q4_K."""
    if not weights or not weight_bytes:
        return 1.0
    density = weights / weight_bytes * Q4_K_BYTES / Q4_K_WEIGHTS
    return 1 - calibration.weight_share + calibration.weight_share * density


def _block_factor(calibration: Calibration, facts: ModelFacts) -> float:
    return _type_factor(calibration, facts.block_weights, sum(facts.layer_bytes))


def _output_factor(calibration: Calibration, facts: ModelFacts) -> float:
    return _type_factor(calibration, facts.output_weights, facts.output_bytes)


def _context_ms(calibration: Calibration, facts: ModelFacts) -> float:
    """What a block takes for each token before the one that is computed, in the mean."""
    kv_bytes = sum(facts.layer_kv_bytes_per_token) / facts.layer_count
    return calibration.context_ms_per_byte * kv_bytes * (1 - QUERY_SHARE + QUERY_SHARE * facts.shared_by)


def _is_same_time(token_ms: float, other_ms: float) -> bool:
    return abs(token_ms / other_ms - 1) <= SAME_TIME if other_ms > 0 else False


def _without(measurement: Measurement, is_old: Iterable[bool]) -> Measurement:
    """A measurement without the workers that were measured again since, and without their time; own devices stay,
    since their time is a part of the coordinator's."""
    parts = list(zip(measurement.parts, measurement.part_ms, is_old, strict=True))
    left = [(part, ms) for part, ms, old in parts if part.is_own or not old]
    return Measurement(
        tuple(part for part, _ in left),
        measurement.token_ms - sum(ms for part, ms, old in parts if old and not part.is_own),
        tuple(ms for _, ms in left),
    )
