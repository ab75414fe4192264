"""The prompt of a conversation as Ollama renders it from a Go template, without tools.

A translation is compared with it. Source: Ollama's `template/template.go`, Go's `text/template/exec.go`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sollol_nb.go_template.syntax import (
    Call,
    Dot,
    Expression,
    Field,
    If,
    Jump,
    Literal,
    Node,
    Range,
    Set,
    Text,
    UnknownSyntaxError,
    Variable,
    Write,
)

MAX_STEPS = 5_000
MAX_CHARACTERS = 1_000_000  # of a prompt, and of each text on the way to it
_MESSAGE = {
    "Role": "",
    "Content": "",
    "Thinking": "",
    "ToolCalls": [],
    "ToolName": "",
    "ToolCallID": "",
    "Images": [],
}


class _Break(Exception):
    pass


class _Continue(Exception):
    pass


def field_names(nodes: Sequence[Node]) -> set[str]:
    """The names of all fields that a template reads."""
    return {part.name for part in expressions(nodes) if isinstance(part, Field)}


def expressions(nodes: Sequence[Node]) -> Iterator[Expression]:
    """All expressions of a template, with those inside others."""
    for node in nodes:
        match node:
            case Write(value) | Set(value=value):
                yield from _with_inner(value)
            case If():
                yield from _with_inner(node.condition)
                yield from expressions([*node.body, *node.otherwise])
            case Range():
                yield from _with_inner(node.over)
                yield from expressions([*node.body, *node.otherwise])


def _with_inner(expression: Expression) -> Iterator[Expression]:
    yield expression
    if isinstance(expression, Field):
        yield from _with_inner(expression.of)
    if isinstance(expression, Call):
        for argument in expression.arguments:
            yield from _with_inner(argument)


def with_response(nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    """The nodes, with `{{ .Response }}` at the end where Ollama adds it."""
    return nodes if field_names(nodes) & {"Messages", "Response"} else (*nodes, Write(Field(Dot(), "Response")))


def until_response(nodes: Sequence[Node]) -> tuple[tuple[Node, ...], bool]:
    """The nodes without those after the first that writes `.Response`, and whether there is one.

    Ollama's `deleteNode` does not look into conditions, and leaves nothing after that node on any level.
    """
    kept: list[Node] = []
    for node in nodes:
        if isinstance(node, If | Range):
            body, is_cut = until_response(node.body)
            otherwise, is_cut_too = ((), False) if is_cut else until_response(node.otherwise)
            changed = {"body": body, "otherwise": otherwise}
            kept.append(_replaced(node, changed))
            is_cut = is_cut or is_cut_too
        else:
            kept.append(node)
            values = [node.value] if isinstance(node, Write | Set) else []
            is_cut = any(
                isinstance(part, Field) and part.name == "Response"
                for value in values
                for part in _with_inner(value)
            )
        if is_cut:
            return tuple(kept), True
    return tuple(kept), False


def _replaced(node: If | Range, changed: Mapping[str, Any]) -> Node:
    given = {name: getattr(node, name) for name in node.__slots__}
    return type(node)(**{**given, **changed})


def render(nodes: tuple[Node, ...], messages: Sequence[Mapping[str, str]], *, thinks: bool, think: bool) -> str:
    """The prompt.

    Args:
        nodes: of `with_response`.
        messages: with `role`, `content` and `thinking`.
        thinks: whether Ollama takes the model for one that thinks; see `thinking_tags`.
        think: whether it should think.

    Raises:
        UnknownSyntaxError: the template does what Go refuses, or what this package does not know.
    """
    system, collated = _collated(messages)
    common = {"Think": thinks and think, "ThinkLevel": "medium" if thinks and think else "", "IsThinkSet": thinks}
    if "Messages" in field_names(nodes):
        root = {"System": system, "Messages": collated, "Tools": [], "Response": "", **common}
        return _Renderer(root).written(nodes)
    turns = _turns(collated)
    parts = [_Renderer({**turn, **common}).written(nodes) for turn in turns[:-1]]
    parts.append(_Renderer({**turns[-1], **common}).written(until_response(nodes)[0]))
    return "".join(parts)


def _collated(messages: Sequence[Mapping[str, str]]) -> tuple[str, list[dict[str, Any]]]:
    """All system messages as one text, and the messages with neighbours of one role joined."""
    collated: list[dict[str, Any]] = []
    for message in messages:
        if collated and collated[-1]["Role"] == message["role"] != "tool":
            collated[-1]["Content"] += "\n\n" + message["content"]
        else:
            own = {"Role": message["role"], "Content": message["content"], "Thinking": message.get("thinking", "")}
            collated.append({**_MESSAGE, **own})
    systems = [message["content"] for message in messages if message["role"] == "system"]
    return "\n\n".join(systems), collated


def _turns(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The turns for which a template without `.Messages` is rendered, one after the other."""
    turns = []
    turn = {"System": "", "Prompt": "", "Response": ""}
    for message in messages:
        role = message["Role"]
        if (role == "system" and (turn["Prompt"] or turn["Response"])) or (role == "user" and turn["Response"]):
            turns.append(turn)
            turn = {"System": "", "Prompt": "", "Response": ""}
        name = {"system": "System", "user": "Prompt", "assistant": "Response"}.get(role)
        if name is not None:
            turn[name] = message["Content"]
    return [*turns, turn]


class _Renderer:
    """Renders a template for one root value."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        self._scopes: list[dict[str, Any]] = [{}]
        self._out: list[str] = []
        self._steps = self._characters = 0

    def written(self, nodes: Sequence[Node]) -> str:
        self._run(nodes, self._root)
        return "".join(self._out)

    def _run(self, nodes: Sequence[Node], dot: Any) -> None:
        for node in nodes:
            self._steps += 1
            if self._steps > MAX_STEPS:
                raise UnknownSyntaxError("it takes too long")
            match node:
                case Text(text):
                    self._write(text)
                case Write(value):
                    self._write(_text(self._value(value, dot)))
                case Set(name, value, declares):
                    self._set(name, self._value(value, dot), declares)
                case If():
                    self._run_if(node, dot)
                case Range():
                    self._run_range(node, dot)
                case Jump(kind):
                    raise _Break if kind == "break" else _Continue

    def _write(self, text: str) -> None:
        self._characters += len(text)
        _check_length(self._characters)
        self._out.append(text)

    def _run_if(self, node: If, dot: Any) -> None:
        value = self._value(node.condition, dot)
        self._scopes.append({node.name: value} if node.name else {})
        try:
            if value:
                self._run(node.body, value if node.rebinds else dot)
            else:
                self._run(node.otherwise, dot)
        finally:
            self._scopes.pop()

    def _run_range(self, node: Range, dot: Any) -> None:
        items = self._value(node.over, dot)
        if not isinstance(items, list):
            raise UnknownSyntaxError("a loop over something else than a list")
        for index, item in enumerate(items):
            names = {node.index_name: index, node.item_name: item}
            self._scopes.append({name: value for name, value in names.items() if name})
            try:
                self._run(node.body, item)
            except _Continue:
                continue
            except _Break:
                break
            finally:
                self._scopes.pop()
        if not items:
            self._run(node.otherwise, dot)

    def _set(self, name: str, value: Any, declares: bool) -> None:
        if declares:
            self._scopes[-1][name] = value
            return
        for scope in reversed(self._scopes):
            if name in scope:
                scope[name] = value
                return
        raise UnknownSyntaxError(f"{name} without a declaration")

    def _value(self, expression: Expression, dot: Any) -> Any:
        match expression:
            case Literal(value):
                return value
            case Dot():
                return dot
            case Variable("$"):
                return self._root
            case Variable(name):
                for scope in reversed(self._scopes):
                    if name in scope:
                        return scope[name]
                raise UnknownSyntaxError(f"{name} without a declaration")
            case Field(of, name):
                owner = self._value(of, dot)
                if owner is self._root:
                    return self._root.get(name)
                if not isinstance(owner, dict) or name not in owner:
                    raise UnknownSyntaxError(f".{name} of something that has none")
                return owner[name]
            case Call(function, arguments):
                return self._call(function, arguments, dot)

    def _call(self, function: str, arguments: Sequence[Expression], dot: Any) -> Any:
        if function in ("and", "or") and arguments:
            value = None
            for argument in arguments:
                value = self._value(argument, dot)
                if bool(value) is (function == "or"):
                    break
            return value
        return apply(function, [self._value(argument, dot) for argument in arguments])


def apply(function: str, values: Sequence[Any]) -> Any:
    """The result of a function of Go's or Ollama's. Raises UnknownSyntaxError for values that it does not take."""
    match function, values:
        case "not", [value]:
            return not value
        case "eq", [first, _, *_]:
            return any(first == _of_kind(first, other) for other in values[1:])
        case "ne", [first, second]:
            return first != _of_kind(first, second)
        case "lt" | "le" | "gt" | "ge", [int() as first, int() as second]:
            return {"lt": first < second, "le": first <= second, "gt": first > second, "ge": first >= second}[
                function
            ]
        case "len", [list() as items]:
            return len(items)
        case "len", [str() as text]:
            return len(text.encode())
        case "slice", [list() as items, int() as first, *rest] if 0 <= first <= len(items) and not rest[1:]:
            end = rest[0] if rest else len(items)
            if isinstance(end, int) and first <= end <= len(items):
                return items[first:end]
        case "index", [list() as items, int() as position] if 0 <= position < len(items):
            return items[position]
        case "print", _ if all(isinstance(value, str) for value in values):
            _check_length(sum(map(len, values)))
            return "".join(values)
        case "printf", [str() as pattern, *rest]:
            return formatted(pattern, rest)
        case "json", [str() | int() as value]:
            text = json.dumps(value, ensure_ascii=False)
            for character in "<>&\u2028\u2029":
                text = text.replace(character, f"\\u{ord(character):04x}")
            return text
        case "currentDate", _:
            return time.strftime("%Y-%m-%d")
    raise UnknownSyntaxError(f"{function} of these values")


def _check_length(characters: int) -> None:
    if characters > MAX_CHARACTERS:
        raise UnknownSyntaxError(f"a text of more than {MAX_CHARACTERS:,} characters")


def _of_kind(first: Any, other: Any) -> Any:
    if type(first) is not type(other) or not isinstance(first, str | int):
        raise UnknownSyntaxError("a comparison of different kinds of values")
    return other


def formatted(pattern: str, values: Sequence[Any]) -> str:
    """Go's `printf` with `%s`, `%v` and `%d`."""
    parts = pattern.replace("%%", "\0").split("%")
    if len(parts) - 1 != len(values):
        raise UnknownSyntaxError("printf with another number of values")
    _check_length(sum(len(value) for value in values if isinstance(value, str)))
    text = parts[0]
    for part, value in zip(parts[1:], values, strict=True):
        is_text, is_number = isinstance(value, str), isinstance(value, int) and not isinstance(value, bool)
        if not ((part[:1] in ("s", "v") and is_text) or (part[:1] in ("d", "v") and is_number)):
            raise UnknownSyntaxError(f"%{part[:1]} of this value")
        text += str(value) + part[1:]
    return text.replace("\0", "%")


def _text(value: Any) -> str:
    """What Go writes for a value."""
    if value is None:
        return "<no value>"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int):
        return str(value)
    raise UnknownSyntaxError("a list or an object, written")


def thinking_tags(nodes: Sequence[Node], over_messages: bool = False) -> tuple[str, str]:
    """The tags around the thoughts of earlier answers, by which Ollama sees that a model thinks; "" without.

    As Ollama's InferTags finds them: the texts at both ends of the list of nodes that holds `.Thinking`.
    """
    opening = closing = ""
    for node in nodes:
        if isinstance(node, Write | Set) and over_messages and _reads_thinking(node.value):
            opening = nodes[0].text.strip() if isinstance(nodes[0], Text) else opening
            closing = nodes[-1].text.strip() if isinstance(nodes[-1], Text) else closing
        if isinstance(node, If | Range):
            inside = over_messages
            if isinstance(node, Range):
                inside = any(
                    isinstance(part, Field) and part.name == "Messages" for part in _with_inner(node.over)
                )
            elif over_messages and _reads_thinking(node.condition):
                opening = nodes[0].text.strip() if isinstance(nodes[0], Text) else opening
                closing = nodes[-1].text.strip() if isinstance(nodes[-1], Text) else closing
            for part in (node.body, node.otherwise):
                inner = thinking_tags(part, inside)
                opening, closing = inner[0] or opening, inner[1] or closing
    return opening, closing


def _reads_thinking(expression: Expression) -> bool:
    return any(part == Field(Dot(), "Thinking") for part in _with_inner(expression))
