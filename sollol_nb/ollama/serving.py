"""The way of a request through the Ollama nodes: choose one, wait at its gate, read the answer, go on elsewhere.

If a node dies or goes silent in mid-answer, another that has the model goes on: a chat with the words so far as
the assistant's last message, a generation as raw text. A node that a request has left is not asked again by it,
unless it is the only one and there again at once.
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import AsyncGenerator, AsyncIterator, Container, Iterable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from sollol_nb.chat.chunk import CONTEXT_FULL, DROPPED, RESTARTED, ROUTING, Chunk, Failover, Routing
from sollol_nb.chat.context_window import overflow_error
from sollol_nb.errors import (
    ConnectionBrokenError,
    ModelNotFoundError,
    OllamaResponseError,
    OllamaUnavailableError,
    SollolError,
    TransportError,
)
from sollol_nb.models.names import ModelName
from sollol_nb.ollama.choice import Holding, NodeOffer, choose_node, worth_waiting_for
from sollol_nb.ollama.exchange import Deadline, NodeLostError, Patience, exchange, lost
from sollol_nb.ollama.nodes import (
    ASSUMED_ANSWER_TOKENS,
    INVENTORY_FRESH_S,
    INVENTORY_RECENT_S,
    LOOK_TIMEOUT_S,
    NEW_SAMPLE_WEIGHT,
    NodeState,
    NodeStatus,
    OllamaNode,
)
from sollol_nb.ollama.requests import (
    AnswerSoFar,
    can_continue,
    characters,
    chat_continuation,
    generate_continuation,
    is_too_long,
    unread_words,
)
from sollol_nb.runtime.events import EventBus, EventKind
from sollol_nb.runtime.gate import first_slot

BACKEND = "ollama-pool"
TELLING_FACTOR = 4  # of a prompt's length: what it tells of longer ones
CHAT, GENERATE, EMBED = "/api/chat", "/api/generate", "/api/embed"


@dataclass(slots=True)
class Journey:
    """One request on its way through the pool."""

    path: str
    body: dict[str, Any]
    priority: int
    deadline: Deadline
    name: ModelName
    began_s: float = field(default_factory=time.monotonic)
    last_sign_s: float = field(default_factory=time.monotonic)
    so_far: AnswerSoFar = field(default_factory=AnswerSoFar)
    left: dict[str, NodeLostError] = field(default_factory=dict)  # by URL, in order
    failovers: list[Failover] = field(default_factory=list)
    has_gone_back: bool = False
    queue_ms: float = 0.0
    load_ms: float = 0.0  # before the request itself was sent
    ttft_ms: float | None = None

    def option(self, name: str) -> Any:
        """One of Ollama's options, as asked for; None where it was not."""
        return (self.body.get("options") or {}).get(name)

    def leave(self, node: OllamaNode, why: NodeLostError) -> None:
        """Note that a node was left, and why."""
        self.left[node.url] = why
        tokens = self.so_far.tokens
        continued = tokens > 0 and can_continue(self.path, self.body, self.so_far)
        self.failovers.append(
            {
                "what": str(why),
                "when": time.time(),
                "cost_ms": None,
                "continued": continued,
                "tokens_before": tokens,
            }
        )

    def take(self, chunk: Chunk) -> bool:
        """Note what a chunk brings; whether it is the last."""
        now_s = time.monotonic()
        for failover in self.failovers:
            if failover["cost_ms"] is None:
                failover["cost_ms"] = (now_s - self.last_sign_s) * 1e3
        self.last_sign_s = now_s
        is_last = bool(chunk.get("done")) or self.path == EMBED
        if (self.so_far.add(chunk) or is_last) and self.ttft_ms is None:
            self.ttft_ms = (now_s - self.began_s) * 1e3
        return is_last

    def routing(self, node: OllamaNode, final: Mapping[str, Any]) -> Routing:
        """The `_routing` of the answer, so far or, with the last chunk, as a whole."""
        return {
            "backend": BACKEND,
            "node": node.url,
            "queue_ms": self.queue_ms,
            "ttft_ms": self.ttft_ms,
            "total_ms": (time.monotonic() - self.began_s) * 1e3,
            "load_ms": self.load_ms + final.get("load_duration", 0) / 1e6,
            "failovers": copy.deepcopy(self.failovers),
        }


class Serving:
    """The nodes of a pool, and the way of a request through them.

    Args:
        urls: of the nodes, in the order given by the user.
        slots: requests a node serves at once.
        patience: how long a node may be silent.
        events: told of nodes that come and go.
    """

    def __init__(self, urls: Iterable[str], *, slots: int, patience: Patience, events: EventBus | None) -> None:
        self.nodes = {url: OllamaNode(url, slots, self._node_changed) for url in urls}
        self.patience = patience
        self.answer_tokens = ASSUMED_ANSWER_TOKENS
        self._last_prompts: dict[str, tuple[int, int]] = {}  # tokens and characters of each model's last chat
        self._events = events

    # --- a request's way ------------------------------------------------------------------------

    async def answer(self, journey: Journey) -> AsyncGenerator[Chunk, None]:
        """The chunks of a request's answer; the first of each node and the last have `_routing`.

        Errors are those of `OllamaPool.chat`.
        """
        while True:
            async with self._place(journey) as (node, offer):
                if offer.holding is Holding.ON_DISK:  # loading the model does not count against the request's time
                    journey.deadline.pause()
                try:
                    request, restarted = await self._next_request(node, journey)
                    is_first = True
                    async with aclosing(
                        exchange(node, journey.path, request, deadline=journey.deadline, patience=self.patience)
                    ) as chunks:
                        async for chunk in chunks:
                            journey.deadline.go_on()
                            is_last = journey.take(chunk)
                            if is_first:  # an answer that is cut short has no last chunk to say where it ran
                                chunk, is_first = {**chunk, ROUTING: journey.routing(node, chunk)}, False
                            if restarted:
                                chunk, restarted = {**chunk, RESTARTED: True}, False
                            if is_last:
                                self._learn(node, offer, journey, chunk)
                                chunk |= await self._remarks(node, journey, chunk)
                                chunk[ROUTING] = journey.routing(node, chunk)
                            yield chunk
                            if is_last:
                                return
                    error = ConnectionBrokenError(f"{node.url} ended its answer before it was done")
                    raise lost(node, error)
                except NodeLostError as why:
                    journey.deadline.go_on()
                    if why.lacks_model:
                        node.lacks(journey.name.key)
                    journey.leave(node, why)
                except OllamaResponseError as refused:
                    if not is_too_long(str(refused)):
                        raise
                    context_tokens = await self._context_tokens_of(node, journey)
                    raise overflow_error(
                        str(journey.name),
                        None,
                        context_tokens,
                        remedy='a larger num_ctx (options={"num_ctx": ...})',
                    ) from refused

    async def _remarks(self, node: OllamaNode, journey: Journey, final: Mapping[str, Any]) -> dict[str, Any]:
        """`_context_full` (tokens) if the answer ended because the context was, `_dropped` (words) if this Ollama
        seems to have left out a part of the prompt in silence."""
        remarks: dict[str, Any] = {}
        answer_tokens = final.get("eval_count") or 0
        was_cut = final.get("done_reason") == "length" and journey.body.get("shift") is False
        if was_cut and answer_tokens != journey.option("num_predict"):
            context_tokens = await self._context_tokens_of(node, journey)
            if (
                context_tokens is not None
                and (final.get("prompt_eval_count") or 0) + answer_tokens >= context_tokens
            ):
                remarks[CONTEXT_FULL] = context_tokens
        if words := unread_words(journey.body.get("messages") or (), final.get("prompt_eval_count")):
            remarks[DROPPED] = words
        return remarks

    def tokens_per_character(self, key: str, prompt_characters: int) -> float | None:
        """What the last chat with a model tells of a prompt of so many characters; None if there was none, or a
        much shorter one, most of which may have been what the template adds once."""
        tokens, seen_characters = self._last_prompts.get(key, (0, 0))
        is_telling = 0 < prompt_characters <= seen_characters * TELLING_FACTOR
        return tokens / seen_characters if is_telling else None

    async def context_tokens(self, key: str) -> int | None:
        """What the nodes that have a model loaded hold for one request of it, the least of them; None if none
        has it loaded, or none tells."""
        nodes = [one for one in self.nodes.values() if one.state is NodeState.READY]
        told = await asyncio.gather(*(self._context_tokens_at(node, key) for node in nodes))
        return min((tokens for tokens in told if tokens is not None), default=None)

    async def _context_tokens_of(self, node: OllamaNode, journey: Journey) -> int | None:
        # A model that was not to be kept loaded is not listed any more.
        return await self._context_tokens_at(node, journey.name.key) or journey.option("num_ctx")

    async def _context_tokens_at(self, node: OllamaNode, key: str) -> int | None:
        # Ollama loads what several names share once, and shows it under one of them: told by the digest.
        try:
            paths = ("/api/ps", "/api/tags")
            answers = [await node.client.get(path, timeout_s=LOOK_TIMEOUT_S) for path in paths]
        except TransportError:
            return None
        loaded, on_disk = (answer.get("models") or () for answer in answers)
        digests = {one.get("digest") for one in on_disk if _is_named(one, key)}
        told = (one.get("context_length") for one in loaded if one.get("digest") in digests)
        return next((int(tokens) for tokens in told if tokens), None)

    async def _next_request(self, node: OllamaNode, journey: Journey) -> tuple[dict[str, Any], bool]:
        """The body to send, and whether it starts an answer again of which a part was shown."""
        body = journey.body if journey.path == EMBED else {**journey.body, "stream": True}
        if not journey.so_far.tokens:
            return body, False
        if journey.failovers[-1]["continued"]:
            if journey.path == CHAT:
                return chat_continuation(body, journey.so_far), False
            prompt = await self._rendered_prompt(node, body, journey.deadline)
            if prompt is not None:
                return generate_continuation(body, prompt, journey.so_far), False
            journey.failovers[-1]["continued"] = False
        journey.so_far = AnswerSoFar()
        return body, True

    async def _rendered_prompt(self, node: OllamaNode, body: dict[str, Any], deadline: Deadline) -> str | None:
        """The prompt of a generate request as the model sees it; None from an Ollama too old to tell."""
        if body.get("raw"):
            return str(body["prompt"])
        # An Ollama that does not know the field answers the request: one token of that is enough.
        one_token = {**body.get("options", {}), "num_predict": 1}
        asked = {**body, "stream": False, "_debug_render_only": True, "options": one_token}
        answer = await self.post(node, GENERATE, asked, deadline)
        rendered = (answer.get("_debug_info") or {}).get("rendered_template")
        return rendered if isinstance(rendered, str) else None

    @asynccontextmanager
    async def _place(self, journey: Journey) -> AsyncIterator[tuple[OllamaNode, NodeOffer]]:
        """Hold a slot at the best node there is for a request."""
        arrived_s = time.monotonic()
        while True:
            choice, offers = await journey.deadline.bound(self.chosen(journey))
            gates = {self.nodes[o.url].gate: o for o in worth_waiting_for(choice, offers)}
            gate = await journey.deadline.bound(first_slot([*gates], journey.priority, arrived_s=journey.began_s))
            if gate is None:  # something has changed meanwhile
                continue
            offer = gates[gate]
            node = self.nodes[offer.url]
            if node.state is NodeState.READY:
                break
            gate.release()
        try:
            journey.queue_ms += (time.monotonic() - arrived_s) * 1e3
            yield node, offer
        finally:
            gate.release()

    async def chosen(self, journey: Journey) -> tuple[NodeOffer, Sequence[NodeOffer]]:
        """The node for a request, and what all offered. Errors are those of `OllamaPool.chat`."""
        while True:
            offers = await self.offers(journey.name.key, journey.left)
            choice = choose_node(offers)
            if choice is not None and choice.holding is not Holding.NOTHING:
                return choice, offers
            if not await self._is_back(journey):
                raise self._nothing_left(journey, bool(offers))

    async def _is_back(self, journey: Journey) -> bool:
        """Whether the node that was left last is there again: restarted, or an idle connection had been closed.
        It is given one more chance."""
        url, why = next(reversed(journey.left.items()), (None, None))
        if url is None or why is None or not why.broke_off or journey.has_gone_back:
            return False
        await self.nodes[url].look()
        if self.nodes[url].state is not NodeState.READY:
            return False
        journey.has_gone_back = True
        del journey.left[url]
        return True

    def _nothing_left(self, journey: Journey, some_answer: bool) -> SollolError:
        name = journey.name
        why = next(reversed(journey.left.values()), None)
        if why is not None and why.said and not why.lacks_model:
            return OllamaResponseError(why.said)
        if why is not None and not why.lacks_model:
            return OllamaUnavailableError(
                f"{why}; no other Ollama node has {name}: start it again with `ollama serve`"
            )
        if why is None and not some_answer:
            return self.unavailable()
        return ModelNotFoundError(f"no Ollama node has {name} (asked: {self.urls()}); run: ollama pull {name}")

    async def offers(self, key: str, skip: Container[str] = ()) -> Sequence[NodeOffer]:
        """What each node that can be used offers. Nodes never looked at are looked at now; so are all the others
        if none can be used, or none has the model."""
        nodes = [node for node in self.nodes.values() if node.url not in skip]
        await _look_at(node for node in nodes if node.state is NodeState.UNKNOWN)
        for node in nodes:
            if node.state is NodeState.READY and node.inventory_age_s > INVENTORY_FRESH_S:
                node.look_soon()
        if not any(node.state is NodeState.READY and node.holding(key) is not Holding.NOTHING for node in nodes):
            await _look_at(node for node in nodes if node.inventory_age_s > INVENTORY_RECENT_S)
        return [node.offer(key, self.answer_tokens) for node in nodes if node.state is NodeState.READY]

    def _learn(self, node: OllamaNode, offer: NodeOffer, journey: Journey, final: Mapping[str, Any]) -> None:
        had_to_load = offer.holding is Holding.ON_DISK
        node.served(journey.name.key, str(journey.name), final, had_to_load=had_to_load)
        if journey.body.get("keep_alive") == 0:
            node.unloaded(journey.name.key)
        prompt_tokens, asked = final.get("prompt_eval_count"), journey.body.get("messages")
        if prompt_tokens and asked and not any(message.get("images") for message in asked):
            self._last_prompts[journey.name.key] = prompt_tokens, characters(asked)
        if journey.so_far.tokens:
            self.answer_tokens += NEW_SAMPLE_WEIGHT * (journey.so_far.tokens - self.answer_tokens)

    async def post(
        self, node: OllamaNode, path: str, body: Mapping[str, Any], deadline: Deadline
    ) -> dict[str, Any]:
        """The answer to a request that is answered in one piece."""
        async with aclosing(exchange(node, path, body, deadline=deadline, patience=self.patience)) as answers:
            async for answer in answers:
                return dict(answer)
        raise NodeLostError(f"{node.url}{path} answered nothing")

    # --- nodes --------------------------------------------------------------------------------

    async def look(self) -> None:
        """Look at all nodes now."""
        await _look_at(self.nodes.values())

    def statuses(self) -> list[NodeStatus]:
        """Every node as seen now."""
        return [node.status(self.answer_tokens) for node in self.nodes.values()]

    async def entries(self, path: str) -> list[tuple[str, dict[str, Any]]]:
        """The models of `/api/tags` or `/api/ps` of every node that answers, with its URL."""
        await _look_at(node for node in self.nodes.values() if node.state is not NodeState.READY)
        entries = []
        for node in self.nodes.values():
            if node.state is NodeState.READY:
                try:
                    answer = await node.client.get(path, timeout_s=LOOK_TIMEOUT_S)
                except TransportError as error:
                    node.failed(error)
                else:
                    entries += [(node.url, entry) for entry in answer.get("models") or ()]
        if not any(node.state is NodeState.READY for node in self.nodes.values()):
            raise self.unavailable()
        return entries

    def _node_changed(self, node: OllamaNode, *, has_new_state: bool) -> None:
        # Whoever waits chose by what was known before.
        for other in self.nodes.values():
            other.gate.dismiss()
        if has_new_state and self._events is not None:
            words = f"Ollama at {node.url} is {node.state.value}"
            kind = EventKind(f"node.{node.state.value}")
            self._events.publish(kind, node.url, words, error=node.last_error)

    def unavailable(self) -> OllamaUnavailableError:
        tried = "; ".join(node.last_error or node.url for node in self.nodes.values())
        return OllamaUnavailableError(
            f"no Ollama node answers ({tried}); start one with `ollama serve`, or name others in OLLAMA_HOST"
        )

    def urls(self) -> str:
        return ", ".join(self.nodes)


def _is_named(entry: Mapping[str, Any], key: str) -> bool:
    with suppress(ModelNotFoundError):  # a name that is none
        return ModelName.parse(str(entry.get("name"))).key == key
    return False


async def _look_at(nodes: Iterable[OllamaNode]) -> None:
    await asyncio.gather(*(node.look() for node in nodes))
