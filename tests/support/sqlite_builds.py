"""SQLite as others build it."""

from __future__ import annotations

import sqlite3
from typing import Any

import pytest


def use_sqlite_that_does_not_erase(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let SQLite erase what is deleted only where it is asked to, as that of python.org; Debian's always does."""
    connect = sqlite3.connect

    def connected(*arguments: Any, **options: Any) -> sqlite3.Connection:
        connection = connect(*arguments, **options)
        connection.execute("PRAGMA secure_delete = OFF")
        return connection

    monkeypatch.setattr(sqlite3, "connect", connected)
