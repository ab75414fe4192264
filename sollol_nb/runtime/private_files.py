"""Files and folders that only this user may read and write: the state folder, with prompts, keys and the registry.

What is in such a folder is believed, so a folder is used only if it is the user's and nobody else can write in it,
and a file only if it is a regular one of the user (no link, which would lead outside). Windows protects the user's
folders by itself; there only links are refused.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from sollol_nb.errors import ConfigError

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
"""A FIFO must not block, either."""
READ_LIMIT_BYTES = 1024 * 1024


def private_folder(path: Path, *, shared_parent: bool = False) -> Path:
    """A folder of this user alone, created with mode 0700 if it does not exist; returns it.

    Args:
        path: the folder; it may be reached through links, of which the target counts.
        shared_parent: the folder is not the package's alone (the user chose it), so its mode is not changed unless
            it is empty; others may read the names of what is in it, and nothing else.

    Raises:
        ConfigError: it cannot be created, belongs to another user, or others can write in it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = path.stat()
    except FileExistsError:
        raise ConfigError(
            f"{path} is not a folder; move it away, or set SOLLOL_STATE_DIR to another folder"
        ) from None
    except OSError as error:
        why = error.strerror or str(error)
        raise ConfigError(
            f"cannot use the folder {path} ({why}); set SOLLOL_STATE_DIR to another folder"
        ) from None
    if os.name == "posix":
        if found.st_uid != os.geteuid():
            raise ConfigError(
                f"the folder {path} belongs to another user (uid {found.st_uid}), so what it contains is not "
                "trusted; set SOLLOL_STATE_DIR to another folder"
            )
        if found.st_mode & _OTHERS_WRITE:
            raise ConfigError(
                f"other users can write in the folder {path}, so what it contains is not trusted; check it and "
                f"run `chmod 700 {path}`, or set SOLLOL_STATE_DIR to another folder"
            )
        if stat.S_IMODE(found.st_mode) & 0o077 and not (shared_parent and any(path.iterdir())):
            with contextlib.suppress(OSError):
                path.chmod(0o700)
    return path


def check_private(path: Path) -> None:
    """Check a file that is about to be opened by path (by SQLite, say); it need not exist. Others' access to the
    user's own file is removed.

    Raises:
        ConfigError: it is a link, not a regular file, or belongs to another user; or its mode cannot be changed.
    """
    try:
        found = path.lstat()
        why = _distrusted(found)
        if why:
            raise ConfigError(f"{path} is not used, because it is {why}; move it away")
        if os.name == "posix" and stat.S_IMODE(found.st_mode) & 0o077:
            path.chmod(0o600)
    except FileNotFoundError:
        return
    except OSError as error:
        why = error.strerror or str(error)
        raise ConfigError(f"cannot use {path} ({why}); set SOLLOL_STATE_DIR to another folder") from None


def open_private(path: Path, flags: int) -> int:
    """Open a private file (`os.O_WRONLY | os.O_CREAT`, say); a new one gets mode 0600. Returns its descriptor.

    Raises:
        OSError: it cannot be opened, or is a link.
        ConfigError: it is not a regular file of this user.
    """
    descriptor = os.open(path, flags | _NO_LINK, 0o600)
    why = _distrusted(os.fstat(descriptor))
    if why:
        os.close(descriptor)
        raise ConfigError(f"{path} is not used, because it is {why}; move it away")
    return descriptor


def write_private(path: Path, text: str) -> None:
    """Replace a private file in one step, so that readers see the old or the new text.

    Raises:
        OSError: it cannot be written.
    """
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    with contextlib.suppress(FileNotFoundError):
        new.unlink()
    try:
        with os.fdopen(open_private(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "w", encoding="utf-8") as file:
            file.write(text)
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def read_private(path: Path, limit_bytes: int = READ_LIMIT_BYTES) -> str | None:
    """The text of a private file; None if there is none that can be trusted: it is missing, a link, writable by
    others, of another user, longer than the limit, or not UTF-8."""
    try:
        descriptor = os.open(path, os.O_RDONLY | _NO_LINK)
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if _distrusted(found) or (os.name == "posix" and found.st_mode & _OTHERS_WRITE):
                return None
            data = file.read(limit_bytes + 1)
            return data.decode("utf-8") if len(data) <= limit_bytes else None
    except (OSError, UnicodeDecodeError):
        return None


def _distrusted(found: os.stat_result) -> str:
    """Why a file is not trusted; empty if it is."""
    if stat.S_ISLNK(found.st_mode):
        return "a symbolic link"
    if not stat.S_ISREG(found.st_mode):
        return "not a regular file"
    if os.name == "posix" and found.st_uid != os.geteuid():
        return f"a file of another user (uid {found.st_uid})"
    return ""
