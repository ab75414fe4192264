"""The names of hosts in the user's configuration of ssh (`~/.ssh/config`, ssh_config(5)); only for completion.

The ssh program itself reads the configuration; nothing here is needed to connect.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

LONGEST_FILE_BYTES = 1024 * 1024
DEEPEST_INCLUDE = 4
_LINE = re.compile(r"\s*(\w+)(?:\s*=\s*|\s+)(.*?)\s*$")


def configured_hosts(config: Path | None = None) -> list[str]:
    """The hosts that have a `Host` line of their own, without patterns, in the order of the file. Files that it
    includes are read, too; one that cannot be read is left out.

    Args:
        config: the file; by default the user's.
    """
    folder = Path("~/.ssh").expanduser()
    return list(dict.fromkeys(_hosts(config or folder / "config", folder, DEEPEST_INCLUDE)))


def _hosts(path: Path, folder: Path, depth: int) -> list[str]:
    found: list[str] = []
    for line in _text(path).splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        keyword, values = match[1].lower(), match[2].replace('"', " ").split()
        if keyword == "host":
            found += [value for value in values if not re.search(r"[*?!]|^-", value)]
        elif keyword == "include" and depth:
            for value in values:
                with contextlib.suppress(OSError, ValueError, RuntimeError, NotImplementedError):
                    for included in sorted(_matching(value, folder)):
                        found += _hosts(included, folder, depth - 1)
    return found


def _matching(pattern: str, folder: Path) -> list[Path]:
    """The files that an include line names; relative ones are in the folder."""
    path = folder / Path(pattern).expanduser()
    root = Path(path.anchor)
    return list(root.glob(str(path.relative_to(root))))


def _text(path: Path) -> str:
    with contextlib.suppress(OSError), path.open(encoding="utf-8", errors="replace") as file:
        return file.read(LONGEST_FILE_BYTES)
    return ""
