"""The README's Python blocks run as they stand, on real engines."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.engines import script

pytestmark = pytest.mark.engine

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_there_are_blocks() -> None:
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_a_block_runs(engine: object, block: str, tmp_path: Path) -> None:
    with script(block, SOLLOL_STATE_DIR=str(tmp_path), SOLLOL_KEEP_ALIVE="5s") as process:
        shown, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "worker" in shown
