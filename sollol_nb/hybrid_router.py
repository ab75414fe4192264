"""The hybrid router: small models go to Ollama, large ones to a llama-server over RPC workers.

`HybridRouter` is the async API; it can be awaited from any event loop, since its work runs on the process's
I/O loop (`io_loop.py`). `sync_wrapper.HybridRouter` is its blocking twin. Making a router does no I/O: nodes are
looked at, workers probed and engines started when a request needs them.
"""

from __future__ import annotations

import asyncio
import difflib
import logging
import re
import sqlite3
from collections.abc import AsyncGenerator, Collection, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

from sollol_nb import config
from sollol_nb.completion import Completion
from sollol_nb.coordinator_pool import CoordinatorPool
from sollol_nb.coordinator_settings import DEFAULT_SLOTS
from sollol_nb.coordinator_start import PoolSettings
from sollol_nb.errors import (
    AnswerInterruptedError,
    ConfigError,
    OllamaResponseError,
    WorkersUnavailableError,
)
from sollol_nb.events import EventBus
from sollol_nb.failover import stream_answer
from sollol_nb.gguf_facts import read_facts
from sollol_nb.io_loop import io_bound, io_bound_stream
from sollol_nb.latency import LatencyLog, LatencyRow
from sollol_nb.layer_plan import STRATEGIES
from sollol_nb.llama_answer import Answer
from sollol_nb.llama_chat import check_messages, check_options
from sollol_nb.model_files import DEMO_MODEL_PATH, DEMO_NOTE, find_model_file
from sollol_nb.ollama_pool import OllamaPool
from sollol_nb.priority_helpers import Priority
from sollol_nb.profiles import MODEL_PROFILES, profile_of
from sollol_nb.request_record import RequestRecord
from sollol_nb.router_cluster import RouterCluster
from sollol_nb.routing import DISTRIBUTED, OLLAMA, Route, decide_route
from sollol_nb.workers import Workers

__all__ = ["DEFAULT_TIMEOUT_S", "MODEL_PROFILES", "HybridRouter"]

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S = 600.0
# Ollama's words, and its engine's, when a model does not fit (Ollama's llm/server.go, ggml's allocators).
_OUT_OF_MEMORY = re.compile(
    r"requires more system memory|out of memory|(unable|failed) to allocate", re.IGNORECASE
)
DEFAULT_COORDINATOR_TIMEOUT_S = 1200.0


class HybridRouter(RouterCluster):
    """Routes chat requests by the model's profile, and keeps what it started warm.

    Args:
        ollama_pool: the Ollama nodes; by default those of `OLLAMA_HOST`, or this machine's.
        enable_distributed: whether large models are sharded.
        rpc_backends: workers as `"host:port"` or `{"host": ..., "port": ...}`; by default those of the
            variable `RPC_BACKENDS`.
        num_rpc_backends: how many workers a model is spread over; by default 3, or as many as its size takes.
        auto_discover_rpc: look for workers on this machine's ports 50052 to 50067 where more are needed.
        auto_setup_rpc: start workers on this machine where more are needed.
        coordinator_timeout: seconds that a coordinator may take to load its model.
        coordinator_port: the first port to try for a coordinator.
        rpc_port: the first port to try for workers started here.
        distributed_threshold_params: models of more billions of parameters are sharded too.
        model_filter: only these models are sharded by this router.
        gguf_path: the GGUF file for models on llama.cpp, instead of looking into Ollama's storage.
        layer_strategy: how layers are spread, `memory_aware` or `even`.
        context_tokens: context of a coordinator, shared by its slots; by default the model's own, at most 8192.
        slots: requests that a coordinator serves at the same time.
        timeout: default limit of a request in seconds, from when its place is ready.
        llama_cpp: folder with the llama.cpp binaries.
        keep_alive: how long a coordinator (and a worker started here) lives without a request: seconds, `"10m"`,
            0 (ends with its request) or `"forever"`; or a dict of such by model, with `"*"` for all others. By
            default that of the variable `SOLLOL_KEEP_ALIVE`, or 10 minutes. It lives on when the kernel ends.
        latency: the latency log; by default the one in the state folder.

    Raises:
        ConfigError: an argument cannot be used.

    Attributes:
        events: the event bus of this router's workers, coordinators and requests.
        latency: the latency log.
    """

    def __init__(
        self,
        ollama_pool: OllamaPool | None = None,
        *,
        enable_distributed: bool = True,
        rpc_backends: Iterable[str | Mapping[str, Any]] | None = None,
        num_rpc_backends: int | None = None,
        auto_discover_rpc: bool = True,
        auto_setup_rpc: bool = False,
        coordinator_timeout: float = DEFAULT_COORDINATOR_TIMEOUT_S,
        coordinator_port: int = config.DEFAULT_COORDINATOR_PORT,
        rpc_port: int = config.DEFAULT_RPC_PORT,
        distributed_threshold_params: float | None = None,
        model_filter: Collection[str] | None = None,
        gguf_path: str | Path | None = None,
        layer_strategy: str = "memory_aware",
        context_tokens: int | None = None,
        slots: int = DEFAULT_SLOTS,
        timeout: float = DEFAULT_TIMEOUT_S,
        llama_cpp: str | Path | None = None,
        keep_alive: float | str | Mapping[str, float | str] | None = None,
        latency: LatencyLog | None = None,
    ) -> None:
        for name, number in {
            "num_rpc_backends": num_rpc_backends,
            "context_tokens": context_tokens,
            "slots": slots,
            "coordinator_timeout": coordinator_timeout,
            "timeout": timeout,
            "distributed_threshold_params": distributed_threshold_params,
        }.items():
            if number is not None and not _is_positive(number):
                raise ConfigError(f"{name}={number!r} must be more than 0")
            if name in ("num_rpc_backends", "context_tokens", "slots") and isinstance(number, float):
                raise ConfigError(f"{name}={number!r} must be a whole number")
        if layer_strategy not in STRATEGIES:
            near = difflib.get_close_matches(layer_strategy, STRATEGIES, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(STRATEGIES)}"
            raise ConfigError(f"layer_strategy={layer_strategy!r} is unknown; {hint}")
        if isinstance(model_filter, str):
            model_filter = [model_filter]
        given = config.rpc_backends() if rpc_backends is None else [_endpoint(one) for one in rpc_backends]
        events = EventBus()
        settings = PoolSettings(
            num_rpc_backends=num_rpc_backends,
            auto_discover_rpc=auto_discover_rpc,
            auto_setup_rpc=auto_setup_rpc,
            coordinator_timeout_s=coordinator_timeout,
            coordinator_port=coordinator_port,
            rpc_port=rpc_port,
            layer_strategy=layer_strategy,
            context_tokens=context_tokens,
            slots=slots,
            llama_cpp=Path(llama_cpp) if llama_cpp is not None else None,
            **_keep_alive_settings(keep_alive),
        )
        workers = Workers(given, events)
        ollama = ollama_pool if ollama_pool is not None else OllamaPool.auto_configure(events=events)
        super().__init__(CoordinatorPool(settings, workers, events), workers, ollama, events)
        self.latency = latency if latency is not None else LatencyLog()
        self._enable_distributed = enable_distributed
        self._threshold = distributed_threshold_params
        self._model_filter = model_filter
        self._gguf_path = gguf_path
        self._timeout_s = timeout

    def __repr__(self) -> str:
        models = ", ".join(one.model for one in self._coordinators.coordinators) or "none"
        return f"<HybridRouter: {len(self._workers.endpoints)} workers, coordinators: {models}>"

    # --- asking ---------------------------------------------------------------------------------

    async def route_request(
        self,
        /,
        model: str,
        messages: Sequence[Mapping[str, Any]] | str,
        *,
        priority: int = Priority.NORMAL,
        timeout: float | None = None,
        **options: Any,
    ) -> Completion:
        """Ask a model, and wait for the whole answer.

        Args:
            model: a model's name, such as `llama3.1:70b` or `demo:sharded`, or the path of a `.gguf` file.
            messages: `[{"role": "user", "content": "Hello!"}]`, or one user message as a string.
            priority: 1 to 10; of requests that wait for the same place, higher ones go first.
            timeout: limit in seconds, from when the place is ready.
            **options: `max_tokens`, `temperature`, `top_p`, `top_k`, `min_p`, `seed`, `stop`, `format`
                (`"json"` or a JSON schema), `tools`, `options` (Ollama's own dict), ...

        Returns:
            The answer in Ollama's shape, with `_routing`.

        Raises:
            SollolError: of the kind that fits; see `errors.py`.
        """
        async with aclosing(self.stream(model, messages, priority=priority, timeout=timeout, **options)) as chunks:
            return Completion.from_chunks([chunk async for chunk in chunks])

    async def resume(
        self, interrupted: AnswerInterruptedError, *, priority: int = Priority.NORMAL, timeout: float | None = None
    ) -> Completion:
        """Go on with an answer that was interrupted because no coordinator could take over.

        Args:
            interrupted: the error that said so.

        Returns:
            The whole answer, with what came before the interruption.

        Raises:
            ConfigError: the error holds nothing to go on with.
            SollolError: as for `route_request`.
        """
        if not isinstance(interrupted, AnswerInterruptedError) or interrupted.state is None:
            raise ConfigError("resume() takes an AnswerInterruptedError of an answer that had begun; ask again")
        answer = Answer.from_state(interrupted.state)
        before = {"message": {"role": "assistant", "content": answer.text, "thinking": answer.thinking}}
        async with aclosing(self._resumed(answer, priority, timeout)) as chunks:
            return Completion.from_chunks([before, *[chunk async for chunk in chunks]])

    @io_bound_stream
    async def _resumed(
        self, answer: Answer, priority: int, timeout_s: float | None
    ) -> AsyncGenerator[dict[str, Any], None]:
        record = RequestRecord(answer.model)
        record.text = answer.text

        async def chunks() -> AsyncGenerator[dict[str, Any], None]:
            route = await self.route(answer.model)
            record.take(route)
            if route.backend == OLLAMA:
                raise ConfigError(
                    f"{answer.model} goes to Ollama now, which cannot go on with this answer; ask again"
                )
            async for chunk in stream_answer(
                self._coordinators,
                route,
                record,
                lambda _: answer,
                priority=_checked_priority(priority),
                timeout_s=self._checked_timeout_s(timeout_s),
            ):
                yield chunk

        async with aclosing(self._recorded(record, chunks())) as recorded:
            async for chunk in recorded:
                yield chunk

    @io_bound_stream
    async def stream(
        self,
        /,
        model: str,
        messages: Sequence[Mapping[str, Any]] | str,
        *,
        priority: int = Priority.NORMAL,
        timeout: float | None = None,
        **options: Any,
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Ask a model; yields Ollama-shaped chunks as they come, the last with `done` and `_routing`.

        Arguments and errors are those of `route_request`. Leaving the loop early (closing the generator)
        cancels the generation on the engine.
        """
        record = RequestRecord(model)
        chunks = self._chunks(record, messages, priority, timeout, options)
        async with aclosing(self._recorded(record, chunks)) as recorded:
            async for chunk in recorded:
                yield chunk

    async def _recorded(
        self, record: RequestRecord, chunks: AsyncGenerator[dict[str, Any], None]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The chunks, the last with `_routing`, and one latency row whatever happens."""
        model, status, error_words = record.model, "cancelled", ""
        self.events.publish("request.started", model, f"asking {model}")
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    record.saw(chunk)
                    if chunk.get("done"):
                        chunk = {**chunk, "total_duration": int(record.duration_ms * 1e6)}
                        chunk["load_duration"] = int((record.load_ms or 0) * 1e6)
                        chunk["_routing"] = record.routing()
                        # The row is there before the caller has its answer.
                        status = "ok"
                        await self._write(record.row("ok"))
                    yield chunk
        except Exception as error:
            status = "timeout" if isinstance(error, TimeoutError) else "error"
            error_words = str(error)
            if isinstance(error, AnswerInterruptedError):
                error.partial = record.partial()
            raise
        finally:
            if status != "ok":
                await self._write(record.row(status, error_words))
            self._counts[record.backend] += 1
            self.events.publish("request.finished", model, f"{model}: {status}", status=status)

    async def _chunks(
        self,
        record: RequestRecord,
        messages: Sequence[Mapping[str, Any]] | str,
        priority: int,
        timeout_s: float | None,
        options: Mapping[str, Any],
    ) -> AsyncGenerator[dict[str, Any], None]:
        checked_messages, checked_options = check_messages(messages), check_options(options)
        priority, timeout_s = _checked_priority(priority), self._checked_timeout_s(timeout_s)
        route = await self.route(record.model)
        record.take(route)
        if route.backend == OLLAMA:
            record.sent()
            try:
                async for chunk in self._ollama.stream_chat(
                    route.model, checked_messages, priority=priority, timeout=timeout_s, **checked_options
                ):
                    if chunk.get("done"):
                        record.take_node(chunk.get("_routing") or {})
                    yield chunk
                return
            except OllamaResponseError as error:
                route = await self._sharded_instead(route, error, record)
        try:
            async with aclosing(
                stream_answer(
                    self._coordinators,
                    route,
                    record,
                    lambda coordinator: coordinator.answer(checked_messages, checked_options),
                    priority=priority,
                    timeout_s=timeout_s,
                    keep_alive=checked_options.get("keep_alive"),
                )
            ) as chunks:
                async for chunk in chunks:
                    yield chunk
        except WorkersUnavailableError as error:
            if record.failovers:
                raise WorkersUnavailableError(f"{record.failovers[-1]['what']}; {error}") from error
            raise

    def _checked_timeout_s(self, timeout_s: float | None) -> float:
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        if not _is_positive(timeout_s):
            raise ConfigError(f"timeout={timeout_s!r} must be more than 0 seconds")
        return timeout_s

    async def _sharded_instead(self, route: Route, error: OllamaResponseError, record: RequestRecord) -> Route:
        """The route over workers for a model that Ollama has no memory for; else the error goes on."""
        if record.text or not _OUT_OF_MEMORY.search(str(error)) or not self._may_shard(route.model):
            raise error
        path = await asyncio.to_thread(find_model_file, route.model, self._gguf_path)
        if path is None:
            raise error
        instead = replace(
            route,
            backend=DISTRIBUTED,
            model_path=path,
            reason=f"{route.reason}, but it has no memory for it, so it is sharded",
        )
        record.leave(str(error))
        record.take(instead)
        return instead

    # --- deciding -------------------------------------------------------------------------------

    def should_use_distributed(self, model: str) -> bool:
        """Whether this router would shard the model, by its profile (no node or worker is asked)."""
        return self._may_shard(model) and bool(self._profile(model).requires_distributed)

    @io_bound
    async def route(self, model: str) -> Route:
        """Where a request for this model would go now, and why.

        Raises:
            ModelError, ConfigError: it could go nowhere; the message says why.
        """
        if not isinstance(model, str) or not model.strip():
            raise ConfigError(f"model={model!r} is not a model's name; try demo, or llama3.2")
        profile = await asyncio.to_thread(self._profile, model)
        # A model that is sharded anyway need not wait for Ollama's word, and a file has no name there.
        is_file = model.endswith(".gguf")
        ask_ollama = not is_file and not (profile.requires_distributed and self._enable_distributed)
        in_ollama, words = await self._in_ollama(model) if ask_ollama else (False, "Ollama was not asked")
        path = None if in_ollama else await asyncio.to_thread(find_model_file, model, self._gguf_path)
        route = decide_route(
            profile,
            in_ollama=in_ollama,
            ollama_words=words,
            model_path=path,
            enable_distributed=self._enable_distributed,
            model_filter=self._model_filter,
        )
        is_demo = route.model_path == DEMO_MODEL_PATH
        return replace(route, reason=f"{route.reason} ({DEMO_NOTE})") if is_demo else route

    # --- inside ---------------------------------------------------------------------------------

    def _profile(self, model: str) -> Any:
        profile = profile_of(model, threshold_params=self._threshold)
        if profile.source.startswith("profile"):
            return profile
        path = find_model_file(model, self._gguf_path)
        if path is None:
            return profile
        return profile_of(model, facts=read_facts(path), threshold_params=self._threshold)

    def _may_shard(self, model: str) -> bool:
        return self._enable_distributed and (self._model_filter is None or model in self._model_filter)

    async def _in_ollama(self, model: str) -> tuple[bool, str]:
        if await self._ollama.has_model(model):
            return True, "an Ollama node has it"
        if any(node.state == "ready" for node in self._ollama.nodes):
            return False, "no Ollama node has it"
        return False, "no Ollama node answers"

    async def _write(self, row: LatencyRow) -> None:
        try:
            await asyncio.to_thread(self.latency.record, row)
        except (OSError, sqlite3.Error) as error:  # an answer is worth more than its row
            logger.warning("the latency row was not written to %s: %s", self.latency.path, error)


def _checked_priority(priority: int) -> int:
    if not isinstance(priority, int) or not Priority.BATCH <= priority <= Priority.CRITICAL:
        raise ConfigError(f"priority={priority!r} must be a number from 1 (BATCH) to 10 (CRITICAL)")
    return priority


def _keep_alive_settings(keep_alive: float | str | Mapping[str, float | str] | None) -> dict[str, Any]:
    """`keep_alive` as the settings of the coordinator pool."""
    by_model = dict(keep_alive) if isinstance(keep_alive, Mapping) else {}
    rest = by_model.pop("*", None) if isinstance(keep_alive, Mapping) else keep_alive
    return {
        "keep_alive_s": config.default_keep_alive_s() if rest is None else config.keep_alive_seconds(rest),
        "keep_alive_of": {model: config.keep_alive_seconds(value) for model, value in by_model.items()},
    }


def _is_positive(number: object) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool) and number > 0


def _endpoint(backend: str | Mapping[str, Any]) -> str:
    """`host:port` of a backend given as text or as a dict with `host` and `port`."""
    if isinstance(backend, str):
        return config.format_endpoint(*config.parse_endpoint(backend))
    if not isinstance(backend, Mapping) or "host" not in backend:
        raise ConfigError(f'{backend!r} is not an RPC backend; write {{"host": "192.168.1.10", "port": 50052}}')
    text = config.format_endpoint(str(backend["host"]), backend.get("port", config.DEFAULT_RPC_PORT))
    return config.format_endpoint(*config.parse_endpoint(text))
