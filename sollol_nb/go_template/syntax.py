"""Parses the part of Go's template language that prompt templates use: text, values, variables, conditions, loops.

Source: the documentation of Go's `text/template`, and its `parse/parse.go`. What this package does not know
(`define`, `template`, `block`, unknown functions) is an `UnknownSyntaxError`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

MAX_BYTES = 30_000  # environment variables of Windows, in which a translation travels, hold 32,767
MAX_DEPTH = 40
FUNCTIONS = frozenset(
    "and or not eq ne lt le gt ge len index slice print printf json currentDate".split()  # noqa: SIM905
)


class UnknownSyntaxError(ValueError):
    """The template has a construct that this package does not know; the text says which."""


@dataclass(frozen=True, slots=True)
class Dot:
    """`.`: the value of the loop or `with` around, or the root."""


@dataclass(frozen=True, slots=True)
class Variable:
    """`$name`; `$` is the root."""

    name: str


@dataclass(frozen=True, slots=True)
class Literal:
    """A text, a whole number, a truth value or nil."""

    value: str | int | bool | None


@dataclass(frozen=True, slots=True)
class Field:
    """`.name` of a value."""

    of: Expression
    name: str


@dataclass(frozen=True, slots=True)
class Call:
    """A function with its arguments. What comes through a pipe is the last one."""

    function: str
    arguments: tuple[Expression, ...]


Expression: TypeAlias = Dot | Variable | Literal | Field | Call


@dataclass(frozen=True, slots=True)
class Text:
    """Text that is written as it is."""

    text: str


@dataclass(frozen=True, slots=True)
class Write:
    """A value that is written."""

    value: Expression


@dataclass(frozen=True, slots=True)
class Set:
    """`$name := value` (declares) or `$name = value`."""

    name: str
    value: Expression
    declares: bool


@dataclass(frozen=True, slots=True)
class If:
    """`if`, or `with` where `rebinds`; `name` is a variable that it declares, or ""."""

    condition: Expression
    name: str
    body: tuple[Node, ...]
    otherwise: tuple[Node, ...]
    rebinds: bool


@dataclass(frozen=True, slots=True)
class Range:
    """A loop over a list; the names are those of variables that it declares, or ""."""

    over: Expression
    index_name: str
    item_name: str
    body: tuple[Node, ...]
    otherwise: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Jump:
    """`break` or `continue`."""

    kind: str


Node: TypeAlias = Text | Write | Set | If | Range | Jump

_KEYWORD = re.compile(r"(if|with|range|end|else|break|continue|define|template|block)\b(.*)", re.DOTALL)
_SPACE = " \t\r\n"
_TOKEN = re.compile(
    r"""\s*(?:(?P<text>"(?:[^"\\\n]|\\.)*")|(?P<raw>`[^`]*`)|(?P<number>-?\d+(?![\w.]))|(?P<field>\.\w+)
    |(?P<variable>\$\w*)|(?P<word>[A-Za-z_]\w*)|(?P<mark>:=|=|\||\(|\)|,|\.))""",
    re.VERBOSE,
)


def parse(source: str) -> tuple[Node, ...]:
    """The nodes of a template.

    Raises:
        UnknownSyntaxError: it has something else, or is not a template.
    """
    if len(source.encode()) > MAX_BYTES:
        raise UnknownSyntaxError(f"more than {MAX_BYTES:,} bytes")
    if "\0" in source:
        raise UnknownSyntaxError("a NUL character")
    reader = _Reader(source)
    nodes, end = reader.nodes(0)
    if end is not None:
        raise UnknownSyntaxError(f"{{{{ {end} }}}} without a beginning")
    return nodes


class _Reader:
    """Reads the nodes of one template, in order."""

    def __init__(self, source: str) -> None:
        self._pieces = _pieces(source)

    def nodes(self, depth: int) -> tuple[tuple[Node, ...], str | None]:
        """The nodes up to the next `end` or `else` of this level, and which it is; None at the template's end."""
        if depth > MAX_DEPTH:
            raise UnknownSyntaxError("nested too deeply")
        found: list[Node] = []
        for is_action, piece in self._pieces:
            code = piece.strip(_SPACE)
            if not is_action:
                if piece:
                    found.append(Text(piece))
                continue
            if code.startswith("/*"):
                continue
            match = _KEYWORD.fullmatch(code)
            word, rest = (match[1], match[2].strip(_SPACE)) if match is not None else ("", code)
            if word == "else" or (word == "end" and not rest):
                return tuple(found), f"{word} {rest}".strip()
            if word in ("break", "continue") and not rest:
                found.append(Jump(word))
            elif word in ("if", "with", "range"):
                found.append(self._block(word, rest, depth))
            elif word:
                raise UnknownSyntaxError(f"{{{{ {word} }}}}")
            else:
                found.append(_action(code))
        return tuple(found), None

    def _block(self, word: str, code: str, depth: int) -> Node:
        names, declares, value = _pipeline(code)
        if names and not declares:
            raise UnknownSyntaxError(f"{{{{ {word} }}}} with `=`")
        body, end = self.nodes(depth + 1)
        otherwise: tuple[Node, ...] = ()
        if end is not None and end != "end":
            match = _KEYWORD.fullmatch(end.removeprefix("else").strip())
            if match is not None and match[1] in ("if", "with"):
                otherwise, end = (
                    (self._block(match[1], match[2].strip(_SPACE), depth + 1),),
                    "end",
                )  # it has the same
            elif end == "else":
                otherwise, end = self.nodes(depth + 1)
        if end != "end":
            raise UnknownSyntaxError(f"{{{{ {word} }}}} without an end")
        if word == "range":
            index, item = names if len(names) == 2 else ("", *names) if names else ("", "")
            return Range(value, index, item, body, otherwise)
        if len(names) > 1:
            raise UnknownSyntaxError(f"{{{{ {word} }}}} with two variables")
        return If(value, names[0] if names else "", body, otherwise, rebinds=word == "with")


def _pieces(source: str) -> Iterator[tuple[bool, str]]:
    """Text and the code of actions in turn; space that an action trims is already gone."""
    position, trims = 0, False
    while (start := source.find("{{", position)) >= 0:
        end = _end_of_action(source, start + 2)
        text, code = source[position:start], source[start + 2 : end]
        text = text.lstrip(_SPACE) if trims else text
        if code[:1] == "-" and code[1:2] in tuple(_SPACE):
            text, code = text.rstrip(_SPACE), code[1:]
        trims = code[-1:] == "-" and code[-2:-1] in tuple(_SPACE)
        yield False, text
        yield True, code[:-1] if trims else code
        position = end + 2
    rest = source[position:]
    yield False, rest.lstrip(_SPACE) if trims else rest


def _end_of_action(source: str, position: int) -> int:
    """Where the }} of an action is that begins before this position."""
    while position < len(source):
        character = source[position]
        if source.startswith("}}", position):
            return position
        if source.startswith("/*", position):
            position = source.find("*/", position) + 1
            if not position:
                break
        elif character in '"`':
            position += 1
            while position < len(source) and source[position] != character:
                position += 2 if character == '"' and source[position] == "\\" else 1
        position += 1
    raise UnknownSyntaxError("{{ without }}")


def _action(code: str) -> Node:
    names, declares, value = _pipeline(code)
    if len(names) > 1:
        raise UnknownSyntaxError("two variables outside of a range")
    return Set(names[0], value, declares) if names else Write(value)


def _pipeline(code: str) -> tuple[list[str], bool, Expression]:
    """The variables that a pipeline sets, whether it declares them, and its value."""
    tokens = list(_tokens(code))
    names: list[str] = []
    declares = False
    marks = [text for _, text in tokens]
    for sign in (":=", "="):
        if sign in marks:
            at = marks.index(sign)
            names = [text for kind, text in tokens[:at] if kind == "variable"]
            if [text for _, text in tokens[:at] if text != ","] != names or "$" in names:
                raise UnknownSyntaxError(f"{sign} after something else than variables")
            tokens, declares = tokens[at + 1 :], sign == ":="
            break
    value, position = _value(tokens, 0)
    if position != len(tokens):
        raise UnknownSyntaxError(f"{tokens[position][1]} in {code.strip()}")
    return names, declares, value


def _tokens(code: str) -> Iterator[tuple[str, str]]:
    position = 0
    code = code.strip()
    while position < len(code):
        match = _TOKEN.match(code, position)
        if match is None or match.lastgroup is None:
            raise UnknownSyntaxError(code[position : position + 20])
        spaced = match[0] != match[0].lstrip() or position == 0
        kind, text = match.lastgroup, match[match.lastgroup]
        if kind == "field" and not spaced:
            kind = "more"  # of the value before it
        yield kind, text
        position = match.end()


def _value(tokens: Sequence[tuple[str, str]], position: int, depth: int = 0) -> tuple[Expression, int]:
    """The value of a pipeline from a position up to its end or a closing parenthesis."""
    if depth > MAX_DEPTH:
        raise UnknownSyntaxError("nested too deeply")
    value: Expression | None = None
    while True:
        function = ""
        operands: list[Expression] = []
        if position < len(tokens) and tokens[position][0] == "word" and tokens[position][1] not in _CONSTANTS:
            function = tokens[position][1]
            if function not in FUNCTIONS:
                raise UnknownSyntaxError(f"the function {function}")
            position += 1
        while position < len(tokens) and tokens[position][1] not in ("|", ")"):
            operand, position = _operand(tokens, position, depth)
            operands.append(operand)
        if value is not None:
            operands.append(value)
        if function:
            value = Call(function, tuple(operands))
        elif len(operands) == 1:
            value = operands[0]
        else:
            raise UnknownSyntaxError("arguments after a value that is not a function")
        if position >= len(tokens) or tokens[position][1] == ")":
            return value, position
        position += 1  # the pipe


_CONSTANTS = {"true": True, "false": False, "nil": None}


def _operand(tokens: Sequence[tuple[str, str]], position: int, depth: int) -> tuple[Expression, int]:
    kind, text = tokens[position]
    position += 1
    operand: Expression
    if kind == "text":
        operand = Literal(_unquoted(text))
    elif kind == "raw":
        operand = Literal(text[1:-1])
    elif kind == "number":
        operand = Literal(int(text))
    elif kind == "word" and text in _CONSTANTS:
        operand = Literal(_CONSTANTS[text])
    elif kind == "word" and text in FUNCTIONS:
        operand = Call(text, ())
    elif kind == "field":
        operand = Field(Dot(), text[1:])
    elif kind == "variable":
        operand = Variable(text)
    elif text == ".":
        operand = Dot()
    elif text == "(":
        operand, position = _value(tokens, position, depth + 1)
        if position >= len(tokens) or tokens[position][1] != ")":
            raise UnknownSyntaxError("( without )")
        position += 1
    else:
        raise UnknownSyntaxError(text)
    while position < len(tokens) and tokens[position][0] == "more":
        operand = Field(operand, tokens[position][1][1:])
        position += 1
    return operand, position


def _unquoted(text: str) -> str:
    """The value of a Go text in quotes; Python reads the escapes that templates use in the same way."""
    if re.search(r"\\(?![nrt\"\\])", text):
        raise UnknownSyntaxError(f"an escape in {text}")
    return str(ast.literal_eval(text))
