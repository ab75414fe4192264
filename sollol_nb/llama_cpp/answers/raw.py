"""Answers streamed as token ids, which another engine can continue exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sollol_nb.chat.chunk import STOPPED_BY, Chunk
from sollol_nb.chat.option_checks import answer_schema
from sollol_nb.llama_cpp.answers.base import (
    CHARACTERS_PER_TOKEN,
    NOT_ENCODED_NOTE,
    SEEDS,
    Answer,
    SentText,
    diverged_error,
)
from sollol_nb.llama_cpp.answers.logprobs import LogprobReader, spelling, wanted_alternatives
from sollol_nb.llama_cpp.answers.prompts import ForeseenPrompts
from sollol_nb.llama_cpp.answers.protocol import (
    CLOSING_TAG,
    OPENING_TAG,
    ThinkSplitter,
    chat_chunk,
    is_encoding_failure,
    progress_of,
    prompt_request,
    request_body,
    sampling_settings,
)
from sollol_nb.llama_cpp.answers.tokens import Post, grammar_prompt, spelled, tokens_within

# Without this list the last event repeats the request, with the whole prompt.
_LAST_EVENT_FIELDS = ["stop", "stop_type", "stopping_word", "tokens_predicted", "tokens_evaluated", "timings"]


@dataclass(slots=True)
class _Piece:
    """The text of one event, and the ids of its tokens; None for those that the stream left out."""

    text: str
    ids: list[int | None]


class RawAnswer(Answer):
    """An answer streamed as token ids from `/completion`.

    Args:
        splits_thinking: the model's template writes thoughts between `<think>` and `</think>`.
        markup: special tokens that are sent as text, too.
        prompt: what the model reads; by default the template with the messages filled in.
        prompts: the engine's prompts so far, from which this one may be foreseen.
    """

    kind = "raw"

    def __init__(
        self,
        model: str,
        messages: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
        *,
        splits_thinking: bool = False,
        markup: Sequence[str] = (),
        prompt: str | None = None,
        prompts: ForeseenPrompts | None = None,
    ) -> None:
        super().__init__(model, messages, options)
        settings = sampling_settings(options)
        settings.pop("seed", None)
        self._limit: int | None = settings.pop("max_tokens", None)
        self._settings = settings
        self._schema = answer_schema(options)
        self._splits_thinking = splits_thinking
        self._markup = tuple(markup)
        self._splitter: ThinkSplitter | None = None
        self._prompt = prompt
        self._prompts = prompts
        self._done_reason = ""
        self._stopped_by = ""
        self._pieces: list[_Piece] = []
        self._sent = SentText()
        # Text whose tokens are not known for sure: whether to tokenise it, or to generate it again and compare.
        self._tokenises = settings.get("temperature", 1) > 0
        self._grammar_prompt: str | None = None
        self._from_start = False  # no engine can continue in the middle of it
        self._known: list[_Piece] | None = None  # while the answer is generated again: all that had been received
        self._given_text = ""  # of the answer, which the present engine received with the prompt
        self._given = 0  # tokens of the answer that the present engine received with the prompt
        self._predicted = 0  # tokens that it has generated
        self._pending: list[int | None] = []  # of these, those whose text was not received yet
        self._logprob_reader = LogprobReader(options)

    async def request(self, post: Post) -> tuple[str, dict[str, Any]] | None:
        self._begin_stream()
        self._logprob_reader = LogprobReader(self._options)
        if self.is_complete:
            return None
        if self._prompt is None or self.unconfirmed is not None:
            self._begin(await self._rendered(post))
        assert self._prompt is not None
        if self._known is not None:  # lost again while it was repeated
            self._pieces, self._known = self._known, None
        if self.recovers_exactly and self._sent.text:
            self._pieces, self._known, self._sent.position = [], self._pieces, 0
            self.recovery = "exact"
        else:
            await self._recover_tokens(post)
            if self._sent.text:
                self.recovery = "exact" if self._from_start else "fast"
        ids = [token for piece in self._pieces for token in piece.ids]
        self._given, self._predicted, self._pending = len(ids), 0, []
        self._given_text = "".join(piece.text for piece in self._pieces)
        if not ids:
            self.waiting_prompt_tokens = len(self._prompt) // CHARACTERS_PER_TOKEN + 1
            return "/completion", {**self._body(), "prompt": self._prompt, "seed": self.seed}
        if self._limit is not None and 0 <= self._limit <= len(ids):
            self._complete("length", len(ids))
            return None
        prompt = {"content": self._prompt, "add_special": True, "parse_special": True}
        prompt_ids = (await post("/tokenize", prompt))["tokens"]
        self.waiting_prompt_tokens = len(prompt_ids) + len(ids)
        body = self._body() | {"prompt": [*prompt_ids, *ids], "seed": (self.seed + len(ids)) % SEEDS}
        if self._limit is not None and self._limit > 0:
            body["n_predict"] = self._limit - len(ids)
        if self._schema is not None:
            body["generation_prompt"] = self._grammar_prompt
        return "/completion", body

    @property
    def prompt_text(self) -> str | None:
        return None if self._prompt is None else self._prompt + self._given_text

    @property
    def context_text(self) -> str | None:
        return None if self._prompt is None else self._prompt + self._sent.text[: self._sent.position]

    async def _rendered(self, post: Post) -> str:
        """The prompt: foreseen, or as the engine renders it."""
        request = prompt_request(request_body(self._messages, self._options))
        # A request that is given up may be computed together with the next one, which rounds otherwise.
        may_foresee = self._prompts is not None and self._prompt is None and not self.recovers_exactly
        foreseen = self._prompts.foresee(request) if self._prompts is not None and may_foresee else None
        self.unconfirmed = request if foreseen is not None else None
        if foreseen is not None:
            return foreseen
        prompt = str((await post("/apply-template", request))["prompt"])
        if self._prompts is not None:
            self._prompts.learn(request, prompt)
        return prompt

    def confirm(self, prompt: str) -> None:
        assert self.unconfirmed is not None
        assert self._prompts is not None
        self._prompts.learn(self.unconfirmed, prompt, foreseen=self._prompt)
        self.unconfirmed = None
        if prompt != self._prompt:
            self._begin(prompt)
            self.is_abandoned = True

    def translate(self, event: Mapping[str, Any]) -> Chunk | None:
        if self.is_complete or self.is_abandoned:
            return None
        self._read_timings(event)
        if self._prompt_tokens is None and "tokens_evaluated" in event:
            self._prompt_tokens = event["tokens_evaluated"]
        progress = progress_of(event)
        if progress is not None:
            self.waiting_prompt_tokens = progress[1] - progress[0]
            return None
        self.waiting_prompt_tokens = 0
        predicted, ids = event.get("tokens_predicted", 0), event.get("tokens") or []
        if event.get("stop"):
            if self._sent.is_repeated:
                self._stopped_by = event.get("stopping_word") or ""
                self._complete("length" if event.get("stop_type") == "limit" else "stop", self._given + predicted)
            else:
                self._diverge()
            return None
        self._pending += [*[None] * (predicted - self._predicted - len(ids)), *ids]
        self._predicted = predicted
        self.token_count = max(self.token_count, self._given + predicted)
        text = event.get("content") or ""
        logprobs = self._logprob_reader.read(event.get("completion_probabilities", ()), text)
        if not text:
            return None
        if not self._sent.agrees_with(text):
            self._diverge()
            return None
        self._pieces.append(_Piece(text, self._pending))
        self._pending = []
        if self._sent.position + len(text) >= len(self._sent.text):
            self._known = None  # all of it is repeated
        new = self._sent.add(text)
        return self._append(*self._split(new), spelling(logprobs, new))

    def recover(self, reason: str) -> bool:
        if not is_encoding_failure(reason) or not self._sent.is_repeated:
            return False
        tokens = self._given + self._predicted
        self._complete("length" if tokens == self._limit else "stop", tokens)
        self._note = NOT_ENCODED_NOTE
        return True

    def final(self) -> Chunk:
        thinking, content = self._splitter.flush() if self._splitter is not None else ("", "")
        self._append(content, thinking)
        last = self._with_counts(chat_chunk(self.model, content, thinking, done=True), self._done_reason)
        return {**last, STOPPED_BY: self._stopped_by} if self._stopped_by else last

    def state(self) -> dict[str, Any]:
        return {
            **self._common_state(),
            "splits_thinking": self._splits_thinking,
            "markup": list(self._markup),
            "prompt": self._prompt if self.unconfirmed is None else None,
            "done_reason": self._done_reason,
            "spells": self._tokenises,
            "written": self._sent.text,
            "pieces": [[piece.text, piece.ids] for piece in self._known or self._pieces],
        }

    @classmethod
    def _restored(cls, state: Mapping[str, Any]) -> RawAnswer:
        answer = cls(
            state["model"],
            state["messages"],
            state["options"],
            splits_thinking=bool(state["splits_thinking"]),
            markup=state["markup"],
        )
        answer._restore_common(state)
        answer._pieces = [_Piece(str(text), list(ids)) for text, ids in state["pieces"]]
        answer._tokenises = bool(state["spells"])
        answer._sent = SentText(str(state["written"]))
        if state["prompt"] is not None:
            answer._begin(str(state["prompt"]))
            answer._append(*answer._split(answer._sent.text))
        if state["done_reason"]:
            answer._complete(str(state["done_reason"]), answer.token_count)
        return answer

    def _begin(self, prompt: str) -> None:
        self._prompt = prompt
        if self._splits_thinking:
            begun = prompt.rstrip().endswith(OPENING_TAG) or self._is_thinking_begun()
            self._splitter = ThinkSplitter(inside=begun)

    def _is_thinking_begun(self) -> bool:
        """Whether the messages end with the assistant's own unfinished thoughts, which the answer continues."""
        last = self._messages[-1] if self._messages else {}
        content = last.get("content") or "" if last.get("role") == "assistant" else ""
        return isinstance(content, str) and content.rfind(OPENING_TAG) > content.rfind(CLOSING_TAG)

    def _body(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            **self._settings,
            "stream": True,
            "return_tokens": True,
            "return_progress": True,
            "timings_per_token": True,  # so that durations are known also for an engine that is lost
            "response_fields": _LAST_EVENT_FIELDS,
            **self._cache_settings(),
        }
        if self._limit is not None:
            body["n_predict"] = self._limit
        if self._schema is not None:
            body["json_schema"] = self._schema
        if (alternatives := wanted_alternatives(self._options)) is not None:
            body["n_probs"] = alternatives
        preserved = [*([OPENING_TAG, CLOSING_TAG] if self._splits_thinking else ()), *self._markup]
        if preserved:
            body["preserved_tokens"] = preserved  # sent also where they are special tokens
        return body

    def _split(self, text: str) -> tuple[str, str]:
        """The parts of new text to show: answer and thinking."""
        if self._splitter is None:
            return text, ""
        thinking, content = self._splitter.feed(text)
        return content, thinking

    def _complete(self, reason: str, token_count: int) -> None:
        self.is_complete, self._done_reason, self.token_count = True, reason, token_count

    def _diverge(self) -> None:
        """The engine did not repeat the text that was sent, so generating again cannot find its tokens."""
        if self._known is not None:  # what was sent stays, so it continues from the tokens of that
            self._pieces, self._known = self._known, None
            self.recovers_exactly, self.is_abandoned = False, True
            return
        if self._from_start:
            raise diverged_error(self.model)
        self._tokenises = self.is_abandoned = True

    async def _recover_tokens(self, post: Post) -> None:
        """Keep the pieces whose tokens are known; have the rest of the sent text tokenised or repeated."""
        known = 0
        for piece in self._pieces:
            if not await _find_ids(post, piece, is_last=piece is self._pieces[-1]):
                break
            known += 1
        del self._pieces[known:]
        kept = "".join(piece.text for piece in self._pieces)
        rest = self._sent.text[len(kept) :]
        if rest and self._tokenises:
            self._pieces.append(_Piece(rest, list(await spelled(post, rest))))
            kept += rest
        if kept and self._schema is not None:
            self._grammar_prompt = await grammar_prompt(post, kept)
            if self._grammar_prompt is None:  # the grammar must read the answer from its start
                self._pieces, kept, self._from_start = [], "", True
        self._sent.position = len(kept)


async def _find_ids(post: Post, piece: _Piece, *, is_last: bool) -> bool:
    """Fill in the ids that the stream left out; False if they cannot be found.

    The ids of the last piece must also spell its text: they do not where the engine cut the text at a stop string
    or at the end of the answer, and then the answer must not continue after them.
    """
    if None not in piece.ids:
        return not is_last or (await post("/detokenize", {"tokens": piece.ids}))["content"] == piece.text
    ids = await tokens_within(post, piece.text)
    agrees = (
        ids is not None
        and len(ids) == len(piece.ids)
        and all(known in (None, found) for known, found in zip(piece.ids, ids, strict=True))
    )
    if agrees:
        piece.ids = list(ids or ())
    return agrees
