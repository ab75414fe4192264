"""Asking, for a router: requests are checked, routed, answered by their place, and recorded whatever happens."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from sollol_nb.batch.batch import BatchPlace
from sollol_nb.chat.chunk import ROUTING, Chunk
from sollol_nb.chat.completion import Completion, checked_against_schema
from sollol_nb.chat.request import ChatRequest, checked_timeout_s
from sollol_nb.errors import (
    AnswerInterruptedError,
    ConfigError,
    OllamaResponseError,
    OllamaUnavailableError,
    WorkersUnavailableError,
)
from sollol_nb.latency.log import LatencyLog, LatencyRow
from sollol_nb.llama_cpp.answers.base import Answer
from sollol_nb.llama_cpp.coordinators.pool import CoordinatorPool
from sollol_nb.llama_cpp.workers.workers import Workers
from sollol_nb.models.files import OllamaGGUFResolver
from sollol_nb.models.listing import list_models, models_frame
from sollol_nb.models.profiles import ModelProfile
from sollol_nb.models.routing import OLLAMA, Route, checked_backend
from sollol_nb.ollama.pool import OllamaPool
from sollol_nb.router.failover import stream_answer
from sollol_nb.router.finder import RouteFinder
from sollol_nb.router.record import RequestRecord
from sollol_nb.router.steering import RouterCluster
from sollol_nb.runtime.events import EventBus, EventKind
from sollol_nb.runtime.io_loop import io_bound, io_bound_stream
from sollol_nb.runtime.priority import Priority, checked_priority

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)


class RouterAsking(RouterCluster):
    """The side of `HybridRouter` that asks and decides.

    Attributes:
        latency: the latency log.
    """

    def __init__(
        self,
        coordinators: CoordinatorPool,
        workers: Workers,
        ollama: OllamaPool,
        events: EventBus,
        *,
        routes: RouteFinder,
        latency: LatencyLog,
        timeout_s: float,
    ) -> None:
        super().__init__(coordinators, workers, ollama, events)
        self.latency = latency
        self._routes = routes
        self._timeout_s = timeout_s

    # --- asking ---------------------------------------------------------------------------------

    async def route_request(
        self,
        /,
        model: str,
        messages: Sequence[Mapping[str, Any]] | str,
        *,
        schema: object = None,
        backend: str | None = None,
        priority: int = Priority.NORMAL,
        timeout: float | None = None,
        **options: Any,
    ) -> Completion:
        """Ask a model, and wait for the whole answer.

        Args:
            model: a model's name, such as `llama3.1:70b` or `demo:sharded`, or the path of a `.gguf` file.
            messages: `[{"role": "user", "content": "Hello!"}]`, or one user message as a string.
            schema: what the answer must fit: a pydantic model class, a dataclass, another type such as
                `list[str]`, a JSON schema as a dict, or a DataFrame as an example (see `schema/schema.py`). The
                engine is held to it, and the answer is checked; `.value` has it as such.
            backend: where it must run, whatever the model's size: `ollama`, `sharded` or `local` (or in full, as
                in `_routing`); None and `auto` leave that to the router.
            priority: 1 to 10; of requests that wait for the same place, higher ones go first.
            timeout: limit in seconds, from when the place is ready.
            **options: `max_tokens`, `temperature`, `top_p`, `top_k`, `min_p`, `seed`, `stop`, `format`
                (`"json"` or a JSON schema), `tools`, `options` (Ollama's own dict), `overflow` (`"error"`, or
                `"drop_oldest"`: leaves out the oldest turns that do not fit, and says so as `_dropped`), ...

        Returns:
            The answer in Ollama's shape, with `_routing`.

        Raises:
            StructureError: the answer does not fit the schema; the error has it as `.completion`.
            ContextOverflowError: the messages do not fit the model's context.
            SollolError: of the kind that fits; see `errors.py`.
        """
        chunks = self.stream(
            model, messages, schema=schema, backend=backend, priority=priority, timeout=timeout, **options
        )
        async with aclosing(chunks):
            return checked_against_schema(Completion.from_chunks([chunk async for chunk in chunks]), schema)

    async def resume(
        self, interrupted: AnswerInterruptedError, *, priority: int = Priority.NORMAL, timeout: float | None = None
    ) -> Completion:
        """Go on with an answer that was interrupted because no coordinator could take over.

        Args:
            interrupted: the error that said so.

        Returns:
            The whole answer, with what came before the interruption; checked if a schema was given.

        Raises:
            ConfigError: the error holds nothing to go on with.
            StructureError: as for `route_request`.
            SollolError: as for `route_request`.
        """
        if not isinstance(interrupted, AnswerInterruptedError) or interrupted.state is None:
            raise ConfigError("resume() takes an AnswerInterruptedError of an answer that had begun; ask again")
        answer = Answer.from_state(interrupted.state)
        before: Chunk = {"message": {"role": "assistant", "content": answer.text, "thinking": answer.thinking}}
        async with aclosing(self._resumed(answer, interrupted, priority, timeout)) as chunks:
            whole = Completion.from_chunks([before, *[chunk async for chunk in chunks]])
        return checked_against_schema(whole, interrupted.schema)

    @io_bound_stream
    async def _resumed(
        self, answer: Answer, interrupted: AnswerInterruptedError, priority: int, timeout_s: float | None
    ) -> AsyncGenerator[Chunk, None]:
        record = RequestRecord(answer.model)
        record.text = answer.text

        async def chunks() -> AsyncGenerator[Chunk, None]:
            record.priority = checked_priority(priority)
            limit_s = checked_timeout_s(self._timeout_s if timeout_s is None else timeout_s)
            route = await self.route(answer.model, backend=interrupted.backend)
            record.take(route)
            if route.backend == OLLAMA:
                raise ConfigError(
                    f"{answer.model} goes to Ollama now, which cannot go on with this answer; ask again"
                )
            try:
                async with aclosing(
                    stream_answer(
                        self._coordinators,
                        route,
                        record,
                        lambda _: answer,
                        priority=record.priority,
                        timeout_s=limit_s,
                    )
                ) as resumed:
                    async for chunk in resumed:
                        yield chunk
            except AnswerInterruptedError as error:
                error.backend, error.schema = interrupted.backend, interrupted.schema
                raise

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
        schema: object = None,
        backend: str | None = None,
        priority: int = Priority.NORMAL,
        timeout: float | None = None,
        **options: Any,
    ) -> AsyncGenerator[Chunk, None]:
        """Ask a model; yields Ollama-shaped chunks as they come, the last with `done` and `_routing`.

        Arguments and errors are those of `route_request`, but the engine alone sees to the schema: the text is not
        checked here. Leaving the loop early (closing the generator) cancels the generation on the engine.
        """
        record = RequestRecord(model)
        chunks = self._chunks(
            record,
            messages,
            schema=schema,
            backend=backend,
            priority=priority,
            timeout_s=self._timeout_s if timeout is None else timeout,
            options=options,
        )
        async with aclosing(self._recorded(record, chunks)) as recorded:
            async for chunk in recorded:
                yield chunk

    async def _recorded(
        self, record: RequestRecord, chunks: AsyncGenerator[Chunk, None]
    ) -> AsyncGenerator[Chunk, None]:
        """The chunks, the last with `_routing`, and one latency row whatever happens."""
        model, status, error_words = record.model, "cancelled", ""
        told_place = None
        self.events.publish(EventKind.REQUEST_STARTED, model, f"asking {model}")
        try:
            async with aclosing(chunks):
                async for chunk in chunks:
                    is_first = record.ttft_ms is None
                    record.saw(chunk)
                    # An answer that is cut short has no last chunk to say where it ran.
                    if is_first or ROUTING in chunk or record.place != told_place:
                        told_place = record.place
                        chunk = {**chunk, ROUTING: record.routing()}
                    if chunk.get("done"):
                        chunk = {**chunk, "total_duration": int(record.duration_ms * 1e6)}
                        chunk["load_duration"] = int((record.load_ms or 0) * 1e6)
                        chunk[ROUTING] = record.routing()
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
            try:
                if status != "ok":
                    await self._write(record.row(status, error_words))
            finally:  # also where that is cancelled once more
                self._counts[record.backend] += 1
                facts = {"place": record.place, "tokens_per_s": record.tokens_per_s, "ttft_ms": record.ttft_ms}
                self.events.publish(
                    EventKind.REQUEST_FINISHED, model, f"{model}: {status}", status=status, **facts
                )

    async def _chunks(
        self, record: RequestRecord, messages: Sequence[Mapping[str, Any]] | str, **arguments: Any
    ) -> AsyncGenerator[Chunk, None]:
        request = ChatRequest.checked(messages, **arguments)
        record.priority = request.priority
        route = await self.route(record.model, backend=request.backend)
        record.take(route)
        if route.backend == OLLAMA:
            record.sent()
            try:
                async with aclosing(
                    self._ollama.stream_chat(
                        route.model,
                        request.messages,
                        priority=request.priority,
                        timeout=request.timeout_s,
                        **request.options,
                    )
                ) as chunks:
                    async for chunk in chunks:
                        if ROUTING in chunk:
                            record.take_node(chunk[ROUTING])
                        yield chunk
                return
            except OllamaResponseError as error:
                may_move = record.ttft_ms is None and request.backend is None
                instead = await self._routes.sharded_instead(route, error) if may_move else None
                if instead is None:
                    raise
                record.leave(str(error))
                record.take(instead)
                route = instead
        try:
            async with aclosing(
                stream_answer(
                    self._coordinators,
                    route,
                    record,
                    lambda coordinator: coordinator.answer(request.messages, request.options),
                    priority=request.priority,
                    timeout_s=request.timeout_s,
                    keep_alive=request.options.get("keep_alive"),
                )
            ) as chunks:
                async for chunk in chunks:
                    yield chunk
        except AnswerInterruptedError as error:
            error.backend, error.schema = request.backend, request.schema
            raise
        except WorkersUnavailableError as error:
            if record.failovers:
                raise WorkersUnavailableError(f"{record.failovers[-1]['what']}; {error}") from error
            raise

    async def _write(self, row: LatencyRow) -> None:
        try:
            await asyncio.to_thread(self.latency.record, row)
        except (OSError, sqlite3.Error) as error:  # an answer is worth more than its row
            logger.warning("the latency row was not written to %s: %s", self.latency.path, error)

    # --- deciding -------------------------------------------------------------------------------

    def should_use_distributed(self, model: str) -> bool:
        """Whether this router would shard the model, by its profile (no node or worker is asked)."""
        return self._routes.would_shard(model)

    @io_bound
    async def route(self, model: str, *, backend: str | None = None) -> Route:
        """Where a request for this model would go now, and why.

        Args:
            backend: as for `route_request`.

        Raises:
            ModelError, ConfigError: it could go nowhere, or not there; the message says why.
        """
        return await self._routes.find(model, checked_backend(backend))

    def profile(self, model: str) -> ModelProfile:
        """What is known of a model, and from where (no node or worker is asked).

        Raises:
            ModelFileError, ConfigError: its file or its entry in `MODEL_PROFILES` cannot be used.
        """
        return self._routes.profile(model)

    @io_bound
    async def models(self) -> pd.DataFrame:
        """The models that can be asked, one row each (see `models/listing.py`), without those of absent Ollama
        nodes."""
        try:
            in_ollama = (await self._ollama.list())["models"]
            loaded = (await self._ollama.ps())["models"]
        except OllamaUnavailableError:
            in_ollama, loaded = [], []
        in_storage = await asyncio.to_thread(OllamaGGUFResolver().installed)
        coordinators = {one.model: one.base_url for one in self.coordinators}
        return await asyncio.to_thread(
            lambda: models_frame(
                list_models(
                    self.profile,
                    in_ollama=in_ollama,
                    loaded=loaded,
                    in_storage=in_storage,
                    coordinators=coordinators,
                )
            )
        )

    @io_bound
    async def preload(self, model: str) -> str:
        """Have a model loaded where a request for it would go; returns where that is, in words.

        Raises:
            SollolError: it cannot be loaded; of the kind that fits, as for `route_request`.
        """
        route = await self.route(model)
        if route.backend == OLLAMA:
            await self._ollama.generate(route.model, "", max_tokens=1)
            return "in Ollama"
        coordinator, _ = await self._coordinators.get(route)
        return f"at {coordinator.base_url}"

    @io_bound
    async def _batch_place(self, model: str, backend: str | None) -> BatchPlace:
        route = await self.route(model, backend=backend)
        identity = await self._routes.identity(route)
        if route.backend == OLLAMA:
            return BatchPlace(identity, self._routes.ollama_slots(route.model))
        return BatchPlace(identity, self._coordinators.gate(route).slots)
