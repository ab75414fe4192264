"""Whether a call of a model may be made: the user is asked, in the terminal or below the cell."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeAlias

from sollol_nb.chat.tool_steps import call_text
from sollol_nb.errors import ConfigError
from sollol_nb.runtime.amounts import shown

Confirm: TypeAlias = Callable[[str, Mapping[str, Any]], "bool | Awaitable[bool]"]
"""Takes the name of the function and its arguments."""

SHOWN_CHARS = 4000
CANNOT_ASK = (
    "cannot ask before {name} is called: this front end takes no input; leave out confirm (setting "
    "confirm_tools), or give confirm=FUNCTION"
)


def checked_confirm(confirm: Any, default: bool) -> Confirm | None:
    """What decides about calls; None allows all.

    Args:
        confirm: True, False, a function, or None for the default.

    Raises:
        ConfigError: something else.
    """
    if callable(confirm):
        function: Confirm = confirm
        return function
    if not isinstance(confirm, bool | None):
        raise ConfigError(
            f"confirm={shown(confirm)} must be True, False, or a function of a name and its arguments"
        )
    return AskUser() if (default if confirm is None else confirm) else None


class AskUser:
    """Asks the user about each call of one answer, until the user allows all of them."""

    def __init__(self) -> None:
        self._allows_all = False

    def __call__(self, name: str, arguments: Mapping[str, Any]) -> bool:
        """Whether the user allows the call.

        Raises:
            ConfigError: nobody can be asked.
        """
        question = (
            f"{call_text(name, arguments, SHOWN_CHARS)}\nCall {name}? [y]es, [n]o, [a]ll calls of this answer: "
        )
        while not self._allows_all:
            try:
                answer = input(question).strip().lower()
            except (EOFError, NotImplementedError, RuntimeError, OSError):
                raise ConfigError(CANNOT_ASK.format(name=name)) from None
            if answer in ("n", "no"):
                return False
            if answer in ("y", "yes"):
                return True
            self._allows_all = answer in ("a", "all")
            question = "Please answer y, n or a: "
        return True
