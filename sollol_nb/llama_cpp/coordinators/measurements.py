"""The measured time of tokens on each layout of each model, from which token times are predicted.

The time that the engine measured counts if its answer was the only one on its coordinator; the event at the end of
a request has it. Until there is such an answer, the coordinator's pace is used instead. Before the first token of
a model, its time is predicted from the calibrations of its workers.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import median

from sollol_nb.gguf.facts import ModelFacts
from sollol_nb.layers.plan import THIS_MACHINE, LayerPlan
from sollol_nb.layers.token_time import Measurement, TokenTime, WorkerSpeeds, calibrate, predict, worker_parts
from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.llama_cpp.workers.calibrations import Calibration
from sollol_nb.runtime.events import Event, EventBus, EventKind

ANSWERS_KEPT = 15
LAYOUTS_KEPT = 20
FASTEST_CORRECTION, SLOWEST_CORRECTION = 0.5, 8.0
"""Of a worker, relative to its calibration."""

_Layout = tuple[tuple[str, int], ...]
"""Endpoints with their units, in order."""


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
        self._kept: dict[Path, dict[_Layout, Measurement]] = {}
        events.subscribe(self._on_event)

    def token_ms(self, coordinator: Coordinator) -> float | None:
        """Milliseconds per token of one answer alone; None before the first token."""
        answers_ms = self._answers_ms.get(coordinator.base_url)
        if answers_ms:
            return median(answers_ms)
        seconds = coordinator.pace.seconds_per_token
        return None if seconds is None else seconds * 1000

    def take_answers(self, coordinator: Coordinator, at_least: int) -> bool:
        """Whether so many answers of a coordinator were measured alone since this was last true."""
        if self._counts[coordinator.base_url] < at_least:
            return False
        del self._counts[coordinator.base_url]
        return True

    def keep(self, coordinator: Coordinator, round_trips_ms: Mapping[str, float | None]) -> None:
        """Remember what was measured on a coordinator that is about to end."""
        measurement = self._measurement(coordinator, round_trips_ms)
        self._answers_ms.pop(coordinator.base_url, None)
        self._counts.pop(coordinator.base_url, None)
        if measurement is None or coordinator.plan is None:
            return
        kept = self._kept.setdefault(coordinator.settings.model_path, {})
        layout = _layout_of(coordinator.plan)
        kept.pop(layout, None)  # so that the newest is the last
        kept[layout] = measurement
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
        measurements = dict(self._kept.get(model_path, {}))
        for coordinator in running:
            if coordinator.settings.model_path == model_path and coordinator.plan is not None:
                measurement = self._measurement(coordinator, round_trips_ms)
                if measurement is not None:
                    measurements[_layout_of(coordinator.plan)] = measurement
        parts = [part.endpoint for measurement in measurements.values() for part in measurement.parts]
        known = self.calibrated(facts, {*endpoints, *parts}) if facts is not None else None
        return calibrate(list(measurements.values()), known)

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
        return WorkerSpeeds(
            {endpoint: calibration.ms_per_byte for endpoint, calibration in found.items()},
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
            {endpoint: calibration.block_ms for endpoint, calibration in found.items()},
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
        return Measurement(parts, token_ms)

    def _on_event(self, event: Event) -> None:
        model = event.subject
        if event.kind == EventKind.REQUEST_STARTED:
            self._under_way[model] += 1
            if self._under_way[model] > 1:
                self._concurrent.add(model)
        elif event.kind == EventKind.REQUEST_FINISHED:
            url, token_ms = event.data.get("place"), event.data.get("token_ms")
            if url and token_ms and model not in self._concurrent:
                self._answers_ms.setdefault(url, deque(maxlen=ANSWERS_KEPT)).append(token_ms)
                self._counts[url] += 1
            self._under_way[model] -= 1
            if self._under_way[model] <= 0:
                del self._under_way[model]
                self._concurrent.discard(model)


def _layout_of(plan: LayerPlan) -> _Layout:
    return tuple((shard.endpoint, shard.unit_count) for shard in plan.shards)
