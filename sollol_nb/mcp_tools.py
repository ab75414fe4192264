"""Tools for agents, which reach them through the MCP server of Jupyter (extra `mcp`: jupyter-server-mcp).

They run in the Jupyter server's process, with the settings of its environment and its folder. They start and stop
nothing and change no setting. `sollol_ask` is the one that makes engines work; the setting `mcp_ask` says on what:

| `mcp_ask` | `sollol_ask` |
|---|---|
| `off` | refuses |
| `loaded` (default) | asks a model only where it is loaded already |
| `any` | asks every model, which may load it: start a coordinator, or load it in Ollama |

What an agent asks and gets is not journaled; the latency log gets its row, as of every request. Results are
bounded, and an error is one line. Jupyter loads this module at each start, so it imports the router on first use.
"""

# No postponed annotations: jupyter-server-mcp reads them as types.

import functools
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from sollol_nb.errors import ConfigError, ModelDoesNotFitError, ModelError, SollolError, WorkersUnavailableError
from sollol_nb.settings import config
from sollol_nb.text.short_names import is_file_name
from sollol_nb.text.tables import counted

if TYPE_CHECKING:
    from sollol_nb.cluster.coordinator_status import CoordinatorStatus
    from sollol_nb.cluster.status import ClusterStatus
    from sollol_nb.hybrid_router import HybridRouter
    from sollol_nb.models.routing import Route

MOST_CHARS = 20_000
MOST_MODELS = 100
MOST_TOKENS = 4096
DEFAULT_TOKENS = 1024

P = ParamSpec("P")
R = TypeVar("R")


def tools() -> list[str]:
    """The tools, for jupyter-server-mcp, whose entry point names this function."""
    return [f"{__name__}:{tool.__name__}" for tool in (sollol_status, sollol_models, sollol_route, sollol_ask)]


def _short_errors(tool: Callable[P, Awaitable[R]]) -> Callable[P, Awaitable[R]]:
    """A tool whose errors of this package are one line for the agent, and no traceback in the server's log."""

    @functools.wraps(tool)
    async def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await tool(*args, **kwargs)
        except SollolError as error:
            from fastmcp.exceptions import ToolError

            message = " ".join(f"{type(error).__name__}: {error}".split())
            raise ToolError(_bounded(message)) from None

    return run


@_short_errors
async def sollol_status() -> str:
    """Show the user's cluster of language models: loaded models with their layers, RPC workers, Ollama nodes, and
    what needs attention. Changes nothing."""
    from sollol_nb.cli.status import user_cluster, verdict

    cluster = await user_cluster()
    return _bounded(f"{cluster.describe()}\n{verdict(cluster)}")


@_short_errors
async def sollol_models(contains: str = "") -> list[dict[str, Any]]:
    """List the language models that can be asked here, the loaded ones first. Changes nothing.

    Each has `model` (the name for the other tools), `where` (Ollama nodes, this machine or built in), `loaded`
    (how, or "" if it is not loaded), `parameters_b` (billions), `memory_gb` and `sharded` (over several machines).

    Args:
        contains: only names that contain this text.
    """
    from sollol_nb.cli.status import user_cluster

    async with _Router() as router:
        listed, cluster = await router.listed_models(), await user_cluster()
    running = {each.model: each for each in cluster.coordinators}
    rows: list[dict[str, Any]] = [
        {
            "model": each.model,
            "where": each.where,
            "loaded": each.running or ("by a coordinator" if each.model in running else ""),
            "parameters_b": each.parameters_b,
            "memory_gb": each.memory_gb,
            "sharded": each.sharded,
        }
        for each in listed
        if each.where or each.running
    ]
    known = {row["model"] for row in rows}
    rows += [
        {"model": name, "where": "this machine", "loaded": "by a coordinator", "sharded": bool(each.segments)}
        for name, each in running.items()
        if name not in known
    ]
    chosen = [row for row in rows if contains.lower() in str(row["model"]).lower()]
    return sorted(chosen, key=lambda row: not row["loaded"])[:MOST_MODELS]


@_short_errors
async def sollol_route(model: str) -> str:
    """Show where a request for a model would run now and why, whether the model is loaded there, and the plan of
    its layers if it is sharded. Starts nothing.

    Args:
        model: a name of `sollol_models`.
    """
    from sollol_nb.cli.status import user_cluster, user_workers

    cluster = await user_cluster()
    async with _Router(**await user_workers()) as router:
        route = await _route(router, model, cluster)
        lines = [str(route), "loaded" if await _is_loaded(router, route, cluster) else "not loaded"]
        running = _coordinator_of(route, cluster)
        if running is not None and running.segments:
            lines += [segment.description for segment in running.segments]
        elif running is None:
            try:
                plan = await router.plan(route.model)
            except (WorkersUnavailableError, ModelDoesNotFitError) as error:
                lines.append(f"no plan: {error}")
            else:
                lines += [f"plan: {plan.describe()}"] if plan is not None else []
    return _bounded("\n".join(lines))


@_short_errors
async def sollol_ask(
    model: str,
    prompt: str,
    system: str = "",
    max_tokens: int = DEFAULT_TOKENS,
    temperature: float | None = None,
) -> dict[str, Any]:
    """Ask one of the user's language models, and wait for its answer. Unless the user has allowed more, only a
    model that is loaded already answers.

    The result has `text`, `model`, `backend`, `tokens`, and `finish_reason`: `length` where the text was cut.

    Args:
        model: a name of `sollol_models`.
        prompt: the question, as the user's message.
        system: a system message.
        max_tokens: longest answer in tokens, at most 4096.
        temperature: 0 always takes the most likely token; by default as the user has set it.
    """
    from sollol_nb.cli.status import user_cluster

    allowed = config.default("mcp_ask")
    if allowed == "off":
        raise ConfigError("the user does not let agents ask models: the setting mcp_ask is off")
    if not 1 <= max_tokens <= MOST_TOKENS:
        raise ConfigError(f"max_tokens={max_tokens} must be 1 to {MOST_TOKENS}")
    may_load = allowed == "any"
    cluster = await user_cluster()
    async with _Router(**({} if may_load else _loads_nothing())) as router:
        route = await _route(router, model, cluster)
        if not may_load and not await _is_loaded(router, route, cluster):
            raise ConfigError(
                f"{route.name} is not loaded, and agents may ask only loaded models; the user can load it with "
                f"`%sollol_cluster preload {route.name}` in a notebook, or allow more with the setting mcp_ask"
            )
        options: dict[str, Any] = {} if temperature is None else {"temperature": temperature}
        answer = await router.route_request(
            route.model,
            [
                *([{"role": "system", "content": system}] if system else []),
                {"role": "user", "content": prompt},
            ],
            backend=route.backend,
            max_tokens=max_tokens,
            journal=False,
            **options,
        )
    return {
        "text": _bounded(answer.text),
        "model": route.name,
        "backend": answer.routing["backend"],
        "tokens": answer.get("eval_count"),
        "finish_reason": answer.finish_reason,
    }


class _Router:
    """A router for one call of a tool, so that no model is in use in between; the engines live on for their
    keep_alive."""

    def __init__(self, **arguments: Any) -> None:
        from sollol_nb.hybrid_router import HybridRouter

        self._router = HybridRouter(**arguments)

    async def __aenter__(self) -> "HybridRouter":
        return self._router

    async def __aexit__(self, *_: object) -> None:
        await self._router.close(keep=True)


def _loads_nothing() -> dict[str, Any]:
    """The arguments of a router that uses only running coordinators, whatever their context."""
    from sollol_nb.cli.status import uses_gateway

    if uses_gateway():  # its engines are asked before whether they have the model loaded
        return {}
    return {"adopt_only": True, "context_tokens": 1, "standby": False, "replan": "off"}


async def _route(router: "HybridRouter", model: str, cluster: "ClusterStatus") -> "Route":
    """The route of a model that an agent names: also by the short name of a file that is loaded, but not by the
    path of a file, which would let it read any.

    Raises:
        ModelError, ConfigError: there is none.
    """
    if is_file_name(model):
        raise ConfigError("name a model as sollol_models lists it, not a file")
    try:
        return await router.route(model)
    except ModelError:
        paths = [each.model_path for each in cluster.coordinators if each.model == model and each.model_path]
        if not paths or router.gateway is not None:
            raise
        return await router.route(paths[0])


async def _is_loaded(router: "HybridRouter", route: "Route", cluster: "ClusterStatus") -> bool:
    if route.model_path is not None:
        return _coordinator_of(route, cluster) is not None
    names = {route.model, route.model.removesuffix(":latest")}
    return any(each.running and each.model in names for each in await router.listed_models())


def _coordinator_of(route: "Route", cluster: "ClusterStatus") -> "CoordinatorStatus | None":
    """The running coordinator of a route."""
    path = str(route.model_path)
    running = [each for each in cluster.coordinators if each.model_path == path and not each.standby]
    return next((each for each in running if each.segments or not route.needs_worker), None)


def _bounded(text: str) -> str:
    if len(text) <= MOST_CHARS:
        return text
    return f"{text[:MOST_CHARS]}\n[{counted(len(text) - MOST_CHARS, 'character')} more were left out]"
