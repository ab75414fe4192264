"""The threat model names tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "SECURITY.md").read_text(encoding="utf-8")
NAMED = re.compile(r"`([\w/]*\.py)?(?:::(\w+))?`")


def functions_of(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_each_named_test_exists() -> None:
    count = 0
    for line in PAGE.splitlines():
        file: Path | None = None
        for path, test in NAMED.findall(line):
            file = TESTS / path if path else file
            assert file is not None, f"no file before ::{test}"
            assert file.is_file(), f"{path} does not exist"
            assert not test or test in functions_of(file), f"{file.name} has no {test}"
            count += 1
    assert count > 40


def test_each_claim_names_a_test_or_says_that_nothing_stops_it() -> None:
    for row in re.findall(r"^\|(?!-| (?:what|could) \|)(.*)\|$", PAGE, re.MULTILINE):
        *_, what_stops_it, shown_by = (cell.strip() for cell in row.split("|"))
        assert shown_by or re.match(r"\W*nothing|Ollama decides|a worker gets", what_stops_it), row
