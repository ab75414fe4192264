"""A chunk of a streamed answer: Ollama's keys, and the marks that this package adds, which begin with `_`.

`Completion.from_chunks` and the views read them.
"""

from __future__ import annotations

from typing import Any, Final, NotRequired, TypedDict

ROUTING: Final = "_routing"
"""Where the request went, why, and what it took: a `Routing`. On the first chunk of each server and the last."""
DROPPED: Final = "_dropped"
"""Which messages were left out to fit the context, as one line. On the first chunk and the last."""
RESTARTED: Final = "_restarted"
"""True where the answer begins again on another server: the text received before it is void."""
NOTE: Final = "_note"
"""What to know about the text, as one line, such as that it could not be parsed. On the last chunk."""
CONTEXT_FULL: Final = "_context_full"
"""Size in tokens of the context that was full before the answer ended. On the last chunk."""

STOPPED_BY: Final = "_stopped_by"
"""Which of the texts of `stop` ended the answer. On the last chunk, where the engine says it."""

DRAFTS: Final = "_drafts"
"""What drafts brought, a `Drafts`. On the last chunk of llama.cpp's answers."""

CACHED: Final = "_cached"
"""Which tokens of the prompt were not processed, a `Cached`. On the first and last chunk from llama.cpp."""

CALLING: Final = "_calling"
"""A call of a Python function that begins now, a `Step` without its result. A chunk with it has no text."""
STEP: Final = "_step"
"""A call of a Python function that has ended, a `Step`. A chunk with it has no text; the text received before it
belongs to the step, not to the answer."""
STEPS: Final = "_steps"
"""Of a completion, not of a chunk: all calls of Python functions before the answer, each a `Step`."""


class Step(TypedDict):
    """A call of a Python function that was given as a tool.

    Keys:
        round: which answer of the model has the call, counted from 1.
        id: of the call.
        call: the name of the function, as the model wrote it.
        arguments: as the model wrote them; a text where they are not JSON.
        result: what the model was given as the result; "" if the call failed.
        error: why it failed, as the model reads it; else "".
        seconds: how long the function took; 0 if it was not called.
        note: what else to know, such as that the result was cut; usually "".
        text, thinking: what the model wrote in the same answer, with its first call.
    """

    round: int
    id: str
    call: str
    arguments: Any
    result: str
    error: str
    seconds: float
    note: str
    text: str
    thinking: str


class Cached(TypedDict):
    """Where the tokens of a prompt came from; keys are those of `Routing`."""

    cached_tokens: int | None
    restored_tokens: int | None
    context_note: str


class Drafts(TypedDict):
    """Tokens of an answer that were drafted, and those that were not.

    Keys:
        drafted, accepted: tokens.
        single_tokens, single_ms: tokens that were computed alone, and the milliseconds that they took together.
    """

    drafted: int
    accepted: int
    single_tokens: int
    single_ms: float


class Failover(TypedDict):
    """A request that moved to another server, because its server was lost or given up.

    Keys:
        what: what happened, as one line.
        when: `time.time()`.
        cost_ms: from the last sign of the old server to the first of the new one; None until then.
        continued: whether the next server continued the answer, instead of beginning it again.
        tokens_before: tokens of the answer that had been received by then.
        lost_workers: the workers that a coordinator lost: their endpoints, or the names of those on other machines
            that are reached through links; not with Ollama nodes.
        recovery: how a coordinator continued: `exact` if it has generated all tokens again and they were the same
            (so the rest is what it would have been), else `fast`; not with Ollama nodes.
    """

    what: str
    when: float
    cost_ms: float | None
    continued: bool
    tokens_before: int
    lost_workers: NotRequired[list[str]]
    recovery: NotRequired[str]


class Routing(TypedDict, total=False):
    """What `_routing` has. The Ollama pool by itself gives only the keys listed in `ollama/pool.py`.

    Keys:
        backend: `ollama-pool`, `llama.cpp-distributed` or `llama.cpp-local`.
        reason: why it went there.
        model_path: the file that the model's name stands for; "" for models of Ollama and the built-in one.
        note: what else to know about the answer, as one line; usually "".
        loaded_by: who had loaded the model before this router began to use its coordinator; usually "".
        duration_ms: from the request to the last token.
        coordinator_url, node_url: the llama-server or the Ollama node; the other is None.
        plan: the layer plan as plain data; None where nothing is sharded.
        placement_differences: where llama.cpp put layers elsewhere than planned.
        layout: layers per worker, in order, such as `5/4/4`.
        queue_ms, load_ms, ttft_ms, tokens_per_s, router_overhead_ms, failovers: as in the latency log.
        drafted_tokens, accepted_tokens: as in the latency log; None where the engine drafts none.
        dropped: which messages were left out to fit the context.
        cached_tokens: prompt tokens that were taken from the engine's slot, not processed; None where unknown.
        restored_tokens: those of `cached_tokens` that a saved context had brought there; None where unknown.
        context_note: why a saved context of the prompt was not used, as one line; usually "".
        answer_id: of the answer in the journal; "" where it is not journaled.
        gateway: the URL of the gateway over which the answer came, if one did.
        node, total_ms: of the Ollama pool: the node that finished, and from the call to the end.
    """

    backend: str
    reason: str
    model_path: str
    note: str
    duration_ms: float
    coordinator_url: str | None
    node_url: str | None
    plan: dict[str, Any] | None
    placement_differences: list[str]
    layout: str
    queue_ms: float | None
    load_ms: float | None
    loaded_by: str
    ttft_ms: float | None
    tokens_per_s: float | None
    router_overhead_ms: float | None
    failovers: list[Failover]
    drafted_tokens: int | None
    accepted_tokens: int | None
    dropped: str
    answer_id: str
    cached_tokens: int | None
    restored_tokens: int | None
    context_note: str
    gateway: str
    node: str
    total_ms: float


class ChunkMessage(TypedDict, total=False):
    """The piece of the assistant's message that a chunk brings.

    Keys:
        tool_calls: whole calls, each `{"id": ..., "function": {"name": ..., "arguments": {...}}}`; from llama.cpp
            all come with the last chunk. Old versions of Ollama give no `id`. Arguments that are no JSON are text.
    """

    role: str
    content: str
    thinking: str
    tool_calls: list[dict[str, Any]]


class TokenLogprob(TypedDict):
    """How likely the model found a token, as in Ollama's `/api/chat`.

    Keys:
        token: its text. From llama.cpp it is "" where the next token has the text of both.
        logprob: the natural logarithm of its probability, before any sampling option.
        bytes: the token's UTF-8 bytes; not with every Ollama.
        top_logprobs: the likeliest tokens at this place, likeliest first; only with the option `top_logprobs`.
    """

    token: str
    logprob: float
    bytes: NotRequired[list[int]]
    top_logprobs: NotRequired[list[TokenLogprob]]


class Chunk(TypedDict, total=False):
    """One chunk of a chat's answer, in the shape of Ollama's `/api/chat`. The last has `done` and the counts.

    Durations are in nanoseconds. `logprobs` has an entry for each token that the model wrote, thoughts included,
    also in chunks without text. The entries of a whole answer spell its text, unless thoughts or markup were taken
    out. llama-server's chat parser (images, some kinds of thoughts) gives none for markup that it takes out.
    """

    model: str
    created_at: str
    message: ChunkMessage
    done: bool
    done_reason: str
    total_duration: int
    load_duration: int
    prompt_eval_count: int | None
    prompt_eval_duration: int
    eval_count: int | None
    eval_duration: int
    logprobs: list[TokenLogprob]
    _routing: Routing
    _dropped: str
    _restarted: bool
    _context_full: int
    _note: str
    _stopped_by: str
    _drafts: Drafts
    _cached: Cached
    _calling: Step
    _step: Step
