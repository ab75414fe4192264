"""What if: one slider for each worker; predicted memory and token time are seen before the layout is applied.

A slider holds its worker's units (blocks and output layer); 0 drops the worker. What one gains its neighbours lose
(`what_if.moved`), so the sliders always make a whole layout.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets

from sollol_nb.errors import SollolError
from sollol_nb.layers.plan import MAX_WORKERS
from sollol_nb.layers.what_if import Forecast, memory_words, moved, token_words
from sollol_nb.runtime.io_loop import submit
from sollol_nb.widget.controls import choose_among

if TYPE_CHECKING:
    import weakref

    from sollol_nb.router.router import Router
    from sollol_nb.widget.actions import ClusterActions

_NOTHING = "No model of this notebook runs over workers."


class WhatIfPanel:
    """Sliders for the layout of one running model.

    Args:
        router: asked for forecasts.
        actions: apply a layout.
    """

    def __init__(self, router: weakref.ref[Router], actions: ClusterActions) -> None:
        self._router = router
        self._actions = actions
        self._lock = threading.RLock()  # sliders are moved by the kernel's threads, and set up by the I/O loop
        self._is_setting = False
        self._data: Mapping[str, Any] = {}
        self._base: dict[str, int] = {}  # the running layout, and free workers with 0
        self._base_url = ""
        self._forecast: Forecast | None = None
        self._foreseen_with: str | None = None
        self.model = ipywidgets.Dropdown(options=(), layout={"width": "250px"})
        self.sliders: list[ipywidgets.IntSlider] = []
        self._rows = ipywidgets.VBox([])
        self.prediction = ipywidgets.HTML(_NOTHING)
        self.apply = ipywidgets.Button(
            description="Apply",
            tooltip="start the model anew on this layout",
            layout={"width": "auto"},
            disabled=True,
        )
        self.reset = ipywidgets.Button(
            description="Reset", tooltip="back to the running layout", layout={"width": "auto"}, disabled=True
        )
        head = ipywidgets.HBox([self.model, self.apply, self.reset])
        self.box = ipywidgets.VBox([head, self._rows, self.prediction])
        self.model.observe(self._choose, "value")
        self.apply.on_click(self._apply)
        self.reset.on_click(lambda _: self._move_all(list(self._base.values())))

    @property
    def counts(self) -> dict[str, int]:
        """Units of each worker as the sliders stand, in the order of their layers."""
        return dict(zip(self._base, (one.value for one in self.sliders), strict=True))

    def refresh(self, data: Mapping[str, Any]) -> None:
        """Fit the panel to the state; sliders that were moved stay as long as their layout and workers do."""
        with self._lock:
            self._data = data
            self._is_setting = True  # new options choose the first for a moment
            try:
                choose_among(self.model, [one["model"] for one in self._sharded().values()])
            finally:
                self._is_setting = False
            url, base = self._layout()
            is_other = (url, _used(base)) != (self._base_url, _used(self._base))
            is_other |= any(endpoint not in base for endpoint, _ in _used(self.counts))
            if is_other or (base != self._base and self.counts == self._base):
                self._set_up()
            elif self._measured() != self._foreseen_with:
                self._foresee()
            else:
                self._enable()

    # --- sliders --------------------------------------------------------------------------------

    def _sharded(self) -> dict[str, Mapping[str, Any]]:
        coordinators = self._data.get("coordinators", {})
        return {url: one for url, one in coordinators.items() if one.get("own") and one.get("segments")}

    def _layout(self) -> tuple[str, dict[str, int]]:
        """URL and units of the chosen model's coordinator, free workers included; ("", {}) without one."""
        for url, one in self._sharded().items():
            if one["model"] == self.model.value:
                counts = {endpoint: segment["units"] for endpoint, segment in one["segments"].items()}
                workers = self._data.get("workers", {})
                free = [name for name, worker in workers.items() if worker["state"] == "free"]
                return url, counts | dict.fromkeys(free[: max(0, MAX_WORKERS - len(counts))], 0)
        return "", {}

    def _choose(self, _: object) -> None:
        with self._lock:
            if not self._is_setting:
                self._set_up()

    def _set_up(self) -> None:
        with self._lock:
            self._base_url, self._base = self._layout()
            before = self.sliders
            total = sum(self._base.values())
            self.sliders = [_slider(endpoint, count, total) for endpoint, count in self._base.items()]
            for slider in self.sliders:
                slider.observe(self._moved, "value")
            self._rows.children = tuple(self.sliders)
            for slider in before:
                slider.close()
            self._foresee()

    def _moved(self, change: Mapping[str, Any]) -> None:
        with self._lock:
            if self._is_setting:
                return
            position = self.sliders.index(change["owner"])
            counts = [one.value for one in self.sliders]
            counts[position] = change["old"]
            self._move_all(moved(counts, position, change["new"]))

    def _move_all(self, counts: Sequence[int]) -> None:
        with self._lock:
            self._is_setting = True
            try:
                for slider, count in zip(self.sliders, counts, strict=True):
                    slider.value = count
            finally:
                self._is_setting = False
            self._foresee()

    # --- prediction -----------------------------------------------------------------------------

    def _foresee(self) -> None:
        """Predict for the sliders as they stand, on the I/O loop."""
        self._forecast = None
        self._foreseen_with = self._measured()
        self._enable()
        router = self._router()
        if not self._base or router is None:
            self.prediction.value = _NOTHING
            return
        submit(self._tell(router, self.model.value, self.counts))

    async def _tell(self, router: Router, model: str, counts: dict[str, int]) -> None:
        try:
            foreseen = await router.what_if(model, counts)
        except SollolError as error:
            self.prediction.value = escape(str(error))
            return
        with self._lock:
            if self._base and counts == self.counts:  # else they were moved on meanwhile
                self._forecast = foreseen
                self.prediction.value = forecast_html(foreseen)
                self._enable()

    def _measured(self) -> str | None:
        """What is known of the running layout's token time; a prediction made with other facts is out of date."""
        time: str | None = self._sharded().get(self._base_url, {}).get("token_time")
        return time

    def _enable(self) -> None:
        """Apply makes sense for another layout that fits, while no answer runs on the old one."""
        coordinator = self._sharded().get(self._base_url, {})
        is_moved = bool(self._base) and self.counts != self._base
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

        self._actions.begin("apply", f"laying {model} out anew", apply)


def _used(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return [(endpoint, count) for endpoint, count in counts.items() if count]


def forecast_html(foreseen: Forecast) -> str:
    """A forecast as a small table, and one line that says whether it fits and how quick it would be."""
    cell = 'style="padding: 0 14px 0 0; text-align: left;"'
    rows = [
        f"<tr><td {cell}>{escape(one.endpoint)}</td><td {cell}>{escape(one.layers) or 'no layers'}</td>"
        f"<td {cell}>{memory_words(one)}</td>"
        f"<td {cell}>{'' if one.token_ms is None else f'{one.token_ms:.3g} ms'}</td></tr>"
        for one in foreseen.workers
    ]
    heads = "".join(f"<th {cell}>{name}</th>" for name in ("worker", "layers", "memory", "of a token"))
    verdict = "fits" if foreseen.fits else f"⚠ does not fit: {escape(foreseen.shortage)}"
    return (
        f"<b>{verdict}</b>; {escape(token_words(foreseen.token))}"
        f'<table style="line-height: 1.5;"><tr>{heads}</tr>{"".join(rows)}</table>'
    )


def _slider(endpoint: str, count: int, total: int) -> ipywidgets.IntSlider:
    return ipywidgets.IntSlider(
        value=count,
        min=0,
        max=total,
        description=endpoint,
        style={"description_width": "180px"},
        layout={"width": "520px"},
    )
