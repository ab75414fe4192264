"""What a router is asked: chats, continuations of a text, and the rest of interrupted answers."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from sollol_nb.chat.chunk import Chunk
from sollol_nb.chat.completion import Completion, checked_against_schema
from sollol_nb.chat.journaling import JournalEntry
from sollol_nb.chat.options import ChatOptions
from sollol_nb.chat.request import ChatRequest
from sollol_nb.chat.tool_choice import resumed_call
from sollol_nb.errors import AnswerInterruptedError, ConfigError
from sollol_nb.llama_cpp.answers.base import Answer
from sollol_nb.router.own_engines import OwnEngines
from sollol_nb.router.remote.engines import GatewayEngines
from sollol_nb.router.resumption import bare_request, continued, entry_of
from sollol_nb.router.tool_loop import answered_with_tools, calls_functions
from sollol_nb.runtime.io_loop import io_bound, io_bound_stream
from sollol_nb.runtime.priority import Priority
from sollol_nb.settings.models import model_text


class RouterRequests:
    """The methods of `Router` that ask a model. They need its engines and its time limit."""

    _engines: OwnEngines | GatewayEngines
    _timeout_s: float

    async def route_request(
        self,
        /,
        model: str | Path,
        messages: Sequence[Mapping[str, Any]] | str,
        *,
        schema: object = None,
        backend: str | None = None,
        priority: int = Priority.NORMAL,
        timeout: float | None = None,
        max_steps: int | None = None,
        confirm: bool | Callable[[str, Mapping[str, Any]], Any] | None = None,
        **options: Unpack[ChatOptions],
    ) -> Completion:
        """Ask a model, and wait for the whole answer.

        Args:
            model: a model's name, such as `llama3.1:70b` or `demo:sharded`, or the path of a GGUF file, as text or
                `Path`.
            messages: `[{"role": "user", "content": "Hello!"}]`, or one user message as a string.
            schema: what the answer must match: a pydantic model class, a dataclass, another type such as
                `list[str]`, a JSON schema as a dict, or a DataFrame as an example (see `schema/schema.py`). The
                engine is held to it, and the answer is checked; `.value` has the answer as that type.
            backend: where it must run, whatever the model's size: `ollama`, `sharded` or `local` (or in full, as
                in `_routing`); None and `auto` leave that to the router.
            priority: 1 to 10; of requests that wait for the same backend, higher ones go first.
            timeout: limit in seconds, from when the coordinator is ready; at Ollama, loading counts. With
                functions as tools, of each request to the model.
            max_steps: with functions as tools: how many answers of the model may call them; after that it has to
                answer without. Default: 10.
            confirm: with functions as tools: whether the user is asked before each call, in the terminal or below
                the cell; or a function of the name and the arguments that returns whether the call may be made.
                Default: the setting `confirm_tools`.
            **options: `max_tokens`, `temperature`, `top_p`, `top_k`, `min_p`, `seed`, `stop`, `format`
                (`"json"` or a JSON schema), `tools` (dicts as Ollama takes them, or Python functions, see below),
                `tool_choice`, `options` (Ollama's own dict), `overflow`
                (`"error"`, or `"drop_oldest"`: leaves out the oldest turns that do not fit, and says so as
                `_dropped`), ... (see `chat/options.py`)

        Python functions as `tools` are called here when the model asks for it. The model gets their results, and
        may call more, until it answers. Type hints and docstrings describe them to the model. A call whose
        arguments do not match, or that fails, goes back to the model as an error. A blocking call runs them in its
        own thread, so that an interrupt ends them too; `await` runs them in threads, and coroutines in its own
        event loop. `tool_choice` is for the first answer. Only the functions given here are ever called.

        Returns:
            The answer in Ollama's shape, with `_routing`; `.steps` has the calls of functions.

        Raises:
            StructureError: the answer does not match the schema; the error has it as `.completion`.
            ContextOverflowError: the messages do not fit the model's context.
            SollolError: of the kind that fits; see `errors.py`.
        """
        chunks = self.stream(
            model,
            messages,
            schema=schema,
            backend=backend,
            priority=priority,
            timeout=timeout,
            max_steps=max_steps,
            confirm=confirm,
            **options,
        )
        is_local = calls_functions(
            options.get("tools"), max_steps, confirm
        )  # then the loop of the caller is needed
        return checked_against_schema(await (_joined_here if is_local else _joined)(chunks), schema)

    def stream(
        self,
        /,
        model: str | Path,
        messages: Sequence[Mapping[str, Any]] | str,
        *,
        schema: object = None,
        backend: str | None = None,
        priority: int = Priority.NORMAL,
        timeout: float | None = None,
        max_steps: int | None = None,
        confirm: bool | Callable[[str, Mapping[str, Any]], Any] | None = None,
        **options: Unpack[ChatOptions],
    ) -> AsyncGenerator[Chunk, None]:
        """Ask a model; yields Ollama-shaped chunks as they arrive, the last with `done` and `_routing`.

        Arguments and errors are those of `route_request`, but only the engine is held to the schema: the text is
        not checked here. Leaving the loop early (closing the generator) cancels the generation on the engine.
        Where functions are called, chunks with `_calling` and `_step` say which and what they gave
        (`chat/chunk.py`).
        """
        ask = partial(self._answer, model, schema=schema, backend=backend, priority=priority, timeout=timeout)
        if calls_functions(options.get("tools"), max_steps, confirm):
            return answered_with_tools(ask, messages, options, max_steps=max_steps, confirm=confirm)
        return ask(messages, **options)

    @io_bound_stream
    def _answer(
        self,
        /,
        model: str | Path,
        messages: Sequence[Mapping[str, Any]] | str,
        *,
        schema: object,
        backend: str | None,
        priority: int,
        timeout: float | None,
        **options: Any,
    ) -> AsyncGenerator[Chunk, None]:
        """One answer of the model, as chunks."""
        check = partial(
            ChatRequest.checked,
            messages,
            schema=schema,
            backend=backend,
            priority=priority,
            timeout_s=self._timeout_s if timeout is None else timeout,
            options=options,
        )
        return self._engines.chunks(model_text(model), check, router=self)

    async def generate(
        self,
        /,
        model: str | Path,
        prompt: str,
        *,
        suffix: str | None = None,
        images: Sequence[str] | None = None,
        backend: str | None = None,
        priority: int = Priority.NORMAL,
        timeout: float | None = None,
        **options: Unpack[ChatOptions],
    ) -> Completion:
        """Continue a text without a chat template, and wait for the whole continuation.

        It survives the death of machines as other answers do.

        Args:
            prompt: as the model reads it; special tokens may be written as text. It is not part of the answer.
            suffix: what follows the answer, which fills the gap; only models in Ollama whose template knows it.
            images: in base64, where the prompt says `[img-0]`, `[img-1]`, ...; only models in Ollama.
            model, backend, priority, timeout, **options: as for `route_request`, but for `tools`, `tool_choice`,
                `parallel_tool_calls` and `think`.

        Returns:
            The answer in the shape of a chat's, with `_routing`. Errors are those of `route_request`.
        """
        chunks = self.stream_generate(
            model,
            prompt,
            suffix=suffix,
            images=images,
            backend=backend,
            priority=priority,
            timeout=timeout,
            **options,
        )
        return await _joined(chunks)

    @io_bound_stream
    def stream_generate(
        self,
        /,
        model: str | Path,
        prompt: str,
        *,
        suffix: str | None = None,
        images: Sequence[str] | None = None,
        backend: str | None = None,
        priority: int = Priority.NORMAL,
        timeout: float | None = None,
        **options: Unpack[ChatOptions],
    ) -> AsyncGenerator[Chunk, None]:
        """As `generate`; yields chunks in the shape of a chat's, as `stream` does."""
        check = partial(
            ChatRequest.of_prompt,
            prompt,
            suffix=suffix,
            images=images,
            backend=backend,
            priority=priority,
            timeout_s=self._timeout_s if timeout is None else timeout,
            options=options,
        )
        return self._engines.chunks(model_text(model), check, router=self)

    async def resume(
        self,
        interrupted: AnswerInterruptedError | str,
        *,
        priority: int = Priority.NORMAL,
        timeout: float | None = None,
    ) -> Completion:
        """Continue an answer that was interrupted, because no coordinator could take over or its process ended.

        Args:
            interrupted: the error that was raised then; or the id of an answer in the journal (`answer_id` in its
                `_routing`), which may be that of a process that has ended.

        With functions as tools, it is the model's present answer that continues; its calls are returned, not made.

        Returns:
            The whole answer, with the text from before the interruption; checked if a schema was given.

        Raises:
            ConfigError: there is nothing to continue, or another process continues it.
            StructureError: as for `route_request`.
            SollolError: as for `route_request`.
        """
        if isinstance(interrupted, str):
            return await _joined(self.resumed(interrupted, priority=priority, timeout=timeout))
        if not isinstance(interrupted, AnswerInterruptedError) or interrupted.state is None:
            raise ConfigError("resume() takes an AnswerInterruptedError of an answer that had begun; ask again")
        answer = Answer.from_state(interrupted.state)
        whole = await self._continued(interrupted, interrupted.state, answer, priority=priority, timeout=timeout)
        return checked_against_schema(resumed_call(whole, answer.options), interrupted.schema)

    @io_bound  # from the claim in the journal to the request, so that whoever is interrupted in between ends both
    async def _continued(
        self,
        interrupted: AnswerInterruptedError,
        state: Mapping[str, Any],
        answer: Answer,
        *,
        priority: int,
        timeout: float | None,
    ) -> Completion:
        """The whole of an interrupted answer, as it is before its calls and its schema are looked at."""
        before: Chunk = {"message": {"role": "assistant", "content": answer.text, "thinking": answer.thinking}}
        before["logprobs"] = answer.logprobs
        chunks = self.resumed(
            state,
            backend=interrupted.backend,
            schema=interrupted.schema,
            priority=priority,
            timeout=timeout,
            entry=await entry_of(interrupted, answer),
        )
        return await _joined(chunks, before)

    @io_bound_stream
    def resumed(
        self,
        state: Mapping[str, Any] | str,
        *,
        backend: str | None = None,
        schema: object = None,
        priority: int = Priority.NORMAL,
        timeout: float | None = None,
        entry: JournalEntry | None = None,
    ) -> AsyncGenerator[Chunk, None]:
        """The rest of an interrupted answer, as chunks; `resume` gives the whole.

        Args:
            state: of the `AnswerInterruptedError`; or the id of an answer in the journal: then the first chunk has
                what was received of it.
            backend, schema, priority, timeout: as for `route_request`; an answer of the journal has its backend.
            entry: of the journal, where the answer goes on.

        Raises:
            ConfigError: this is not the state of an answer, or there is none of this id to continue.
            SollolError: as for `stream`.
        """
        timeout_s = self._timeout_s if timeout is None else timeout
        if isinstance(state, str):
            may_repeat = isinstance(self._engines, GatewayEngines)
            return continued(
                self._engines,
                state,
                router=self,
                may_repeat=may_repeat,
                priority=priority,
                timeout_s=timeout_s,
            )
        answer = Answer.from_state(state)
        check = partial(bare_request, backend, schema, priority, timeout_s)
        return self._engines.chunks(answer.model, check, router=self, interrupted=answer, entry=entry)


async def _joined_here(chunks: AsyncGenerator[Chunk, None], *before: Chunk) -> Completion:
    """The whole answer of a stream, after the chunks from before it."""
    async with aclosing(chunks):
        return Completion.from_chunks([*before, *[chunk async for chunk in chunks]])


_joined = io_bound(_joined_here)
"""So that only the whole answer changes the thread, not each of its chunks."""
