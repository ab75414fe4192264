"""Files, modules and names that texts mention exist.

The texts are README.md, CONTRIBUTING.md, docstrings and comments, and all other strings of the package (messages,
help). Checked are modules (`sollol_nb.text.tables`), and in back-ticks files (`text/tables.py`), names in modules
(`tables.markdown_table`), of classes (`Completion.text`) and of objects named after their class (`router.map`),
capitalised names (`Completion`), and "see `readable`". The code is read, not imported.
"""

from __future__ import annotations

import ast
import builtins
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sollol_nb"
FOLDERS = ("sollol_nb", "tests", "benchmarks", "tools")
SOURCES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]

OTHERS_FILES = {
    "sollol_nb.toml",  # what a user writes
    "ipython_config.py",  # IPython's
    "docs/api.md", "docs/modelfile.md",  # Ollama's
    "tools/server/README.md",  # llama.cpp's
    "name-00001-of-00003.gguf",  # an example
    "engine.json", "batches.sqlite", "latency.sqlite",  # in the state folder
}  # fmt: skip
OTHERS_NAMES = {
    "asyncio", "importlib", "os", "pandas", "plt", "time",  # other libraries
    "df", "module",  # examples
    "general",  # keys of GGUF
    "cpu",  # files of cgroups
    "llama3",  # a model
    "c",  # IPython's settings
    "sollol_cluster",  # arguments of the magic
    "error.message",  # in llama-server's JSON
    "Out",  # IPython's
    "sollol_nb.toml",  # what a user writes
    "sollol_nb.completer",  # how IPython identifies the completer
}  # fmt: skip
CLASS_OF = {"load": "ModelLoad", "answer": "Completion"}
"""The class of objects that are not named after it."""

FILE = re.compile(r"[\w/.-]+\.(?:py|js|md|j2|ipynb|gguf|toml|json|sqlite)")
DOTTED = re.compile(r"([A-Za-z_]\w*(?:\.\w+)+)(?:\(.*\))?")
CAPITALISED = re.compile(r"[A-Z][a-z]\w*")
IN_PACKAGE = re.compile(r"\bsollol_nb(?:\.\w+)+")


def texts_of(file: Path) -> Iterator[tuple[int, str]]:
    """Docstrings and comments of a Python file (in the package all strings), or the whole of another file."""
    source = file.read_text(encoding="utf-8")
    if file.suffix != ".py":
        yield 1, source
        return
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text)), lineno=line) if PACKAGE not in file.parents:
                yield line, text
            case ast.Constant(value=str(text), lineno=line) if PACKAGE in file.parents:
                yield line, text
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def names_in(body: list[ast.stmt]) -> set[str]:
    """What statements define, without those inside functions and classes."""
    names: set[str] = set()
    for node in body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.Assign(targets=targets):
                names |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                names |= {alias.asname or alias.name for alias in aliases}
            case ast.If(body=inner, orelse=other) | ast.Try(body=inner, orelse=other):
                names |= names_in(inner) | names_in(other)
    return names


class Code:
    """What the package defines.

    Attributes:
        modules: the names in each module, by its dotted name.
        classes: the members of each class, its bases' included, by its name.
        identifiers: every name of a module, function, class, member or parameter.
        texts: every string, such as kinds of events and names of settings.
    """

    def __init__(self) -> None:
        self.modules: dict[str, set[str]] = {}
        self.classes: dict[str, set[str]] = {}
        self.identifiers: set[str] = set()
        self.texts: set[str] = set()
        bases: dict[str, list[str]] = {}
        for file in PACKAGE.rglob("*.py"):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            parts = file.relative_to(ROOT).with_suffix("").parts
            self.modules[".".join(part for part in parts if part != "__init__")] = names_in(tree.body)
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    self.classes.setdefault(node.name, set()).update(members_of(node))
                    bases.setdefault(node.name, []).extend(ast.unparse(base) for base in node.bases)
                    self.identifiers |= {node.name, *members_of(node)}
                elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    self.identifiers.add(node.name)
                elif isinstance(node, ast.arg):
                    self.identifiers.add(node.arg)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    self.texts.add(node.value)
        for names in self.modules.values():
            self.identifiers |= names
        self.identifiers |= {part for module in self.modules for part in module.split(".")}
        for _ in range(5):  # as deep as bases have bases
            for name, of in bases.items():
                for base in of:
                    self.classes[name] |= self.classes.get(base.partition("[")[0], set())

    def has(self, parts: list[str]) -> bool:
        """Whether dotted names lead from a module, a class or an object to something."""
        first, *rest = parts
        if first == "Sollol":  # `%config`
            return rest[0] in self.texts
        if first == "sollol_nb":
            return self.has_in_module("sollol_nb", rest)
        modules = [module for module in self.modules if module.rpartition(".")[2] == first]
        if any(self.has_in_module(module, rest) for module in modules):
            return True
        of = CLASS_OF.get(first, first).lower().replace("_", "")
        return any(rest[0] in members for name, members in self.classes.items() if name.lower().endswith(of))

    def has_in_module(self, module: str, rest: list[str]) -> bool:
        if not rest:
            return True
        inner = f"{module}.{rest[0]}"
        if inner in self.modules:
            return self.has_in_module(inner, rest[1:])
        if rest[0] not in self.modules[module] or len(rest) == 1:
            return rest[0] in self.modules[module]
        return rest[1] in self.classes.get(rest[0], {rest[1]})


def members_of(node: ast.ClassDef) -> set[str]:
    """Methods, fields, and what is assigned to `self`."""
    own = {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)
           and isinstance(part.value, ast.Name) and part.value.id == "self"}  # fmt: skip
    return names_in(node.body) | own


@cache
def code() -> Code:
    return Code()


@cache
def files() -> list[str]:
    """Every file of the repository, as `/folder/file`."""
    folders = (*FOLDERS, "notebooks", "binder")
    inner = [file for folder in folders for file in (ROOT / folder).rglob("*.*")]
    return [f"/{file.relative_to(ROOT).as_posix()}" for file in (*inner, *ROOT.glob("*.*"))]


def problem_of(reference: str) -> str:
    """Why a reference in back-ticks leads nowhere; "" if it leads somewhere, or is none that is checked."""
    if FILE.fullmatch(reference):
        exists = reference in OTHERS_FILES or any(file.endswith(f"/{reference}") for file in files())
        return "" if exists else "there is no such file"
    if CAPITALISED.fullmatch(reference):
        known = reference in code().identifiers | code().texts | OTHERS_NAMES or hasattr(builtins, reference)
        return "" if known else "there is no such name"
    dotted = DOTTED.fullmatch(reference)
    if dotted is None:
        return ""
    parts = dotted[1].split(".")
    known = parts[0] in OTHERS_NAMES or dotted[1] in OTHERS_NAMES or dotted[1] in code().texts
    return "" if known or code().has(parts) else "there is no such name"


def problems_in(text: str) -> list[str]:
    """What a text mentions that does not exist, one line each."""
    problems = [
        f"`{reference}`: {problem}"
        for reference in re.findall(r"`([^`\n]+)`", text)
        if (problem := problem_of(reference))
    ]
    problems += [
        f"there is no {name}"
        for name in IN_PACKAGE.findall(text)
        if name not in OTHERS_NAMES and not code().has(name.split("."))
    ]
    problems += [
        f"see `{name}`: there is no such name"
        for name in re.findall(r"\bsee `(\w+)`", text)
        if name not in code().identifiers
    ]
    return problems


@pytest.mark.parametrize("file", [*SOURCES, *TEXTS], ids=lambda file: file.relative_to(ROOT).as_posix())
def test_references_lead_somewhere(file: Path) -> None:
    wrong = [f"text at line {line}: {problem}" for line, text in texts_of(file) for problem in problems_in(text)]
    assert not wrong, "\n".join([f"in {file.relative_to(ROOT)}:", *wrong])


@pytest.mark.parametrize(
    "text",
    ["`completion.Completion`", "`Completion.text`", "`router.map(df)`", "`conversations.ask_in_chat`",
     "`schema.py`", "`node.ready`", "`text/tables.py`", "`Completion`", "`KeyboardInterrupt`", "see `readable`",
     "sollol_nb.text.readable", "`python -m sollol_nb.settings`"],
)  # fmt: skip
def test_what_exists_is_found(text: str) -> None:
    assert not problems_in(text)


@pytest.mark.parametrize(
    "text",
    ["`completion.Completions`", "`Completion.words`", "`llama_chat.check_messages`", "`units.py`",
     "`chat/tables.py`", "`router.no_such_method(df)`", "`Sollol.no_such_setting`", "`Journey`",
     "see `no_such_name`", "sollol_nb.units", "`python -m sollol_nb.chats`",
     "from sollol_nb.text.tables.no_such_name import name"],
)  # fmt: skip
def test_what_does_not_exist_is_reported(text: str) -> None:
    assert problems_in(text)
