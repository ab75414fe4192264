"""The measured time of tokens on each layout of each model, from which token times are predicted.

The time that the engine measured counts if its answer was the only one on its coordinator; the event at the end of
a request has it. Until there is such an answer, the coordinator's pace is used instead.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median

from sollol_nb.layers.plan import LayerPlan
from sollol_nb.layers.token_time import Measurement, TokenTime, WorkerSpeeds, calibrate, predict, worker_parts
from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.runtime.events import Event, EventBus, EventKind

ANSWERS_KEPT = 15
LAYOUTS_KEPT = 20

_Layout = tuple[tuple[str, int], ...]
"""Endpoints with their units, in order."""


class TokenMeasurements:
    """Collects measurements from the event bus, and gives speeds. Lives on the I/O loop."""

    def __init__(self, events: EventBus) -> None:
        self._under_way: Counter[str] = Counter()  # requests by model
        self._concurrent: set[str] = set()  # models with several requests, until the last of these has ended
        self._answers_ms: dict[str, deque[float]] = {}  # by the URL of the coordinator
        self._kept: dict[Path, dict[_Layout, Measurement]] = {}
        events.subscribe(self._on_event)

    def token_ms(self, coordinator: Coordinator) -> float | None:
        """Milliseconds per token of one answer alone; None before the first token."""
        answers_ms = self._answers_ms.get(coordinator.base_url)
        if answers_ms:
            return median(answers_ms)
        seconds = coordinator.pace.seconds_per_token
        return None if seconds is None else seconds * 1000

    def keep(self, coordinator: Coordinator, round_trips_ms: Mapping[str, float | None]) -> None:
        """Remember what was measured on a coordinator that is about to end."""
        measurement = self._measurement(coordinator, round_trips_ms)
        self._answers_ms.pop(coordinator.base_url, None)
        if measurement is None or coordinator.plan is None:
            return
        kept = self._kept.setdefault(coordinator.settings.model_path, {})
        layout = _layout_of(coordinator.plan)
        kept.pop(layout, None)  # so that the newest is the last
        kept[layout] = measurement
        while len(kept) > LAYOUTS_KEPT:
            del kept[next(iter(kept))]

    def speeds(
        self, model_path: Path, running: Iterable[Coordinator], round_trips_ms: Mapping[str, float | None]
    ) -> WorkerSpeeds | None:
        """How fast workers run a model, from its layouts so far and those that run now; None if never measured."""
        measurements = dict(self._kept.get(model_path, {}))
        for coordinator in running:
            if coordinator.settings.model_path == model_path and coordinator.plan is not None:
                measurement = self._measurement(coordinator, round_trips_ms)
                if measurement is not None:
                    measurements[_layout_of(coordinator.plan)] = measurement
        return calibrate(list(measurements.values()))

    def predict(
        self,
        model_path: Path,
        plan: LayerPlan,
        running: Iterable[Coordinator],
        round_trips_ms: Mapping[str, float | None],
    ) -> TokenTime:
        """The time of a token under a plan for a model file, from what its tokens took so far."""
        return predict(self.speeds(model_path, running, round_trips_ms), worker_parts(plan, round_trips_ms))

    def _measurement(
        self, coordinator: Coordinator, round_trips_ms: Mapping[str, float | None]
    ) -> Measurement | None:
        token_ms = self.token_ms(coordinator)
        if token_ms is None or coordinator.plan is None:
            return None
        return Measurement(worker_parts(coordinator.plan, round_trips_ms), token_ms)

    def _on_event(self, event: Event) -> None:
        model = event.subject
        if event.kind == EventKind.REQUEST_STARTED:
            self._under_way[model] += 1
            if self._under_way[model] > 1:
                self._concurrent.add(model)
        elif event.kind == EventKind.REQUEST_FINISHED:
            url, tokens_per_s = event.data.get("place"), event.data.get("tokens_per_s")
            if url and tokens_per_s and model not in self._concurrent:
                self._answers_ms.setdefault(url, deque(maxlen=ANSWERS_KEPT)).append(1000 / tokens_per_s)
            self._under_way[model] -= 1
            if self._under_way[model] <= 0:
                del self._under_way[model]
                self._concurrent.discard(model)


def _layout_of(plan: LayerPlan) -> _Layout:
    return tuple(zip(plan.endpoints, plan.unit_counts, strict=True))
