"""API keys: each with a name, a priority and limits. They are made and removed with `sollol-nb key`.

The file of keys is in the state folder and has only hashes. A running gateway reads it again after each change.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import re
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sollol_nb.errors import ConfigError
from sollol_nb.runtime.amounts import is_whole_number, shown
from sollol_nb.runtime.priority import Priority, is_priority
from sollol_nb.runtime.private_files import read_private, write_private
from sollol_nb.settings import config

logger = logging.getLogger(__name__)

FILE_NAME = "gateway_keys.json"
PREFIX = "snb-"
"""The beginning of every key, so that scanners for leaked secrets can find it."""
KEY_BYTES = 32
LONGEST = 128
"""Characters of a text that can be a key."""
LOCK_TIMEOUT_S = 10.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What requests with this key may do.

    Attributes:
        name: for logs and metrics.
        priority: of requests that name none, 1 to 10.
        limits_priority: whether requests may not have a higher one.
        may_control: whether it may change the cluster, pull models and name model files.
        max_requests: at the same time; None is the gateway's limit.
        requests_per_minute: None means no limit.
    """

    name: str
    priority: int = Priority.NORMAL
    limits_priority: bool = True
    may_control: bool = False
    max_requests: int | None = None
    requests_per_minute: int | None = None

    def __str__(self) -> str:
        parts = [f"priority {self.priority}"]
        if self.max_requests is not None:
            parts.append(f"{self.max_requests} requests at the same time")
        if self.requests_per_minute is not None:
            parts.append(f"{self.requests_per_minute} requests a minute")
        if self.may_control:
            parts.append("may change the cluster")
        return f"{self.name}: {', '.join(parts)}"


ANYBODY = Key(name="", limits_priority=False, may_control=True)
"""For requests on loopback, if there are no keys."""
WITHOUT_KEY = Key(name="")
"""For requests without a key, if there are keys but none is required."""


class Keys:
    """The keys of a file, as it is now. A lookup is cheap: the file is read only after it has changed.

    Args:
        path: of the file; it need not exist. The default is the one that `sollol-nb key` writes.

    Raises:
        ConfigError: the file cannot be trusted or read.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path or keys_file()
        self._version = _version_of(self._path)
        self._keys = _read(self._path)

    def __repr__(self) -> str:
        return f"Keys({str(self._path)!r})"

    @property
    def exist(self) -> bool:
        """Whether there is any key now."""
        self._look()
        return bool(self._keys)

    @property
    def all(self) -> Sequence[Key]:
        """All keys, as they are now."""
        self._look()
        return [key for _, key in self._keys]

    def find(self, text: str) -> Key | None:
        """The key with this text; None if there is none."""
        self._look()
        digest = _digest(text) if len(text) <= LONGEST else ""
        found = None
        for known, key in self._keys:  # compare all keys: the time must not depend on which key matches
            if hmac.compare_digest(known, digest):
                found = key
        return found

    def _look(self) -> None:
        version = _version_of(self._path)
        if version == self._version:
            return
        self._version = version
        try:
            self._keys = _read(self._path)
        except ConfigError as error:
            logger.error("%s; the keys that were read before stay valid", error)


def keys_file() -> Path:
    """The path of the file of keys.

    Raises:
        ConfigError: the state folder cannot be trusted.
    """
    return config.state_file(FILE_NAME)


def add_key(key: Key, path: Path | None = None) -> str:
    """Make a key and add it to the file; returns it. It cannot be shown again.

    Raises:
        ConfigError: the name is taken or not valid, a limit is not valid, or the file cannot be written.
    """
    _check(key)
    text = PREFIX + secrets.token_urlsafe(KEY_BYTES)

    def added(keys: list[tuple[str, Key]]) -> list[tuple[str, Key]]:
        if any(known.name == key.name for _, known in keys):
            raise ConfigError(f"the key {key.name} exists already; choose another name, or remove it")
        return [*keys, (_digest(text), key)]

    _change(path or keys_file(), added)
    return text


def remove_key(name: str, path: Path | None = None) -> None:
    """Remove a key from the file: requests with it are refused from now on.

    Raises:
        ConfigError: there is none with this name, or the file cannot be written.
    """

    def removed(keys: list[tuple[str, Key]]) -> list[tuple[str, Key]]:
        left = [(digest, key) for digest, key in keys if key.name != name]
        if len(left) == len(keys):
            names = ", ".join(key.name for _, key in keys) or "none"
            raise ConfigError(f"there is no key {shown(name)}; keys: {names}")
        return left

    _change(path or keys_file(), removed)


def _digest(text: str) -> str:
    # A plain SHA-256 is enough: keys are 256 random bits, which nobody can guess, however quick the hash is. A
    # slow one (scrypt) protects passwords that people choose, and would cost each request milliseconds.
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def _check(key: Key) -> None:
    if not _NAME.fullmatch(key.name):
        raise ConfigError(
            f"the name {shown(key.name)} must have 1 to 64 letters, digits or ._@-, the first a letter or digit"
        )
    if not is_priority(key.priority):
        raise ConfigError(f"priority={shown(key.priority)} must be 1 to 10")
    for label, limit in (("max_requests", key.max_requests), ("requests_per_minute", key.requests_per_minute)):
        if limit is not None and not (is_whole_number(limit) and 1 <= limit <= 1_000_000):
            raise ConfigError(f"{label}={shown(limit)} must be a whole number from 1 to 1000000")


# --- the file -----------------------------------------------------------------------------------


def _version_of(path: Path) -> tuple[int, int, int] | None:
    """Differs after each change; None if there is no file."""
    try:
        found = os.stat(path)  # noqa: PTH116  # on the way of each request
    except FileNotFoundError:
        return None
    except OSError:  # it may exist, and without keys every request would be allowed
        return -1, -1, -1
    return found.st_mtime_ns, found.st_size, found.st_ino


def _read(path: Path) -> list[tuple[str, Key]]:
    """The hash of each key, and the key."""
    if _version_of(path) is None:
        return []
    text = read_private(path)
    if text is None:
        raise ConfigError(f"the file of keys {path} cannot be read or trusted; check its owner and mode (0600)")
    try:
        return [(_checked_digest(entry), _key(entry)) for entry in json.loads(text)["keys"]]
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise ConfigError(f"the file of keys {path} is damaged ({error}); remove it and make new keys") from None


def _checked_digest(entry: dict[str, Any]) -> str:
    digest: str = entry["sha256"]
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError("a hash is not valid")
    return digest


def _key(entry: dict[str, Any]) -> Key:
    key = Key(
        name=entry["name"],
        priority=entry["priority"],
        may_control=entry["may_control"] is True,
        max_requests=entry["max_requests"],
        requests_per_minute=entry["requests_per_minute"],
    )
    _check(key)
    return key


def _change(path: Path, change: Callable[[list[tuple[str, Key]]], list[tuple[str, Key]]]) -> None:
    from filelock import FileLock, Timeout  # here, so that `sollol-nb --help` is quick

    lock = path.with_suffix(".lock")
    try:
        with FileLock(lock, timeout=LOCK_TIMEOUT_S):
            entries = [
                {
                    "name": key.name,
                    "sha256": digest,
                    "priority": int(key.priority),
                    "may_control": key.may_control,
                    "max_requests": key.max_requests,
                    "requests_per_minute": key.requests_per_minute,
                }
                for digest, key in change(_read(path))
            ]
            write_private(path, json.dumps({"keys": entries}, indent=1) + "\n")
    except Timeout:
        raise ConfigError(f"{path} is being written by another program ({lock}); try again") from None
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from None
    with suppress(OSError):
        lock.chmod(0o600)
