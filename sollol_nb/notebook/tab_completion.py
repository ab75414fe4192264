"""Tab completion in the lines of this package's magics: models, options and their values, conversations, files.

One matcher of IPython's matcher API, for notebooks and terminals alike. It replaces the whole word at the cursor,
since IPython would split `llama3.1:70b` at the colon. Where it has completions, the other matchers (Python names,
files) are not asked. Names from disks and Ollama nodes come from a cache that threads fill, so that no slow source
delays the Tab key; all other names are in memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, wait
from enum import Enum
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from IPython.core.completer import SimpleCompletion, context_matcher

from sollol_nb.chat.completion import Completion
from sollol_nb.errors import ConfigError
from sollol_nb.layers.strategies import STRATEGIES
from sollol_nb.models.files import OllamaGGUFResolver
from sollol_nb.models.found_files import found_files
from sollol_nb.models.profiles import MODEL_PROFILES
from sollol_nb.notebook.tab_expressions import Offer, offers, open_expression
from sollol_nb.notebook.tab_line import Expected, expected, line_at_cursor
from sollol_nb.runtime.io_loop import run_blocking
from sollol_nb.runtime.priority import Priority
from sollol_nb.settings import config
from sollol_nb.settings.endpoints import SSH
from sollol_nb.settings.ssh_hosts import configured_hosts
from sollol_nb.text.readable_frames import is_instance_of

if TYPE_CHECKING:
    from IPython.core.completer import CompletionContext, SimpleMatcherResult
    from IPython.core.interactiveshell import InteractiveShell

Read = Callable[[], Iterable[str]]

MATCHER = "sollol_nb.completer"
WAIT_LIMIT_S = 0.03
"""How long one completion waits for slow sources: people feel a Tab that takes longer than 50 ms."""
FRESH_FACTOR, MAX_FRESH_S = 20.0, 30.0
"""Names stay fresh for this many times as long as reading them took: a quick disk is read each time."""
CLOSE_LIMIT_S = 4.0
_PRIORITY = 1000  # above IPython's own matchers, which then need not run
_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")

_KINDS = {
    "model": "models",
    "chat": "chats",
    "priority": "priorities",
    "schema": "schemas",
    "tools": "functions",
    "strategies": "strategies",
    "out": "answers",
    "answer": "answers",
    "save": "files",
    "load": "files",
    "sollol_chat.name": "chats",
    "sollol_log.name": "engines",
    "sollol_stop.names": "engines",
    "sollol_models.text": "models",
    "sollol_cluster.stop": "engines",
    "sollol_cluster.preload": "models",
    "sollol_cluster.add": "machines",
    "sollol_cluster.remove": "workers",
    "ssh": "hosts",
    "sollol_cluster.calibrate": "workers",
}
"""Name of an option or argument (see `Expected.names`) -> the kind of its values."""


def install(
    shell: InteractiveShell,
    running: Callable[[], Iterable[str]],
    *,
    chats: Callable[[], Iterable[str]] = tuple,
    workers: Callable[[], Iterable[str]] = tuple,
    ollama_models: Read | None = None,
    typed: Callable[[str], object] = lambda cell: None,
) -> None:
    """Complete the lines of this package's magics. Installing twice is fine.

    Args:
        running: names of the running models, from memory.
        chats: names of the conversations, from memory.
        workers: endpoints of the known workers, and what leads to other machines, from memory.
        ollama_models: names of the models of the Ollama nodes; called in a thread, may be slow. By default the
            nodes of the setting `ollama_hosts` are asked.
        typed: called with a cell up to the cursor, if that is below its first line; must not wait.
    """
    remove(shell)
    cache = NameCache()
    names = _Names(shell, cache, running, chats, workers, ollama_models or models_of_nodes)

    @context_matcher(identifier=MATCHER, priority=_PRIORITY)
    def match(context: CompletionContext) -> SimpleMatcherResult:
        if context.cursor_line:
            before = context.full_text.split("\n")[: context.cursor_line]
            with contextlib.suppress(Exception):  # completions come whatever else fails
                typed("\n".join(before))
        inserted = _inserted(shell, context)
        if inserted is not None:
            completions = [SimpleCompletion(text, type="instance") for text in inserted.texts]
            return {"completions": completions, "matched_fragment": inserted.fragment, "suppress": True}
        line = line_at_cursor(context.text_until_cursor)
        parser = _parser(shell, line.magic) if line is not None else None
        if line is None or parser is None:
            return {"completions": []}
        at_cursor = expected(line, parser)
        completions = _completions(names, at_cursor)
        return {
            "completions": completions,
            "matched_fragment": at_cursor.fragment,
            "ordered": True,
            "suppress": bool(completions),
        }

    shell.Completer.custom_matchers.append(match)
    _caches[shell] = cache
    cache.refresh(names.slow_models())


def remove(shell: InteractiveShell) -> None:
    """Remove the completion again. Fine where it is not installed."""
    matchers = shell.Completer.custom_matchers
    matchers[:] = [matcher for matcher in matchers if getattr(matcher, "matcher_identifier", None) != MATCHER]
    cache = _caches.pop(shell, None)
    if cache is not None:
        cache.close()


def models_of_nodes() -> list[str]:
    """Names of the models on the Ollama nodes of the setting `ollama_hosts`. Asks them, and waits.

    Raises:
        OllamaUnavailableError: no node answers.
    """

    from sollol_nb.ollama.pool import OllamaPool  # in this thread, so that `%load_ext` need not wait for it

    async def names() -> list[str]:
        pool = OllamaPool.auto_configure()
        try:
            return [str(model["name"]) for model in (await pool.list())["models"]]
        finally:
            await pool.close()

    return run_blocking(names())


class NameCache:
    """The names that slow sources gave last, by the sources' keys.

    Each source is read in its own thread, which ends with the reading: a source that hangs delays no other.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._names: dict[str, tuple[str, ...]] = {}
        self._fresh_until: dict[str, float] = {}
        self._readings: dict[str, Future[None]] = {}
        self._closed = False

    def names(self, sources: Mapping[str, Read]) -> dict[str, tuple[str, ...]]:
        """The names of each source: those it gives within `WAIT_LIMIT_S`, else those it gave last."""
        wait(self.refresh(sources), timeout=WAIT_LIMIT_S)
        with self._lock:
            return {key: self._names.get(key, ()) for key in sources}

    def refresh(self, sources: Mapping[str, Read]) -> list[Future[None]]:
        """Begin to read those sources that are neither fresh nor being read."""
        begun = []
        with self._lock:
            for key, read in sources.items():
                is_fresh = time.monotonic() < self._fresh_until.get(key, 0.0)
                if self._closed or is_fresh or key in self._readings:
                    continue
                self._readings[key] = Future()
                begun.append(self._readings[key])
                thread = threading.Thread(
                    target=self._read, args=(key, read), name=f"sollol_nb completion {key}", daemon=True
                )
                thread.start()
        return begun

    def close(self) -> None:
        """Read nothing from now on. Waits for readings to end, but not for a source that hangs."""
        with self._lock:
            self._closed = True
            readings = list(self._readings.values())
        wait(readings, timeout=CLOSE_LIMIT_S)

    def _read(self, key: str, read: Read) -> None:
        names: tuple[str, ...] | None = None
        began = time.monotonic()
        with contextlib.suppress(Exception):  # a broken source keeps its last names
            names = tuple(read())
        with self._lock:
            if names is not None:
                self._names[key] = names
            ended = time.monotonic()
            self._fresh_until[key] = ended + min(FRESH_FACTOR * (ended - began), MAX_FRESH_S)
            reading = self._readings.pop(key)
        reading.set_result(None)


_caches: weakref.WeakKeyDictionary[InteractiveShell, NameCache] = weakref.WeakKeyDictionary()


def _parser(shell: InteractiveShell, magic: str) -> Any:
    function = shell.find_line_magic(magic) or shell.find_cell_magic(magic)
    return getattr(function, "parser", None)


def _inserted(shell: InteractiveShell, context: CompletionContext) -> Offer | None:
    """The completions of the `{{ }}` at the cursor, in a line or a cell of one of this package's magics."""
    text = context.text_until_cursor
    line = line_at_cursor(text)
    if line is None and context.full_text.startswith("%%"):
        before = context.full_text.split("\n")[: context.cursor_line]
        line = line_at_cursor(f"{before[0]} ") if before else None
        text = "\n".join([*before, text])
    if line is None or _parser(shell, line.magic) is None:
        return None
    expression = open_expression(text)
    if expression is None:
        return None
    hidden = shell.user_ns_hidden
    variables = {
        name: value
        for name, value in shell.user_ns.items()
        if name not in hidden or hidden[name] is not value  # the user's own, though it has a name of IPython's
    }
    return offers(expression, variables)


def _completions(names: _Names, at_cursor: Expected) -> list[SimpleCompletion]:
    """Values that begin with the fragment, or options where no value does."""
    quote = at_cursor.fragment[:1] if at_cursor.fragment[:1] in ("'", '"') else ""
    typed = at_cursor.fragment.removeprefix(quote)
    kind = next((_KINDS[name] for name in at_cursor.names if name in _KINDS), None)
    values = at_cursor.choices or (names.of(kind, typed) if kind is not None else ())
    matching = {value for value in values if value.casefold().startswith(typed.casefold())}
    if matching:
        in_order = sorted(matching, key=lambda value: (value.casefold(), value))
        return [SimpleCompletion(_quoted(value, quote), type="value") for value in in_order]
    options = [option for option in at_cursor.options if option.startswith(at_cursor.fragment)]
    return [SimpleCompletion(option, type="option") for option in options]


def _quoted(value: str, quote: str) -> str:
    """A value in quotes if it needs them. A folder's quotes stay open."""
    if not quote and not re.search(r"\s", value):
        return value
    quote = quote or '"'
    return quote + value + ("" if value.endswith("/") else quote)


class _Names:
    """What can be named in a magic's line, by kind."""

    def __init__(
        self,
        shell: InteractiveShell,
        cache: NameCache,
        running: Callable[[], Iterable[str]],
        chats: Callable[[], Iterable[str]],
        workers: Callable[[], Iterable[str]],
        ollama_models: Read,
    ) -> None:
        self._shell = shell
        self._cache = cache
        self._ollama_models = ollama_models
        self._in_memory = {"running": running, "chats": chats, "workers": workers, "saved": config.saved_models}

    def slow_models(self) -> dict[str, Read]:
        """The sources of model names on disk and in the network."""
        hosts: Any = None
        with contextlib.suppress(ConfigError):  # the request says so
            hosts = config.default("ollama_hosts")
        return {
            "stored": OllamaGGUFResolver().installed,
            "found": lambda: found_files().by_name,
            f"nodes {hosts}": self._ollama_models,
        }

    def of(self, kind: str, typed: str) -> Iterable[str]:
        """The names of one kind that may match the typed text."""
        match kind:
            case "models":
                folder = _Folder(typed)
                slow = self._cache.names(self.slow_models() | folder.source)
                paths = folder.paths(slow.pop(folder.key), ".gguf")
                saved = self._quick("saved")
                return {
                    *MODEL_PROFILES,
                    *saved,
                    *self._quick("running"),
                    *chain.from_iterable(slow.values()),
                    *paths,
                }
            case "files":
                folder = _Folder(typed)
                return folder.paths(self._cache.names(folder.source)[folder.key], "")
            case "hosts" | "machines":  # of several with commas, the last one is completed
                begun = typed[: typed.rfind(",") + 1] if kind == "hosts" else SSH
                return [f"{begun}{host}" for host in self._cache.names({"ssh": configured_hosts})["ssh"]]
            case "strategies":  # of several with commas, the last one is completed
                return [f"{typed[: typed.rfind(',') + 1]}{strategy}" for strategy in STRATEGIES]
            case "engines":
                return {*self._quick("running"), *self._quick("workers")}
            case "priorities":
                return [name.lower().replace("_", "-") for name in Priority.__members__]
            case "schemas":
                return self._variables(_is_schema)
            case "functions":  # of several with commas, the last one is completed
                begun = typed[: typed.rfind(",") + 1]
                return [f"{begun}{name}" for name in self._variables(inspect.isroutine)]
            case "answers":
                return self._variables(lambda value: isinstance(value, Completion))
        return self._quick(kind)

    def _quick(self, source: str) -> list[str]:
        with contextlib.suppress(Exception):  # a broken source has no names
            return list(self._in_memory[source]())
        return []

    def _variables(self, has_kind: Callable[[Any], bool]) -> list[str]:
        """The user's variables whose value is of some kind."""
        found = []
        for name, value in list(self._shell.user_ns.items()):
            if name.startswith("_") or name in self._shell.user_ns_hidden:
                continue
            with contextlib.suppress(Exception):  # a user's class may raise anything from `isinstance`
                if has_kind(value):
                    found.append(name)
        return found


def _is_schema(value: Any) -> bool:
    """Whether it may be the schema of an answer: a class with fields, a JSON schema, an example frame."""
    if isinstance(value, type):
        has_fields = dataclasses.is_dataclass(value) or "__annotations__" in vars(value)
        return has_fields or issubclass(value, Enum) or hasattr(value, "model_json_schema")
    if isinstance(value, dict):
        return not isinstance(value, Completion)
    return is_instance_of(value, "pandas.DataFrame")


class _Folder:
    """The folder of a path that is being typed.

    Attributes:
        key: its name in the cache.
        source: how the cache reads it, by that key.
    """

    def __init__(self, typed: str) -> None:
        cut = max(typed.rfind("/"), typed.rfind(os.sep)) + 1
        self._typed, self._begun = typed[:cut], typed[cut:]
        self._folder = Path(self._typed or ".")
        with contextlib.suppress(RuntimeError, OSError):  # a `~name` without a home, a deleted working folder
            self._folder = self._folder.expanduser().absolute()
        self.key = f"folder {self._folder}"
        self.source: dict[str, Read] = {self.key: self._entries}

    def _entries(self) -> list[str]:
        """Its files and folders; folders end with `/`. Of a model in several parts only the first."""
        with os.scandir(self._folder) as listing:
            names = [f"{entry.name}/" if entry.is_dir() else entry.name for entry in listing]
        return [name for name in names if not _LATER_PART.search(name)]

    def paths(self, entries: Iterable[str], suffix: str) -> list[str]:
        """Paths, as the user types them, of files with this suffix, and of folders once a path is begun; hidden
        ones only after a dot."""
        is_begun = bool(self._typed or self._begun)
        return [
            self._typed + entry
            for entry in entries
            if entry.endswith(suffix) or (entry.endswith("/") and is_begun)
            if self._begun.startswith(".") or not entry.startswith(".")
        ]
