"""One running coordinator with its layers, planned and as the engine placed them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sollol_nb.layers.plan import CPU
from sollol_nb.layers.token_time import TokenTime
from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.llama_cpp.coordinators.replanning import Advice
from sollol_nb.models.files import DEMO_MODEL_PATH, DEMO_NOTE
from sollol_nb.text import palette
from sollol_nb.text.tables import counted, format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSegment:
    """The layers that one worker, or one device of the coordinator's own machine, runs of one model.

    Attributes:
        endpoint: the worker's; `this machine`, or `this machine CUDA0`, for an own device.
        layers: planned layers, such as `0-4` or `10-11 + output`.
        units: planned units (blocks and the output layer).
        actual_units: units that the engine reports to have placed; None if it reports none.
        weight_bytes: planned weights.
        actual_weight_bytes: weights as the engine reports them; None if it does not.
        kv_bytes: planned KV cache.
        actual_kv_bytes: KV cache as the engine reports it; None if it does not.
        share: fraction of all units, 0 to 1.
        color: its colour wherever the layers are drawn, one of `palette.SEGMENTS`.
        token_ms: its part of the time of a token, estimated from measurements; None if unknown.
        time_share: the same as a fraction of the time of a token, 0 to 1.
        name: how people call the worker; "" if by its endpoint.
    """

    endpoint: str
    layers: str
    units: int
    actual_units: int | None
    weight_bytes: int
    actual_weight_bytes: int | None
    kv_bytes: int
    actual_kv_bytes: int | None = None
    share: float
    color: str
    token_ms: float | None = None
    time_share: float | None = None
    name: str = ""

    @property
    def worker(self) -> str:
        """The worker as people call it."""
        return self.name or self.endpoint

    @property
    def description(self) -> str:
        """Planned beside actual, for a tooltip."""
        actual = "not reported" if self.actual_units is None else counted(self.actual_units, "unit")
        if self.actual_weight_bytes is not None:
            actual += f", {format_bytes(self.actual_weight_bytes)} weights"
        if self.actual_kv_bytes is not None:
            actual += f", {format_bytes(self.actual_kv_bytes)} KV cache"
        time = "" if self.token_ms is None else f"; {self.token_ms:.3g} ms of each token ({self.time_share:.0%})"
        return (
            f"{self.worker}: layers {self.layers}; planned: {counted(self.units, 'unit')}, "
            f"{format_bytes(self.weight_bytes)} weights, {format_bytes(self.kv_bytes)} KV cache; "
            f"actual: {actual}{time}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalPart:
    """What the engine placed on a device of the coordinator's own machine, such as `CPU`: the input embedding, or
    the whole model where nothing is sharded.

    Attributes:
        device: the engine's name of the device.
        units: blocks and output layer placed there.
        weight_bytes, kv_bytes: as the engine reports them.
    """

    device: str
    units: int
    weight_bytes: int
    kv_bytes: int

    @property
    def name(self) -> str:
        """`this machine (CPU)`."""
        return f"this machine ({self.device})"

    @property
    def contents(self) -> str:
        """What is placed there."""
        units = f"{counted(self.units, 'unit')}, " if self.units else ""
        kv = f", {format_bytes(self.kv_bytes)} KV cache" if self.kv_bytes else ""
        return f"{units}{format_bytes(self.weight_bytes)} weights{kv}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorStatus:
    """One running coordinator; `note` says what is special about its model.

    `predicted_token_ms` was predicted when the layers were planned, `token_ms` is measured, and `drift` is the
    measured time relative to the predicted one, over some answers; None if unknown.
    `reasons` say why its layers are planned like this, the most important one first; `drafts` says how it drafts
    tokens, "" if it does not. `advice` says what a better layout would bring, "" where none is known;
    `advised_layout` has its units of each worker, in the order of its layers. `standby` is the state of one that
    is a standby of the same model (`starting` or `ready`), which answers nobody; "" for others. `bytes_sent` is
    what its workers got when it was loaded, None where not known; `sent` adds how much was cached there.
    """

    model: str
    note: str
    url: str
    log_path: str
    strategy: str
    context_tokens: int
    running: int
    waiting: int
    slots: int
    uptime_s: float
    load_ms: float
    segments: tuple[LayerSegment, ...]
    differences: tuple[str, ...]
    local: tuple[LocalPart, ...] = ()
    predicted_token_ms: float | None = None
    token_ms: float | None = None
    drift: float | None = None
    model_path: str = ""
    bytes_sent: int | None = None
    sent: str = ""
    reasons: tuple[str, ...] = ()
    drafts: str = ""
    advice: str = ""
    advised_layout: tuple[tuple[str, int], ...] = ()
    standby: str = ""

    @classmethod
    def of(
        cls,
        coordinator: Coordinator,
        remark: str = "",
        *,
        token_ms: float | None = None,
        drift: float | None = None,
        token: TokenTime | None = None,
        advice: Advice | None = None,
    ) -> CoordinatorStatus:
        """The status of a coordinator now.

        Args:
            remark: added to its note; of a standby, its state comes first.
            token_ms: measured time of a token.
            drift: how much longer that is than predicted.
            token: the estimated parts of its workers in that time.
            advice: what a better layout would bring.
        """
        demo = DEMO_NOTE if coordinator.settings.model_path == DEMO_MODEL_PATH else ""
        plan, speculation = coordinator.plan, coordinator.settings.speculation
        reasons = plan.reasons if plan else ()
        standby = ("ready" if coordinator.load_ms else "starting") if coordinator.standby_of else ""
        if reasons and speculation.why and not speculation.is_on:
            reasons = (*reasons, speculation.describe())
        return cls(
            model=coordinator.model,
            model_path=str(coordinator.settings.model_path),
            note="; ".join(filter(None, (demo, standby and f"standby, {standby}", remark))),
            url=coordinator.base_url,
            log_path=str(coordinator.log_path),
            strategy=plan.strategy if plan else "this machine only",
            context_tokens=coordinator.settings.context_tokens,
            # A standby shares the gate of the coordinator that it may have to replace.
            running=0 if standby else coordinator.gate.running,
            waiting=0 if standby else coordinator.gate.waiting,
            slots=0 if standby else coordinator.gate.slots,
            standby=standby,
            uptime_s=coordinator.uptime_s,
            load_ms=coordinator.load_ms,
            bytes_sent=coordinator.bytes_sent,
            sent=coordinator.sent_description,
            segments=tuple(_segments(coordinator, token)),
            differences=tuple(coordinator.placement_differences),
            reasons=reasons,
            drafts=speculation.describe() if speculation.is_on else "",
            local=tuple(_local_parts(coordinator)),
            predicted_token_ms=plan.predicted_token_ms if plan else None,
            token_ms=token_ms,
            drift=drift,
            advice=advice.text if advice else "",
            advised_layout=advice.layout if advice else (),
        )


def _segments(coordinator: Coordinator, token: TokenTime | None) -> Iterator[LayerSegment]:
    part_ms = token.part_ms if token else ()
    shares = token.shares if token else ()
    for position, shard in enumerate(coordinator.plan.shards if coordinator.plan else ()):
        placed = coordinator.placement.of(shard.placed_on) if coordinator.placement else None
        yield LayerSegment(
            endpoint=shard.endpoint,
            name=shard.name,
            layers=shard.layers,
            units=shard.unit_count,
            actual_units=len(placed.units) if placed else None,
            weight_bytes=shard.weight_bytes,
            # The engine reports the whole part of the file that it maps, with the embedding.
            actual_weight_bytes=placed.model_bytes if placed and shard.device != CPU else None,
            kv_bytes=shard.kv_bytes,
            actual_kv_bytes=placed.kv_bytes if placed else None,
            share=shard.unit_count / (coordinator.settings.facts.layer_count + 1),
            color=palette.SEGMENTS[position % len(palette.SEGMENTS)],
            token_ms=part_ms[position] if part_ms else None,
            time_share=shares[position] if shares else None,
        )


def _local_parts(coordinator: Coordinator) -> Iterator[LocalPart]:
    planned = {shard.placed_on for shard in coordinator.plan.shards} if coordinator.plan else set()
    for device in coordinator.placement.devices if coordinator.placement else ():
        if device.name not in planned and (device.units or device.model_bytes or device.kv_bytes):
            yield LocalPart(
                device=device.name,
                units=len(device.units),
                weight_bytes=device.model_bytes,
                kv_bytes=device.kv_bytes,
            )
