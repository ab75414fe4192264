"""Answers whose oldest turns are dropped where the messages do not fit the context; see `chat.context_window`.

The engine counts the tokens, before the first request. The first chunk (also of an answer that is resumed) and the
last one have `_dropped`, which says what was dropped. An answer of one of the other kinds then answers the
messages that fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sollol_nb.chat.chunk import DROPPED, Chunk
from sollol_nb.chat.context_window import Message, fit
from sollol_nb.llama_cpp.answers.base import Answer
from sollol_nb.llama_cpp.answers.kinds import answer_for
from sollol_nb.llama_cpp.answers.protocol import chat_chunk, request_body, sampling_settings
from sollol_nb.llama_cpp.answers.tokens import Post, prompt_tokens


class FittingAnswer(Answer):
    """An answer to as many of the newest turns as fit.

    Args:
        chat_template: of the model.
        context_tokens: the limit of the engine for one request, prompt and answer.
    """

    kind = "fitting"

    def __init__(
        self,
        model: str,
        messages: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
        *,
        chat_template: str,
        context_tokens: int,
    ) -> None:
        super().__init__(model, messages, options)
        self._chat_template = chat_template
        self._context_tokens = context_tokens
        self._inner: Answer | None = None
        self._dropped = ""
        self._is_dropped_sent = False

    async def request(self, post: Post) -> tuple[str, dict[str, Any]] | None:
        if self._inner is None:
            self._inner = await self._fit(post)
        request = await self._inner.request(post)
        self._copy_progress(self._inner)
        return request

    @property
    def prompt_text(self) -> str | None:
        return None if self._inner is None else self._inner.prompt_text

    @property
    def context_text(self) -> str | None:
        return None if self._inner is None else self._inner.context_text

    async def _fit(self, post: Post) -> Answer:
        async def count_tokens(messages: Sequence[Message]) -> int:
            return await prompt_tokens(post, request_body(messages, self._options))

        fitted = await fit(
            self._messages,
            count_tokens,
            model=self.model,
            context_tokens=self._context_tokens,
            max_tokens=sampling_settings(self._options).get("max_tokens"),
        )
        self._dropped = fitted.description
        return self._answer_to(fitted.messages)

    def translate(self, event: Mapping[str, Any]) -> Chunk | None:
        chunk = self._started.translate(event)
        self._copy_progress(self._started)
        if self._dropped and not self._is_dropped_sent:
            self._is_dropped_sent = True
            chunk = {**(chunk or chat_chunk(self.model, "")), DROPPED: self._dropped}
        return chunk

    def recover(self, reason: str) -> bool:
        recovered = self._inner is not None and self._inner.recover(reason)
        if recovered:
            self._copy_progress(self._started)
        return recovered

    def final(self) -> Chunk:
        chunk = self._started.final()
        self._copy_progress(self._started)
        return {**chunk, DROPPED: self._dropped} if self._dropped else chunk

    def state(self) -> dict[str, Any]:
        return {
            **self._common_state(),
            "chat_template": self._chat_template,
            "context_tokens": self._context_tokens,
            "dropped": self._dropped,
            "fitted": None if self._inner is None else self._inner.state(),
        }

    @classmethod
    def _restored(cls, state: Mapping[str, Any]) -> FittingAnswer:
        answer = cls(
            state["model"],
            state["messages"],
            state["options"],
            chat_template=str(state["chat_template"]),
            context_tokens=int(state["context_tokens"]),
        )
        answer._restore_common(state)
        answer._dropped = str(state["dropped"])
        if state["fitted"] is not None:
            answer._inner = Answer.from_state(state["fitted"])
            answer._copy_progress(answer._inner)
        return answer

    def _answer_to(self, messages: Sequence[Message]) -> Answer:
        options = {**self._options, "seed": self.seed}
        return answer_for(self.model, messages, options, chat_template=self._chat_template)

    @property
    def _started(self) -> Answer:
        assert self._inner is not None, "there are no events before the first request"
        return self._inner

    def _copy_progress(self, answer: Answer) -> None:
        self.text, self.thinking, self.token_count = answer.text, answer.thinking, answer.token_count
        self.logprobs = answer.logprobs
        self.waiting_prompt_tokens = answer.waiting_prompt_tokens
        self.is_complete, self.is_abandoned = answer.is_complete, answer.is_abandoned
        self.recovery, self.recovers_exactly = answer.recovery, answer.recovers_exactly
