"""Each notebook begins with what it gives, a picture of it, and three steps. (nbval runs their cells.)"""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PICTURE = re.compile(r"^!\[([^\]]+)\]\(([^)\s]+)\)$", re.MULTILINE)
NO_PROSE = re.compile(r"!\[[^\]]*\]\([^)]*\)|```.*?```|^#[^\n]*", re.MULTILINE | re.DOTALL)
PICTURE_BYTES = 400_000
WORDS = {
    "worker": r"\*worker\*|\*workers\*:",
    "layer": r"\*layers?\*",
    "token": r"\*token\*|tokens? \(",
    "coordinator": r"\*coordinator\*",
    "slots": r"\*slots\*|\*slot\*",
    "GGUF": r"GGUF file \(|\(a GGUF file",
    "profile": r"\*profile\*",
}
"""How a word of this field is explained, where a text uses it."""


def markdown(path: Path) -> list[str]:
    """The texts of a notebook."""
    return [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown"]


def test_there_are_notebooks() -> None:
    assert len(NOTEBOOKS) >= 8


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_begins_with_what_it_gives_a_picture_and_three_steps(path: Path) -> None:
    first = markdown(path)[0]
    title, gives, picture, steps = first.split("\n\n")[:4]
    assert title.startswith("# ")
    assert 1 <= len(re.findall(r"[.?!](?:\s|$)", gives)) <= 3
    found = PICTURE.fullmatch(picture)
    assert found is not None, picture
    assert len(found[1]) > 40, "what the picture shows, for those who do not see it"
    assert (FOLDER / found[2]).stat().st_size < PICTURE_BYTES
    assert re.findall(r"^(\d)\. ", steps, re.MULTILINE) == ["1", "2", "3"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_picture_is_of_its_own_cells(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    tagged = [cell for cell in cells if "picture" in cell.metadata.get("tags", ())]
    assert tagged
    assert PICTURE.search(cells[0].source)[2] == f"images/{path.stem}.png"  # type: ignore[index]
    assert (FOLDER / "images" / f"{path.stem}.png").is_file()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_cell_that_first_uses_a_word_explains_it(path: Path) -> None:
    texts = [NO_PROSE.sub("", text) for text in markdown(path)]
    for word, explained in WORDS.items():
        uses = [text for text in texts if re.search(rf"\b{word}", re.sub(r"`[^`]*`", "", text))]
        assert not uses or re.search(explained, uses[0]), f"{word}: {uses[0]}"


def test_links_between_notebooks_lead_somewhere() -> None:
    for path in NOTEBOOKS:
        for link in re.findall(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)", "\n".join(markdown(path))):
            assert link.startswith("https://") or (FOLDER / link).is_file(), f"{path.name}: {link}"


def test_outputs_name_no_folder_of_whoever_ran_them() -> None:
    for path in NOTEBOOKS:
        found = re.findall(r"[\"' >(](/(?:home|root|tmp|Users|work)/[^\s\"'<]*)", path.read_text(encoding="utf-8"))
        assert found == [], path.name
