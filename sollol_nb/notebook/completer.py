"""Tab completion of model names after `%%sollol`, `%sollol`, `%sollol_route` and `%sollol_stop`.

Names are those of the profiles, of the running coordinators, and of what is really installed in Ollama's
storage on this machine; the storage is a few small files, read when asked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sollol_nb.ollama_gguf_resolver import OllamaGGUFResolver
from sollol_nb.profiles import MODEL_PROFILES

if TYPE_CHECKING:
    from collections.abc import Callable

    from IPython.core.interactiveshell import InteractiveShell

COMMANDS = ("%%sollol", "%sollol", "%sollol_route", "%sollol_stop")
_HOOK = "complete_command"


def install(shell: InteractiveShell, running: Callable[[], list[str]]) -> None:
    """Complete model names. `running` gives the names of running models."""

    def complete(_: Any, event: Any) -> list[str]:
        words = event.text_until_cursor.split()
        if len(words) > 2 or (len(words) == 2 and event.text_until_cursor[-1].isspace()):
            return []  # the model is already there
        names = {*MODEL_PROFILES, *running(), *OllamaGGUFResolver().installed()}
        # What readline-like completers replace starts after the last of their delimiters, such as a colon.
        typed = words[1] if len(words) == 2 else ""
        cut = len(typed) - len(event.symbol)
        return sorted(name[cut:] for name in names if name.startswith(typed))

    for command in COMMANDS:
        shell.set_hook(_HOOK, complete, str_key=command)


def remove(shell: InteractiveShell) -> None:
    """Take the completion out again; IPython has no call for that."""
    dispatcher = shell.strdispatchers.get(_HOOK)
    if dispatcher is not None:
        for command in COMMANDS:
            dispatcher.strs.pop(command, None)
