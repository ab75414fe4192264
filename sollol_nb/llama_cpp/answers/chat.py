"""Answers streamed through llama-server's own parser, which another engine can only repeat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sollol_nb.chat.chunk import Chunk
from sollol_nb.llama_cpp.answers.base import Answer, SentText, diverged_error
from sollol_nb.llama_cpp.answers.protocol import ChunkTranslator, progress_of, request_body
from sollol_nb.llama_cpp.answers.tokens import Post


class ChatAnswer(Answer):
    """An answer streamed from `/v1/chat/completions`."""

    kind = "chat"

    def __init__(self, model: str, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> None:
        super().__init__(model, messages, options)
        self._translator = ChunkTranslator(model)
        self._content, self._thoughts = SentText(), SentText()

    async def request(self, post: Post) -> tuple[str, dict[str, Any]] | None:
        self._begin_stream()
        if self.is_complete:
            return None
        self._translator = ChunkTranslator(self.model)
        self._content, self._thoughts = SentText(self.text), SentText(self.thinking)
        body = request_body(self._messages, self._options)
        body |= {"seed": self.seed, "return_progress": True, "timings_per_token": True}
        return "/v1/chat/completions", body

    def translate(self, event: Mapping[str, Any]) -> Chunk | None:
        self._count(event)
        chunk = self._translator.translate(event)
        message = chunk["message"] if chunk is not None else {}
        content, thinking = message.get("content", ""), message.get("thinking", "")
        if not (self._content.agrees_with(content) and self._thoughts.agrees_with(thinking)):
            raise diverged_error(self.model)
        shown = self._append(self._content.add(content), self._thoughts.add(thinking))
        if any(choice.get("finish_reason") for choice in event.get("choices", ())):
            if not (self._content.is_repeated and self._thoughts.is_repeated):
                raise diverged_error(self.model)
            self.is_complete = True
        return shown

    def final(self) -> Chunk:
        chunk = self._translator.final()
        return self._with_counts(chunk, chunk["done_reason"])

    def state(self) -> dict[str, Any]:
        return {**self._common_state(), "text": self.text, "thinking": self.thinking}

    @classmethod
    def _restored(cls, state: Mapping[str, Any]) -> ChatAnswer:
        answer = cls(state["model"], state["messages"], state["options"])
        answer._restore_common(state)
        answer.text, answer.thinking = str(state["text"]), str(state["thinking"])
        return answer

    def _count(self, event: Mapping[str, Any]) -> None:
        self._timings = event.get("timings") or self._timings
        self.token_count = max(self.token_count, self._timings.get("predicted_n", 0))
        usage = event.get("usage")
        if usage:
            self._prompt_tokens, self.token_count = usage["prompt_tokens"], usage["completion_tokens"]
        progress = progress_of(event)
        if progress is not None:
            self._prompt_tokens = progress[1]
        self.waiting_prompt_tokens = progress[1] - progress[0] if progress is not None else 0
