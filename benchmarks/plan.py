"""Layer plans on uneven clusters: ours, the engine's own split, an even one, and every split there is.

    python benchmarks/plan.py [--clusters 10] [--seed 1] [--json FILE]

Ten workers on loopback, in two groups, are made slow (they run for 25 % to 100 % of the time, see `stutter.py`)
and far (a proxy adds up to 5 ms to a round trip). They are calibrated; then ten clusters of three to five
workers of a group are drawn. In half of these the workers have so little memory that none holds the model, and
all together one and a half times of it. Every split of a small model over every subset of a cluster is measured
briefly, and the best of them again, in turns with our plan (`auto`), the engine's own split (by free memory) and
an even one. "Every" leaves out the order of the workers, since only the small output layer depends on it. Of
SmolLM2, which has 31 units, splits are tried in steps of `STEP`.

Memory is limited in what planner and splits know, not in the workers; there the engine gets the split by free
memory that it would choose. The coordinator's own processor takes no part: on one machine, nothing is faster.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import sys
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

from clusters import bare_server, delayed, running_worker, stuttering
from common import Report, in_turns, isolated, parser_of, run, smollm2_path

from sollol_nb.errors import ModelDoesNotFitError
from sollol_nb.gguf.facts import ModelFacts, read_facts
from sollol_nb.layers.planner import model_load, plan_from_counts, plan_layers
from sollol_nb.layers.strategies import WorkerCapacity
from sollol_nb.layers.token_time import WorkerSpeeds, predict, worker_parts
from sollol_nb.llama_cpp.coordinators.calibration_models import CalibrationModel
from sollol_nb.llama_cpp.coordinators.measurements import TokenMeasurements
from sollol_nb.llama_cpp.workers.calibrations import Calibration
from sollol_nb.runtime.events import EventBus
from sollol_nb.sync_wrapper import HybridRouter

SMALL = CalibrationModel("uneven", 4, 1536, 4096, "Q4_K")
"""64 MB: 3 ms for each of its 4 blocks on a core of a server."""
CONTEXT_TOKENS = 512
GROUP, SLOWEST, FARTHEST_MS = 5, 0.25, 5.0
PERIOD_S = 0.002  # shorter ones cost a tenth of a core for each worker
TOKENS, ANSWERS, FINAL_ROUNDS, FINALISTS = 7, 2, 2, 3
STEP = 8  # of SmolLM2's units
REAL_LIMITS = ((10, 15, 20), ())  # of its blocks, in each group

Layout = tuple[tuple[int, int], ...]
"""Position of a worker in its group, and its units; only workers with some."""


@dataclass(frozen=True)
class Machine:
    """A worker: its share of a core, what its way adds to a round trip, and its endpoint."""

    share: float
    delay_ms: float
    endpoint: str


@dataclass(frozen=True)
class Cluster:
    """Some machines of a group, and how many blocks each can hold besides the output layer; () if all."""

    members: tuple[int, ...]
    limits: tuple[int, ...] = ()


@dataclass
class Model:
    """A model, and the times measured with it in one group, in milliseconds for each token."""

    path: Path
    facts: ModelFacts
    machines: Sequence[Machine]
    speeds: WorkerSpeeds
    round_trips_ms: Mapping[str, float | None]
    times: dict[Layout, list[float]] = field(default_factory=dict)

    @property
    def unit_count(self) -> int:
        return self.facts.layer_count + 1

    def capacities(self, cluster: Cluster) -> list[WorkerCapacity]:
        """The workers as the planner knows them."""
        load = model_load(self.facts, CONTEXT_TOKENS)
        fixed = load.reserve_bytes + load.output_reserve_bytes + load.weight_bytes[-1]
        block = max(map(sum, zip(load.weight_bytes[:-1], load.kv_bytes[:-1], strict=True)))
        found = []
        limits = cluster.limits or [self.facts.layer_count] * len(cluster.members)
        for member, limit in zip(cluster.members, limits, strict=True):
            endpoint = self.machines[member].endpoint
            free_bytes = math.ceil((fixed + limit * block) * 1.06)  # the planner leaves a margin of 5 %
            found.append(WorkerCapacity(endpoint, free_bytes, free_bytes, self.round_trips_ms[endpoint]))
        return found

    def layouts(self, cluster: Cluster, step: int) -> set[Layout]:
        """Every split that fits, in these steps."""
        workers, found = self.capacities(cluster), set()
        for counts in splits(self.unit_count, len(workers), step):
            with contextlib.suppress(ModelDoesNotFitError):
                plan_from_counts(self.facts, workers, counts, context_tokens=CONTEXT_TOKENS)
                found.add(as_layout(cluster, counts))
        return found

    def planned(self, cluster: Cluster) -> tuple[Layout, float]:
        """Our plan, and its predicted milliseconds for each token."""
        plan = plan_layers(
            self.facts,
            self.capacities(cluster),
            strategy="auto",
            context_tokens=CONTEXT_TOKENS,
            speeds=self.speeds,
        )
        assert plan.predicted_token_ms is not None
        position = {machine.endpoint: number for number, machine in enumerate(self.machines)}
        layout = tuple((position[shard.endpoint], shard.unit_count) for shard in plan.shards)
        return layout, plan.predicted_token_ms

    def predicted_ms(self, layout: Layout) -> float:
        workers = [WorkerCapacity(self.machines[member].endpoint, 2**40, 2**40, 0.0) for member, _ in layout]
        counts = [count for _, count in layout]
        plan = plan_from_counts(self.facts, workers, counts, context_tokens=CONTEXT_TOKENS)
        token_ms = predict(self.speeds, worker_parts(plan, self.round_trips_ms, self.facts)).token_ms
        assert token_ms is not None
        return token_ms

    def measure(self, layout: Layout, answers: int) -> None:
        """Start a bare llama-server with this layout, and keep what its fastest answer took."""
        endpoints = [self.machines[member].endpoint for member, _ in layout]
        split = ",".join(str(count) for _, count in layout)
        flags = ["-c", str(CONTEXT_TOKENS), "-np", "1", "-fit", "off", "--cache-ram", "0", "--no-warmup"]
        with bare_server(self.path, endpoints, *flags, "-ts", split) as server:
            token_ms(server.url, server.key, 2)
            self.times.setdefault(layout, []).append(
                min(token_ms(server.url, server.key, TOKENS) for _ in range(answers))
            )

    def measured_ms(self, layout: Layout) -> float:
        return median(self.times[layout])


def token_ms(url: str, key: str, tokens: int) -> float:
    """Milliseconds for each token after the first, as the engine measured them."""
    body = {"prompt": [3], "n_predict": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/completion", json.dumps(body).encode(), headers)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as response:
        return float(json.load(response)["timings"]["predicted_per_token_ms"])


# --- clusters ---------------------------------------------------------------------------------


@contextmanager
def running_group(chance: random.Random) -> Iterator[list[Machine]]:
    """Five machines at random; the fastest is four times as fast as the slowest."""
    shares = [1.0, SLOWEST, *(SLOWEST ** chance.random() for _ in range(GROUP - 2))]
    chance.shuffle(shares)
    with ExitStack() as stack:
        machines = []
        for share in shares:
            worker = stack.enter_context(running_worker())
            if share < 1:
                stack.enter_context(stuttering(worker, share, PERIOD_S))
            delay_ms = chance.uniform(0.0, FARTHEST_MS)
            endpoint = stack.enter_context(delayed(worker.endpoint, delay_ms / 1000))
            machines.append(Machine(share, delay_ms, endpoint))
        yield machines


def drawn_clusters(machines: Sequence[Machine], count: int, blocks: int, chance: random.Random) -> list[Cluster]:
    """Clusters with the fastest and the slowest machine; every other one with little memory."""
    fastest = max(range(GROUP), key=lambda position: machines[position].share)
    slowest = min(range(GROUP), key=lambda position: machines[position].share)
    others = sorted(set(range(GROUP)) - {fastest, slowest})
    found = []
    for number in range(count):
        is_tight = number % 2 == 0
        count_of_others = chance.randint(1, len(others) if is_tight else 2)  # five have 126 splits where all fit
        members = tuple(sorted({fastest, slowest, *chance.sample(others, count_of_others)}))
        limits: tuple[int, ...] = ()
        while is_tight and not 1.5 * blocks <= sum(limits) <= 2 * blocks:
            limits = tuple(chance.randint(1, blocks - 1) for _ in members)
        found.append(Cluster(members, limits))
    return found


def splits(units: int, workers: int, step: int) -> Iterator[tuple[int, ...]]:
    """All counts that sum to these units, in steps, but for the last that is not 0."""
    if not workers:
        if not units:
            yield ()
        return
    for count in sorted({*range(0, units, step), units}):
        for rest in splits(units - count, workers - 1, step):
            yield (count, *rest)


def as_layout(cluster: Cluster, counts: Iterable[int]) -> Layout:
    return tuple((member, count) for member, count in zip(cluster.members, counts, strict=True) if count)


def split_by(shares: Sequence[float], units: int) -> tuple[int, ...]:
    """What llama.cpp makes of shares: unit i goes to the first worker whose cumulative share exceeds i / units."""
    borders = [sum(shares[: position + 1]) / sum(shares) for position in range(len(shares))]
    counts = [0] * len(shares)
    for unit in range(units):
        counts[next(position for position, border in enumerate(borders) if border > unit / units + 1e-9)] += 1
    return tuple(counts)


# --- the benchmark ----------------------------------------------------------------------------


def main() -> Report:
    parser = parser_of(__doc__)
    parser.add_argument("--clusters", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--skip-smollm2", action="store_true")
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    report = Report()
    small = report.table("A model of 4 blocks: ms for each token", *COLUMNS)
    real = report.table(f"SmolLM2, splits in steps of {STEP} of its 31 units: ms for each token", *COLUMNS)
    results: list[Result] = []
    real_results: list[Result] = []
    errors: list[float] = []
    noise: list[float] = []
    with isolated():
        for group in range(2):
            with running_group(chance) as machines:
                calibrations = calibrated(machines)
                model = model_of(SMALL.path(), machines, calibrations)
                share = arguments.clusters // 2 + (arguments.clusters % 2 > group)
                clusters = drawn_clusters(machines, share, model.facts.layer_count, chance)
                found = of_model(model, clusters, 1)
                results += found
                errors += [model.predicted_ms(layout) / model.measured_ms(layout) for layout in model.times]
                noise += [max(times) / min(times) - 1 for times in model.times.values() if len(times) > 1]
                if not arguments.skip_smollm2:
                    model = model_of(smollm2_path(), machines, calibrations)
                    members = next(cluster.members for cluster in clusters if len(cluster.members) == 3)
                    real_results += of_model(model, [Cluster(members, REAL_LIMITS[group])], STEP)
    for number, result in enumerate(results, start=1):
        small.add(*result.cells(number))
    for number, result in enumerate(real_results, start=1):
        real.add(*result.cells(number))
    add_goals(report, results, errors)
    report.notes.append(f"The same layout twice: {median(noise):.1%} apart in the median.")
    return report


COLUMNS = (
    "cluster",
    "speeds, delays in ms",
    "blocks at most",
    "ours",
    "best",
    "ours, ms",
    "predicted",
    "by memory",
    "even",
    "best of",
    "x by memory",
    "of best",
    "predicted / measured",
)


@dataclass(frozen=True)
class Result:
    """What one cluster gave: milliseconds for each token."""

    machines: Sequence[Machine]
    cluster: Cluster
    ours: Layout
    best: Layout
    ours_ms: float
    predicted_ms: float
    default_ms: float
    even_ms: float
    best_ms: float
    tried: int

    @property
    def gain(self) -> float:
        return self.default_ms / self.ours_ms

    @property
    def of_best(self) -> float:
        return self.best_ms / self.ours_ms

    @property
    def accuracy(self) -> float:
        return self.predicted_ms / self.ours_ms

    def cells(self, number: int) -> tuple[str | int | float, ...]:
        members = [self.machines[member] for member in self.cluster.members]
        return (
            number,
            ", ".join(f"{machine.share:.0%} {machine.delay_ms:.1f}" for machine in members),
            "/".join(map(str, self.cluster.limits)) or "all",
            self.counts(self.ours),
            self.counts(self.best),
            self.ours_ms,
            self.predicted_ms,
            self.default_ms,
            self.even_ms,
            f"{self.best_ms:.1f} of {self.tried}",
            self.gain,
            self.of_best,
            self.accuracy,
        )

    def counts(self, layout: Layout) -> str:
        units = dict(layout)
        return "/".join(str(units.get(member, 0)) for member in self.cluster.members)


def calibrated(machines: Sequence[Machine]) -> dict[str, Calibration]:
    """By endpoint; this machine, too."""
    endpoints = [machine.endpoint for machine in machines]
    with HybridRouter(rpc_backends=endpoints, auto_discover_rpc=False) as router:
        results = router.calibrate()
    failed = [str(result) for result in results if result.calibration is None]
    if failed:
        raise RuntimeError("; ".join(failed))
    # The tokens that are measured here have next to no context.
    found = {result.endpoint: result.calibration for result in results if result.calibration}
    return {endpoint: replace(calibration, context_ms_per_byte=0.0) for endpoint, calibration in found.items()}


def model_of(path: Path, machines: Sequence[Machine], calibrations: Mapping[str, Calibration]) -> Model:
    facts = read_facts(path)
    endpoints = [machine.endpoint for machine in machines]
    speeds = TokenMeasurements(EventBus(), calibrations.get).calibrated(facts, endpoints)
    assert speeds is not None
    return Model(path, facts, machines, speeds, {name: calibrations[name].round_trip_ms for name in endpoints})


def of_model(model: Model, clusters: Sequence[Cluster], step: int) -> list[Result]:
    """Try every split once; then measure those that matter again, in turns."""
    tried = {cluster: model.layouts(cluster, step) for cluster in clusters}
    for layout in sorted(set().union(*tried.values())):
        model.measure(layout, 1)
    ours = {cluster: model.planned(cluster) for cluster in clusters}
    default, even = {}, {}
    for cluster in clusters:
        free = [worker.free_bytes for worker in model.capacities(cluster)]
        default[cluster] = as_layout(cluster, split_by(free, model.unit_count))
        even[cluster] = as_layout(cluster, split_by([1] * len(free), model.unit_count))
    best = {
        cluster: sorted(layouts, key=lambda layout: model.measured_ms(layout))[:FINALISTS]
        for cluster, layouts in tried.items()
    }
    again = {ours[cluster][0] for cluster in clusters} | {*default.values(), *even.values()}
    again |= {layout for layouts in best.values() for layout in layouts}
    by_name = {str(layout): layout for layout in sorted(again)}
    model.times = {layout: times for layout, times in model.times.items() if layout not in again}
    for name in in_turns(list(by_name), FINAL_ROUNDS):
        model.measure(by_name[name], ANSWERS)
    found = []
    for cluster in clusters:
        layout, predicted_ms = ours[cluster]
        fastest = min(best[cluster], key=lambda tried: model.measured_ms(tried))
        found.append(
            Result(
                model.machines,
                cluster,
                layout,
                fastest,
                model.measured_ms(layout),
                predicted_ms,
                model.measured_ms(default[cluster]),
                model.measured_ms(even[cluster]),
                model.measured_ms(fastest),
                len(tried[cluster]),
            )
        )
    return found


def add_goals(report: Report, results: Sequence[Result], errors: Sequence[float]) -> None:
    """The goals of the small model's clusters, all of which are as uneven as the goals ask."""
    worst = min(result.gain for result in results)
    report.goal(
        "at least 1.4 times as fast as the engine's own split where the fastest worker is 4 times as fast as the "
        "slowest: median",
        median(result.gain for result in results),
        median(result.gain for result in results) >= 1.4,
    )
    report.goal("the same: worst cluster", worst, worst >= 1.4)
    of_best = min(result.of_best for result in results)
    report.goal("at least 0.95 of the best split tried, on all clusters", of_best, of_best >= 0.95)
    off = median(abs(result.accuracy - 1) for result in results)
    report.goal("predictions of our plans at most 10 % off (median)", f"{off:.1%}", off <= 0.1)
    off = median(abs(error - 1) for error in errors)
    report.goal("predictions of every split tried at most 10 % off (median)", f"{off:.1%}", off <= 0.1)


if __name__ == "__main__":
    sys.exit(run(main))
