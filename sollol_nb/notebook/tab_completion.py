"""Tab completion in the lines of this package's magics: models, options and their values, conversations, files.

One matcher of IPython's matcher API takes part in its completion, in notebooks and terminals alike. It replaces
the whole word at the cursor, since IPython would split `llama3.1:70b` at the colon, and where it knows an answer
the other matchers (Python names, files) are silent. What disks and Ollama nodes have comes from a cache that is
read behind the completer's back (`completion_cache`); the rest is at hand.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import weakref
from collections.abc import Callable, Iterable
from enum import Enum
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from IPython.core.completer import SimpleCompletion, context_matcher

from sollol_nb.chat.completion import Completion
from sollol_nb.models.files import OllamaGGUFResolver
from sollol_nb.models.profiles import MODEL_PROFILES
from sollol_nb.notebook.tab_cache import CompletionCache, Read
from sollol_nb.notebook.tab_line import Wanted, magic_line, wanted
from sollol_nb.ollama.pool import OllamaPool
from sollol_nb.runtime.io_loop import run_blocking
from sollol_nb.runtime.priority import Priority
from sollol_nb.text.readable import is_of

if TYPE_CHECKING:
    from IPython.core.completer import CompletionContext, SimpleMatcherResult
    from IPython.core.interactiveshell import InteractiveShell

MATCHER = "sollol_nb.completer"
_PRIORITY = 1000  # above IPython's own matchers, which then need not run
_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")

_VALUES = {
    "model": "models",
    "chat": "chats",
    "priority": "priorities",
    "schema": "schemas",
    "out": "answers",
    "save": "files",
    "load": "files",
    "sollol_chat.name": "chats",
    "sollol_log.name": "engines",
    "sollol_stop.names": "engines",
    "sollol_models.text": "models",
    "sollol_cluster.stop": "running",
    "sollol_cluster.remove": "workers",
}
"""Name of an option or argument (see `Wanted.names`) -> what its values are."""


def install(
    shell: InteractiveShell,
    running: Callable[[], Iterable[str]],
    *,
    chats: Callable[[], Iterable[str]] = tuple,
    workers: Callable[[], Iterable[str]] = tuple,
    ollama_models: Read | None = None,
) -> None:
    """Complete the lines of this package's magics. Installing twice is fine.

    Args:
        running: names of the running models; at hand, as is all that follows but the last.
        chats: names of the conversations.
        workers: endpoints of the known workers.
        ollama_models: names of the models of the Ollama nodes; called in a thread, it may be slow. By default the
            nodes of `OLLAMA_HOST` are asked.
    """
    remove(shell)
    cache = CompletionCache()
    names = _Names(shell, cache, running, chats, workers, ollama_models or models_of_nodes)

    @context_matcher(identifier=MATCHER, priority=_PRIORITY)
    def match(context: CompletionContext) -> SimpleMatcherResult:
        line = magic_line(context.text_until_cursor)
        parser = _parser(shell, line.magic) if line is not None else None
        if line is None or parser is None:
            return {"completions": []}
        place = wanted(line, parser)
        completions = _completions(names, place)
        return {
            "completions": completions,
            "matched_fragment": place.fragment,
            "ordered": True,
            "suppress": bool(completions),
        }

    shell.Completer.custom_matchers.append(match)
    _caches[shell] = cache
    cache.refresh(names.slow_models())


def remove(shell: InteractiveShell) -> None:
    """Take the completion out again. Fine where there is none."""
    matchers = shell.Completer.custom_matchers
    matchers[:] = [one for one in matchers if getattr(one, "matcher_identifier", None) != MATCHER]
    cache = _caches.pop(shell, None)
    if cache is not None:
        cache.close()


def models_of_nodes() -> list[str]:
    """Names of the models on the Ollama nodes of `OLLAMA_HOST`, or of this machine. Asks them, and waits.

    Raises:
        OllamaUnavailableError: no node answers.
    """

    async def names() -> list[str]:
        pool = OllamaPool.auto_configure()
        try:
            return [str(model["name"]) for model in (await pool.list())["models"]]
        finally:
            await pool.close()

    return run_blocking(names())


_caches: weakref.WeakKeyDictionary[InteractiveShell, CompletionCache] = weakref.WeakKeyDictionary()


def _parser(shell: InteractiveShell, magic: str) -> Any:
    function = shell.find_line_magic(magic) or shell.find_cell_magic(magic)
    return getattr(function, "parser", None)


def _completions(names: _Names, place: Wanted) -> list[SimpleCompletion]:
    """Values that begin like the fragment, or options where none does."""
    quote = place.fragment[:1] if place.fragment[:1] in ("'", '"') else ""
    typed = place.fragment.removeprefix(quote)
    kind = next((_VALUES[name] for name in place.names if name in _VALUES), None)
    values = place.choices or (names.of(kind, typed) if kind is not None else ())
    fitting = {value for value in values if value.casefold().startswith(typed.casefold())}
    if fitting:
        in_order = sorted(fitting, key=lambda value: (value.casefold(), value))
        return [SimpleCompletion(_written(value, quote), type="value") for value in in_order]
    options = [option for option in place.options if option.startswith(place.fragment)]
    return [SimpleCompletion(option, type="option") for option in options]


def _written(value: str, quote: str) -> str:
    """A value as it is written in a line: in quotes where it has spaces. A folder's quotes stay open."""
    if not quote and not re.search(r"\s", value):
        return value
    quote = quote or '"'
    return quote + value + ("" if value.endswith("/") else quote)


class _Names:
    """What can be named in a magic's line, by kind."""

    def __init__(
        self,
        shell: InteractiveShell,
        cache: CompletionCache,
        running: Callable[[], Iterable[str]],
        chats: Callable[[], Iterable[str]],
        workers: Callable[[], Iterable[str]],
        ollama_models: Read,
    ) -> None:
        self._shell = shell
        self._cache = cache
        self._ollama_models = ollama_models
        self._at_hand = {"running": running, "chats": chats, "workers": workers}

    def slow_models(self) -> dict[str, Read]:
        """The places on disk and in the network where models are."""
        return {"stored": OllamaGGUFResolver().installed, "nodes": self._ollama_models}

    def of(self, kind: str, typed: str) -> Iterable[str]:
        """The names of one kind that may fit what is typed."""
        match kind:
            case "models":
                folder = _Folder(typed)
                slow = self._cache.names(self.slow_models() | folder.place)
                paths = folder.paths(slow.pop(folder.key), ".gguf")
                return {*MODEL_PROFILES, *self._quick("running"), *chain.from_iterable(slow.values()), *paths}
            case "files":
                folder = _Folder(typed)
                return folder.paths(self._cache.names(folder.place)[folder.key], "")
            case "engines":
                return {*self._quick("running"), *self._quick("workers")}
            case "priorities":
                return [name.lower().replace("_", "-") for name in Priority.__members__]
            case "schemas":
                return self._variables(_is_schema)
            case "answers":
                return self._variables(lambda value: isinstance(value, Completion))
        return self._quick(kind)

    def _quick(self, source: str) -> list[str]:
        with contextlib.suppress(Exception):  # a broken source has no names
            return list(self._at_hand[source]())
        return []

    def _variables(self, fits: Callable[[Any], bool]) -> list[str]:
        """The user's variables with a value of some kind."""
        found = []
        for name, value in list(self._shell.user_ns.items()):
            if name.startswith("_") or name in self._shell.user_ns_hidden:
                continue
            with contextlib.suppress(Exception):  # a value may say anything when asked what it is
                if fits(value):
                    found.append(name)
        return found


def _is_schema(value: Any) -> bool:
    """Whether it can be meant as the form of an answer: a class with fields, a JSON schema, an example frame."""
    if isinstance(value, type):
        has_fields = dataclasses.is_dataclass(value) or "__annotations__" in vars(value)
        return has_fields or issubclass(value, Enum) or hasattr(value, "model_json_schema")
    if isinstance(value, dict):
        return not isinstance(value, Completion)
    return is_of(value, "pandas.DataFrame")


class _Folder:
    """The folder of a path that is being typed.

    Attributes:
        key: names it in the cache.
        place: how the cache reads it.
    """

    def __init__(self, typed: str) -> None:
        cut = max(typed.rfind("/"), typed.rfind(os.sep)) + 1
        self._written, self._begun = typed[:cut], typed[cut:]
        self._folder = Path(self._written or ".")
        with contextlib.suppress(RuntimeError, OSError):  # a `~name` without a home, a working folder that is gone
            self._folder = self._folder.expanduser().absolute()
        self.key = f"folder {self._folder}"
        self.place: dict[str, Read] = {self.key: self._entries}

    def _entries(self) -> list[str]:
        """What is in it; folders end in `/`. Of a model in several files only the first, which names the model."""
        with os.scandir(self._folder) as listing:
            names = [f"{entry.name}/" if entry.is_dir() else entry.name for entry in listing]
        return [name for name in names if not _LATER_PART.search(name)]

    def paths(self, entries: Iterable[str], suffix: str) -> list[str]:
        """Files that end so, and folders once a path is begun, as one writes them; hidden ones if asked for."""
        is_begun = bool(self._written or self._begun)
        return [
            self._written + entry
            for entry in entries
            if entry.endswith(suffix) or (entry.endswith("/") and is_begun)
            if self._begun.startswith(".") or not entry.startswith(".")
        ]
