"""A coordinator as a card, and a model that is being loaded."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import PurePath

from sollol_nb.cluster.cards.shapes import ModelCard, Pill, Segment
from sollol_nb.cluster.coordinator_status import CoordinatorStatus, LayerSegment
from sollol_nb.models.files import DEMO_NOTE
from sollol_nb.text.short_names import short_endpoints, short_names, without_home
from sollol_nb.text.tables import counted, format_bytes

MEANT_WITHIN = 2.0
"""A prediction that is off by a larger factor is not shown beside what was measured."""


def model_cards(
    coordinators: Iterable[CoordinatorStatus],
    starting: Mapping[str, tuple[str, float | None]],
    answers: Mapping[str, str],
    own: Collection[str] | None,
) -> tuple[ModelCard, ...]:
    """Models that are being loaded, then the running ones, then standbys.

    Args:
        starting: description and share of each load, by model.
        answers: a description of the last answer, by URL.
        own: URLs of this router's coordinators; None if all are.
    """
    coordinators = sorted(coordinators, key=lambda coordinator: bool(coordinator.standby))
    titles = short_names([*starting, *(coordinator.model for coordinator in coordinators)])
    loading = [
        ModelCard(
            key=model,
            title=titles[model],
            tooltip=without_home(model) if model != titles[model] else "",
            pill=Pill("loading" if share is None else f"loading {share:.0%}", "busy"),
            progress=share,
            figures=(description,),
        )
        for model, (description, share) in starting.items()
    ]
    running = [
        _card(coordinator, titles[coordinator.model], answers.get(coordinator.url, ""), own)
        for coordinator in coordinators
    ]
    return (*loading, *running)


def _card(coordinator: CoordinatorStatus, title: str, answer: str, own: Collection[str] | None) -> ModelCard:
    path = coordinator.model_path or (coordinator.model if coordinator.model != title else "")
    path = PurePath(path).name if DEMO_NOTE in coordinator.note else without_home(path)
    return ModelCard(
        key=coordinator.url,
        title=title,
        tooltip=path,
        pill=_pill(coordinator),
        figures=tuple(_figures(coordinator, answer)),
        note="; ".join(part for part in coordinator.note.split("; ") if not part.startswith("standby, ")),
        segments=tuple(_segments(coordinator)),
        facts=tuple(_facts(coordinator, path)),
        why=coordinator.reasons,
        is_own=own is None or coordinator.url in own,
    )


def _pill(coordinator: CoordinatorStatus) -> Pill:
    if coordinator.standby:
        return Pill("standby" if coordinator.standby == "ready" else "standby, loading", "idle")
    if coordinator.waiting:
        return Pill(f"answering {coordinator.running}, {coordinator.waiting} waiting", "busy")
    if coordinator.running:
        count = f" {coordinator.running} of {coordinator.slots}" if coordinator.slots > 1 else ""
        return Pill(f"answering{count}", "busy")
    return Pill("ready", "ok")


def _figures(coordinator: CoordinatorStatus, answer: str) -> Iterable[str]:
    """What people look for first; the same figures for each card."""
    if coordinator.token_ms:
        yield f"{1000 / coordinator.token_ms:.3g} tokens/s"
        yield f"{coordinator.token_ms:.3g} ms per token{_beside(coordinator)}"
    elif coordinator.predicted_token_ms is not None:
        yield f"{1000 / coordinator.predicted_token_ms:.3g} tokens/s predicted"
    if answer:
        yield f"last answer: {answer}"
    yield f"{coordinator.context_tokens:,} tokens of context"
    if not coordinator.segments:
        yield "on this machine"
    else:
        yield f"over {counted(len(coordinator.segments), 'worker')}"


def _beside(coordinator: CoordinatorStatus) -> str:
    """The prediction beside a measured time, where it means something."""
    if not means_something(coordinator):
        return ""
    return f" ({coordinator.predicted_token_ms:.3g} predicted)"


def means_something(coordinator: CoordinatorStatus) -> bool:
    """Whether the predicted time of a token is worth showing beside the measured one."""
    predicted_ms, token_ms, drift = coordinator.predicted_token_ms, coordinator.token_ms, coordinator.drift
    ratio = drift if drift is not None else token_ms / predicted_ms if token_ms and predicted_ms else None
    return bool(predicted_ms) and ratio is not None and 1 / MEANT_WITHIN <= ratio <= MEANT_WITHIN


def _segments(coordinator: CoordinatorStatus) -> Iterable[Segment]:
    labels = short_endpoints(segment.worker for segment in coordinator.segments)
    actual = [segment.actual_units for segment in coordinator.segments]
    planned = [segment.units for segment in coordinator.segments]
    placed = sum(units or 0 for units in actual)
    has_moved = None not in actual and actual != planned and placed > 0
    for segment, units in zip(coordinator.segments, actual, strict=True):
        has_time = segment.token_ms is not None and segment.time_share is not None
        yield Segment(
            key=segment.endpoint,
            layers=segment.layers,
            worker=labels[segment.worker],
            name=segment.worker,
            tooltip=_tooltip(segment),
            share=round(segment.share, 4),
            color=segment.color,
            units=_beside_plan(f"{segment.units}", None if units is None else f"{units}"),
            weights=_sizes(segment.weight_bytes, segment.actual_weight_bytes),
            kv=_sizes(segment.kv_bytes, segment.actual_kv_bytes),
            time=f"{segment.token_ms:.3g} ms ({segment.time_share:.0%})" if has_time else "",
            time_share=None if segment.time_share is None else round(segment.time_share, 2),
            actual_share=round((units or 0) / placed, 4) if has_moved else None,
        )


def _tooltip(segment: LayerSegment) -> str:
    where = f"{segment.worker} ({segment.endpoint})" if segment.name else segment.worker
    lines = [
        where,
        f"layers {segment.layers}",
        f"weights {_sizes(segment.weight_bytes, segment.actual_weight_bytes)}",
        f"KV cache {_sizes(segment.kv_bytes, segment.actual_kv_bytes)}",
    ]
    if segment.token_ms is not None:
        lines.append(f"{segment.token_ms:.3g} ms of each token")
    return "\n".join(lines)


def _sizes(planned_bytes: int, actual_bytes: int | None) -> str:
    return _beside_plan(format_bytes(planned_bytes), None if actual_bytes is None else format_bytes(actual_bytes))


def _beside_plan(planned: str, actual: str | None) -> str:
    """What there is, with the plan where it differs."""
    if actual is None:
        return f"{planned} planned"
    return actual if actual == planned else f"{actual} (planned {planned})"


def _facts(coordinator: CoordinatorStatus, path: str) -> Iterable[tuple[str, str]]:
    if path:
        yield "file", path
    yield "address", coordinator.url
    yield "layer strategy", coordinator.strategy
    sent = f", {coordinator.sent}" if coordinator.sent else ""
    yield "loaded in", f"{coordinator.load_ms / 1000:.2f} s{sent}"
    if not coordinator.standby:
        yield "slots", f"{coordinator.running} of {coordinator.slots} busy, {coordinator.waiting} waiting"
    if coordinator.drafts:
        yield "drafts", coordinator.drafts
    for part in coordinator.local:
        yield part.name, part.contents
