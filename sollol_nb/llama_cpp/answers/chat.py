"""Answers streamed through llama-server's own parser, which another engine can only repeat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sollol_nb.chat.chunk import NOTE, RESTARTED, Chunk, TokenLogprob
from sollol_nb.llama_cpp.answers.base import (
    NOT_ENCODED_NOTE,
    NOT_PARSED_NOTE,
    Answer,
    SentText,
    diverged_error,
    message_tokens,
)
from sollol_nb.llama_cpp.answers.logprobs import LogprobReader, wanted_alternatives
from sollol_nb.llama_cpp.answers.protocol import (
    ChunkTranslator,
    chat_chunk,
    has_media,
    is_encoding_failure,
    is_parser_failure,
    progress_of,
    prompt_request,
    request_body,
)
from sollol_nb.llama_cpp.answers.raw import RawAnswer
from sollol_nb.llama_cpp.answers.tokens import Post

LONG_TOKENS = 500
"""Of a longer question the prompt is rendered before, so that a saved context can be found for it."""


class ChatAnswer(Answer):
    """An answer streamed from `/v1/chat/completions`.

    Where the engine's parser fails on what the model wrote, the answer is generated again, with the same seed, as
    a `RawAnswer`, which is not parsed: the text keeps its markup, and `_note` says so. Text that was sent before
    is not sent again if it is the same; else the answer starts over (`_restarted`).

    Args:
        splits_thinking, markup: for that `RawAnswer`.
    """

    kind = "chat"

    def __init__(
        self,
        model: str,
        messages: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
        *,
        splits_thinking: bool = False,
        markup: Sequence[str] = (),
    ) -> None:
        super().__init__(model, messages, options)
        self._splits_thinking = splits_thinking
        self._markup = tuple(markup)
        self._translator = ChunkTranslator(model)
        self._content, self._thoughts = SentText(), SentText()
        self._tokens_seen = 0  # of the present engine, with their log probabilities
        self._unparsed: RawAnswer | None = None
        self._rendered: str | None = None

    @property
    def prompt_text(self) -> str | None:
        return self._rendered if self._unparsed is None else self._unparsed.prompt_text

    @property
    def context_text(self) -> str | None:
        return self._rendered if self._unparsed is None else self._unparsed.context_text

    async def request(self, post: Post) -> tuple[str, dict[str, Any]] | None:
        if self._unparsed is not None:
            request = await self._unparsed.request(post)
            self._copy_progress(self._unparsed)
            return request
        self._begin_stream()
        if self.is_complete:
            return None
        if self.text or self.thinking:
            self.recovery = "exact"  # it is generated again, and must be the same
        self._translator = ChunkTranslator(self.model)
        self._content, self._thoughts = SentText(self.text), SentText(self.thinking)
        self._tokens_seen = 0
        body = request_body(self._messages, self._options)
        body |= {"seed": self.seed, "return_progress": True, "timings_per_token": True, **self._cache_settings()}
        if (alternatives := wanted_alternatives(self._options)) is not None:
            body |= {"logprobs": True, "top_logprobs": alternatives}
        if self._rendered is None and self._is_long():
            self._rendered = str((await post("/apply-template", prompt_request(body)))["prompt"])
        return "/v1/chat/completions", body

    def _is_long(self) -> bool:
        """Whether a saved context may be worth the milliseconds that its prompt takes to be rendered."""
        tokens = sum(map(message_tokens, self._messages))
        return tokens >= LONG_TOKENS and not self.recovers_exactly and not any(map(has_media, self._messages))

    def translate(self, event: Mapping[str, Any]) -> Chunk | None:
        if self._unparsed is not None:
            chunk = self._unparsed.translate(event)
            self._copy_progress(self._unparsed)
            return self._as_new(chunk, self._unparsed) if chunk is not None else None
        self._count(event)
        chunk = self._translator.translate(event)
        message = chunk["message"] if chunk is not None else {}
        content, thinking = message.get("content", ""), message.get("thinking", "")
        if not (self._content.agrees_with(content) and self._thoughts.agrees_with(thinking)):
            raise diverged_error(self.model)
        logprobs = self._new_logprobs(event)
        shown = self._append(self._content.add(content), self._thoughts.add(thinking), logprobs)
        if any(choice.get("finish_reason") for choice in event.get("choices", ())):
            if not (self._content.is_repeated and self._thoughts.is_repeated):
                raise diverged_error(self.model)
            self.is_complete = True
        return shown

    def recover(self, reason: str) -> bool:
        if self._unparsed is not None:
            recovered = self._unparsed.recover(reason)
            self._copy_progress(self._unparsed)
            return recovered
        if is_encoding_failure(reason) and self._content.is_repeated and self._thoughts.is_repeated:
            self.is_complete, self._note = True, NOT_ENCODED_NOTE
            return True
        if not is_parser_failure(reason) or any(map(has_media, self._messages)):
            return False
        self._begin_unparsed(
            RawAnswer(
                self.model,
                self._messages,
                {**self._options, "seed": self.seed},
                splits_thinking=self._splits_thinking,
                markup=self._markup,
            )
        )
        return True

    def final(self) -> Chunk:
        if self._unparsed is None:
            chunk = self._translator.final()
            return self._with_counts(chunk, chunk["done_reason"])
        last = self._unparsed.final()
        self._copy_progress(self._unparsed)
        new = self._as_new(last, self._unparsed)
        if not (self._content.is_repeated and self._thoughts.is_repeated):
            new = self._start_over(self._unparsed)
        return {**last, **(new or chat_chunk(self.model, "")), "done": True, NOTE: NOT_PARSED_NOTE}

    def state(self) -> dict[str, Any]:
        return {
            **self._common_state(),
            "text": self.text,
            "thinking": self.thinking,
            "splits_thinking": self._splits_thinking,
            "markup": list(self._markup),
            "unparsed": None if self._unparsed is None else self._unparsed.state(),
        }

    @classmethod
    def _restored(cls, state: Mapping[str, Any]) -> ChatAnswer:
        answer = cls(
            state["model"],
            state["messages"],
            state["options"],
            splits_thinking=bool(state["splits_thinking"]),
            markup=state["markup"],
        )
        answer._restore_common(state)
        answer.text, answer.thinking = str(state["text"]), str(state["thinking"])
        if state["unparsed"] is not None:
            answer._begin_unparsed(RawAnswer._restored(state["unparsed"]))
        return answer

    def _begin_unparsed(self, unparsed: RawAnswer) -> None:
        self._unparsed = unparsed
        self._content, self._thoughts = SentText(self.text), SentText(self.thinking)
        self._content.position = min(len(unparsed.text), len(self.text))
        self._thoughts.position = min(len(unparsed.thinking), len(self.thinking))

    def _as_new(self, chunk: Chunk, unparsed: RawAnswer) -> Chunk | None:
        """A chunk of the unparsed answer without what was sent before; the whole answer if that was different."""
        message = chunk["message"]
        content, thinking = message.get("content", ""), message.get("thinking", "")
        is_same = self._content.agrees_with(content) and self._thoughts.agrees_with(thinking)
        if not is_same or (content and not self._thoughts.is_repeated):  # the thoughts came as text
            return self._start_over(unparsed)
        logprobs = unparsed.logprobs[len(self.logprobs) :]
        return self._append(self._content.add(content), self._thoughts.add(thinking), logprobs)

    def _start_over(self, unparsed: RawAnswer) -> Chunk:
        self.text, self.thinking, self.logprobs = "", "", []
        self._content, self._thoughts = SentText(unparsed.text), SentText(unparsed.thinking)
        self._content.position, self._thoughts.position = len(unparsed.text), len(unparsed.thinking)
        chunk: Chunk | None = self._append(unparsed.text, unparsed.thinking, unparsed.logprobs)
        chunk = chunk or chat_chunk(self.model, "")
        return {**chunk, RESTARTED: True}

    def _copy_progress(self, answer: Answer) -> None:
        self.token_count = answer.token_count
        self.waiting_prompt_tokens = answer.waiting_prompt_tokens
        self.is_complete, self.is_abandoned = answer.is_complete, answer.is_abandoned

    def _new_logprobs(self, event: Mapping[str, Any]) -> list[TokenLogprob]:
        """Those of an event that were not sent before, by an engine that was lost."""
        choices = event.get("choices", ())
        tokens = [token for choice in choices for token in (choice.get("logprobs") or {}).get("content") or ()]
        entries = LogprobReader(self._options).read_parsed(tokens)
        known = max(0, len(self.logprobs) - self._tokens_seen)
        self._tokens_seen += len(entries)
        return entries[known:]

    def _count(self, event: Mapping[str, Any]) -> None:
        self._read_timings(event)
        self.token_count = max(self.token_count, self._timings.get("predicted_n", 0))
        usage = event.get("usage")
        if usage:
            self._prompt_tokens, self.token_count = usage["prompt_tokens"], usage["completion_tokens"]
        progress = progress_of(event)
        if progress is not None:
            self._prompt_tokens = progress[1]
        self.waiting_prompt_tokens = progress[1] - progress[0] if progress is not None else 0
