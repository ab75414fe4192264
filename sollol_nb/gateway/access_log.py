"""The gateway's request log: one line of JSON for each request, without prompts, answers or keys."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sollol_nb.gateway.gateway import FinishedRequest
from sollol_nb.runtime.private_files import open_private
from sollol_nb.settings import config

logger = logging.getLogger(__name__)

FILE_NAME = "gateway.jsonl"
STDERR = "-"
WRITE_EVERY_S = 1.0
MAX_PENDING = 20_000
"""Lines that wait to be written; on a slower disk further lines are dropped."""
LIMIT_BYTES = 16 * 1024 * 1024
"""Size at which the file becomes the older file, which replaces the previous older file."""
LONGEST_TEXT = 200
"""Characters of what clients choose: paths and names of models."""


class AccessLog:
    """Collects lines, and writes them once a second in another thread, so that no request waits for the disk.

    Args:
        path: of the file, or `STDERR`; the default is a file in the folder of logs. `/dev/null` disables the log.

    Raises:
        ConfigError: the folder or the file cannot be trusted.
        OSError: the file cannot be written.
    """

    def __init__(self, path: str | None = None) -> None:
        self._is_off = path == os.devnull
        self.path = None
        if path != STDERR and not self._is_off:
            self.path = Path(path) if path is not None else config.log_dir() / FILE_NAME
        self._pending: list[str] = []
        self._lost = 0
        if self.path is not None:
            os.close(open_private(self.path, _APPEND))

    def note(self, request: FinishedRequest) -> None:
        """Add a request that has ended."""
        if self._is_off:
            return
        if len(self._pending) >= MAX_PENDING:
            self._lost += 1
        else:
            self._pending.append(json.dumps(_facts(request), ensure_ascii=True, separators=(",", ":")))

    async def write_always(self) -> None:
        """Write what has been noted, once a second, until this is cancelled; then write the rest."""
        try:
            while True:
                await asyncio.sleep(WRITE_EVERY_S)
                if text := self._take():  # here, where lines are added
                    await asyncio.to_thread(self._write, text)
        finally:
            self.write()

    def write(self) -> None:
        """Write what has been noted."""
        self._write(self._take())

    def _take(self) -> str:
        lines, self._pending = self._pending, []
        if self._lost:
            lines.append(json.dumps({"lost_lines": self._lost}))
            self._lost = 0
        return "".join(f"{line}\n" for line in lines)

    def _write(self, text: str) -> None:
        if not text:
            return
        try:
            if self.path is None:
                sys.stderr.write(text)
                sys.stderr.flush()
            else:
                _append(self.path, text)
        except Exception as error:  # such as a full disk: requests must not fail because of it
            logger.warning("cannot write the log of requests: %s", error)


_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND


def _append(path: Path, text: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > LIMIT_BYTES:
            path.replace(path.with_name(f"{path.name}.1"))
    with os.fdopen(open_private(path, _APPEND), "w", encoding="ascii") as file:
        file.write(text)


def _facts(request: FinishedRequest) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "id": request.request_id,
        "client": request.client,
        "key": request.key,
        "method": request.method[:LONGEST_TEXT],
        "path": request.path[:LONGEST_TEXT],
        "status": request.status,
        "seconds": round(request.duration_s, 4),
    }
    if request.error_kind:
        facts["error"] = request.error_kind
    if (answer := request.answer) is not None:
        routing = answer.routing
        facts |= {
            "api": answer.api,
            "model": answer.model[:LONGEST_TEXT],
            "route": routing.get("coordinator_url") or routing.get("node_url") or routing.get("backend") or "",
            "failovers": len(routing.get("failovers") or ()),
            "prompt_tokens": answer.prompt_tokens,
            "completion_tokens": answer.completion_tokens,
        }
    return facts
