"""Which Ollama node a request goes to: pure functions over what each node offers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum


class Residency(IntEnum):
    """Where a node has a model, the best first."""

    LOADED = 0
    ON_DISK = 1
    MISSING = 2


@dataclass(frozen=True, slots=True)
class NodeOffer:
    """What one node can do for one request.

    Attributes:
        url: the node.
        residency: where it has the model.
        has_free_slot: whether the request would start immediately.
        expected_ms: until the answer is complete there: measured time of a typical answer, times one more than
            the requests already there per slot, plus loading the model if it is only on disk.
    """

    url: str
    residency: Residency
    has_free_slot: bool
    expected_ms: float


def choose_node(
    offers: Sequence[NodeOffer], *, pick: Callable[[Sequence[NodeOffer]], NodeOffer] = random.choice
) -> NodeOffer | None:
    """The node for a request: one that has the model loaded, else on disk, else any that could pull it; among
    those the one expected to finish first; among equals a random one. None if there are no nodes.

    One exception: where every node that has the model loaded is busy, and another would finish sooner although
    it must load the model first, the other is chosen, so that no queue forms beside an idle node.

    Args:
        pick: how one of several equals is chosen; a test may pass its own.
    """
    infinite = float("inf")
    loaded_ms = on_disk_ms = missing_ms = infinite
    loaded: list[NodeOffer] = []
    on_disk: list[NodeOffer] = []
    missing: list[NodeOffer] = []
    # One loop with plain comparisons: a thousand nodes in less than 50 us (benchmarks/scale.py).
    for offer in offers:
        expected_ms = offer.expected_ms
        residency = offer.residency
        if residency == 0:
            if expected_ms < loaded_ms:
                loaded_ms, loaded = expected_ms, [offer]
            elif expected_ms == loaded_ms:
                loaded.append(offer)
        elif residency == 1:
            if expected_ms < on_disk_ms:
                on_disk_ms, on_disk = expected_ms, [offer]
            elif expected_ms == on_disk_ms:
                on_disk.append(offer)
        elif expected_ms < missing_ms:
            missing_ms, missing = expected_ms, [offer]
        elif expected_ms == missing_ms:
            missing.append(offer)
    best = loaded or on_disk or missing
    if loaded and on_disk_ms < loaded_ms and not any(o.has_free_slot for o in offers if o.residency == 0):
        best = on_disk
    return pick(best) if best else None


def worth_waiting_for(choice: NodeOffer, offers: Iterable[NodeOffer]) -> list[NodeOffer]:
    """Where to wait for a slot once `choice` is made: there alone if it has a free slot, else there and at all
    busy nodes with the same residency that are not expected to take twice as long, whichever is free first."""
    if choice.has_free_slot:
        return [choice]
    return [
        offer
        for offer in offers
        if offer.residency == choice.residency
        and not offer.has_free_slot
        and offer.expected_ms <= 2 * choice.expected_ms
    ]
