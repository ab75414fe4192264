"""All Ollama nodes as one: chat, generate, embed and the rest, at the node that finishes first.

A request goes to the node that has the model and is expected to finish first (`choice.py`), waits at that node's gate
by priority, and streams back. If the node dies or goes silent (`exchange.py`), another that has the model continues
the answer: a chat with the answer so far as the assistant's last message, a generation as raw text. `_routing` of the
result reports it:

| key | is |
|---|---|
| `backend`, `node` | "ollama-pool", and the URL of the node that finished |
| `queue_ms` | time spent waiting at gates |
| `ttft_ms` | from the call to the first text |
| `total_ms`, `load_ms` | from the call to the end; loading the model, as Ollama reports |
| `failovers` | a dict for each node that failed: `what` happened, `when` (`time.time()`), `cost_ms` (from the last chunk of the old node to the first of the new), `continued` (False if no text had arrived yet, or the answer had to start again), `tokens_before` |

The pool runs on the process's I/O loop (`runtime/io_loop.py`), whichever loop calls it.
"""  # noqa: E501 - a table's row is one line

from __future__ import annotations

import builtins
from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, Self

from sollol_nb.chat.chunk import RESTARTED, ROUTING, Chunk
from sollol_nb.chat.context_window import DROP_OLDEST, ERROR, check_overflow, turn_starts
from sollol_nb.errors import ConfigError, OllamaResponseError, OllamaUnavailableError
from sollol_nb.models.names import ModelName
from sollol_nb.ollama.choice import Residency, choose_node
from sollol_nb.ollama.exchange import Deadline, NodeLostError, Patience, exchange
from sollol_nb.ollama.fitting import answer_dropping_turns
from sollol_nb.ollama.messages import ollama_messages
from sollol_nb.ollama.nodes import NodeStatus, node_url
from sollol_nb.ollama.pool_request import CHAT, EMBED, GENERATE, PoolRequest
from sollol_nb.ollama.requests import KEEPS_ALL, AnswerSoFar, request_body
from sollol_nb.ollama.serving import Serving
from sollol_nb.runtime.events import EventBus
from sollol_nb.runtime.http_client import one_line
from sollol_nb.runtime.io_loop import io_bound, io_bound_stream, is_of_parent
from sollol_nb.runtime.priority import Priority, checked_priority
from sollol_nb.runtime.progress_bars import progress_bar
from sollol_nb.settings import config
from sollol_nb.settings.endpoints import LOOPBACK

FIRST_TOKEN_TIMEOUT_S = 600.0  # loading hundreds of gigabytes from a slow disk takes minutes
SILENCE_TIMEOUT_S = 60.0
PROBE_AFTER_S = 5.0
UNLOAD_TIMEOUT_S = 30.0
STATUS_CHARS = 60  # of a pull; the longest has a digest


class OllamaPool:
    """Ollama nodes, used as one.

    Args:
        nodes: each as `host`, `host:port`, a URL, or `{"host": ..., "port": ...}`; None takes `OLLAMA_HOST`, else
            localhost:11434. A node where no Ollama runs is not an error: `nodes` lists it as absent, and it is
            used once it runs.
        num_parallel: requests a node serves at the same time; None takes `OLLAMA_NUM_PARALLEL`, else 1.
        first_token_timeout_s: the longest silence before the first chunk, while the model loads.
        silence_timeout_s: the longest silence between two chunks.
        probe_after_s: after this silence the node is asked whether it runs, and has the same time to answer.
        events: where changes of a node's state are published (`node.ready`, `node.absent`, `node.cooling`).

    Raises:
        ConfigError: a node is not an address.
    """

    def __init__(
        self,
        nodes: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] | None = None,
        *,
        num_parallel: int | None = None,
        first_token_timeout_s: float = FIRST_TOKEN_TIMEOUT_S,
        silence_timeout_s: float = SILENCE_TIMEOUT_S,
        probe_after_s: float = PROBE_AFTER_S,
        events: EventBus | None = None,
    ) -> None:
        if isinstance(nodes, str):
            nodes = [node for node in nodes.split(",") if node.strip()]
        elif isinstance(nodes, Mapping):
            nodes = [nodes]
        named = nodes or config.default("ollama_hosts")
        urls = [node_url(node) for node in named or [LOOPBACK]]
        self._serving = Serving(
            dict.fromkeys(urls),
            slots=max(1, config.default("ollama_num_parallel")) if num_parallel is None else num_parallel,
            patience=Patience(first_token_timeout_s, silence_timeout_s, probe_after_s),
            events=events,
            are_named=bool(named),
        )

    @classmethod
    def auto_configure(
        cls, nodes: str | Mapping[str, Any] | Sequence[str | Mapping[str, Any]] | None = None, **settings: Any
    ) -> Self:
        """A pool of the given nodes, else of those in `OLLAMA_HOST`, else of localhost. Contacts no node yet;
        `await` the pool to ask its nodes now. `settings` are those of the class."""
        return cls(nodes, **settings)

    def __await__(self) -> Generator[Any, None, Self]:
        return self.__aenter__().__await__()

    @io_bound
    async def __aenter__(self) -> Self:
        await self._serving.refresh()
        return self

    @io_bound
    async def refresh(self) -> builtins.list[NodeStatus]:
        """Ask all nodes now, for 3 s at most; returns their states."""
        await self._serving.refresh()
        return self.nodes

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"OllamaPool({', '.join(f'{node.url}: {node.state}' for node in self.nodes)})"

    @property
    def nodes(self) -> builtins.list[NodeStatus]:
        """The state of every node now, in the order given."""
        return self._serving.statuses()

    def describe_state(self) -> str:
        """Why no node can answer, as known now: none runs, none can be used (with addresses and reasons), or none
        has the model."""
        return self._serving.description()

    # --- answers ------------------------------------------------------------------------------

    @io_bound
    async def chat(
        self,
        /,
        model: str,
        messages: Sequence[Mapping[str, Any]],
        *,
        priority: int = Priority.NORMAL,
        timeout: float | None = None,
        overflow: str = ERROR,
        **options: Any,
    ) -> dict[str, Any]:
        """One answer of `/api/chat`, as Ollama gives it without streaming, and `_routing` (see the module).

        Args:
            model: a name as `ollama list` shows it; a missing tag is `latest`.
            messages: as Ollama takes them (`role`, `content`, perhaps `images` in base64 and `tool_calls`), or in
                OpenAI's shapes (`content` as parts, `arguments` of a tool call as JSON text).
            priority: 1 (BATCH) to 10 (CRITICAL).
            timeout: seconds for everything, including loading the model; None means no limit.
            overflow: what happens to messages that do not fit the context: `error`, or `drop_oldest`, which drops
                the oldest turns (see `chat/context_window.py`) and reports them as `_dropped`.
            options: `max_tokens`, any of Ollama's options (`temperature`, `seed`, ...), and anything else that
                `/api/chat` takes (`tools`, `format`, `think`, `keep_alive`, `options`, ...).

        Raises:
            OllamaUnavailableError: no node runs, or all that have the model failed.
            ModelNotFoundError: no node has the model.
            ConfigError: a message has a part that Ollama does not take.
            ContextOverflowError: the messages do not fit the context.
            OllamaResponseError: Ollama refused; the message is its own.
            RequestTimeoutError: not finished within `timeout` seconds.
        """
        chunks = self.stream_chat(
            model, messages, priority=priority, timeout=timeout, overflow=overflow, **options
        )
        return await _merged(chunks)

    @io_bound_stream
    def stream_chat(
        self,
        /,
        model: str,
        messages: Sequence[Mapping[str, Any]],
        *,
        priority: int = Priority.NORMAL,
        timeout: float | None = None,
        overflow: str = ERROR,
        **options: Any,
    ) -> AsyncGenerator[Chunk, None]:
        """The chunks of `/api/chat` as Ollama sends them; the last has `done` and `_routing`. The first
        of each node has `_routing` as far as it is known by then.

        If an answer in a `format` has to start again at another node, the first chunk of the new answer has
        `_restarted`: discard all chunks before it. Where the answer ended because the context was full, the last
        chunk has `_context_full`: its size in tokens. Arguments and errors are those of `chat`.
        """
        messages = ollama_messages(messages)
        body = request_body(model, messages=messages, **{**KEEPS_ALL, **_without_stream(options)})
        request = _pool_request(CHAT, body, priority, timeout)
        may_drop = check_overflow(overflow) == DROP_OLDEST and len(turn_starts(messages)) > 1
        return answer_dropping_turns(self._serving, request) if may_drop else self._serving.answer(request)

    @io_bound
    async def generate(
        self,
        /,
        model: str,
        prompt: str,
        *,
        priority: int = Priority.NORMAL,
        timeout: float | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """One answer of `/api/generate` and `_routing`. Options (also `suffix`, `system`, `raw`, `images`, ...)
        are passed on; errors are those of `chat`."""
        return await _merged(self.stream_generate(model, prompt, priority=priority, timeout=timeout, **options))

    @io_bound_stream
    def stream_generate(
        self,
        /,
        model: str,
        prompt: str,
        *,
        priority: int = Priority.NORMAL,
        timeout: float | None = None,
        **options: Any,
    ) -> AsyncGenerator[Chunk, None]:
        """The chunks of `/api/generate` as Ollama sends them, with `done` and `_routing` as in `stream_chat`."""
        body = request_body(model, prompt=prompt, **{**KEEPS_ALL, **_without_stream(options)})
        return self._serving.answer(_pool_request(GENERATE, body, priority, timeout))

    @io_bound
    async def embed(
        self,
        /,
        model: str,
        input: str | Sequence[str],
        *,
        priority: int = Priority.NORMAL,
        timeout: float | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """The answer of `/api/embed` and `_routing`: `embeddings` has one vector, or one for each text of a
        batch, in its order. Errors are those of `chat`."""
        texts = input if isinstance(input, str) else [*input]
        body = request_body(model, input=texts, **_without_stream(options))
        answer = await _merged(self._serving.answer(_pool_request(EMBED, body, priority, timeout)))
        if "embeddings" not in answer:
            raise OllamaResponseError(f"Ollama at {answer[ROUTING]['node']} sent an answer without embeddings")
        return answer

    # --- models -------------------------------------------------------------------------------

    @io_bound
    async def has_model(self, model: str) -> bool:
        """Whether a running node has the model."""
        offers = await self._serving.offers(ModelName.parse(model).key)
        return any(offer.residency is not Residency.MISSING for offer in offers)

    @io_bound
    async def list(self) -> dict[str, Any]:
        """Models on disk, as `/api/tags` gives them, each once, with `nodes`: the URLs that have it.

        Raises:
            OllamaUnavailableError: no node runs.
        """
        models: dict[tuple[Any, Any], dict[str, Any]] = {}
        for url, entry in await self._serving.entries("/api/tags"):
            known = models.setdefault((entry.get("name"), entry.get("digest")), {**entry, "nodes": []})
            known["nodes"].append(url)
        return {"models": [*models.values()]}

    @io_bound
    async def ps(self) -> dict[str, Any]:
        """Models loaded, as `/api/ps` gives them, each with `node`: the URL that has it loaded.

        Raises:
            OllamaUnavailableError: no node runs.
        """
        return {"models": [{**entry, "node": url} for url, entry in await self._serving.entries("/api/ps")]}

    @io_bound
    async def show(self, /, model: str, **options: Any) -> dict[str, Any]:
        """The answer of `/api/show` for a model, from a node that has it. Errors are those of `chat`."""
        request = _pool_request("/api/show", request_body(model, **options), Priority.NORMAL, None)
        while True:
            offer, _ = await self._serving.choose(request)
            try:
                return await self._serving.post(
                    self._serving.nodes[offer.url], request.path, request.body, request.deadline
                )
            except NodeLostError as error:
                request.failed[offer.url] = error

    @io_bound
    async def unload(self, /, model: str) -> None:
        """Have a model unloaded by every node that has it loaded, also if one of them fails. Errors are those of
        `chat`."""
        key, failed = ModelName.parse(model).key, list[NodeLostError]()
        for node in await self._serving.nodes_with_loaded(key):
            body = request_body(model, prompt="", keep_alive=0, stream=False)
            try:
                await self._serving.post(node, GENERATE, body, Deadline(UNLOAD_TIMEOUT_S, model))
            except NodeLostError as error:
                failed.append(error)
            else:
                node.record_unload(key)
        if failed:
            raise OllamaUnavailableError(f"{model} may still be loaded: {failed[0]}") from failed[0]

    @io_bound
    async def versions(self) -> dict[str, str]:
        """The version of Ollama that each node which can be used runs, by URL."""
        return await self._serving.versions()

    @io_bound_stream
    async def pull(
        self, /, model: str, *, node: str | None = None, **options: Any
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Pull a model onto a node; yields Ollama's progress (`status`, `digest`, `total`, `completed`: bytes).

        Args:
            node: which one; None takes one that has the model (an update), else the least busy one.

        Raises:
            OllamaUnavailableError: no node runs, or the node stopped.
            OllamaResponseError: Ollama failed; the message is its own.
        """
        key = ModelName.parse(model).key
        if node is not None and node_url(node) not in self._serving.nodes:
            raise ConfigError(f"{node} is not a node of this pool; its nodes are {', '.join(self._serving.nodes)}")
        offers = await self._serving.offers(key)
        if node is not None:
            offers = [offer for offer in offers if offer.url == node_url(node)]
        chosen = choose_node(offers)
        if chosen is None:
            raise self._serving.unavailable()
        target = self._serving.nodes[chosen.url]
        # A checksum over a large file takes minutes of silence: only the server itself has to answer.
        patience = Patience(None, None, self._serving.patience.probe_after_s)
        body, deadline = request_body(model, stream=True, **options), Deadline(None, model)
        try:
            async with aclosing(
                exchange(target, "/api/pull", body, deadline=deadline, patience=patience)
            ) as progress:
                async for step in progress:
                    yield step
        except NodeLostError as error:
            raise (OllamaResponseError if error.reason else OllamaUnavailableError)(str(error)) from error
        await target.refresh()

    async def pull_with_bar(self, /, model: str, *, node: str | None = None, **options: Any) -> None:
        """`pull`, showing a progress bar. Errors are those of `pull`."""
        with PullBar(model) as bar:
            async with aclosing(self.pull(model, node=node, **options)) as progress:
                async for step in progress:
                    bar.show(step)

    async def close(self) -> None:
        """Close all connections and stop asking nodes. Closing twice is fine; a later request connects again. In a
        forked child, whose parent owns the connections, it does nothing."""
        if not is_of_parent(self):
            await self._close()

    @io_bound
    async def _close(self) -> None:
        for node in self._serving.nodes.values():
            await node.aclose()


def _pool_request(path: str, body: dict[str, Any], priority: int, timeout: float | None) -> PoolRequest:
    name = ModelName.parse(str(body["model"]))
    return PoolRequest(
        path=path,
        body=body,
        priority=checked_priority(priority),
        deadline=Deadline(timeout, str(name)),
        name=name,
    )


class PullBar:
    """A progress bar over the steps of a pull, for terminals and notebooks."""

    def __init__(self, model: str) -> None:
        self._bar = progress_bar(desc=f"pulling {model}", unit="B", unit_scale=True, unit_divisor=1024)
        self._layers: dict[str, tuple[int, int]] = {}  # done and total bytes, by digest

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def show(self, step: Mapping[str, Any]) -> None:
        """Show one step that `pull` yields."""
        if "digest" in step and "total" in step:
            self._layers[step["digest"]] = (step.get("completed", 0), step["total"])
        self._bar.set_postfix_str(one_line(step.get("status", ""), STATUS_CHARS), refresh=False)
        self._bar.n, self._bar.total = (sum(column) for column in zip((0, 0), *self._layers.values(), strict=True))
        self._bar.refresh()


async def _merged(chunks: AsyncGenerator[Chunk, None]) -> dict[str, Any]:
    """All chunks merged into one answer."""
    answer = AnswerSoFar()
    async with aclosing(chunks):
        async for chunk in chunks:
            if chunk.get(RESTARTED):
                answer = AnswerSoFar()
            answer.add(chunk)
    merged = answer.merged()
    merged.pop(RESTARTED, None)
    return merged


def _without_stream(options: dict[str, Any]) -> dict[str, Any]:
    if options.get("stream") is not None:
        raise ConfigError("stream is not an option here; call stream_chat or stream_generate")
    return options
