"""The options of a request by name, so that editors complete them and type checkers check them.

`option_checks.check_options` checks the same names at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict


class ChatOptions(TypedDict, total=False):
    """Options of one request; None means "not given".

    Keys:
        max_tokens, num_predict: most tokens of the answer; the second is Ollama's name for it.
        temperature, top_p, top_k, min_p, typical_p, seed, stop, repeat_penalty, repeat_last_n, presence_penalty,
            frequency_penalty: sampling, as in Ollama's `docs/modelfile.md`.
        options: Ollama's own dict of these.
        format: `"json"`, or a JSON schema.
        tools: functions that the model may call: dicts as in Ollama's `docs/api.md`, whose calls are returned; or
            Python functions, which `route_request` and `stream` call.
        tool_choice: whether it may call them (`"auto"`), must not (`"none"`) or must (`"required"`); or which one
            it must call, as `{"type": "function", "function": {"name": ...}}`.
        parallel_tool_calls: False: it calls one function at most.
        logprobs: whether each token comes with its log probability (`chat/chunk.py`); on llama.cpp not with tools.
        top_logprobs: how many of the likeliest tokens come with each, 0 to 20.
        logit_bias: for tokens by their ids (as text) a number from -100 to 100 that is added to their logits; only
            on llama.cpp.
        keep_alive: how long the model stays loaded after a request: seconds, `"10m"`, 0 or `"forever"`.
        think: whether (and for some models how much) the model thinks first.
        overflow: what happens if the messages do not fit the context: `"error"`, or `"drop_oldest"`, which drops
            the oldest turns.
        recovery: how an answer of llama.cpp continues when its coordinator is lost: `"fast"`, at once from the
            known tokens, after which the text may differ from an undisturbed answer; or `"exact"`, which generates
            the known tokens again first.
        deterministic: whether llama.cpp gives the same answer each time (at temperature 0, or with a `seed`): the
            request runs alone, with all slots empty, and with exact recovery.
        speculation: whether llama.cpp drafts tokens. The engine fixes it when it starts, so `"off"` restarts a
            coordinator that drafts (its answers continue on the new one); `"auto"`, `"ngram"` and `"draft"` count
            only if this request starts the coordinator. Requests that must be exact (`recovery="exact"`,
            `deterministic`) or have `logprobs` never run with drafts.
        journal: whether the answer is journaled; by default as the setting `journal` says.
        conversation: for the journal: the name of the conversation that the request belongs to.
    """

    max_tokens: int | None
    num_predict: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    typical_p: float | None
    seed: int | None
    stop: str | list[str] | tuple[str, ...] | None
    repeat_penalty: float | None
    repeat_last_n: int | None
    presence_penalty: float | None
    frequency_penalty: float | None
    options: dict[str, Any] | None
    format: str | dict[str, Any] | None
    tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None
    tool_choice: str | dict[str, Any] | None
    parallel_tool_calls: bool | None
    logprobs: bool | None
    top_logprobs: int | None
    logit_bias: dict[str, float] | None
    keep_alive: float | str | None
    think: bool | str | None
    overflow: Literal["error", "drop_oldest"] | None
    recovery: Literal["fast", "exact"] | None
    deterministic: bool | None
    speculation: Literal["auto", "off", "ngram", "draft"] | None
    journal: bool | None
    conversation: str | None
