"""What all kinds of answers share. The package's docstring says why there are several."""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from sollol_nb.chat.chunk import DRAFTS, NOTE, Chunk, TokenLogprob
from sollol_nb.errors import AnswerDivergedError, ConfigError
from sollol_nb.llama_cpp.answers.drafts import NO_DRAFTS, DraftCounter
from sollol_nb.llama_cpp.answers.protocol import chat_chunk, sampling_settings
from sollol_nb.llama_cpp.answers.tokens import Post
from sollol_nb.text.short_names import short_name

SEEDS = 2**31  # llama.cpp takes 2**32 - 1 as "draw one"
NOT_ENCODED_NOTE = "the answer contains broken UTF-8, at which llama-server failed; this is all that it sent"
NOT_PARSED_NOTE = "llama-server could not parse what the model wrote; this is its text with its markup"
CHARACTERS_PER_TOKEN = 3  # a guess on the safe side, until the engine says how long the prompt is


class Answer(ABC):
    """One answer in progress.

        while (request := await answer.request(post)) is not None:
            async for event in <the events of a streaming POST of request>:
                if answer.unconfirmed is not None:
                    answer.confirm(<the prompt that a POST of it to /apply-template gives>)
                chunk = answer.translate(event)    # show it, unless it is None
                if answer.is_abandoned:
                    break
        last = answer.final()

    When the engine reports an error, `recover` says whether the loop may continue. When the engine is lost
    anywhere in it, start the loop again with another engine and the same answer.

    Attributes:
        model: the name it was requested by.
        text, thinking: the text sent to the reader so far.
        logprobs: of the tokens sent to the reader so far, if they were requested.
        token_count: tokens generated so far, as far as known.
        seed: given, or drawn.
        waiting_prompt_tokens: tokens of the prompt that are not processed yet; a guess until the engine reports.
        is_complete: no further request is needed.
        is_abandoned: the rest of this stream is useless; close it, and send the next `request`.
        unconfirmed: what renders the prompt of the last request, which was foreseen; None if that is certain.
        is_deterministic: it must not depend on other requests, past or present: see `deterministic` in
            `chat/options.py`.
        recovers_exactly: another engine generates it again from its beginning.
        recovery: how it continued on another engine: `fast`, or `exact` if that one has generated all tokens
            again, and they were the same; "" before it was continued.
    """

    kind: ClassVar[str]

    def __init_subclass__(cls) -> None:
        _KINDS[cls.kind] = cls

    def __init__(self, model: str, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> None:
        self.model = model
        self.text = ""
        self.thinking = ""
        self.logprobs: list[TokenLogprob] = []
        self.token_count = 0
        self.is_complete = False
        self.is_abandoned = False
        self.unconfirmed: Mapping[str, Any] | None = None
        self._note = ""
        self.waiting_prompt_tokens = sum(map(_characters, messages)) // CHARACTERS_PER_TOKEN + 1
        self._messages = [dict(message) for message in messages]
        self._options = dict(options)
        self.recovery = ""
        self.is_deterministic = bool(options.get("deterministic"))
        self.recovers_exactly = self.is_deterministic or options.get("recovery") == "exact"
        given = sampling_settings(options).get("seed")
        self.seed: int = given if given is not None and given >= 0 else secrets.randbelow(SEEDS)
        self._prompt_tokens: int | None = None
        self._timings: Mapping[str, Any] = {}
        self._spent_ms = {"prompt_ms": 0.0, "predicted_ms": 0.0}  # on engines that were lost
        self._drafts = DraftCounter()

    @property
    def options(self) -> dict[str, Any]:
        """The options of the request that it answers."""
        return self._options

    @abstractmethod
    async def request(self, post: Post) -> tuple[str, dict[str, Any]] | None:
        """Path and body of the next request to stream; None when the answer is complete. Call it once per stream.

        Raises:
            TransportError: from `post`.
        """

    @property
    def prompt_text(self) -> str | None:
        """What the model reads with the last request: the prompt, and the text of the answer that it is given;
        None where that is not known (images, or a short request that llama-server renders itself)."""
        return None

    @property
    def context_text(self) -> str | None:
        """What the engine's slot holds by now, or the beginning of it: prompt and answer; None where that is not
        known."""
        return self.prompt_text

    def confirm(self, prompt: str) -> None:
        """Take the real prompt of the last request, where it was foreseen; a wrong one abandons the stream."""
        self.unconfirmed = None

    @abstractmethod
    def translate(self, event: Mapping[str, Any]) -> Chunk | None:
        """The Ollama chunk of an event, or None when it has nothing to show.

        Raises:
            AnswerDivergedError: this engine writes a different answer, so this one cannot continue.
        """

    def recover(self, reason: str) -> bool:
        """Whether the answer can continue although the engine failed for this reason; `request` says how."""
        return False

    @abstractmethod
    def final(self) -> Chunk:
        """The last chunk: `done`, the reason, tokens and nanoseconds over all engines, tool calls if any."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """All that is needed to continue later, also in another process, as plain data for JSON."""

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> Answer:
        """The answer whose `state` this is; its next `request` continues it.

        Raises:
            ConfigError: it is not the state of an answer.
        """
        try:
            return _KINDS[state["kind"]]._restored(state)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"this is not the state of an answer ({error!r}); ask again") from error

    @classmethod
    @abstractmethod
    def _restored(cls, state: Mapping[str, Any]) -> Self: ...

    def _common_state(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "model": self.model,
            "messages": self._messages,
            "options": self._options,
            "seed": self.seed,
            "token_count": self.token_count,
            "prompt_tokens": self._prompt_tokens,
            "logprobs": self.logprobs,
            "spent_ms": {name: self._total_ms(name) for name in self._spent_ms},
            "drafts": self._drafts.total,
        }

    def _restore_common(self, state: Mapping[str, Any]) -> None:
        self.seed = int(state["seed"])
        self.token_count = int(state["token_count"])
        self._prompt_tokens = state["prompt_tokens"]
        self.logprobs = list(state["logprobs"])
        self._spent_ms = {name: float(state["spent_ms"][name]) for name in self._spent_ms}
        self._drafts = DraftCounter(state.get("drafts", NO_DRAFTS))

    def _cache_settings(self) -> dict[str, Any]:
        """For the body of a request: the cached beginning of another request's prompt was computed in other
        batches, which round differently, so an answer that is to be repeated must not begin with it."""
        return {"cache_prompt": False} if self.recovers_exactly else {}

    def _begin_stream(self) -> None:
        self._spent_ms = {name: self._total_ms(name) for name in self._spent_ms}
        self._timings = {}
        self._drafts.next_engine()
        self.is_abandoned = False

    def _read_timings(self, event: Mapping[str, Any]) -> None:
        """Note how long the engine has taken so far, if an event says it."""
        timings = event.get("timings")
        if timings:
            self._timings = timings
            self._drafts.read(timings)

    def _total_ms(self, name: str) -> float:
        return float(self._spent_ms[name] + self._timings.get(name, 0.0))

    def _append(self, content: str, thinking: str, logprobs: Sequence[TokenLogprob] = ()) -> Chunk | None:
        self.text += content
        self.thinking += thinking
        self.logprobs += logprobs
        if not (content or thinking or logprobs):
            return None
        chunk = chat_chunk(self.model, content, thinking)
        if logprobs:
            chunk["logprobs"] = [*logprobs]
        return chunk

    def _with_counts(self, chunk: Chunk, done_reason: str) -> Chunk:
        if self._note:
            chunk = {**chunk, NOTE: self._note}
        return {
            **chunk,
            "done_reason": done_reason,
            "prompt_eval_count": self._prompt_tokens,
            "eval_count": self.token_count,
            "prompt_eval_duration": int(self._total_ms("prompt_ms") * 1e6),
            "eval_duration": int(self._total_ms("predicted_ms") * 1e6),
            DRAFTS: self._drafts.total,
        }


_KINDS: dict[str, type[Answer]] = {}


def diverged_error(model: str) -> AnswerDivergedError:
    """Another engine should have repeated the text that was sent, and did not."""
    return AnswerDivergedError(
        f"{short_name(model)}: the coordinator was lost in mid-answer, and the new one begins the answer "
        "differently, so it cannot be continued; ask again"
    )


def _characters(message: Mapping[str, Any]) -> int:
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"text": content}]
    return sum(len(part.get("text") or "") for part in parts)


def message_tokens(message: Mapping[str, Any]) -> int:
    """About how many tokens a message has."""
    return _characters(message) // CHARACTERS_PER_TOKEN


class SentText:
    """Text that was sent to the reader, and how much of it the present engine has.

    Attributes:
        text: all that was sent.
        position: characters of it that the present engine was given or has repeated.
    """

    def __init__(self, text: str = "") -> None:
        self.text = text
        self.position = 0

    @property
    def is_repeated(self) -> bool:
        """Whether the engine has all of it."""
        return self.position == len(self.text)

    def agrees_with(self, piece: str) -> bool:
        """Whether the engine's next piece of text repeats what was sent, up to its end."""
        return piece.startswith(self.text[self.position : self.position + len(piece)])

    def add(self, piece: str) -> str:
        """Add a piece that agrees; returns the part of it that is new."""
        new = piece[len(self.text) - self.position :]
        self.position += len(piece)
        self.text += new
        return new
