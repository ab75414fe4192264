"""A layer plan as data: which worker, or device of the coordinator's machine, takes which layers.

llama.cpp places n + 1 units, in order: the model's n blocks and the output layer (the input embedding stays with
the coordinator). Each device gets a contiguous run of units, so a placement is a list of counts.

The order of devices is llama.cpp's (`load_tensors` in llama-model.cpp): with `--gpu-layers K` the first n + 1 - K
units stay on the coordinator's own CPU; then follow the workers in the order of `--rpc`; then the coordinator's
own GPUs. So its CPU has the output layer only where it has everything.

`--tensor-split` reproduces whole counts exactly. llama.cpp puts unit i of the K that leave the CPU on the first
device whose cumulative share exceeds i / K. Its float32 arithmetic cannot shift a border: at a border both sides
are the same quotient of the same two whole numbers, and elsewhere they are at least 1 / K apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from sollol_nb.text.tables import counted, format_bytes

MAX_WORKERS = 15
"""llama.cpp schedules 16 backends (GGML_SCHED_MAX_BACKENDS), one of which is the coordinator's CPU; the others are
workers and own GPUs."""

THIS_MACHINE = "this machine"
"""Instead of an endpoint: the machine of the coordinators, and its CPU."""
CPU = "CPU"
"""The device of `Shard` and `WorkerCapacity` that is the coordinator's own CPU."""
GIVEN = "as given"
"""The strategy of a plan whose counts were given."""


def own_endpoint(device: str) -> str:
    """Instead of an endpoint, for a device of the coordinator's machine: `this machine`, `this machine CUDA0`."""
    return THIS_MACHINE if device == CPU else f"{THIS_MACHINE} {device}"


def is_own(endpoint: str) -> bool:
    """Whether this stands for a device of the coordinator's machine."""
    return endpoint == THIS_MACHINE or endpoint.startswith(f"{THIS_MACHINE} ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """The units of one worker, or of one device of the coordinator's machine, without a gap.

    Attributes:
        endpoint: the worker; for an own device `own_endpoint(device)`.
        first_layer: its first block (the number of blocks, if it has the output layer only).
        layer_count: its blocks; 0 if it has the output layer only.
        has_output: whether it has the output layer.
        weight_bytes, kv_bytes, reserve_bytes: predicted memory for weights, KV cache and compute buffers.
        free_bytes: memory that was reported as free.
        name: how people call the worker; "" if by its endpoint.
        device: "" for a worker; `CPU`, or llama.cpp's name of a GPU such as `CUDA0`, for a device of the
            coordinator's own machine.
    """

    endpoint: str
    first_layer: int
    layer_count: int
    has_output: bool
    weight_bytes: int
    kv_bytes: int
    reserve_bytes: int
    free_bytes: int
    name: str = ""
    device: str = ""

    @property
    def is_own(self) -> bool:
        """Whether it is a device of the coordinator's own machine."""
        return bool(self.device)

    @property
    def worker(self) -> str:
        """The worker or device as people call it."""
        return self.name or self.endpoint

    @property
    def placed_on(self) -> str:
        """As llama.cpp's log names where it places units: the endpoint, or the device."""
        return self.device or self.endpoint

    @property
    def unit_count(self) -> int:
        return self.layer_count + self.has_output

    @property
    def units(self) -> range:
        """Its units: blocks, then the output layer."""
        return range(self.first_layer, self.first_layer + self.unit_count)

    @property
    def last_layer(self) -> int:
        """Its last block; `first_layer - 1` if it has none."""
        return self.first_layer + self.layer_count - 1

    @property
    def needed_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.reserve_bytes

    @property
    def layers(self) -> str:
        """`0-5`, `7`, `10-11 + output`, `output`."""
        if not self.layer_count:
            return "output"
        blocks = f"{self.first_layer}-{self.last_layer}" if self.layer_count > 1 else f"{self.first_layer}"
        return f"{blocks} + output" if self.has_output else blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """Which worker takes which layers; workers without any are not in it.

    Attributes:
        strategy: a name in `STRATEGIES`, or `GIVEN`; where `auto` chose, what it chose.
        layer_count: the model's blocks.
        context_tokens: of the coordinator, all its slots together.
        shards: in the order of their layers: the own CPU, workers in the order of `--rpc`, own GPUs.
        predicted_token_ms: time per token, if it could be predicted when the plan was made (see `token_time.py`).
        reasons: why it is so, a sentence each: who was left out and why, and what the next best would have given.
    """

    strategy: str
    layer_count: int
    context_tokens: int
    shards: tuple[Shard, ...]
    predicted_token_ms: float | None = None
    reasons: tuple[str, ...] = ()

    @property
    def workers(self) -> tuple[Shard, ...]:
        """The shards of workers, without those of own devices."""
        return tuple(shard for shard in self.shards if not shard.is_own)

    @property
    def own(self) -> tuple[Shard, ...]:
        """The shards of own devices."""
        return tuple(shard for shard in self.shards if shard.is_own)

    @property
    def own_cpu(self) -> Shard | None:
        """The shard of the own CPU; None if it has no units."""
        return next((shard for shard in self.shards if shard.device == CPU), None)

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Workers in the order of their layers, the order `--rpc` needs; empty if all is on own devices."""
        return tuple(shard.endpoint for shard in self.workers)

    @property
    def unit_counts(self) -> tuple[int, ...]:
        """Units of each shard, own devices included; they sum to `layer_count + 1`."""
        return tuple(shard.unit_count for shard in self.shards)

    @property
    def offloaded(self) -> tuple[Shard, ...]:
        """All shards but that of the own CPU: what llama.cpp calls offloaded layers."""
        return tuple(shard for shard in self.shards if shard.device != CPU)

    @property
    def tensor_split(self) -> str:
        """The value for `--tensor-split`: `6,4,3`; "" if all is on the own CPU."""
        return ",".join(str(shard.unit_count) for shard in self.offloaded)

    @property
    def gpu_layers(self) -> int:
        """The value for `--gpu-layers`: the units that do not stay on the own CPU."""
        return sum(shard.unit_count for shard in self.offloaded)

    @property
    def needed_bytes(self) -> int:
        return sum(shard.needed_bytes for shard in self.shards)

    def describe(self) -> str:
        """One line: `12 layers over 2 workers (even): a:50052 0-5 (1.2 GiB of 4.0 GiB), ...`."""
        shards = ", ".join(
            f"{shard.worker} {shard.layers} "
            f"({format_bytes(shard.needed_bytes)} of {format_bytes(shard.free_bytes)})"
            for shard in self.shards
        )
        return f"{counted(self.layer_count, 'layer')} {self.describe_devices()} ({self.strategy}): {shards}"

    def describe_cost(self) -> str:
        """What it takes where, such as `40 GB on b (80 layers)`."""
        shares = [f"{shard.worker} ({counted(shard.unit_count, 'layer')})" for shard in self.shards]
        return f"{format_bytes(self.needed_bytes)} on {' and '.join(shares)}"

    def describe_devices(self) -> str:
        """`over 2 workers`, `over 2 workers and this machine`, `on this machine`."""
        if not self.workers:
            return f"on {THIS_MACHINE}"
        workers = counted(len(self.workers), "worker")
        return f"over {workers} and {THIS_MACHINE}" if self.own else f"over {workers}"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerPlan:
        """The plan from the data of `as_dict`. Raises KeyError or TypeError for other data."""
        names = {field.name for field in fields(Shard)}
        return cls(
            strategy=data["strategy"],
            layer_count=data["layer_count"],
            context_tokens=data["context_tokens"],
            shards=tuple(Shard(**{key: shard[key] for key in shard if key in names}) for shard in data["shards"]),
            predicted_token_ms=data.get("predicted_token_ms"),  # entries of older versions lack it
            reasons=tuple(map(str, data.get("reasons", ()))),
        )

    def as_dict(self) -> dict[str, Any]:
        """The plan as plain data for JSON."""
        shards = [
            asdict(shard) | {"layers": shard.layers, "needed_bytes": shard.needed_bytes} for shard in self.shards
        ]
        return {
            "strategy": self.strategy,
            "layer_count": self.layer_count,
            "context_tokens": self.context_tokens,
            "tensor_split": self.tensor_split,
            "needed_bytes": self.needed_bytes,
            "predicted_token_ms": self.predicted_token_ms,
            "reasons": list(self.reasons),
            "shards": shards,
        }


def reason_lines(reasons: Sequence[str], *, verbose: bool) -> list[str]:
    """The reasons of a plan as lines: one that says how many more there are, or all of them."""
    if not reasons:
        return []
    if verbose:
        return [f"why: {reasons[0]}", *(f"     {reason}" for reason in reasons[1:])]
    more = len(reasons) - 1
    return [f"why: {reasons[0]}" + (f" ({counted(more, 'more reason')} with -v)" if more else "")]
