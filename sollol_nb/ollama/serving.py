"""How a request passes through the Ollama nodes: choose one, wait at its gate, read the answer, fail over.

If a node dies or goes silent in mid-answer, another node that has the model continues: a chat with the answer so
far as the assistant's last message, a generation as raw text. A request does not return to a node that failed it,
unless that node is the last one and answers again immediately.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Container, Iterable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, cast

from sollol_nb.chat.chunk import CONTEXT_FULL, DROPPED, NOTE, RESTARTED, ROUTING, Chunk
from sollol_nb.chat.context_window import overflow_error
from sollol_nb.errors import (
    ConnectionBrokenError,
    ModelNotFoundError,
    OllamaResponseError,
    OllamaUnavailableError,
    SollolError,
    TransportError,
)
from sollol_nb.models.names import key_of
from sollol_nb.ollama.choice import NodeOffer, Residency, choose_node, worth_waiting_for
from sollol_nb.ollama.exchange import Deadline, NodeLostError, Patience, exchange, node_lost
from sollol_nb.ollama.nodes import (
    ASSUMED_ANSWER_TOKENS,
    INVENTORY_FRESH_S,
    INVENTORY_RECENT_S,
    NEW_SAMPLE_WEIGHT,
    NodeState,
    NodeStatus,
    OllamaNode,
)
from sollol_nb.ollama.pool_request import CHAT, EMBED, GENERATE, PoolRequest
from sollol_nb.ollama.requests import (
    AnswerSoFar,
    chat_continuation,
    count_characters,
    describe_truncation,
    generate_continuation,
    too_long,
)
from sollol_nb.runtime.events import EventBus, EventKind
from sollol_nb.runtime.gate import first_slot
from sollol_nb.runtime.http_client import CANNOT_CONNECT

EXTRAPOLATION_FACTOR = 4  # how much longer a prompt may be than the one its tokens are estimated by

_STATE_MESSAGES = {
    NodeState.READY: "is ready",
    NodeState.ABSENT: "is not running",
    NodeState.COOLING: "cannot be used for a while",
}


class Serving:
    """Serves requests from the nodes of a pool.

    Args:
        urls: of the nodes, in the order given by the user.
        slots: requests a node serves at the same time.
        patience: how long a node may be silent.
        events: where changes of a node's state are published.
        are_named: whether the user named the nodes.
    """

    def __init__(
        self,
        urls: Iterable[str],
        *,
        slots: int,
        patience: Patience,
        events: EventBus | None,
        are_named: bool = True,
    ) -> None:
        self.nodes = {url: OllamaNode(url, slots, self._node_changed, is_named=are_named) for url in urls}
        self.patience = patience
        self.answer_tokens = ASSUMED_ANSWER_TOKENS
        self._last_prompts: dict[str, tuple[int, int]] = {}  # tokens and characters of each model's last chat
        self._events = events

    # --- requests -----------------------------------------------------------------------------

    async def answer(self, request: PoolRequest) -> AsyncGenerator[Chunk, None]:
        """The chunks of a request's answer; the first of each node and the last have `_routing`.

        Errors are those of `OllamaPool.chat`.
        """
        while True:
            async with self._slot(request) as (node, offer):
                try:
                    body, restarted = await self._next_body(node, request)
                    is_first = True
                    async with aclosing(
                        exchange(node, request.path, body, deadline=request.deadline, patience=self.patience)
                    ) as chunks:
                        async for chunk in chunks:
                            is_last = request.record_chunk(chunk)
                            if is_first:  # an interrupted answer has no last chunk to say where it ran
                                chunk, is_first = {**chunk, ROUTING: request.routing(node, chunk)}, False
                            if restarted:
                                chunk, restarted = {**chunk, RESTARTED: True}, False
                            if is_last:
                                self._record_answer(node, offer, request, chunk)
                                chunk |= await self._context_marks(node, request, chunk)
                                chunk[ROUTING] = request.routing(node, chunk)
                            yield chunk
                            if is_last:
                                return
                    if request.so_far.repeats_itself:
                        yield self._ended_for_repeating(node, request)
                        return
                    message = f"{node.url} closed the connection before the answer was complete"
                    raise node_lost(node, ConnectionBrokenError(message))
                except NodeLostError as error:
                    if error.lacks_model:
                        node.record_missing(request.name.key)
                    request.record_failover(node, error)
                except OllamaResponseError as refused:
                    overflow = too_long(str(refused))
                    if overflow is None:
                        raise
                    raise overflow_error(
                        str(request.name),
                        overflow.prompt_tokens,
                        overflow.context_tokens or await self._context_tokens_of(node, request),
                        remedy='a larger num_ctx (options={"num_ctx": ...})',
                    ) from refused

    def _ended_for_repeating(self, node: OllamaNode, request: PoolRequest) -> Chunk:
        """The last chunk of an answer that Ollama ended without one, since the model repeated itself."""
        last: dict[str, Any] = {"model": request.body["model"], "done": True, "done_reason": "stop"}
        last |= {"message": {"role": "assistant", "content": ""}} if request.path == CHAT else {"response": ""}
        last |= {"eval_count": request.so_far.tokens, NOTE: "Ollama ended the answer: the model repeated itself"}
        request.record_chunk(cast(Chunk, last))
        return cast(Chunk, {**last, ROUTING: request.routing(node, last)})

    async def _context_marks(
        self, node: OllamaNode, request: PoolRequest, final: Mapping[str, Any]
    ) -> dict[str, Any]:
        """`_context_full` (tokens) if the answer ended because the context was full, `_dropped` (a message) if
        this Ollama seems to have dropped a part of the prompt silently."""
        marks: dict[str, Any] = {}
        answer_tokens = final.get("eval_count") or 0
        was_cut = final.get("done_reason") == "length" and request.body.get("shift") is False
        if was_cut and answer_tokens != request.option("num_predict"):
            context_tokens = await self._context_tokens_of(node, request)
            if (
                context_tokens is not None
                and (final.get("prompt_eval_count") or 0) + answer_tokens >= context_tokens
            ):
                marks[CONTEXT_FULL] = context_tokens
        if message := describe_truncation(request.body.get("messages") or (), final.get("prompt_eval_count")):
            marks[DROPPED] = message
        return marks

    def tokens_per_character(self, key: str, prompt_characters: int) -> float | None:
        """Tokens per character of the last chat with a model, to estimate a prompt of `prompt_characters`; None
        without a chat, or after a much shorter one, most of which may be text that the template adds once."""
        tokens, seen_characters = self._last_prompts.get(key, (0, 0))
        is_usable = 0 < prompt_characters <= seen_characters * EXTRAPOLATION_FACTOR
        return tokens / seen_characters if is_usable else None

    async def context_tokens(self, key: str) -> int | None:
        """The smallest context for one request of a model among the nodes that have it loaded; None if none has,
        or none reports it."""
        nodes = [node for node in self.nodes.values() if node.state is NodeState.READY]
        reported = await asyncio.gather(*(self._context_tokens_at(node, key) for node in nodes))
        return min((tokens for tokens in reported if tokens is not None), default=None)

    async def _context_tokens_of(self, node: OllamaNode, request: PoolRequest) -> int | None:
        # A model with keep_alive=0 is no longer listed.
        return await self._context_tokens_at(node, request.name.key) or request.option("num_ctx")

    async def _context_tokens_at(self, node: OllamaNode, key: str) -> int | None:
        # Ollama loads a model with several names once, and shows one of the names; the digest identifies it.
        try:
            loaded, on_disk = [await node.entries(path) for path in ("/api/ps", "/api/tags")]
        except TransportError:
            return None
        digests = {entry.get("digest") for entry in on_disk if key_of(entry["name"]) == key}
        reported = (entry.get("context_length") for entry in loaded if entry.get("digest") in digests)
        return next((tokens for tokens in reported if tokens), None)

    async def _next_body(self, node: OllamaNode, request: PoolRequest) -> tuple[dict[str, Any], bool]:
        """The body to send, and whether it restarts an answer of which a part was already delivered."""
        body = request.body if request.path == EMBED else {**request.body, "stream": True}
        if not request.so_far.tokens:
            return body, False
        if request.failovers[-1]["continued"]:
            if request.path == CHAT:
                return chat_continuation(body, request.so_far), False
            prompt = await self._rendered_prompt(node, body, request.deadline)
            if prompt is not None:
                return generate_continuation(body, prompt, request.so_far), False
            request.failovers[-1]["continued"] = False
        request.so_far = AnswerSoFar()
        return body, True

    async def _rendered_prompt(self, node: OllamaNode, body: dict[str, Any], deadline: Deadline) -> str | None:
        """The prompt of a generate request as the model sees it; None from an Ollama too old to report it."""
        if body.get("raw"):
            return str(body["prompt"])
        # An Ollama that does not know the field answers the request: one token of that answer is enough.
        one_token = {**body.get("options", {}), "num_predict": 1}
        render = {**body, "stream": False, "_debug_render_only": True, "options": one_token}
        answer = await self.post(node, GENERATE, render, deadline)
        reported = answer.get("_debug_info")
        rendered = reported.get("rendered_template") if isinstance(reported, Mapping) else None
        return rendered if isinstance(rendered, str) else None

    @asynccontextmanager
    async def _slot(self, request: PoolRequest) -> AsyncIterator[tuple[OllamaNode, NodeOffer]]:
        """Hold a slot at the best node for a request."""
        arrived_s = time.monotonic()
        while True:
            choice, offers = await request.deadline.wait_for(self.choose(request))
            gates = {self.nodes[offer.url].gate: offer for offer in worth_waiting_for(choice, offers)}
            gate = await request.deadline.wait_for(
                first_slot([*gates], request.priority, arrived_s=request.started_s)
            )
            if gate is None:  # the nodes have changed meanwhile
                continue
            offer = gates[gate]
            node = self.nodes[offer.url]
            if node.state is NodeState.READY:
                break
            gate.release()
        try:
            request.queue_ms += (time.monotonic() - arrived_s) * 1e3
            yield node, offer
        finally:
            gate.release()

    async def choose(self, request: PoolRequest) -> tuple[NodeOffer, Sequence[NodeOffer]]:
        """The node for a request, and the offers of all. Errors are those of `OllamaPool.chat`."""
        while True:
            offers = await self.offers(request.name.key, request.failed)
            choice = choose_node(offers)
            if choice is not None and choice.residency is not Residency.MISSING:
                return choice, offers
            if not await self._can_return(request):
                raise self._no_node_error(request, any_ready=bool(offers))

    async def _can_return(self, request: PoolRequest) -> bool:
        """Whether the node that failed last answers again: it was restarted, or an idle connection had been
        closed. A request returns once."""
        url, error = next(reversed(request.failed.items()), (None, None))
        if url is None or error is None or not error.connection_broke or request.has_returned:
            return False
        await self.nodes[url].refresh()
        if self.nodes[url].state is not NodeState.READY:
            return False
        request.has_returned = True
        del request.failed[url]
        return True

    def _no_node_error(self, request: PoolRequest, *, any_ready: bool) -> SollolError:
        name = request.name
        error = next(reversed(request.failed.values()), None)
        if error is not None and error.reason and not error.lacks_model:
            return OllamaResponseError(error.reason)
        if error is not None and not error.lacks_model:
            advice = ". Start the node again with `ollama serve`" if error.connection_broke else ""
            return OllamaUnavailableError(f"{error}; no other Ollama node has {name}{advice}")
        if error is None and not any_ready:
            return self.unavailable()
        urls, trouble = ", ".join(self.nodes), self.trouble()
        unusable = f"; not usable: {trouble}" if trouble else ""
        return ModelNotFoundError(f"no Ollama node has {name} (nodes: {urls}{unusable}). Run: ollama pull {name}")

    async def offers(self, key: str, skip: Container[str] = ()) -> Sequence[NodeOffer]:
        """The offers of all usable nodes. Nodes that were never asked are asked now; so are all the others if none
        is usable, or none has the model, except those that were asked within the last second."""
        nodes = [node for node in self.nodes.values() if node.url not in skip]
        await _refresh(node for node in nodes if node.state is NodeState.UNKNOWN)
        for node in nodes:
            if node.state is NodeState.READY and node.inventory_age_s > INVENTORY_FRESH_S:
                node.start_refresh()
        if not any(
            node.state is NodeState.READY and node.residency(key) is not Residency.MISSING for node in nodes
        ):
            await _refresh(node for node in nodes if node.asked_age_s > INVENTORY_RECENT_S)
        return [node.offer(key, self.answer_tokens) for node in nodes if node.state is NodeState.READY]

    def _record_answer(
        self, node: OllamaNode, offer: NodeOffer, request: PoolRequest, final: Mapping[str, Any]
    ) -> None:
        had_to_load = offer.residency is Residency.ON_DISK
        node.record_answer(request.name.key, str(request.name), final, had_to_load=had_to_load)
        if request.body.get("keep_alive") == 0:
            node.record_unload(request.name.key)
        prompt_tokens, messages = final.get("prompt_eval_count"), request.body.get("messages")
        if prompt_tokens and messages and not any(message.get("images") for message in messages):
            self._last_prompts[request.name.key] = prompt_tokens, count_characters(messages)
        if request.so_far.tokens:
            self.answer_tokens += NEW_SAMPLE_WEIGHT * (request.so_far.tokens - self.answer_tokens)

    async def post(
        self, node: OllamaNode, path: str, body: Mapping[str, Any], deadline: Deadline
    ) -> dict[str, Any]:
        """The answer to a request that is not streamed."""
        async with aclosing(exchange(node, path, body, deadline=deadline, patience=self.patience)) as answers:
            async for answer in answers:
                return dict(answer)
        raise NodeLostError(f"{node.url}{path} sent no answer")

    # --- nodes --------------------------------------------------------------------------------

    async def refresh(self) -> None:
        """Ask all nodes now which models they have."""
        await _refresh(self.nodes.values())

    def statuses(self) -> list[NodeStatus]:
        """The state of every node now."""
        return [node.status(self.answer_tokens) for node in self.nodes.values()]

    async def entries(self, path: str) -> list[tuple[str, dict[str, Any]]]:
        """The models of `/api/tags` or `/api/ps` of every node that answers, with its URL."""
        await _refresh(node for node in self.nodes.values() if node.state is not NodeState.READY)
        entries = []
        for node in self.nodes.values():
            if node.state is NodeState.READY:
                try:
                    listed = await node.entries(path)
                except TransportError as error:
                    node.record_failure(error)
                else:
                    entries += [(node.url, entry) for entry in listed]
        if not any(node.state is NodeState.READY for node in self.nodes.values()):
            raise self.unavailable()
        return entries

    async def nodes_with_loaded(self, key: str) -> list[OllamaNode]:
        """The nodes that have a model loaded, asked now."""
        await self.refresh()
        nodes = self.nodes.values()
        return [
            node for node in nodes if node.state is NodeState.READY and node.residency(key) is Residency.LOADED
        ]

    async def versions(self) -> dict[str, str]:
        """What each node that can be used answers to `/api/version`, by URL."""
        await _refresh(node for node in self.nodes.values() if node.state is NodeState.UNKNOWN)
        ready = [node for node in self.nodes.values() if node.state is NodeState.READY]
        versions = await asyncio.gather(*(node.version() for node in ready))
        return {node.url: version for node, version in zip(ready, versions, strict=True) if version}

    def _node_changed(self, node: OllamaNode, *, has_new_state: bool) -> None:
        # Requests that wait chose a node by the state before.
        for waited_for in self.nodes.values():
            waited_for.gate.dismiss()
        if has_new_state and self._events is not None:
            kind = EventKind(f"node.{node.state.value}")
            message = f"Ollama at {node.url} {_STATE_MESSAGES[node.state]}"
            if node.state is NodeState.COOLING and node.last_error:
                message += f": {node.last_error}"
            self._events.publish(kind, node.url, message, error=node.last_error, is_named=node.is_named)

    def trouble(self) -> str:
        """Why nodes cannot be used although something answers there, each with its address; "" without any."""
        troubled = [node for node in self.nodes.values() if node.state is NodeState.COOLING]
        errors = ((node.url, node.last_error or "it failed") for node in troubled)
        return "; ".join(error if url in error else f"{url}: {error}" for url, error in errors)

    def unavailable(self) -> OllamaUnavailableError:
        return OllamaUnavailableError(
            f"{self.description()}. Start one with `ollama serve`, or name others in OLLAMA_HOST"
        )

    def description(self) -> str:
        """Why no node can be used, or that none has the model if one can, as the beginning of an error."""
        trouble = self.trouble()
        if any(node.state is NodeState.READY for node in self.nodes.values()):
            return "no Ollama node has it" + (f" (not usable: {trouble})" if trouble else "")
        if trouble:
            return f"no Ollama node can be used ({trouble})"
        named = ", ".join(_where(node) for node in self.nodes.values() if node.is_named)
        return "no Ollama node is running" + (f" at {named}" if named else "")


def _where(node: OllamaNode) -> str:
    """A node's address, and why nothing answers there, if it is not only that nothing listens."""
    reason = (node.last_error or "").partition("/api/tags: ")[2]
    return f"{node.url} ({reason})" if reason not in ("", CANNOT_CONNECT) else node.url


async def _refresh(nodes: Iterable[OllamaNode]) -> None:
    await asyncio.gather(*(node.refresh() for node in nodes))
