"""The life of one request: checked, routed, answered, and recorded whatever happens."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from sollol_nb.chat.chat_templates import supports_thinking, takes_tools
from sollol_nb.chat.chunk import ROUTING, Chunk
from sollol_nb.chat.journaling import JournalEntry
from sollol_nb.chat.messages import as_read, has_choice
from sollol_nb.chat.option_checks import check_llama_cpp_options, check_ollama_options, speculation_of
from sollol_nb.chat.request import ChatRequest
from sollol_nb.chat.tool_choice import CallFilter
from sollol_nb.errors import (
    AnswerInterruptedError,
    ConfigError,
    OllamaResponseError,
    RequestRejectedError,
    WorkersUnavailableError,
)
from sollol_nb.gguf.facts import read_facts
from sollol_nb.latency.log import LatencyLog
from sollol_nb.llama_cpp.answers.base import Answer
from sollol_nb.llama_cpp.answers.protocol import THINK_LEVEL_VARIABLE, has_media
from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.llama_cpp.coordinators.pool import CoordinatorPool
from sollol_nb.models.routing import OLLAMA, Route
from sollol_nb.ollama.generated import generated
from sollol_nb.ollama.pool import OllamaPool
from sollol_nb.router.failover import stream_answer
from sollol_nb.router.finder import RouteFinder
from sollol_nb.router.journaled import AnswerJournal
from sollol_nb.router.record import RequestRecord
from sollol_nb.runtime.events import EventBus, EventKind
from sollol_nb.text.tables import counted

NOT_SENT_TO_OLLAMA = ("recovery", "deterministic", "speculation", "tool_choice", "parallel_tool_calls")
"""Options that Ollama does not have; `CallFilter` does what the last two require."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestServices:
    """What all requests of a router use.

    Attributes:
        counts: requests that have ended, by backend; "" is for those that found none.
        options: of requests that do not have them.
    """

    routes: RouteFinder
    ollama: OllamaPool
    coordinators: CoordinatorPool
    latency: LatencyLog
    events: EventBus
    counts: Counter[str]
    options: Mapping[str, Any]


class ActiveRequest:
    """One request, from its arguments to its latency row. Lives on the I/O loop.

    Args:
        services: those of its router.
        model: as the caller names it.
        check: gives the checked request. It is called when the request begins, so that a refused request is
            recorded too.
        router: the router, which must live as long as the request: without it, its connections are closed.
        interrupted: an answer to continue; None begins a new one.
        entry: of the journal, where the answer has one already.
    """

    def __init__(
        self,
        services: RequestServices,
        model: str,
        check: Callable[[], ChatRequest],
        *,
        router: object,
        interrupted: Answer | None = None,
        entry: JournalEntry | None = None,
    ) -> None:
        self._services = services
        self._check = check
        self._router = router
        self._interrupted = interrupted
        self._record = RequestRecord(model, text=interrupted.text if interrupted is not None else "")
        self._reported_url: str | None = None
        self._journal = AnswerJournal(self._record, entry)
        if interrupted is not None:
            self._journal.set_state(interrupted.state)

    async def chunks(self) -> AsyncGenerator[Chunk, None]:
        """Ollama-shaped chunks; the first, the last and each from another server have `_routing`.

        Closing the generator cancels the generation on the engine. Errors are those of `Router.route_request`.
        """
        record, status, failure = self._record, "cancelled", None
        record.start()
        self._services.events.publish(EventKind.REQUEST_STARTED, record.name, f"asking {record.name}")
        try:
            request = self._check()
            record.priority = request.priority
            route, saved = await self._services.routes.find_with_settings(record.model, request.backend)
            record.set_route(route)
            request = request.with_defaults(saved.options, saved.system)
            request = request.with_defaults(self._services.options)
            self._journal.begin(request)
            asked = request.with_tool_choice()
            while True:
                request, left_out = await as_read_by(self._services.ollama, route, asked)
                record.note = (
                    f"{counted(left_out, 'image')} not sent: {record.name} reads none" if left_out else ""
                )
                await check_route_options(request, route)
                await self._check_context(request, route)
                calls = CallFilter(request.options)
                try:
                    async with aclosing(self._answer(request, route)) as answer:
                        async for chunk in answer:
                            yielded = calls.shown(self._recorded(chunk))
                            if yielded is None:
                                continue
                            if yielded.get("done"):  # readers of the log see the row from now on
                                status = "ok"
                                self._services.latency.record_later(record.row("ok"))
                            self._journal.add(yielded)
                            yield yielded
                    return
                except OllamaResponseError as error:
                    route = await self._sharded_instead(request, route, error)
                except AnswerInterruptedError as error:
                    error.backend, error.schema, error.partial = request.backend, request.schema, record.partial()
                    error.answer_id = record.answer_id
                    raise
                except RequestRejectedError as error:
                    error.partial = record.partial() if record.text else None
                    raise
                except WorkersUnavailableError as error:
                    if not record.failovers:
                        raise
                    raise WorkersUnavailableError(f"{record.failovers[-1]['what']}; {error}") from error
        except Exception as error:
            status, failure = "timeout" if isinstance(error, TimeoutError) else "error", error
            raise
        finally:
            if status != "ok":
                self._services.latency.record_later(record.row(status, str(failure or "")))
            self._journal.end(failure)
            self._services.counts[record.backend] += 1
            self._services.events.publish(
                EventKind.REQUEST_FINISHED,
                record.name,
                f"{record.name}: {status}",
                status=status,
                place=record.server_url,
                tokens_per_s=record.tokens_per_s,
                token_ms=record.token_ms,
                tokens=record.completion_tokens,
                context_tokens=record.context_tokens,
                drafts=record.draft_results(),
                ttft_ms=record.ttft_ms,
            )

    async def _check_context(self, request: ChatRequest, route: Route) -> None:
        """Refuse a wanted context (`num_ctx`) that is larger than the coordinator's, which it cannot change."""
        wanted = (request.options.get("options") or {}).get("num_ctx", 0)
        if not wanted or route.model_path is None:
            return
        context_tokens = await self._services.coordinators.context_tokens(route)
        if wanted > context_tokens:
            raise ConfigError(
                f"num_ctx={wanted} is more than the {context_tokens:,} tokens of context with which {route.name} "
                "runs; give less, or start the router with a larger context_tokens="
            )

    def _answer(self, request: ChatRequest, route: Route) -> AsyncGenerator[Chunk, None]:
        """The chunks of the backend that the route leads to."""
        if route.backend != OLLAMA:
            if self._interrupted is None:  # else it has its messages and options
                request = request.with_modelfile(route.modelfile)
            begun, asked = self._interrupted, request.options.get("deterministic")

            def begin(coordinator: Coordinator) -> Answer:
                answer = begun or _new_answer(coordinator, request, route)
                self._journal.set_state(answer.state)
                return answer

            return stream_answer(
                self._services.coordinators,
                route,
                self._record,
                begin,
                priority=request.priority,
                timeout_s=request.timeout_s,
                keep_alive=request.options.get("keep_alive"),
                alone=bool(asked if begun is None else begun.is_deterministic),
                speculation=speculation_of(request.options if begun is None else begun.options),
            )
        if self._interrupted is not None:
            raise ConfigError(
                f"{route.name} is routed to Ollama now, which cannot continue this answer; ask again"
            )
        self._record.set_sent()
        options = ollama_options(request.options)
        if request.options.get("deterministic"):
            note = "not deterministic: Ollama may answer differently each time"
            self._record.note = "; ".join(filter(None, [self._record.note, note]))
        options |= {"priority": request.priority, "timeout": request.timeout_s}
        if request.prompt is None:
            chunks = self._services.ollama.stream_chat(route.model, request.messages, **options)
        else:
            chunks = generated(self._services.ollama, route.model, request.prompt, options)
        return _with_logprobs(chunks) if options.get("logprobs") else chunks

    async def _sharded_instead(self, request: ChatRequest, route: Route, error: OllamaResponseError) -> Route:
        """The route over workers, if that is what Ollama's error calls for; else raises the error."""
        may_change = self._record.ttft_ms is None and request.backend is None
        instead = await self._services.routes.sharded_instead(route, error) if may_change else None
        if instead is None:
            raise error
        self._record.add_fallback(str(error))
        self._record.set_route(instead)
        return instead

    def _recorded(self, chunk: Chunk) -> Chunk:
        """Note what a chunk brings; returns it with `_routing` where that is due."""
        record = self._record
        if ROUTING in chunk:  # of the Ollama node
            record.set_node(chunk[ROUTING])
        is_first, is_last = record.ttft_ms is None, chunk.get("done")
        record.add_chunk(chunk)
        # An answer that is cut short has no last chunk to say where it ran.
        if is_first or is_last or ROUTING in chunk or record.server_url != self._reported_url:
            self._reported_url = record.server_url
            chunk = {**chunk, ROUTING: record.routing()}
        if is_last:
            chunk["total_duration"] = int(record.duration_ms * 1e6)
            chunk["load_duration"] = int((record.load_ms or 0) * 1e6)
        return chunk


def ollama_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a request that are sent to Ollama."""
    return {name: value for name, value in options.items() if name not in NOT_SENT_TO_OLLAMA}


def _new_answer(coordinator: Coordinator, request: ChatRequest, route: Route) -> Answer:
    if request.prompt is None:
        return coordinator.answer(request.messages, request.options, model=route.model)
    return coordinator.raw_answer(request.prompt.text, request.options, model=route.model)


async def as_read_by(ollama: OllamaPool, route: Route, request: ChatRequest) -> tuple[ChatRequest, int]:
    """The request as the model of a route gets it, and how many images were left out since it reads none.

    Only where the messages leave the choice: images without a `without_images` are never left out.
    """
    if not has_choice(request.messages):
        return request, 0
    if route.model_path is None:
        reads_images = await _reads_images_in_ollama(ollama, route.model)
    else:
        reads_images = route.modelfile.projector is not None
    messages, left_out = as_read(request.messages, reads_images=reads_images)
    return replace(request, messages=messages), left_out


async def _reads_images_in_ollama(ollama: OllamaPool, model: str) -> bool:
    facts = await ollama.show(model)
    capabilities = facts.get("capabilities")
    if capabilities is None:  # before Ollama 0.6.4
        return bool(facts.get("projector_info"))
    return isinstance(capabilities, list) and "vision" in capabilities


async def check_route_options(request: ChatRequest, route: Route) -> None:
    """Refuse options that the backend of the route would drop, before anything is loaded.

    Raises:
        ConfigError: there is one.
    """
    if route.model_path is None:
        check_ollama_options(request.options)
        return
    check_llama_cpp_options(request.options)
    if request.prompt is not None and (request.prompt.suffix or request.prompt.images):
        what = "suffix" if request.prompt.suffix else "images with a raw prompt"
        raise ConfigError(f"llama.cpp does not take {what} here; leave it out, or ask a model in Ollama")
    if route.modelfile.projector is None and any(map(has_media, request.messages)):
        raise ConfigError(
            f"{route.name} does not read images or sound: llama.cpp has no projector for it; leave them out, or "
            "ask a model in Ollama"
        )
    think, tools = request.options.get("think"), request.options.get("tools")
    if not think and not tools:
        return
    template = route.modelfile.chat_template
    template = template or (await asyncio.to_thread(read_facts, route.model_path)).chat_template
    if tools and (route.modelfile.refuses_tools or not takes_tools(template)):
        raise ConfigError(
            f"{route.name} does not support tools: its chat template does not use them; ask without tools, or ask "
            "another model"
        )
    if think and not supports_thinking(template):
        raise ConfigError(
            f"{route.name} does not know think={think!r}: its chat template does not support reasoning; leave "
            "think out"
        )
    if isinstance(think, str) and THINK_LEVEL_VARIABLE not in template:
        raise ConfigError(
            f"{route.name} does not know think={think!r}: its chat template has no levels of thinking; give "
            "think=True or think=False"
        )


async def _with_logprobs(chunks: AsyncGenerator[Chunk, None]) -> AsyncGenerator[Chunk, None]:
    """The chunks of an Ollama node.

    Raises:
        OllamaResponseError: they come without log probabilities: the node does not know the option.
    """
    node, has_any = "", False
    async with aclosing(chunks):
        async for chunk in chunks:
            node = chunk.get(ROUTING, {}).get("node") or node
            has_any = has_any or bool(chunk.get("logprobs"))
            message = chunk.get("message") or {}
            if not has_any and (message.get("content") or message.get("thinking")):
                raise OllamaResponseError(
                    f"Ollama at {node} gave no logprobs; update it to 0.12.11 or newer, or leave logprobs out"
                )
            yield chunk
