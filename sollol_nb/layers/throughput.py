"""The strategy `throughput`: the layout with which several requests with long prompts are through soonest.

The workload is `requests` at the same time, each with a prompt and `GENERATED_TOKENS`. Its time is predicted as

    requests * prompt + GENERATED_TOKENS * batch

A prompt passes the devices in micro-batches of `BATCH_TOKENS`. llama.cpp overlaps these, so that one device
works on a micro-batch while the next has the one before, only if there is more than one device, the own CPU has
no layers, and the output layer is offloaded (llama-context.cpp, `pipeline_parallel`). With t the time of a
micro-batch on each device and m micro-batches, a prompt takes sum(t) + (m - 1) * max(t) then, else m * sum(t).
So more workers shorten prompts as long as their work outweighs their round trips: with llama.cpp 27B parameters
went 1.68 times as fast over 2 workers as on 1, and 3.8B slower over 4 than on 1 (its issue 18626).

Generated tokens of all requests are one batch, which is not overlapped: the weights are read once, and each
request but the first adds what a token of a prompt costs; of a mixture of experts, the batch reads the experts
of all.

Limits: weights count by their bytes whatever their type, attention over long prompts is not counted, and prompts
are assumed not to interrupt generation. The search tries some limits of the longest micro-batch, and with more
than `FEW_DEVICES` devices only two orders: its layouts are near the best, not proven to be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING

from sollol_nb.gguf.facts import ModelFacts
from sollol_nb.layers.costs import DeviceCost, Runs, is_known
from sollol_nb.layers.fastest import MARGIN, Choice, Search, best_layout
from sollol_nb.layers.plan import CPU, MAX_WORKERS, LayerPlan
from sollol_nb.layers.reasons import ALONE_IS_FASTEST, listed, why_unknown
from sollol_nb.layers.search import OWN_CPU, WORKER, Device, Layout, in_order
from sollol_nb.layers.strategies import ModelLoad, WorkerCapacity
from sollol_nb.layers.token_time import WorkerPart, WorkerSpeeds, value_bytes, worker_parts
from sollol_nb.text.tables import counted

if TYPE_CHECKING:
    from sollol_nb.layers.costs import Floats

BATCH_TOKENS = 512
"""llama-server's default --ubatch-size."""
GENERATED_TOKENS = 256
DEFAULT_REQUESTS = 4
DEFAULT_PROMPT_TOKENS = 2048
LIMITS_TRIED = 12
CANDIDATES = 20
FEW_DEVICES = 4


@dataclass(frozen=True, slots=True)
class Throughput:
    """What a layout is predicted to do.

    Attributes:
        prompt_tokens_per_s: of a prompt that is processed alone.
        tokens_per_s: generated, of all requests together.
        is_pipelined: whether the micro-batches of prompts overlap.
    """

    prompt_tokens_per_s: float
    tokens_per_s: float
    is_pipelined: bool

    def describe(self) -> str:
        """`512 prompt tokens/s (pipelined) and 45 generated tokens/s`."""
        pipelined = " (pipelined)" if self.is_pipelined else ""
        prompts = f"{self.prompt_tokens_per_s:.3g} prompt tokens/s{pipelined}"
        return f"{prompts} and {self.tokens_per_s:.3g} generated tokens/s"


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests at the same time, and the tokens of each one's prompt."""

    facts: ModelFacts
    speeds: WorkerSpeeds
    requests: int = DEFAULT_REQUESTS
    prompt_tokens: int = DEFAULT_PROMPT_TOKENS

    @property
    def batch_tokens(self) -> int:
        """Of each micro-batch of a prompt."""
        return min(self.prompt_tokens, BATCH_TOKENS)

    @property
    def batches(self) -> float:
        """Micro-batches of a prompt; the last counts as the part that it is."""
        return self.prompt_tokens / self.batch_tokens

    def micro_batch(self, worker: WorkerCapacity, free_bytes: int) -> DeviceCost | None:
        """What one micro-batch of a prompt costs; of its last token alone the logits are sent."""
        return self._cost(
            worker, free_bytes, self.batch_tokens, self._prompt_ms(worker.endpoint) * self.batch_tokens
        )

    def tokens(self, worker: WorkerCapacity, free_bytes: int) -> DeviceCost | None:
        """What one generated token of each request costs."""
        ms_per_byte = self.speeds.ms_per_byte.get(worker.endpoint, 0.0) * self._experts
        ms_per_byte += self._prompt_ms(worker.endpoint) * (self.requests - 1)
        return self._cost(worker, free_bytes, self.requests, ms_per_byte, self.requests)

    def _prompt_ms(self, endpoint: str) -> float:
        """For each byte and token of a prompt; where it was not calibrated, as slow as for a generated one."""
        return self.speeds.prompt_ms_per_byte.get(endpoint, self.speeds.ms_per_byte.get(endpoint, 0.0))

    @property
    def _experts(self) -> float:
        """How much more of the weights the tokens of all requests read than one."""
        held = (*self.facts.layer_bytes, self.facts.output_bytes)
        read = self.facts.read_bytes
        return sum(min(all_, self.requests * one) for all_, one in zip(held, read, strict=True)) / max(
            1, sum(read)
        )

    def _cost(
        self, worker: WorkerCapacity, free_bytes: int, tokens: int, ms_per_byte: float, logits: int = 1
    ) -> DeviceCost | None:
        round_trip_ms = 0.0 if worker.is_own else worker.round_trip_ms
        if round_trip_ms is None or worker.endpoint not in self.speeds.ms_per_byte:
            return None
        hidden_bytes, logits_bytes = (0, 0) if worker.is_own else value_bytes(self.facts)

        def way_ms(wire_bytes: int) -> float:
            part = WorkerPart(worker.endpoint, 0, round_trip_ms, wire_bytes, is_own=worker.is_own)
            return round_trip_ms + self.speeds.hop_and_wire_ms(part)

        fixed_ms = way_ms(2 * tokens * hidden_bytes)
        output_ms = way_ms(tokens * hidden_bytes + logits * logits_bytes) - fixed_ms
        block_ms = self.speeds.block_ms.get(worker.endpoint, 0.0)
        return DeviceCost(ms_per_byte, block_ms, fixed_ms, output_ms, free_bytes)

    def ms(self, micro_batch_ms: Sequence[float], tokens_ms: float, *, is_pipelined: bool) -> float:
        """The time of the workload, from that of a micro-batch on each device and of a token of each request."""
        return self.requests * self.prompt_ms(micro_batch_ms, is_pipelined) + GENERATED_TOKENS * tokens_ms

    def prompt_ms(self, micro_batch_ms: Sequence[float], is_pipelined: bool) -> float:
        """The time of a prompt."""
        if is_pipelined:
            return sum(micro_batch_ms) + (self.batches - 1) * max(micro_batch_ms)
        return self.batches * sum(micro_batch_ms)


def sum_of(first: DeviceCost, times: float, second: DeviceCost, more: float) -> DeviceCost:
    """So often the one and so often the other."""
    return DeviceCost(
        first.ms_per_byte * times + second.ms_per_byte * more,
        first.block_ms * times + second.block_ms * more,
        first.fixed_ms * times + second.fixed_ms * more,
        first.output_ms * times + second.output_ms * more,
        first.free_bytes,
    )


def predict_throughput(
    plan: LayerPlan,
    workers: Sequence[WorkerCapacity],
    facts: ModelFacts,
    speeds: WorkerSpeeds,
    *,
    requests: int = DEFAULT_REQUESTS,
    prompt_tokens: int = DEFAULT_PROMPT_TOKENS,
) -> Throughput | None:
    """What a plan would do; None where a speed or a round trip is not known.

    Args:
        workers: those of the plan, with their round trips.
        requests: at the same time.
        prompt_tokens: of each one's prompt.
    """
    workload = Workload(facts, speeds, requests, prompt_tokens)
    by_endpoint = {worker.endpoint: worker for worker in workers}
    micro_batch_ms, tokens_ms = [], speeds.own_ms
    for shard, part in zip(plan.shards, worker_parts(plan, {}, facts), strict=True):
        worker = by_endpoint.get(shard.endpoint)
        batch = workload.micro_batch(worker, 0) if worker else None
        tokens = workload.tokens(worker, 0) if worker else None
        if batch is None or tokens is None:
            return None
        micro_batch_ms.append(_ms(batch, part, has_output=shard.has_output))
        tokens_ms += _ms(tokens, part, has_output=shard.has_output)
    is_pipelined = len(plan.shards) > 1 and all(shard.device != CPU for shard in plan.shards)
    return _throughput(workload, micro_batch_ms, tokens_ms, is_pipelined)


def _ms(cost: DeviceCost, part: WorkerPart, *, has_output: bool) -> float:
    own = cost.ms_per_byte * part.read_bytes + cost.block_ms * part.block_count
    return own + cost.fixed_ms + cost.output_ms * has_output


def _throughput(
    workload: Workload, micro_batch_ms: Sequence[float], tokens_ms: float, is_pipelined: bool
) -> Throughput:
    prompt_ms = workload.prompt_ms(micro_batch_ms, is_pipelined) + workload.speeds.own_ms
    return Throughput(
        1000 * workload.prompt_tokens / prompt_ms if prompt_ms else float("inf"),
        1000 * workload.requests / tokens_ms if tokens_ms else float("inf"),
        is_pipelined,
    )


# --- the search -------------------------------------------------------------------------------


def soonest_through(
    facts: ModelFacts,
    load: ModelLoad,
    workers: Sequence[WorkerCapacity],
    speeds: WorkerSpeeds,
    *,
    wanted: int | None = None,
    requests: int = DEFAULT_REQUESTS,
    prompt_tokens: int = DEFAULT_PROMPT_TOKENS,
    needs_worker: bool = False,
) -> Choice | None:
    """The choice with the shortest time for the workload; None if the model does not fit.

    Without overlap the time is a sum over devices, and the search is that of `fastest.py`. With it, the longest
    micro-batch is limited to one of `LIMITS_TRIED` values, and under each limit the rest is such a sum.
    """
    workload = Workload(facts, speeds, requests, prompt_tokens)

    def in_turn(worker: WorkerCapacity, free_bytes: int) -> DeviceCost | None:
        batch, tokens = workload.micro_batch(worker, free_bytes), workload.tokens(worker, free_bytes)
        if batch is None or tokens is None:
            return None
        return sum_of(batch, requests * workload.batches, tokens, GENERATED_TOKENS)

    found = best_layout(facts, load, workers, in_turn, own_ms=0.0, wanted=wanted, needs_worker=needs_worker)
    if found is None:
        return None
    search, margin = found
    assert search.best is not None
    unknown = [position for position in search.best.positions if not is_known(workers[position], speeds)]
    if unknown:  # so no time can be predicted
        reasons = [why_unknown([workers[position].worker for position in unknown], wanted)]
        return Choice(search.best.positions, search.best.counts, tuple(reasons))
    layouts = [search.best]
    if margin == MARGIN:  # where memory is tight, there is little to choose
        layouts += _pipelined(search, workers, workload)

    def ms_of(layout: Layout) -> float:
        return workload.ms(*_times(search.runs, layout, workers, workload), is_pipelined=_is_pipelined(layout))

    layouts.sort(key=ms_of)
    best = layouts[0]

    def describe(layout: Layout) -> str:
        batch_ms, tokens_ms = _times(search.runs, layout, workers, workload)
        return _throughput(workload, batch_ms, tokens_ms, _is_pipelined(layout)).describe()

    used = counted(len(best.devices), "device") if len(best.devices) > 1 else "one device"
    reasons = [f"{requests} requests with prompts of {prompt_tokens} tokens: {describe(best)} over {used}"]
    if all(device.rank != WORKER for device in best.devices):
        reasons.insert(0, ALONE_IS_FASTEST)
    unused = {device.position for device in search.devices} - set(best.positions)
    left_out = [workers[position].worker for position in sorted(unused)]
    if left_out and wanted is not None:
        reasons.append(f"{counted(wanted, 'worker')} as set by num_workers")
    elif left_out:
        reasons.append(f"left out, since such requests would take longer with them: {listed(left_out)}")
    other = next((layout for layout in layouts if set(layout.positions) != set(best.positions)), None)
    if other is not None:
        over = listed([workers[position].worker for position in other.positions])
        reasons.append(f"the next best, over {over}, would give {describe(other)}")
    return Choice(best.positions, best.counts, tuple(reasons))


def _is_pipelined(layout: Layout) -> bool:
    return len(layout.devices) > 1 and all(device.rank != OWN_CPU for device in layout.devices)


def _times(
    runs: Runs, layout: Layout, workers: Sequence[WorkerCapacity], workload: Workload
) -> tuple[list[float], float]:
    """The time of a micro-batch on each device, and that of a token of each request on all."""
    batch_ms, tokens_ms, first = [], workload.speeds.own_ms, 0
    for device, count in zip(layout.devices, layout.counts, strict=True):
        worker, free_bytes = workers[device.position], device.cost.free_bytes
        batch, tokens = workload.micro_batch(worker, free_bytes), workload.tokens(worker, free_bytes)
        assert batch is not None
        assert tokens is not None
        batch_ms.append(float(runs.ms(batch)[first, first + count]))
        tokens_ms += float(runs.ms(tokens)[first, first + count])
        first += count
    return batch_ms, tokens_ms


def _pipelined(search: Search, workers: Sequence[WorkerCapacity], workload: Workload) -> list[Layout]:
    """Good layouts whose micro-batches overlap, for various limits of the longest."""
    import numpy as np

    runs = search.runs
    micro: dict[DeviceCost, DeviceCost] = {}  # by what in_order adds up
    devices: list[Device] = []
    for device in search.one_of_each_memory():
        worker, free_bytes = workers[device.position], device.cost.free_bytes
        batch, tokens = workload.micro_batch(worker, free_bytes), workload.tokens(worker, free_bytes)
        if device.rank == OWN_CPU or batch is None or tokens is None:
            continue
        added = sum_of(batch, workload.requests, tokens, GENERATED_TOKENS)
        micro[added] = batch
        devices.append(Device(device.position, added, device.rank, device.memory, device.device_count))
    devices.sort(key=lambda device: micro[device.cost].ms_per_byte)
    must: set[int] = set()
    if search.wanted is None:
        devices = devices[:CANDIDATES]
    else:
        must = {device.position for device in [each for each in devices if each.rank == WORKER][: search.wanted]}
        devices = [device for device in devices if device.rank != WORKER or device.position in must]
    if len(devices) < 2:
        return []
    whole = runs.mean_block_read * (runs.unit_count - 1) + runs.output_read
    rates = [1 / max(micro[device.cost].ms_per_byte, 1e-300) for device in devices[:MAX_WORKERS]]
    few = len(devices) <= FEW_DEVICES
    orders = [list(order) for order in permutations(devices)] if few else [devices, devices[::-1]]
    found = []
    for limit_ms in [*np.geomspace(whole / sum(rates), 2 * whole / rates[0], LIMITS_TRIED), float("inf")]:

        def within(cost: DeviceCost, limit_ms: float = float(limit_ms)) -> Floats:
            return np.where(runs.ms(micro[cost]) <= limit_ms, runs.ms(cost), np.inf)

        for order in orders:
            layout = in_order(runs, sorted(order, key=lambda device: device.rank), must, ms_of=within)
            if layout is not None and len(layout.devices) > 1 and search.is_possible(layout):
                found.append(layout)
    return found
