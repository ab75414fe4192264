"""A text that a model continues, without a chat template. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sollol_nb.chat.plain_data import checked_text
from sollol_nb.errors import ConfigError
from sollol_nb.runtime.amounts import shown

_OF_CHATS = ("tools", "tool_choice", "parallel_tool_calls", "think")


@dataclass(frozen=True, slots=True, kw_only=True)
class RawPrompt:
    """A text to continue.

    Attributes:
        text: as the model reads it; special tokens may be written as text.
        suffix: what follows the answer, which fills the gap; "" for nothing.
        images: in base64; the text says with `[img-0]`, `[img-1]`, ... where they are.
    """

    text: str
    suffix: str = ""
    images: tuple[str, ...] = ()

    @classmethod
    def checked(cls, text: Any, *, suffix: Any, images: Any, options: Mapping[str, Any]) -> RawPrompt:
        """The prompt with these arguments (those of `Router.generate`).

        Args:
            options: of the request, checked.

        Raises:
            ConfigError: one of them is invalid, or an option has no meaning without a chat.
        """
        if not isinstance(text, str) or not text:
            raise ConfigError(f"prompt={shown(text)} must be text, and not empty")
        if not isinstance(suffix, str | None):
            raise ConfigError(f"suffix={shown(suffix)} must be text")
        is_list = isinstance(images, list | tuple | None)
        if not is_list or not all(isinstance(image, str) for image in images or ()):
            raise ConfigError("images must be a list of base64 texts")
        for name in _OF_CHATS:
            if options.get(name):
                raise ConfigError(f"a raw prompt does not take {name}; ask with messages")
        for position in range(len(images or ())):
            if f"[img-{position}]" not in text:
                raise ConfigError(f"a raw prompt says with [img-{position}] where its image number {position} is")
        return cls(
            text=checked_text(text, "prompt"),
            suffix=checked_text(suffix or "", "suffix"),
            images=tuple(images or ()),
        )
