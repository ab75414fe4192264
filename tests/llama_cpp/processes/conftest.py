"""What the tests of supervisors share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.supervised import nothing_is_left


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder for the files of this test's supervisors; none of them runs at the end."""
    yield tmp_path
    nothing_is_left(tmp_path)
