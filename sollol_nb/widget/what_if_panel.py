"""What if: one slider for each worker; it predicts memory and token time before the layout is applied.

A slider holds its worker's units (blocks and output layer); 0 drops the worker. What one slider gains, its
neighbours lose (`what_if.rebalance`), so the sliders always hold a whole layout. A suggested one is shown on them,
unless they were moved.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import ipywidgets

from sollol_nb.errors import SollolError
from sollol_nb.layers.plan import MAX_WORKERS, THIS_MACHINE
from sollol_nb.layers.what_if import Forecast, describe_memory, describe_token_time, rebalance
from sollol_nb.router.router import Router
from sollol_nb.runtime.io_loop import submit
from sollol_nb.widget.actions import ClusterActions
from sollol_nb.widget.controls import choose_among

_NO_MODEL = "No model of this notebook runs on workers."


class WhatIfPanel:
    """Sliders for the layout of one running model.

    Args:
        router: makes the forecasts.
        actions: apply a layout.
    """

    def __init__(self, router: weakref.ref[Router], actions: ClusterActions) -> None:
        self._router = router
        self._actions = actions
        self._lock = threading.RLock()  # the kernel's threads move sliders, the I/O loop creates them
        self._is_setting = False
        self._data: Mapping[str, Any] = {}
        self._base: dict[str, int] = {}  # the running layout; this machine's CPU and free workers with 0
        self._shown: list[str] = []  # the endpoints of the sliders, in the order of their layers
        self._suggested: list[tuple[str, int]] = []
        self._base_url = ""
        self._forecast: Forecast | None = None
        self._predicted_with: tuple[float | None, ...] = ()
        self.model = ipywidgets.Dropdown(
            options=(), description="Model", style={"description_width": "60px"}, layout={"width": "310px"}
        )
        self.sliders: list[ipywidgets.IntSlider] = []
        self._rows = ipywidgets.VBox([])
        self.prediction = ipywidgets.HTML(_NO_MODEL)
        self.apply = ipywidgets.Button(
            description="Apply",
            tooltip="restart the model with this layout",
            layout={"width": "auto"},
            disabled=True,
        )
        self.reset = ipywidgets.Button(
            description="Reset", tooltip="back to the running layout", layout={"width": "auto"}, disabled=True
        )
        header = ipywidgets.HBox([self.model, self.apply, self.reset], layout={"flex_flow": "row wrap"})
        self.box = ipywidgets.VBox([header, self._rows, self.prediction])
        self.model.observe(self._choose, "value")
        self.apply.on_click(self._apply)
        self.reset.on_click(lambda _: self._set_up())

    @property
    def counts(self) -> dict[str, int]:
        """Units of each worker by the sliders, in the order of their layers."""
        return dict(zip(self._shown, (slider.value for slider in self.sliders), strict=True))

    def refresh(self, data: Mapping[str, Any]) -> None:
        """Fit the panel to the state; moved sliders keep their values while their layout and workers exist."""
        with self._lock:
            self._data = data
            self._is_setting = True  # new options select the first one for a moment
            try:
                choose_among(self.model, [coordinator["model"] for coordinator in self._sharded().values()])
            finally:
                self._is_setting = False
            url, base = self._layout()
            used = _used(self.counts)
            is_new = (url, _used(base)) != (self._base_url, _used(self._base))
            is_new |= any(endpoint not in base for endpoint, _ in used)
            is_moved = used not in (_used(self._base), self._suggested)
            suggested = self._suggestion()
            if is_new or ((base != self._base or suggested != self._suggested) and not is_moved):
                self._set_up(suggested)
            elif self._token_time() != self._predicted_with:
                self._predict()
            else:
                self._enable()

    def show_suggestion(self, model: str) -> None:
        """Show the layout that the router suggests for a model on the sliders."""
        with self._lock:
            if model in self.model.options:
                self.model.value = model
                self._set_up(self._suggestion())

    # --- sliders --------------------------------------------------------------------------------

    def _sharded(self) -> dict[str, Mapping[str, Any]]:
        coordinators = self._data.get("coordinators", {})
        return {
            url: coordinator
            for url, coordinator in coordinators.items()
            if coordinator.get("own") and coordinator.get("segments")
        }

    def _layout(self) -> tuple[str, dict[str, int]]:
        """URL and units of the chosen model's coordinator, free workers included; ("", {}) without one."""
        for url, coordinator in self._sharded().items():
            if coordinator["model"] == self.model.value:
                counts = {endpoint: segment["units"] for endpoint, segment in coordinator["segments"].items()}
                workers = self._data.get("workers", {})
                free = [endpoint for endpoint, worker in workers.items() if worker["state"] == "free"]
                free = free[: max(0, MAX_WORKERS - len(counts))]
                return url, {THIS_MACHINE: 0} | counts | dict.fromkeys(free, 0)  # its CPU has the first layers
        return "", {}

    def _suggestion(self) -> list[tuple[str, int]]:
        """Units of the suggested layout of the chosen model, in the order of its layers; [] without one."""
        for coordinator in self._sharded().values():
            if coordinator["model"] == self.model.value:
                return [(endpoint, units) for endpoint, units in coordinator.get("advice", {}).get("layout", ())]
        return []

    def _choose(self, _: object) -> None:
        with self._lock:
            if not self._is_setting:
                self._set_up(self._suggestion())

    def _set_up(self, suggested: Sequence[tuple[str, int]] = ()) -> None:
        """New sliders, with a suggested layout, else with the running one."""
        with self._lock:
            self._base_url, self._base = self._layout()
            self._suggested = self._suggestion()
            before = self.sliders
            total = sum(self._base.values())
            counts = dict(suggested) | {
                endpoint: 0 if suggested else count
                for endpoint, count in self._base.items()
                if endpoint not in dict(suggested)
            }
            workers = self._data.get("workers", {})
            names = {endpoint: workers.get(endpoint, {}).get("name", endpoint) for endpoint in counts}
            self._shown = list(counts)
            self.sliders = [_slider(names[endpoint], count, total) for endpoint, count in counts.items()]
            for slider in self.sliders:
                slider.observe(self._moved, "value")
            self._rows.children = tuple(self.sliders)
            for slider in before:
                slider.close()
            self._predict()

    def _moved(self, change: Mapping[str, Any]) -> None:
        with self._lock:
            if self._is_setting:
                return
            position = self.sliders.index(change["owner"])
            counts = [slider.value for slider in self.sliders]
            counts[position] = change["old"]
            self._move_all(rebalance(counts, position, change["new"]))

    def _move_all(self, counts: Sequence[int]) -> None:
        with self._lock:
            self._is_setting = True
            try:
                for slider, count in zip(self.sliders, counts, strict=True):
                    slider.value = count
            finally:
                self._is_setting = False
            self._predict()

    # --- prediction -----------------------------------------------------------------------------

    def _predict(self) -> None:
        """Predict for the current values of the sliders, on the I/O loop."""
        self._forecast = None
        self._predicted_with = self._token_time()
        self._enable()
        router = self._router()
        if not self._base or router is None:
            self.prediction.value = _NO_MODEL
            return
        submit(self._show_forecast(router, self.model.value, self.counts))

    async def _show_forecast(self, router: Router, model: str, counts: dict[str, int]) -> None:
        try:
            predicted = await router.what_if(model, counts)
        except SollolError as error:
            self.prediction.value = escape(str(error))
            return
        with self._lock:
            if self._base and counts == self.counts:  # else they were moved meanwhile
                self._forecast = predicted
                heading = "suggested layout: " if _used(counts) == self._suggested else ""
                self.prediction.value = heading + forecast_html(predicted)
                self._enable()

    def _token_time(self) -> tuple[float | None, ...]:
        """The known token times of the running layout; a prediction made with others is out of date."""
        running = self._sharded().get(self._base_url, {})
        return running.get("token_ms"), running.get("predicted_ms")

    def _enable(self) -> None:
        """Apply is enabled for a changed layout that fits, while no answer runs on the old one."""
        coordinator = self._sharded().get(self._base_url, {})
        is_moved = bool(self._base) and _used(self.counts) != _used(self._base)
        is_idle = not coordinator.get("running") and not coordinator.get("waiting")
        is_applying = self._actions.is_unavailable("apply")
        fits = self._forecast is not None and self._forecast.fits
        self.apply.disabled = not (is_moved and fits and is_idle) or is_applying
        self.reset.disabled = not is_moved or is_applying
        self.model.disabled = self.model.value is None or is_applying
        for slider in self.sliders:
            slider.disabled = is_applying

    def _apply(self, _: object) -> None:
        model, counts = self.model.value, self.counts

        async def apply(router: Router) -> None:
            await router.apply_plan(model, counts)

        self._actions.start("apply", f"applying the new layout of {model}", apply)


def _used(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return [(endpoint, count) for endpoint, count in counts.items() if count]


def forecast_html(predicted: Forecast) -> str:
    """A forecast as a small table, and a line that says whether it fits and how fast it would be."""
    cell = 'style="padding: 0 14px 0 0; text-align: left;"'
    rows = [
        f"<tr><td {cell}>{escape(worker.name or worker.endpoint)}</td>"
        f"<td {cell}>{escape(worker.layers) or 'no layers'}</td>"
        f"<td {cell}>{describe_memory(worker)}</td>"
        f"<td {cell}>{'' if worker.token_ms is None else f'{worker.token_ms:.3g} ms'}</td></tr>"
        for worker in predicted.workers
    ]
    labels = ("worker", "layers", "memory", "time per token")
    header = "".join(f"<th {cell}>{label}</th>" for label in labels)
    verdict = "fits" if predicted.fits else f"⚠ does not fit: {escape(predicted.shortage)}"
    return (
        f"<b>{verdict}</b>; {escape(describe_token_time(predicted.token))}"
        f'<table style="line-height: 1.5;"><tr>{header}</tr>{"".join(rows)}</table>'
    )


def _slider(worker: str, count: int, total: int) -> ipywidgets.IntSlider:
    return ipywidgets.IntSlider(
        value=count,
        min=0,
        max=total,
        description=worker,
        style={"description_width": "min(180px, 40%)"},
        layout={"width": "auto", "max_width": "520px"},
    )
