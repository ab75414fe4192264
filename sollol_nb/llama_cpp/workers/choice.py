"""Which free workers a model is spread over, and why none can be used: pure functions of worker statuses."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sollol_nb.errors import ModelDoesNotFitError, WorkersUnavailableError
from sollol_nb.gguf.facts import ModelFacts
from sollol_nb.layers.plan import LayerPlan
from sollol_nb.layers.planner import plan_layers
from sollol_nb.llama_cpp.workers.status import WorkerStatus
from sollol_nb.settings.table import DEFAULT_WORKERS

SHOWN_WORKERS = 5


def plan_over(
    free: Sequence[WorkerStatus], facts: ModelFacts, *, wanted: int | None, strategy: str, context_tokens: int
) -> LayerPlan:
    """The plan over the first `wanted` workers; by default over three, or more if the model needs more.

    Raises:
        ModelDoesNotFitError: the model does not fit into their memory.
    """
    count = min(wanted or DEFAULT_WORKERS, len(free))
    while True:
        try:
            capacities = [worker.capacity for worker in free[:count]]
            return plan_layers(facts, capacities, strategy=strategy, context_tokens=context_tokens)
        except ModelDoesNotFitError:
            # Each worker costs a round trip per token, so more workers are used only if the memory requires it.
            if wanted is not None or count == len(free):
                raise
            count += 1


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
