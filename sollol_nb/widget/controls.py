"""Controls of a cluster, made of core ipywidgets: workers, models, and how coordinators are started.

Each is enabled only while it makes sense according to the cluster's plain state (`cluster_data`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets

from sollol_nb.errors import ConfigError, WorkersUnavailableError
from sollol_nb.layers.strategies import STRATEGIES
from sollol_nb.llama_cpp.workers.local_workers import MAX_LOCAL_WORKERS
from sollol_nb.models.profiles import MODEL_PROFILES
from sollol_nb.router.router import Router
from sollol_nb.settings import config
from sollol_nb.settings.endpoints import is_target, worker_target
from sollol_nb.settings.kinds import keep_alive_seconds
from sollol_nb.text.short_names import short_name
from sollol_nb.text.tables import counted
from sollol_nb.widget.actions import ClusterActions

_SMALL = {"width": "auto"}
_NARROW = {"width": "150px"}
_COUNT = {"width": "60px"}
_LABEL_PX = 110
_STRATEGIES_TOOLTIP = "\n".join(
    ["how the layers of the next models are spread:", *(f"{name}: {does}" for name, does in STRATEGIES.items())]
)


def row(label: str, first: ipywidgets.Widget, *others: ipywidgets.Widget) -> ipywidgets.HBox:
    """Controls beside each other, and a label that belongs to the first one; in a narrow window they continue on
    the next line."""
    first.description = label
    first.style.description_width = f"{_LABEL_PX}px"
    first.layout.width = f"{_LABEL_PX + int(first.layout.width.removesuffix('px'))}px"
    return ipywidgets.HBox([first, *others], layout={"flex_flow": "row wrap"}).add_class("sollol-group")


def choose_among(dropdown: ipywidgets.Dropdown, names: Sequence[str]) -> None:
    """Give a dropdown these options; its value stays as long as it is one of them."""
    if tuple(dropdown.options) != tuple(names):
        chosen = dropdown.value
        dropdown.options = tuple(names)
        dropdown.value = chosen if chosen in names else (names[0] if names else None)


class WorkerControls:
    """Start and stop workers on this machine; add, remove and discover others."""

    def __init__(self, actions: ClusterActions) -> None:
        self._actions = actions
        self._lock = threading.RLock()  # the kernel's threads change values, the I/O loop refreshes
        self._data: Mapping[str, Any] = {}
        self.endpoint = ipywidgets.Combobox(
            placeholder="ssh://host, or host:port", options=(), ensure_option=False, layout=_NARROW
        )
        self.add = ipywidgets.Button(
            description="Add",
            tooltip="use this machine through ssh, or this worker; llama.cpp is installed there if necessary",
            layout=_SMALL,
        )
        self.known = ipywidgets.Dropdown(options=(), layout=_NARROW)
        self.remove = ipywidgets.Button(
            description="Remove",
            tooltip="remove this worker, or this machine with its workers; what was started here is stopped",
            layout=_SMALL,
        )
        self.discover = ipywidgets.Button(
            description="Discover",
            tooltip="use the workers on this machine's usual ports, and offer those that others announce",
            layout=_SMALL,
        )
        self.calibrate = ipywidgets.Button(
            description="Calibrate",
            tooltip="measure how fast this machine and the free workers are; some seconds for each",
            layout=_SMALL,
        )
        self.count = ipywidgets.BoundedIntText(
            value=3, min=1, max=MAX_LOCAL_WORKERS, tooltip="how many workers run on this machine", layout=_COUNT
        )
        self.start = ipywidgets.Button(
            description="Start workers",
            tooltip="make sure that so many workers run on this machine",
            layout=_SMALL,
        )
        self.stop = ipywidgets.Button(
            description="Stop workers",
            tooltip="stop this notebook's workers on this machine and the models that use them, unless another "
            "notebook uses them",
            layout=_SMALL,
        )
        self.box = ipywidgets.VBox(
            [
                row("Workers here", self.count, self.start, self.stop),
                row("Other workers", self.endpoint, self.add, self.discover),
                row("Known workers", self.known, self.remove, self.calibrate),
            ]
        )
        self.start.on_click(self._start)
        self.stop.on_click(self._stop)
        self.endpoint.observe(lambda _: self._enable(), "value")
        self.add.on_click(self._add)
        self.remove.on_click(self._remove)
        self.discover.on_click(self._discover)
        self.calibrate.on_click(self._calibrate)
        self._enable()

    def refresh(self, data: Mapping[str, Any]) -> None:
        """Fit the controls to the state."""
        with self._lock:
            self._data = data
            workers = data.get("workers", {})
            held = {worker.get("target") for worker in workers.values() if worker["state"] == "held"}
            removable = [
                worker.get("target", endpoint)
                for endpoint, worker in workers.items()
                if worker["state"] != "held" and worker.get("target", "") not in held
            ]
            choose_among(self.known, list(dict.fromkeys(removable)))
            self._enable()

    def _enable(self) -> None:
        with self._lock:
            busy = self._actions.is_unavailable
            endpoint = _endpoint(self.endpoint.value)
            known = self._data.get("workers", {})
            used = {worker.get("target", name) for name, worker in known.items() if not _may_retry(name, worker)}
            self.add.disabled = busy("add") or endpoint is None or endpoint in used
            self.remove.disabled = busy("remove") or self.known.value is None
            self.known.disabled = self.known.value is None
            self.discover.disabled = busy("discover")
            self.calibrate.disabled = busy("calibrate")
            self.start.disabled = busy("start workers")
            has_local = any(worker.get("local") for worker in known.values())
            self.stop.disabled = busy("stop workers") or not has_local

    def _start(self, _: object) -> None:
        count = self.count.value

        async def start(router: Router) -> str | None:
            started = await router.ensure_workers(count)
            return None if started else "so many workers already run"

        self._actions.start("start workers", f"starting {counted(count, 'worker')}", start)

    def _stop(self, _: object) -> None:
        async def stop(router: Router) -> str | None:
            ended = await router.stop_workers()
            return "; ".join(str(engine) for engine in ended if engine.users) or None

        self._actions.start("stop workers", "stopping the workers of this notebook", stop)

    def _add(self, _: object) -> None:
        endpoint = self.endpoint.value

        async def add(router: Router) -> None:
            worker = await router.add_worker(endpoint)
            if is_target(worker.endpoint) and worker.state == "down":  # it stays, so that one click tries it again
                raise WorkersUnavailableError(worker.detail)
            self.endpoint.value = ""

        self._actions.start("add", f"adding {endpoint}", add)

    def _remove(self, _: object) -> None:
        endpoint = self.known.value

        async def remove(router: Router) -> None:
            await router.remove_worker(endpoint)

        self._actions.start("remove", f"removing {endpoint}", remove)

    def _discover(self, _: object) -> None:
        async def discover(router: Router) -> str | None:
            used = await router.discover_workers()
            try:
                found = await router.find_workers(mdns=True)
            except ConfigError:  # without zeroconf, or without a local network
                found = await router.find_workers()
            offered = tuple(worker.name for worker in found if worker.add_line)
            self.endpoint.options = offered
            if offered:
                return f"found {', '.join(offered)}; choose one beside Other workers to add it"
            return None if used else "found no new workers"

        self._actions.start("discover", "searching for workers", discover)

    def _calibrate(self, _: object) -> None:
        async def calibrate(router: Router) -> None:
            await router.calibrate()

        self._actions.start("calibrate", "measuring this machine and the free workers", calibrate)


def _known_models() -> tuple[str, ...]:
    with contextlib.suppress(ConfigError):  # a settings file that cannot be read
        return tuple(dict.fromkeys([*MODEL_PROFILES, *config.saved_models()]))
    return tuple(MODEL_PROFILES)


class ModelControls:
    """Load and stop models, and choose how the next ones are started.

    Args:
        strategy: returns the router's strategy; None once the router is gone.
    """

    def __init__(self, actions: ClusterActions, strategy: Callable[[], str | None]) -> None:
        self._actions = actions
        self._strategy = strategy
        self._lock = threading.RLock()  # the kernel's threads change values, the I/O loop refreshes
        self._data: Mapping[str, Any] = {}
        self.model = ipywidgets.Combobox(
            placeholder="model", options=_known_models(), ensure_option=False, layout=_NARROW
        )
        self.load = ipywidgets.Button(
            description="Load",
            tooltip="load this model: start its coordinator, or load it in Ollama",
            layout=_SMALL,
        )
        self.running = ipywidgets.Dropdown(options=(), layout=_NARROW)
        self.stop = ipywidgets.Button(
            description="Stop", tooltip="stop the coordinator of this model", layout=_SMALL
        )
        self.strategy = ipywidgets.Dropdown(
            options=tuple(STRATEGIES),
            value=strategy(),
            tooltip=_STRATEGIES_TOOLTIP,
            layout=_NARROW,
        )
        self.keep_alive = ipywidgets.Text(placeholder="10m, 1h, forever", layout=_NARROW)
        self.keep = ipywidgets.Button(
            description="Apply",
            tooltip="how long coordinators stay loaded without requests (keep_alive)",
            layout=_SMALL,
        )
        self.box = ipywidgets.VBox(
            [
                row("Load a model", self.model, self.load),
                row("Running model", self.running, self.stop),
                row("Layer strategy", self.strategy),
                row("Keep loaded for", self.keep_alive, self.keep),
            ]
        )
        for text in (self.model, self.keep_alive):
            text.observe(lambda _: self._enable(), "value")
        self.strategy.observe(self._choose_strategy, "value")
        self.load.on_click(self._load)
        self.stop.on_click(self._stop)
        self.keep.on_click(self._keep)
        self._enable()

    def refresh(self, data: Mapping[str, Any]) -> None:
        """Fit the controls to the state."""
        with self._lock:
            self._data = data
            choose_among(self.running, self._running())
            chosen = self._strategy()
            if chosen is not None and not self._actions.is_unavailable("strategy"):  # else a change is under way
                self.strategy.value = chosen
            self._enable()

    def _running(self) -> list[str]:
        coordinators = self._data.get("coordinators", {}).values()
        return [coordinator["model"] for coordinator in coordinators if coordinator.get("own")]

    def _enable(self) -> None:
        with self._lock:
            busy, model = self._actions.is_unavailable, self.model.value.strip()
            loading = {*self._data.get("starting", {}), *self._running()}
            self.load.disabled = busy("load") or not model or short_name(model) in loading
            self.stop.disabled = busy("stop") or self.running.value is None
            self.running.disabled = self.running.value is None
            self.keep.disabled = busy("keep_alive") or not _is_keep_alive(self.keep_alive.value)
            self.strategy.disabled = busy("strategy")

    def _load(self, _: object) -> None:
        model = self.model.value.strip()

        async def load(router: Router) -> str | None:
            return f"loaded {model} {await router.preload(model)}"

        self._actions.start("load", f"loading {model}", load)

    def _stop(self, _: object) -> None:
        model = self.running.value

        async def stop(router: Router) -> None:
            await router.stop_coordinator(model)

        self._actions.start("stop", f"stopping {model}", stop)

    def _choose_strategy(self, change: Mapping[str, Any]) -> None:
        if change["new"] == self._strategy():
            return

        async def choose(router: Router) -> None:
            await router.configure(layer_strategy=change["new"])

        self._actions.start("strategy", f"changing the strategy to {change['new']}", choose)

    def _keep(self, _: object) -> None:
        keep_alive = self.keep_alive.value

        async def keep(router: Router) -> None:
            await router.configure(keep_alive=keep_alive)

        self._actions.start("keep_alive", f"setting keep_alive to {keep_alive}", keep)


def _endpoint(text: str) -> str | None:
    """What was typed as `host:port` or `ssh://host`; None while it is neither."""
    try:
        return worker_target(text)
    except ConfigError:
        return None


def _may_retry(name: str, worker: Mapping[str, Any]) -> bool:
    """Whether it is a machine that could not be connected."""
    return worker["state"] in ("down", "unknown") and is_target(name)


def _is_keep_alive(text: str) -> bool:
    try:
        keep_alive_seconds(text)
    except ConfigError:
        return False
    return True
