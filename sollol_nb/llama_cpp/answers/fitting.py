"""Answers whose oldest turns are dropped where the messages do not fit the engine's context; see `context_window`.

The engine itself counts the tokens, when it is asked for the first time. What was dropped is told at once, in the
first chunk (of an answer that is resumed, too), and again in the last one, both times as `_dropped`. To what fits
there is then an answer of one of the other kinds.
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
        context_tokens: what the engine holds for one request, answer included.
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
        self._fitted: Answer | None = None
        self._dropped = ""
        self._is_told = False

    async def request(self, post: Post) -> tuple[str, dict[str, Any]] | None:
        if self._fitted is None:
            self._fitted = await self._fit(post)
        asked = await self._fitted.request(post)
        self._follow(self._fitted)
        return asked

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
        self._dropped = fitted.words
        return self._answer_to(fitted.messages)

    def translate(self, event: Mapping[str, Any]) -> Chunk | None:
        chunk = self._begun.translate(event)
        self._follow(self._begun)
        if self._dropped and not self._is_told:
            self._is_told = True
            chunk = {**(chunk or chat_chunk(self.model, "")), DROPPED: self._dropped}
        return chunk

    def final(self) -> Chunk:
        chunk = self._begun.final()
        self._follow(self._begun)
        return {**chunk, DROPPED: self._dropped} if self._dropped else chunk

    def state(self) -> dict[str, Any]:
        return {
            **self._common_state(),
            "chat_template": self._chat_template,
            "context_tokens": self._context_tokens,
            "dropped": self._dropped,
            "fitted": None if self._fitted is None else self._fitted.state(),
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
            answer._fitted = Answer.from_state(state["fitted"])
            answer._follow(answer._fitted)
        return answer

    def _answer_to(self, messages: Sequence[Message]) -> Answer:
        options = {**self._options, "seed": self.seed}
        return answer_for(self.model, messages, options, chat_template=self._chat_template)

    @property
    def _begun(self) -> Answer:
        assert self._fitted is not None, "nothing comes back before something was asked for"
        return self._fitted

    def _follow(self, answer: Answer) -> None:
        self.text, self.thinking, self.token_count = answer.text, answer.thinking, answer.token_count
        self.waiting_prompt_tokens = answer.waiting_prompt_tokens
        self.is_complete, self.is_abandoned = answer.is_complete, answer.is_abandoned
