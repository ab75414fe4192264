"""Which free workers a model is spread over, and why none can be used: pure functions of worker statuses."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sollol_nb.errors import ModelDoesNotFitError, WorkersUnavailableError
from sollol_nb.gguf.facts import ModelFacts
from sollol_nb.layers.cached import Cached, keep_cached
from sollol_nb.layers.plan import LayerPlan
from sollol_nb.layers.planner import plan_layers, resolve_strategy
from sollol_nb.layers.replan import layout_of
from sollol_nb.layers.strategies import SPLITS, WorkerCapacity
from sollol_nb.layers.throughput import DEFAULT_REQUESTS
from sollol_nb.layers.token_time import WorkerSpeeds
from sollol_nb.layers.what_if import without_layout
from sollol_nb.llama_cpp.workers.status import WorkerStatus
from sollol_nb.settings.table import DEFAULT_WORKERS

SHOWN_WORKERS = 5


def best_plan(
    facts: ModelFacts,
    free: Sequence[WorkerCapacity],
    *,
    strategy: str,
    context_tokens: int,
    wanted: int | None = None,
    own: Sequence[WorkerCapacity] = (),
    speeds: WorkerSpeeds | None = None,
    running: LayerPlan | None = None,
    requests: int = DEFAULT_REQUESTS,
    needs_worker: bool = False,
    cached: Cached | None = None,
) -> LayerPlan:
    """The best plan of a strategy for a model.

    Strategies that go by predicted times choose among all free workers and the calibrated devices of this machine.
    The others take the first `wanted` workers; by default three, or more if the model needs more. Workers that
    have layers of the model cached come first among these, and each keeps them as far as that makes the plan no
    slower (`layers/cached.py`).

    Args:
        free: the workers that may be used; for a running model also those that it holds.
        wanted: exactly so many workers, as far as there are.
        own: devices of this machine.
        speeds: of all these, as far as they are known.
        running: the plan of the running model, which may stay; its memory counts as free.
        requests: at the same time, for `throughput`: the slots of the coordinator.
        needs_worker: whether at least one worker takes part, even if this machine alone would be faster.
        cached: units of the model that workers have cached, by endpoint.

    Raises:
        ConfigError, WorkersUnavailableError: as in `plan_layers`.
        ModelDoesNotFitError: the model does not fit into their memory.
    """

    def keeping(plan: LayerPlan, workers: Sequence[WorkerCapacity]) -> LayerPlan:
        is_running = running is not None and layout_of(plan) == layout_of(running)
        return plan if is_running or not cached else keep_cached(plan, facts, workers, cached, speeds)

    if resolve_strategy(strategy, free or own, speeds) not in SPLITS:
        assert speeds is not None
        own = [device for device in own if speeds.is_calibrated(device.endpoint)]
        count = None if wanted is None else min(wanted, len(free), facts.layer_count + 1)

        def plan(workers: Sequence[WorkerCapacity]) -> LayerPlan:
            usable = workers if running is None else without_layout(running, workers)
            found = plan_layers(
                facts,
                usable,
                strategy=strategy,
                context_tokens=context_tokens,
                speeds=speeds,
                wanted=count,
                current=running,
                requests=requests,
                needs_worker=needs_worker,
            )
            return keeping(found, usable)

        try:
            return plan([*free, *own])
        except ModelDoesNotFitError:  # workers on this machine may use more of its memory than its own devices
            if not own:
                raise
            return plan(free)
    free = free if running is None else without_layout(running, free)
    if cached:
        free = sorted(free, key=lambda worker: not cached.get(worker.endpoint))
    used = min(wanted or DEFAULT_WORKERS, len(free))
    while True:
        try:
            chosen = free[:used]
            found = plan_layers(facts, chosen, strategy=strategy, context_tokens=context_tokens, speeds=speeds)
            return keeping(found, chosen)
        except ModelDoesNotFitError:
            # Each worker costs a round trip per token, so more workers are used only if the memory requires it.
            if wanted is not None or used == len(free):
                raise
            used += 1


def check_free(model: str, chosen: Sequence[WorkerStatus], taken: Collection[str] = ()) -> None:
    """Refuse a layout that names workers which are not free.

    Args:
        chosen: the workers that it uses, as seen now.
        taken: endpoints that were taken since.

    Raises:
        WorkersUnavailableError: some of them are not free.
    """
    problems = [
        worker.problem if worker.state != "free" else f"{worker.label} was taken by another coordinator"
        for worker in chosen
        if worker.state != "free" or worker.endpoint in taken
    ]
    if problems:
        raise WorkersUnavailableError(
            f"cannot use this layout for {model}: {'; '.join(problems)}; choose other workers"
        )


def describe_missing_workers(model: str, statuses: Sequence[WorkerStatus]) -> str:
    """Why no worker can be used, and what to run."""
    there = (
        "use those of other machines with `%sollol_cluster --ssh HOST` (or ssh://HOST in rpc_backends= or "
        "RPC_BACKENDS)"
    )
    if not statuses:
        return (
            f"{model} needs RPC workers, but none is known; start workers here with `%sollol_cluster start 3` (or "
            f"auto_setup_rpc=True), search this machine for running ones with `%sollol_cluster discover` (or "
            f"auto_discover_rpc=True), or {there}"
        )
    problems = "; ".join(worker.problem for worker in statuses[:SHOWN_WORKERS])
    if len(statuses) > SHOWN_WORKERS:
        problems += " ..."
    return (
        f"{model} needs RPC workers, but none of {len(statuses)} is free: {problems}; start more here with "
        f"`%sollol_cluster start 3 --more` (or auto_setup_rpc=True), or {there}"
    )
