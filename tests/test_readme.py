"""What the README shows works: its Python blocks and the cells of its beginning run on real engines, its commands
and options exist, and its links and pictures lead somewhere."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from sollol_nb import notebook
from sollol_nb.cli.main import _parser
from tests.support.engines import script
from tests.support.kernels import MAGICS, notebook_kernel

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PYTHON = [block for language, block in FENCED if language == "python"]
CELLS = [block for _, block in FENCED if block.startswith("%")]
LINES = [line for language, block in FENCED if language in ("", "bash") for line in block.splitlines()]
INLINE = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL))
OPTION = re.compile(r"(?<!\S)(--?[a-z][\w-]*)")
PICTURE_BYTES = 400_000


def words(text: str) -> list[str]:
    return shlex.split(text.replace("...", ""), comments=True)


def uses(program: str) -> Iterator[list[str]]:
    """The words after a program, wherever the README shows it."""
    for text in (*LINES, *INLINE):
        found = words(text) if text.startswith(program) or f" {program} " in text else []
        if program in found:
            yield found[found.index(program) + 1 :]


def test_there_are_blocks() -> None:
    assert len(PYTHON) >= 2
    assert len(CELLS) >= 3


@pytest.mark.engine
@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
def test_a_python_block_runs(engine: object, block: str, tmp_path: Path) -> None:
    with script(block, SOLLOL_STATE_DIR=str(tmp_path), SOLLOL_KEEP_ALIVE="5s") as process:
        shown, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "worker" in shown


@pytest.mark.engine
def test_the_first_cells_run(engine: object, tmp_path: Path) -> None:
    beginning = README[: README.index("## Commands")]
    cells = [cell for cell in CELLS if cell in beginning]
    assert len(cells) >= 2
    with notebook_kernel(tmp_path) as kernel:
        for cell in cells:
            shown = kernel.run(cell)
            assert (shown.status, shown.error) == ("ok", []), cell
        assert "workers" in kernel.value("answer.text")
        assert "3" in kernel.value("len(answer.routing['plan']['shards'])")


def test_each_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    asked = {rest[0] for rest in uses("make") if rest}
    assert {"demo", "lab"} <= asked
    assert asked <= targets


def test_each_subcommand_and_its_options_exist() -> None:
    commands = next(action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    asked = [rest for rest in uses("sollol-nb") if rest]
    assert len(asked) > 10
    for rest in asked:
        parser = commands.choices[rest[0]]
        nested = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        if nested and len(rest) > 1:
            parser = nested[0].choices[rest[1]]
        own = rest[: rest.index("--")] if "--" in rest else rest
        for option in OPTION.findall(" ".join(own)):
            assert option in parser._option_string_actions, f"sollol-nb {' '.join(rest)}"


def test_each_magic_and_its_options_exist() -> None:
    parsers = {
        name: getattr(magics, method).parser
        for magics in notebook._MAGICS
        for kind in ("line", "cell")
        for name, method in magics.magics[kind].items()
    }
    shown = [text for text in (*LINES, *INLINE) if re.match(r"%%?sollol", text)]
    assert {re.split(r"[ ?]", text.lstrip("%"))[0] for text in shown} >= set(MAGICS)
    for text in shown:
        name, *rest = words(text.lstrip("%").rstrip("?"))
        for option in OPTION.findall(" ".join(rest)):
            assert option in parsers[name]._option_string_actions, text


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a file."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_each_link_leads_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", README) if not link.startswith("https://")]
    assert len(links) > 10
    for link in links:
        path, _, anchor = link.partition("#")
        file = ROOT / (path or "README.md")
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


def test_each_picture_is_there_is_small_and_is_described() -> None:
    pictures = re.findall(r"!\[([^\]]*)\]\(([^)\s]+)\)", README)
    assert pictures
    for text, path in pictures:
        assert len(text) > 40, path
        assert (ROOT / path).stat().st_size < PICTURE_BYTES, path
