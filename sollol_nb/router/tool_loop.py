"""Answers that call Python functions: ask, call what the model wants called, ask again with the results.

The loop runs where the request was made: in the loop of an async caller, else on the I/O loop. Each answer of the
model is a request like any other, with its latency row and its journal entry, and survives the loss of machines as
all of them do. Over a gateway too, the functions run here; the gateway sees only what describes them.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from sollol_nb.chat.chunk import CALLING, NOTE, ROUTING, STEP, STEPS, Chunk, Failover, Step
from sollol_nb.chat.completion import Completion
from sollol_nb.chat.confirming import Confirm, checked_confirm
from sollol_nb.chat.messages import check_messages
from sollol_nb.chat.tool_choice import new_call_id
from sollol_nb.chat.tool_steps import DECLINED, error_text, messages_of, result_text
from sollol_nb.chat.tools import CallRefused, Toolbox, has_functions
from sollol_nb.errors import AnswerInterruptedError, ConfigError
from sollol_nb.runtime.amounts import is_whole_number, shown
from sollol_nb.runtime.callers import called
from sollol_nb.runtime.io_loop import on_io_loop
from sollol_nb.settings import config
from sollol_nb.text.tables import counted, shortened

DEFAULT_MAX_STEPS = 10
MAX_CALLS = 32
"""Of one answer of the model; the others are refused."""

Ask = Callable[..., AsyncGenerator[Chunk, None]]


@dataclass(frozen=True, slots=True)
class ToolRules:
    """How functions are called for one answer.

    Attributes:
        toolbox: what may be called.
        max_steps: how many answers of the model may call functions.
        confirm: decides about each call; None allows all.
    """

    toolbox: Toolbox
    max_steps: int
    confirm: Confirm | None

    @classmethod
    def checked(cls, tools: Sequence[Any], max_steps: int | None, confirm: object) -> ToolRules:
        """The rules that these arguments of `Router.stream` give.

        Raises:
            ConfigError: one of them is invalid.
        """
        steps = DEFAULT_MAX_STEPS if max_steps is None else max_steps
        if not is_whole_number(steps) or steps < 1:
            raise ConfigError(f"max_steps={shown(max_steps)} must be a whole number of 1 or more")
        return cls(Toolbox(tools), steps, checked_confirm(confirm, bool(config.default("confirm_tools"))))


def calls_functions(tools: Any, max_steps: int | None, confirm: object) -> bool:
    """Whether a request with these arguments calls functions here.

    Raises:
        ConfigError: it does not, but says how.
    """
    if has_functions(tools):
        return True
    if callable(tools):
        name = getattr(tools, "__name__", "function")
        raise ConfigError(f"tools must be a list of functions; write tools=[{name}]")
    if max_steps is not None or confirm is not None:
        name = "max_steps" if max_steps is not None else "confirm"
        raise ConfigError(
            f"{name} needs Python functions as tools; give tools=[function, ...], or leave {name} out"
        )
    return False


async def answered_with_tools(
    ask: Ask,
    messages: Sequence[Mapping[str, Any]] | str,
    options: Mapping[str, Any],
    *,
    max_steps: int | None,
    confirm: object,
) -> AsyncGenerator[Chunk, None]:
    """The chunks of an answer whose model may call functions. Only the last has `done`.

    Before a call there is a chunk with `CALLING`, after it one with `STEP`.

    Args:
        ask: streams one answer of the model to messages, with options.
        messages: as for `Router.stream`.
        options: those of the request; `tools` has the functions.
        max_steps, confirm: as for `Router.route_request`.

    Raises:
        ConfigError: an argument is invalid; nothing was sent or loaded.
    """
    rules = ToolRules.checked(options["tools"], max_steps, confirm)
    asked, steps, failovers = check_messages(messages), list[Step](), list[Failover]()
    options = {**options, "tools": rules.toolbox.specs}
    number = 0
    while True:
        number += 1
        may_call = number <= rules.max_steps and options.get("tool_choice") != "none"
        if not may_call:
            options = {**options, "tool_choice": "none"}
        try:
            chunks: list[Chunk] = []
            async with aclosing(ask([*asked, *messages_of(steps)], **options)) as answer:
                async for chunk in answer:  # to its end: leaving earlier cancels the request
                    chunks.append(chunk)
                    if not chunk.get("done"):
                        yield _without_calls(chunk)
            whole = Completion.from_chunks(chunks)
        except AnswerInterruptedError as error:
            if error.partial is not None and steps:
                error.partial[STEPS] = steps
            raise
        calls = whole["message"].get("tool_calls") or [] if may_call else []
        failovers += whole.routing.get("failovers") or ()
        if not calls:
            yield _last(chunks[-1], failovers, None if number <= rules.max_steps else rules.max_steps)
            return
        yield {**_without_calls(chunks[-1]), "done": False}
        if options.get("tool_choice") != "auto":  # what must be called is called once
            options = {**options, "tool_choice": "auto"}
        for position, call in enumerate(calls):
            step = _begun(number, call, whole if position == 0 else None)
            model = whole.get("model")
            between: Chunk = {"message": {"role": "assistant", "content": ""}, "done": False}
            if model is not None:
                between["model"] = model
            yield {**between, CALLING: step}
            if position < MAX_CALLS:
                step = await _made(rules, step)
            else:
                step = {**step, "error": f"only {MAX_CALLS} calls at a time; call again"}
            steps.append(step)
            yield {**between, STEP: step}


def _without_calls(chunk: Chunk) -> Chunk:
    """A chunk of an answer that is not the last one: its calls come with the steps."""
    message = chunk.get("message")
    if message is None or "tool_calls" not in message:
        return chunk
    kept = message.copy()
    del kept["tool_calls"]
    return {**chunk, "message": kept}


def _last(chunk: Chunk, failovers: Sequence[Failover], reached: int | None) -> Chunk:
    """The last chunk of the whole answer, with the failovers of all its requests."""
    chunk = _without_calls(chunk)
    if ROUTING in chunk:
        chunk = {**chunk, ROUTING: {**chunk[ROUTING], "failovers": [*failovers]}}
    if reached is not None:
        note = f"answered without more calls after {counted(reached, 'step')} (max_steps)"
        chunk = {**chunk, NOTE: "; ".join(filter(None, [chunk.get(NOTE), note]))}
    return chunk


def _begun(number: int, call: Mapping[str, Any], whole: Completion | None) -> Step:
    """A step before its call is made."""
    function = call.get("function") or {}
    return {
        "round": number,
        "id": str(call.get("id") or new_call_id()),
        "call": str(function.get("name") or ""),
        "arguments": function.get("arguments", {}),
        "result": "",
        "error": "",
        "seconds": 0.0,
        "note": "",
        "text": whole.text if whole is not None else "",
        "thinking": whole.thinking if whole is not None else "",
    }


async def _made(rules: ToolRules, step: Step) -> Step:
    """The step with what its call gave, or why it failed."""
    try:
        function = rules.toolbox.bound(step["call"], step["arguments"])
    except CallRefused as refused:
        return {**step, "error": shortened(str(refused), 1000)}
    confirm = rules.confirm
    if confirm is not None and not await _called(lambda: confirm(step["call"], step["arguments"])):
        return {**step, "error": DECLINED}
    began = time.perf_counter()
    result, note, error = await _outcome(function)
    return {**step, "result": result, "note": note, "error": error, "seconds": time.perf_counter() - began}


async def _outcome(function: Callable[[], Any]) -> tuple[str, str, str]:
    """Result, note and error of a call. Results become text where the function runs, since that may take a
    while."""

    def call() -> Any:
        try:
            value = function()
            return awaited(value) if inspect.isawaitable(value) else (*result_text(value), "")
        except (Exception, SystemExit) as error:
            return "", "", error_text(error)

    async def awaited(value: Any) -> tuple[str, str, str]:
        try:
            return *result_text(await value), ""
        except (Exception, SystemExit) as error:
            return "", "", error_text(error)

    async def call_async() -> tuple[str, str, str]:
        return await awaited(function())

    try:
        outcome: tuple[str, str, str] = await _called(
            call_async if inspect.iscoroutinefunction(function) else call
        )
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        return "", "", "CancelledError: the function was cancelled"
    return outcome


async def _called(function: Callable[[], Any]) -> Any:
    return await called(function, on_io_loop=on_io_loop())
