"""A module imports only from lower layers: every import of the package against the tables in CONTRIBUTING.md.

Imports in functions and under `TYPE_CHECKING` count too.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sollol_nb"
FILES = sorted(PACKAGE.rglob("*.py"))
MAY_EXPORT = {"sollol_nb/__init__.py", "sollol_nb/plots/__init__.py", "sollol_nb/notebook/__init__.py"}
LOADS_ON_FIRST_USE = "sollol_nb/__init__.py"
HAND_ON_NAMES = ("priority_helpers.py", "rpc_discovery.py", "ollama_gguf_resolver.py")
TABLE = re.compile(r"^\| layer \| packages \|\n\|[-|]+\|\n((?:\|.*\n)+)", re.MULTILINE)


@dataclass(frozen=True)
class Import:
    """A module imports another, or a name in it; both as paths inside the package."""

    importer: str
    imported: str
    line: int


@cache
def tables() -> list[dict[str, int]]:
    """The layer of each path, of each table in CONTRIBUTING.md: of the package, and of the parts of a package."""
    found = []
    for table in TABLE.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")):
        layers: dict[str, int] = {}
        for row in table.splitlines():
            layer, packages = row.strip("|").split("|", 1)
            for path in re.findall(r"`([^`]+)`", packages):
                assert path not in layers, f"{path} is in the table twice"
                layers[path] = int(layer)
        found.append(layers)
    return found


def inside(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def entry_of(path: str, table: dict[str, int]) -> str | None:
    """The entry of a table that a module belongs to: its own, or the nearest folder's."""
    return max((entry for entry in table if path == entry or (entry[-1] == "/" and path.startswith(entry))),
               key=len, default=None)  # fmt: skip


def path_of(module: str) -> str | None:
    """The path of a dotted name if it is a module of the package."""
    folder = PACKAGE.joinpath(*module.split(".")[1:])
    for file in (folder / "__init__.py", folder.with_suffix(".py")):
        if file.is_file():
            return inside(file)
    return None


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imports_of(file: Path) -> Iterator[Import]:
    for node in ast.walk(tree(file)):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno}: an import relative to the file; write sollol_nb...."
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        for module in modules:
            if module.partition(".")[0] == "sollol_nb":
                imported = path_of(module) or path_of(module.rpartition(".")[0])
                assert imported is not None, f"{file}:{node.lineno}: {module} does not exist"
                yield Import(inside(file), imported, node.lineno)


@cache
def all_imports() -> list[Import]:
    return [found for file in FILES for found in imports_of(file)]


def test_each_module_is_in_the_tables() -> None:
    package, *parts = tables()
    assert len(parts) == 2, "a table of CONTRIBUTING.md was not read"
    needed = [(inside(file), package) for file in FILES]
    for part in parts:
        folder = next(iter(part)).partition("/")[0]
        needed += [(inside(file), part) for file in FILES if inside(file).startswith(f"{folder}/")]
        needed.remove((f"{folder}/__init__.py", part))  # a docstring, or in the table
    for path, table in needed:
        assert entry_of(path, table) is not None, f"{path} has no layer in CONTRIBUTING.md"
    for table in tables():
        for entry in table:
            assert (PACKAGE / entry).exists(), f"{entry} does not exist"


def test_imports_lead_to_lower_layers() -> None:
    wrong = []
    for found in all_imports():
        for table in tables():
            above, below = entry_of(found.importer, table), entry_of(found.imported, table)
            if above is not None and below is not None and above != below and table[above] <= table[below]:
                wrong.append(
                    f"{found.importer}:{found.line} (layer {table[above]}) imports {found.imported} "
                    f"(layer {table[below]})"
                )
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for found in all_imports():
        if found.importer != found.imported:
            graph.setdefault(found.importer, set()).add(found.imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def texts_in(node: ast.AST) -> Iterator[tuple[str, int]]:
    """The strings of code, with their lines."""
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value, part.lineno


def test_no_import_is_hidden_in_a_text() -> None:
    """As an argument of `import_module` a module would escape the other tests here."""
    for file in FILES:
        if file.relative_to(ROOT).as_posix() == LOADS_ON_FIRST_USE:
            continue  # the topmost module, which may import any other
        for text, line in texts_in(tree(file)):
            if text.startswith("sollol_nb."):
                is_module = text.endswith(".") or path_of(text.partition(":")[0]) is not None
                assert not is_module, f"{inside(file)}:{line} names the module {text} in a text"
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
                assert not any(text.startswith(".") for text, _ in texts_in(node)), (
                    f"{inside(file)}:{node.lineno} imports a module of the package by {ast.unparse(node.func)}"
                )


def test_no_test_module_imports_another() -> None:
    """What several test modules use is in `tests/support/`."""
    for file in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests."):
                names = f"{node.module}.{'.'.join(alias.name for alias in node.names)}"
                assert ".test_" not in names, f"{file.relative_to(ROOT)}:{node.lineno} imports from a test module"


def test_nothing_imports_modules_that_only_hand_on_names() -> None:
    for found in all_imports():
        assert found.imported not in HAND_ON_NAMES, f"{found.importer}:{found.line} imports {found.imported}"


FOLDERS = [file for file in FILES if file.name == "__init__.py"]


@pytest.mark.parametrize("file", FOLDERS, ids=inside)
def test_the_init_of_a_folder_is_a_docstring_that_names_its_modules(file: Path) -> None:
    if file.relative_to(ROOT).as_posix() not in MAY_EXPORT:
        (only,) = tree(file).body
        assert isinstance(only, ast.Expr), "it hands on names; import the module that has them"
    if file.parent == PACKAGE:
        return  # README and CONTRIBUTING.md describe the package
    docstring = ast.get_docstring(tree(file)) or ""
    modules = [path for path in file.parent.glob("*.py") if path != file]
    folders = [path.parent for path in file.parent.glob("*/__init__.py")]
    for path in modules + folders:
        name = f"{path.name}/" if path in folders else path.name
        assert f"`{name}`" in docstring or re.search(rf"^\W*{re.escape(name)}\s", docstring, re.MULTILINE), (
            f"the docstring does not mention {name}"
        )
