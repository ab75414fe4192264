"""One chat request, checked before anything is sent. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Self

from sollol_nb.chat.messages import check_messages
from sollol_nb.chat.option_checks import answer_schema, check_options
from sollol_nb.chat.raw_prompt import RawPrompt
from sollol_nb.chat.tool_choice import apply_tool_choice
from sollol_nb.errors import ConfigError
from sollol_nb.models.modelfile import Modelfile
from sollol_nb.models.routing import checked_backend
from sollol_nb.runtime.amounts import is_positive, shown
from sollol_nb.runtime.priority import checked_priority
from sollol_nb.schema.schema import json_schema_of
from sollol_nb.settings.kinds import keep_alive_seconds

_LENGTHS = {"max_tokens", "num_predict"}
"""Two names of one option."""
JOURNAL_OPTIONS = ("journal", "conversation")
"""Options that are for the journal, not for an engine."""
LONGEST_TIMEOUT_S = 10.0**9
"""Thirty years: event loops cannot wait for an infinite time or that of a very large whole number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """Messages, and how to answer them.

    Attributes:
        messages: in Ollama's shape.
        options: in Ollama's shape; with `format` if a schema was given.
        priority: 1 to 10.
        timeout_s: limit in seconds, from when the coordinator is ready; at Ollama, loading counts.
        backend: the requested backend by its full name; None if the router chooses.
        schema: what the answer must match, as given; None for free text.
        prompt: a text to continue instead of messages.
        journal: whether the answer is journaled; None is as the setting says.
        conversation: the name of the one that it belongs to, for the journal; "" without one.
    """

    messages: list[dict[str, Any]]
    options: dict[str, Any]
    priority: int
    timeout_s: float
    backend: str | None
    schema: object
    prompt: RawPrompt | None = None
    journal: bool | None = None
    conversation: str = ""

    @property
    def question(self) -> str:
        """What is asked: the text of the last message of the user, or the prompt. Where results of tools follow,
        it begins with their names."""
        if self.prompt is not None:
            return self.prompt.text
        asked: Mapping[str, Any] = next(
            (message for message in reversed(self.messages) if message["role"] == "user"), {}
        )
        content = asked.get("content") or ""
        text = content if isinstance(content, str) else " ".join(str(part.get("text") or "") for part in content)
        tools = [str(each.get("tool_name") or each.get("name") or "a tool") for each in self._last_results]
        return f"[after {', '.join(dict.fromkeys(tools))}] {text}" if tools else text

    @property
    def _last_results(self) -> list[dict[str, Any]]:
        return [*takewhile(lambda message: message["role"] == "tool", reversed(self.messages))][::-1]

    def with_defaults(self, options: Mapping[str, Any], system: str | None = None) -> Self:
        """The request, with options that it does not have, and a system message if it has none.

        Args:
            options: by the names of `ChatOptions`.
        """
        given = {*self.options, *self.options.get("options", {})}
        given |= _LENGTHS if given & _LENGTHS else set()
        added = {name: value for name, value in options.items() if name not in given}
        has_system = not self.messages or any(message["role"] == "system" for message in self.messages)
        first = [{"role": "system", "content": system}] if system and not has_system else []
        return replace(self, options=self.options | added, messages=[*first, *self.messages])

    def with_tool_choice(self) -> Self:
        """The request as both backends take it; see `tool_choice.py`, also for errors."""
        return replace(self, options=apply_tool_choice(self.options))

    @classmethod
    def checked(
        cls,
        messages: Sequence[Mapping[str, Any]] | str,
        *,
        priority: int,
        timeout_s: float,
        backend: str | None,
        schema: object,
        options: Mapping[str, Any],
    ) -> ChatRequest:
        """The request with these arguments (those of `HybridRouter.route_request`).

        Raises:
            ConfigError: one of them is invalid.
        """
        checked = options_with_schema(options, schema)
        journal = {name: checked.pop(name) for name in JOURNAL_OPTIONS if name in checked}
        return cls(
            messages=check_messages(messages),
            options=checked,
            **journal,
            priority=checked_priority(priority),
            timeout_s=checked_timeout_s(timeout_s),
            backend=checked_backend(backend),
            schema=schema,
        )

    @classmethod
    def of_prompt(
        cls,
        text: str,
        *,
        suffix: str | None,
        images: Sequence[str] | None,
        priority: int,
        timeout_s: float,
        backend: str | None,
        options: Mapping[str, Any],
    ) -> ChatRequest:
        """The request to continue a text, with these arguments (those of `HybridRouter.generate`).

        Raises:
            ConfigError: one of them is invalid.
        """
        checked = options_with_schema(options, None)
        journal = {name: checked.pop(name) for name in JOURNAL_OPTIONS if name in checked}
        return cls(
            **journal,
            messages=[],
            prompt=RawPrompt.checked(text, suffix=suffix, images=images, options=checked),
            options=checked,
            priority=checked_priority(priority),
            timeout_s=checked_timeout_s(timeout_s),
            backend=checked_backend(backend),
            schema=None,
        )

    def with_modelfile(self, modelfile: Modelfile) -> ChatRequest:
        """The request as Ollama completes it from the model's Modelfile. What the caller gives wins."""
        messages = self.messages if self.prompt is not None else [*map(dict, modelfile.messages), *self.messages]
        if messages and modelfile.system and self.messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": modelfile.system})
        given = self.options.get("options") or {}
        defaults = dict(modelfile.options)
        options = {**self.options, "options": {**defaults, **given}} if defaults else self.options
        return replace(self, messages=messages, options=options)


def options_with_schema(options: Mapping[str, Any], schema: object) -> dict[str, Any]:
    """The options of a request, checked, with `format` from the schema if there is one.

    Raises:
        ConfigError: one is invalid, or both `format` and a schema are given.
    """
    checked = check_options(options)
    if schema is not None:
        if "format" in checked:
            raise ConfigError("give either schema or format, not both: each describes the answer")
        checked["format"] = json_schema_of(schema)
    answer_schema(checked)
    if "keep_alive" in checked:
        checked["keep_alive"] = ollama_keep_alive(checked["keep_alive"])
    return checked


def ollama_keep_alive(keep_alive: Any) -> float:
    """The time in seconds, as Ollama takes it. Raises ConfigError if it is not a time."""
    keep_alive_s = keep_alive_seconds(keep_alive)
    return -1 if keep_alive_s is None else keep_alive_s  # its "forever"


def checked_timeout_s(timeout_s: float) -> float:
    """The limit in seconds. Raises ConfigError if it is not a number above 0."""
    if not is_positive(timeout_s):
        raise ConfigError(f"timeout={shown(timeout_s)} must be more than 0 seconds")
    return min(timeout_s, LONGEST_TIMEOUT_S)
