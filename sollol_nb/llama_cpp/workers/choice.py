"""Which of the free workers a model is spread over, and why none can be: pure functions of what was seen."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sollol_nb.errors import ModelDoesNotFitError, WorkersUnavailableError
from sollol_nb.gguf.facts import ModelFacts
from sollol_nb.layers.plan import LayerPlan, plan_layers
from sollol_nb.llama_cpp.workers.status import WorkerStatus
from sollol_nb.settings.table import DEFAULT_WORKERS


def plan_over(
    free: Sequence[WorkerStatus], facts: ModelFacts, *, wanted: int | None, strategy: str, context_tokens: int
) -> LayerPlan:
    """The plan over so many of these workers; where None are wanted over three, or as many as it takes.

    Raises:
        ModelDoesNotFitError: their memory does not hold the model.
    """
    count = min(wanted or DEFAULT_WORKERS, len(free))
    while True:
        try:
            capacities = [worker.capacity for worker in free[:count]]
            return plan_layers(facts, capacities, strategy=strategy, context_tokens=context_tokens)
        except ModelDoesNotFitError:
            # Each worker costs a round trip per token, so more are only taken where memory asks for them.
            if wanted is not None or count == len(free):
                raise
            count += 1


def check_free(model: str, chosen: Sequence[WorkerStatus], taken: Collection[str] = ()) -> None:
    """Refuse a layout that names workers which cannot be had.

    Args:
        chosen: the workers it uses, as seen now.
        taken: endpoints that were taken since.

    Raises:
        WorkersUnavailableError: some of them are not free.
    """
    unusable = [one.detail for one in chosen if one.state != "free" or one.endpoint in taken]
    if unusable:
        words = "; ".join(unusable)
        raise WorkersUnavailableError(f"cannot use this layout for {model}: {words}; choose other workers")


def describe_missing_workers(model: str, statuses: Sequence[WorkerStatus]) -> str:
    """Why no worker can be used, and what to run."""
    what_to_do = (
        "start some here with `%sollol_cluster start 3` (or auto_setup_rpc=True), or on each machine "
        "`ggml-rpc-server -H <its address> -p 50052`, then name them in rpc_backends= or RPC_BACKENDS"
    )
    if not statuses:
        return f"{model} needs RPC workers and none is known; {what_to_do}"
    details = [one.detail for one in statuses]
    seen = "; ".join(details[:5]) + (" ..." if len(statuses) > 5 else "")
    return f"{model} needs RPC workers and none of {len(statuses)} is free: {seen}; {what_to_do}"
