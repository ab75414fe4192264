"""The saved contexts of this user: a private folder with two files for each.

`<id>.kv` is what llama-server wrote of a slot, `<id>.json` what is known of it. The folder is the truth: there is
no index, and any kernel may add and delete at any time. llama-server writes to `<id>.part`; only a whole file gets
its name. The time of change of `<id>.json` is when the context was last used; the least recently used are deleted
where the folder would become larger than `context_cache_gb`, or than half of what is free without it.

Everything here blocks: call it in a thread.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from sollol_nb.errors import ConfigError
from sollol_nb.runtime.private_files import private_folder, read_private, write_private
from sollol_nb.settings import config

FOLDER_NAME = "contexts"
ABOUT_LIMIT_BYTES = 32 * 1024 * 1024
"""Of a `.json` file: a million tokens are about 4 MB of text."""
UNFINISHED_S = 3600.0
"""A `.part` file that has not changed for so long belongs to nobody; nor does a `.kv` file without `.json`."""
BLOCK_BYTES = 4 * 1024 * 1024
_LONG_CHARACTERS = 400
"""So much of a text is taken for that text."""
_MARKUP_CHARACTERS = 200
"""So much may be between two messages: what the chat template writes there."""
_ID = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedContext:
    """One saved context.

    Attributes:
        id: of its files.
        model: the model's name, as it was asked for.
        title: who saved it: the name of the notebook or process.
        made_of: what must be the same on an engine that restores it, as plain data: `model_file`, `engine`, ...
        text: the beginning of what it holds, prompt and answer; the engine compares the tokens.
        tokens: how many it holds.
        size: bytes of its `.kv` file.
        checksum: CRC-32 of that file.
        prefill_ms: milliseconds that processing a token of a prompt took where it was saved; 0 if unknown.
        saved_at, used_at: `time.time()`.
    """

    id: str
    model: str
    title: str
    made_of: Mapping[str, Any]
    text: str
    tokens: int
    size: int
    checksum: int = 0
    prefill_ms: float = 0.0
    saved_at: float = 0.0
    used_at: float = 0.0

    @property
    def file_name(self) -> str:
        """The name of the file that the engine reads."""
        return f"{self.id}.kv"

    def has_turns(self, contents: Sequence[str]) -> bool:
        """Whether it has some of a conversation: a message and the next one, or the beginning of a long first one.

        A conversation that only has the same system message, or the same short question, is another one.

        Args:
            contents: of the conversation's messages in order, without the system message.
        """
        messages = [content.strip() for content in contents]
        first = messages[0][:_LONG_CHARACTERS] if messages else ""
        if len(first) == _LONG_CHARACTERS and first in self.text:
            return True
        return any(self._has_next(*pair) for pair in pairwise(messages)) or self._has_only(messages)

    def _has_next(self, message: str, following: str) -> bool:
        """Whether a message is followed by that other one; of long ones, their ends that meet."""
        end, begin = message[-_LONG_CHARACTERS:], following[:_LONG_CHARACTERS]
        position = self.text.find(end) if end and begin else -1
        while position >= 0:
            position += len(end)
            if self.text.find(begin, position, position + _MARKUP_CHARACTERS + len(begin)) >= 0:
                return True
            position = self.text.find(end, position)
        return False

    def _has_only(self, messages: Sequence[str]) -> bool:
        """Whether the conversation has one message, and this ends soon after it."""
        return (
            len(messages) == 1
            and messages != [""]
            and messages[0] in self.text[-len(messages[0]) - _MARKUP_CHARACTERS :]
        )


class ContextStore:
    """The folder with saved contexts.

    Args:
        folder: it; created when something is saved. Default: `contexts` in the cache folder.
        limit_bytes: how large its files may become together; 0 saves none. Default: the setting
            `context_cache_gb`.
    """

    def __init__(self, folder: Path | None = None, limit_bytes: int | None = None) -> None:
        self.folder = config.cache_dir() / FOLDER_NAME if folder is None else folder
        self.limit_bytes = int(config.default("context_cache_gb") * 1e9) if limit_bytes is None else limit_bytes
        self.known: Sequence[SavedContext] = []
        """As of the last `list`, without a look at the folder."""
        self._read: dict[str, tuple[tuple[int, int], SavedContext]] = {}

    @property
    def is_on(self) -> bool:
        """Whether contexts are saved and restored."""
        return self.limit_bytes > 0

    def prepare(self) -> Path:
        """Create the folder, if need be; returns it.

        Raises:
            ConfigError: it cannot be used: others could write there, say.
        """
        return private_folder(self.folder)

    def list(self) -> Sequence[SavedContext]:
        """All saved contexts, the most recently used last. Reads only files that are new or have changed."""
        found: dict[str, tuple[tuple[int, int], SavedContext]] = {}
        for path in self._files(".json"):
            with suppress(OSError):
                about = path.stat()
                version = (about.st_mtime_ns, about.st_size)
                known = self._read.get(path.stem)
                context = known[1] if known is not None and known[0] == version else _read(path, about.st_mtime)
                if context is not None:
                    found[path.stem] = (version, context)
        self._read = found
        self.known = sorted((context for _, context in found.values()), key=lambda context: context.used_at)
        return self.known

    def begin(self, size: int) -> Path | None:
        """Make room for a context of about so many bytes.

        Returns:
            The path that the engine is to write; its name without `.part` is the new id. None if there is no room
            for as much.

        Raises:
            ConfigError: the folder cannot be used.
        """
        folder = self.prepare()
        if size > self._allowed_bytes():
            return None
        self.prune(size)
        return folder / f"{secrets.token_hex(8)}.part"

    def keep(self, part: Path, context: SavedContext) -> SavedContext | None:
        """Take in what the engine has written.

        Args:
            part: as `begin` returned it.
            context: what it is; `id`, `checksum` and the times are filled in here.

        Returns:
            The saved context; None if the file is not as long as the engine says (the disk is full).
        """
        try:
            part.chmod(0o600)
            if not context.size or part.stat().st_size != context.size:  # of a full disk the engine says 0
                raise OSError(f"{part} is incomplete")
            now = time.time()
            kept = replace(context, id=part.stem, checksum=_checksum(part), saved_at=now, used_at=now)
            data = part.with_suffix(".kv")
            part.replace(data)
            try:
                write_private(part.with_suffix(".json"), json.dumps(_as_dict(kept)))
            except BaseException:
                data.unlink(missing_ok=True)
                raise
        except (OSError, ConfigError):
            self.drop(part)
            return None
        return kept

    def drop(self, part: Path) -> None:
        """Delete what the engine has written so far."""
        with suppress(OSError):
            part.unlink(missing_ok=True)

    def is_whole(self, context: SavedContext) -> bool | None:
        """Whether its file is as it was saved; None if it is gone by now. A damaged one is deleted."""
        path = self.folder / context.file_name
        try:
            if path.stat().st_size == context.size and _checksum(path) == context.checksum:
                return True
        except FileNotFoundError:
            return None
        except OSError:
            return False
        self._delete(context.id)
        return False

    def use(self, context: SavedContext) -> None:
        """Note that it is used now."""
        with suppress(OSError):
            os.utime(self.folder / f"{context.id}.json")

    def prune(self, needed_bytes: int = 0) -> Sequence[SavedContext]:
        """Delete the least recently used contexts until the rest is within the limit, and what belongs to none.

        Args:
            needed_bytes: room to make for a new one.

        Returns:
            What was deleted.
        """
        self._delete_remains()
        contexts = self.list()
        used, allowed = sum(context.size for context in contexts), self._allowed_bytes()
        deleted = []
        for context in contexts:
            if used + needed_bytes <= allowed:
                break
            self._delete(context.id)
            used -= context.size
            deleted.append(context)
        if deleted:
            self.list()
        return deleted

    def forget(self, chosen: Callable[[SavedContext], bool] = lambda _: True) -> Sequence[SavedContext]:
        """Delete the contexts that are chosen, by default all. Slots that still hold them are another matter; see
        `CoordinatorPool.forget_contexts`.

        Returns:
            What was deleted.
        """
        deleted = [context for context in self.list() if chosen(context)]
        for context in deleted:
            self._delete(context.id)
        self.list()
        return deleted

    def _allowed_bytes(self) -> int:
        """How large all files may be together: never more than half of what would be free without them."""
        with suppress(OSError):
            used = sum(path.stat().st_size for path in self._files(".kv"))
            return min(self.limit_bytes, (used + shutil.disk_usage(self.folder).free) // 2)
        return self.limit_bytes

    def _files(self, suffix: str) -> Sequence[Path]:
        try:
            return [path for path in self.folder.iterdir() if path.suffix == suffix and _ID.fullmatch(path.stem)]
        except OSError:  # there is no folder yet
            return []

    def _delete(self, context_id: str) -> None:
        for suffix in (".json", ".kv"):
            with suppress(OSError):
                (self.folder / f"{context_id}{suffix}").unlink(missing_ok=True)

    def _delete_remains(self) -> None:
        """Files of savings that never ended, because a process or machine died, and what nothing can read."""
        oldest = time.time() - UNFINISHED_S
        named = {context.id for context in self.list()}
        others = (path for suffix in (".kv", ".json") for path in self._files(suffix) if path.stem not in named)
        for path in [*self._files(".part"), *others]:
            with suppress(OSError):
                if path.stat().st_mtime < oldest:
                    path.unlink(missing_ok=True)


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _as_dict(context: SavedContext) -> dict[str, Any]:
    return {name: value for name, value in asdict(context).items() if name not in ("id", "used_at")}


def _read(path: Path, used_at: float) -> SavedContext | None:
    """The context that a `.json` file describes; None if it describes none."""
    text = read_private(path, ABOUT_LIMIT_BYTES)
    try:
        data = json.loads(text or "")
        return SavedContext(
            id=path.stem,
            model=str(data["model"]),
            title=str(data["title"]),
            made_of=dict(data["made_of"]),
            text=str(data["text"]),
            tokens=int(data["tokens"]),
            size=int(data["size"]),
            checksum=int(data["checksum"]),
            prefill_ms=float(data["prefill_ms"]),
            saved_at=float(data["saved_at"]),
            used_at=used_at,
        )
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
