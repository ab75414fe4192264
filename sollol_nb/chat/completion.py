"""The completion: an answer as an Ollama-shaped dict that also knows how to show itself in a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from sollol_nb.chat import completion_view
from sollol_nb.chat.chunk import CALLING, RESTARTED, ROUTING, STEP, STEPS, Chunk, Step, TokenLogprob
from sollol_nb.errors import StructureError
from sollol_nb.schema.frames import frame_from_text, frame_of
from sollol_nb.schema.schema import PickledSchema, parse_structured
from sollol_nb.text.code_blocks import CodeBlock, code_blocks
from sollol_nb.text.safe_markdown import printable
from sollol_nb.text.tables import counted

if TYPE_CHECKING:
    import pandas as pd

TIMINGS = ("queue_ms", "load_ms", "ttft_ms", "duration_ms", "tokens_per_s", "router_overhead_ms")


class Completion(dict[str, Any]):
    """An answer in the shape of Ollama's `/api/chat`, plus `_routing`.

    Keys: `model`, `created_at`, `message` (`role`, `content`, and where present `thinking`, `tool_calls`),
    `done`, `done_reason`, `prompt_eval_count`, `eval_count` (tokens), `total_duration`, `load_duration`,
    `prompt_eval_duration`, `eval_duration` (nanoseconds), `logprobs` if requested, and `_routing`: `backend`,
    `reason`, `duration_ms`, `coordinator_url`, `plan`, `queue_ms`, `load_ms`, `ttft_ms`, `tokens_per_s`,
    `router_overhead_ms`, `failovers`, `dropped` (which turns were dropped to fit the context), `drafted_tokens`,
    `accepted_tokens` (of drafts; None where llama.cpp drafts none). Where it applies also `_dropped` (the same),
    `_context_full` (tokens of the context that was full before the answer ended) and `_note` (what to know about
    the text), and `_steps` (the calls of Python functions before the answer).

    Attributes:
        schema: what the answer must match (see `sollol_nb.schema`); None for free text.
        shown_as: how a notebook shows it: `markdown`, `text`, `json`, `html` or `code`.
    """

    schema: object = None
    shown_as: str = "markdown"

    @classmethod
    def from_chunks(cls, chunks: Iterable[Chunk]) -> Completion:
        """Join streamed chunks into the whole answer; the last chunk carries everything but the text.

        A chunk with `_restarted` starts the answer over; text before a step belongs to the step.
        """
        content: list[str] = []
        thinking: list[str] = []
        tool_calls: list[Any] = []
        logprobs: list[TokenLogprob] = []
        steps: list[Step] = []
        last: Mapping[str, Any] = {}
        for chunk in chunks:
            message = chunk.get("message") or {}
            if STEP in chunk:
                steps.append(chunk[STEP])
            if chunk.get(RESTARTED) or STEP in chunk:  # the text received so far is void, or belongs to the step
                content, thinking, tool_calls, logprobs = [], [], [], []
            content.append(message.get("content") or "")
            thinking.append(message.get("thinking") or "")
            tool_calls.extend(message.get("tool_calls") or ())
            logprobs.extend(chunk.get("logprobs") or ())
            last = chunk
        message = {"role": "assistant", "content": "".join(content)}
        if any(thinking):
            message["thinking"] = "".join(thinking)
        if tool_calls:
            message["tool_calls"] = tool_calls
        whole = {name: value for name, value in last.items() if name not in (CALLING, STEP)}
        whole |= {"message": message} | ({"logprobs": logprobs} if logprobs else {})
        return cls(whole | ({STEPS: steps} if steps else {}))

    @property
    def text(self) -> str:
        """The answer's text."""
        return str(self.get("message", {}).get("content", ""))

    @property
    def thinking(self) -> str:
        """The model's reasoning before the answer, or ""."""
        return str(self.get("message", {}).get("thinking", ""))

    @property
    def steps(self) -> list[Step]:
        """The calls of Python functions before the answer, in order: `call` (the name), `arguments`, `result` (as
        the model read it), `error` and `seconds` of each, see `chunk.Step`; empty where no functions were
        given."""
        return list(self.get(STEPS, ()))

    @property
    def code(self) -> list[CodeBlock]:
        """The fenced code blocks of the answer, in order: strings with a `language`; [] where it has none."""
        return code_blocks(self.text)

    @property
    def routing(self) -> dict[str, Any]:
        """Where the request went, why, and how long each step took (`_routing`)."""
        return dict(self.get(ROUTING, {}))

    @property
    def route(self) -> str:
        """Where the request went and why, as one line."""
        routing = self.routing
        return f"{routing.get('backend', '')}: {routing.get('reason', '')}" if routing else ""

    @property
    def timings(self) -> dict[str, float | None]:
        """In milliseconds `queue_ms`, `load_ms`, `ttft_ms`, `duration_ms`, `router_overhead_ms`; and
        `tokens_per_s`."""
        routing = self.routing
        return {name: routing.get(name) for name in TIMINGS}

    @property
    def finish_reason(self) -> str:
        """`stop`, `length`, `tool_calls`, `cancelled` or `error`."""
        return str(self.get("done_reason", ""))

    @property
    def value(self) -> Any:
        """The answer as its `schema` describes it, checked; without a schema, the answer's JSON as plain data.

        Raises:
            StructureError: it does not match, or is not JSON; `.text` has it unchanged.
        """
        return parse_structured(self.text, object if self.schema is None else self.schema)

    @property
    def frame(self) -> pd.DataFrame:
        """The answer as a DataFrame: the rows of its `value`; without a schema, the table in its text.

        Raises:
            StructureError: it has no rows.
        """
        return frame_from_text(self.text) if self.schema is None else frame_of(self.value)

    def footer(self) -> str:
        """One line: model, backend, time to first token, speed."""
        return completion_view.footer(self)

    def __getstate__(self) -> dict[str, Any]:
        return (
            {**self.__dict__, "schema": PickledSchema(self.schema)} if self.schema is not None else self.__dict__
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self.schema, PickledSchema):
            self.schema = self.schema.schema

    def __str__(self) -> str:
        return completion_view.plain_text(self)

    def __repr__(self) -> str:
        return f"<Completion of {self.get('model')}: {self.text[:60]!r}>"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return completion_view.mime_bundle(self, self.shown_as)

    def _prompt_text_(self) -> str:
        return self.text

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(printable(str(self)))  # otherwise IPython would print it as a dict


def checked_against_schema(completion: Completion, schema: object) -> Completion:
    """The completion with its `schema`, which its text has been checked against.

    Without a schema, and for an answer that calls tools, the completion is returned unchanged.

    Raises:
        StructureError: the answer does not match; `.completion` has it. If it was stopped at `max_tokens`, the
            message says so.
    """
    if schema is None or completion["message"].get("tool_calls"):
        return completion
    completion.schema = schema
    try:
        parse_structured(completion.text, schema)
    except StructureError as error:
        message = str(error)
        if completion.finish_reason == "length":
            length = counted(completion.get("eval_count") or 0, "token")
            message = (
                f"the answer was stopped after {length}, before it matched the schema; give a larger max_tokens "
                "(the text is in .text)"
            )
        raise StructureError(message, text=completion.text, completion=completion) from None
    return completion
