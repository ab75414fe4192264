"""API keys: each with a name, a priority and limits."""

from __future__ import annotations

from dataclasses import dataclass

from sollol_nb.runtime.priority import Priority


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What whoever has this key may do.

    Attributes:
        name: for logs and metrics.
        priority: of requests that name none, 1 to 10.
        limits_priority: whether requests may not have a higher one.
        may_control: whether it may change the cluster, pull models and name model files.
        max_requests: at the same time; None is the gateway's limit.
        requests_per_minute: None is no limit.
    """

    name: str
    priority: int = Priority.NORMAL
    limits_priority: bool = True
    may_control: bool = False
    max_requests: int | None = None
    requests_per_minute: int | None = None


ANYBODY = Key(name="", limits_priority=False, may_control=True)
"""Who asks where no key is required: on loopback."""
