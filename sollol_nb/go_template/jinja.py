"""A Go template of Ollama in Jinja, as llama.cpp reads it.

Values have kinds here (a text, a message, a list of messages), so that each construct becomes one that does the
same; what has no such counterpart is an `UnknownSyntaxError`. All variables are attributes of one namespace, each
declaration with another name, since a loop in Jinja forgets what it sets. Text only occurs in quotes,
so that Jinja trims nothing. JSON of tools and of their calls is llama.cpp's, whose keys are in the order of the
request.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeAlias

from sollol_nb.go_template.render import field_names, thinking_tags, until_response, with_response
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
    parse,
)

Value: TypeAlias = tuple[str, str]
"""A Jinja expression, and the kind of its value."""

_BEGIN = """
{%- set g = namespace(system='', systems=0, messages=[], turns=[], turn_system='', prompt='', response='') -%}
{%- set g.think = THINK -%}
{%- for m in messages -%}
{%- set content = m['content'] or '' -%}
{%- if m['role'] == 'system' -%}
{%- set g.system = (g.system ~ '\\n\\n' ~ content) if g.systems else content -%}
{%- set g.systems = g.systems + 1 -%}
{%- endif -%}
{%- if g.messages and g.messages[-1]['role'] == m['role'] and m['role'] != 'tool' -%}
{%- set last = g.messages[-1] -%}
{%- set g.messages = g.messages[:-1] + [{'role': last['role'], 'content': last['content'] ~ '\\n\\n' ~ content,
    'thinking': last['thinking'], 'tool_calls': last['tool_calls'],
    'tool_name': last['tool_name'], 'tool_call_id': last['tool_call_id']}] -%}
{%- else -%}
{%- set g.messages = g.messages + [{'role': m['role'], 'content': content,
    'thinking': m['reasoning_content'] or '', 'tool_calls': m['tool_calls'] or [],
    'tool_name': m['name'] or '', 'tool_call_id': m['tool_call_id'] or ''}] -%}
{%- endif -%}
{%- endfor -%}
"""

_TURNS = """
{%- for m in g.messages -%}
{%- if (m['role'] == 'system' and (g.prompt or g.response)) or (m['role'] == 'user' and g.response) -%}
{%- set g.turns = g.turns + [{'system': g.turn_system, 'prompt': g.prompt, 'response': g.response}] -%}
{%- set g.turn_system = '' -%}{%- set g.prompt = '' -%}{%- set g.response = '' -%}
{%- endif -%}
{%- if m['role'] == 'system' -%}{%- set g.turn_system = m['content'] -%}
{%- elif m['role'] == 'user' -%}{%- set g.prompt = m['content'] -%}
{%- elif m['role'] == 'assistant' -%}{%- set g.response = m['content'] -%}{%- endif -%}
{%- endfor -%}
{%- set g.turns = g.turns + [{'system': g.turn_system, 'prompt': g.prompt, 'response': g.response}] -%}
"""

_COMMON: dict[str, Value] = {
    "Think": ("g.think", "bool"),
    "ThinkLevel": ("((reasoning_effort or 'medium') if g.think else '')", "text"),
}
_ROOT: dict[str, Value] = {
    "System": ("g.system", "text"),
    "Messages": ("g.messages", "messages"),
    "Tools": ("(tools or [])", "tools"),
    "Response": ("''", "text"),
}
_TURN: dict[str, Value] = {
    "System": ("t['system']", "text"),
    "Prompt": ("t['prompt']", "text"),
    "Response": ("t['response']", "text"),
}
_FIELDS: dict[str, dict[str, Value]] = {
    "message": {
        "Role": ("role", "text"),
        "Content": ("content", "text"),
        "Thinking": ("thinking", "text"),
        "ToolCalls": ("tool_calls", "calls"),
        "ToolName": ("tool_name", "text"),
        "ToolCallID": ("tool_call_id", "text"),
    },
    "call": {"Function": ("function", "called"), "ID": ("id", "text")},
    "called": {"Name": ("name", "text"), "Arguments": ("arguments", "json")},
    "tool": {"Type": ("type", "text"), "Function": ("function", "function")},
    "function": {
        "Name": ("name", "text"),
        "Description": ("description", "text"),
        "Parameters": ("parameters", "parameters"),
    },
    "parameters": {
        "Type": ("type", "text"),
        "Required": ("required", "json"),
        "Properties": ("properties", "properties"),
    },
    "property": {"Type": ("type", "text"), "Description": ("description", "text"), "Enum": ("enum", "json")},
}
_ITEMS = {"messages": "message", "calls": "call", "tools": "tool"}
_JSON = {"tools", "tool", "function", "parameters", "properties", "property", "calls", "call", "called", "json"}
_STRUCTURES = {"root", "message", "tool", "call", "called", "function", "parameters", "property"}
_MISSING: Value = ("''", "missing")


def to_jinja(source: str) -> str:
    """The template in Jinja.

    Raises:
        UnknownSyntaxError: it has something that is not known here.
    """
    nodes = with_response(parse(source))
    thinks = all(thinking_tags(nodes))
    think = "(enable_thinking if enable_thinking is defined else true)" if thinks else "false"
    begin = _BEGIN.replace("THINK", think)
    common = {**_COMMON, "IsThinkSet": ("true" if thinks else "false", "bool")}
    if "Messages" in field_names(nodes):
        return _compact(begin) + _Writer({**_ROOT, **common}).written(nodes)
    writer = _Writer({**_TURN, **common})
    every, last = writer.written(nodes), writer.written(until_response(nodes)[0])
    body = f"{{% for t in g.turns %}}{{% if not loop.last %}}{every}{{% else %}}{last}{{% endif %}}{{% endfor %}}"
    return _compact(begin + _TURNS) + body


def _compact(text: str) -> str:
    return text.replace("\n", "").replace("{%-", "{%").replace("-%}", "%}")


class _Writer:
    """Writes nodes as Jinja.

    Args:
        root: the fields of `$`.
    """

    def __init__(self, root: dict[str, Value]) -> None:
        self._root = root
        self._scopes: list[dict[str, Value]] = [{}]
        self._names = 0
        self._loops: list[str] = []  # the variable of each loop around that is true where the rest is left out

    def written(self, nodes: Sequence[Node]) -> str:
        """The nodes, with the root as dot."""
        return self._body(nodes, ("", "root"), {})

    def _body(self, nodes: Sequence[Node], dot: Value, names: dict[str, Value]) -> str:
        self._scopes.append(names)
        text, ends = "", ""
        for node in nodes:
            text += self._node(node, dot)
            if _jumps(node):  # llama.cpp's `continue` loses what the iteration has written
                text += f"{{% if not {self._loops[-1]} %}}"
                ends += "{% endif %}"
        self._scopes.pop()
        return text + ends

    def _node(self, node: Node, dot: Value) -> str:
        match node:
            case Text(text):
                return f"{{{{ {_quoted(text)} }}}}"
            case Write(value):
                return f"{{{{ {_shown(self._value(value, dot))} }}}}"
            case Set(name, value, declares):
                return self._set(name, self._value(value, dot), declares)
            case If():
                return self._if(node, dot)
            case Range():
                return self._range(node, dot)
            case Jump(kind):
                if not self._loops:
                    raise UnknownSyntaxError(f"{kind} outside of a loop")
                ended = f"{{% set {self._loops[-1]}_all = true %}}" if kind == "break" else ""
                return f"{ended}{{% set {self._loops[-1]} = true %}}"

    def _new_name(self, kind: str) -> Value:
        self._names += 1
        return f"g.v{self._names}", kind

    def _set(self, name: str, value: Value, declares: bool) -> str:
        if value[1] == "root":
            raise UnknownSyntaxError("$ in a variable")
        if declares:
            self._scopes[-1][name] = self._new_name(value[1])
        target = self._variable(name)
        if target[1] != value[1]:
            raise UnknownSyntaxError(f"{name} with two kinds of values")
        return f"{{% set {target[0]} = {value[0]} %}}"

    def _if(self, node: If, dot: Value) -> str:
        value = self._value(node.condition, dot)
        kept = self._new_name(value[1])
        keeps = node.name or node.rebinds
        if keeps and value[1] == "root":
            raise UnknownSyntaxError("$ in a variable")
        begin = f"{{% set {kept[0]} = {value[0]} %}}" if keeps else ""
        tested = kept if begin else value
        names = {node.name: kept} if node.name else {}
        body = self._body(node.body, kept if node.rebinds else dot, names)
        otherwise = self._body(node.otherwise, dot, dict(names))
        rest = f"{{% else %}}{otherwise}" if node.otherwise else ""
        return f"{begin}{{% if {_tested(tested)} %}}{body}{rest}{{% endif %}}"

    def _range(self, node: Range, dot: Value) -> str:
        source, kind = self._value(node.over, dot)
        if kind == "properties":
            item, index = self._new_name("property"), self._new_name("text")
            source, heads = f"({source} or {{}}).items()", f"k{self._names}, i{self._names}"
            key = f"k{self._names}"
        elif kind in _ITEMS:
            item, index = self._new_name(_ITEMS[kind]), self._new_name("number")
            heads, key = f"i{self._names}", "loop.index0"
        else:
            raise UnknownSyntaxError("a loop over something else than messages, tools or calls")
        begin = f"{{% set {index[0]} = {key} %}}{{% set {item[0]} = i{self._names} %}}"
        names = {name: value for name, value in ((node.index_name, index), (node.item_name, item)) if name}
        done = f"g.d{self._names}"
        self._loops.append(done)
        body = begin + self._body(node.body, item, names)
        self._loops.pop()
        before = ""
        if any(map(_jumps, node.body)):
            before = f"{{% set {done}_all = false %}}"
            body = f"{{% set {done} = {done}_all %}}{{% if not {done} %}}{body}{{% endif %}}"
        otherwise = self._body(node.otherwise, dot, {})
        rest = f"{{% else %}}{otherwise}" if node.otherwise else ""
        return f"{before}{{% for {heads} in {source} %}}{body}{rest}{{% endfor %}}"

    # --- values ---------------------------------------------------------------------------------

    def _variable(self, name: str) -> Value:
        for scope in reversed(self._scopes):
            if name in scope:
                return scope[name]
        raise UnknownSyntaxError(f"{name} without a declaration")

    def _value(self, expression: Expression, dot: Value) -> Value:
        match expression:
            case Literal(bool() as value):
                return ("true" if value else "false"), "bool"
            case Literal(int() as value):
                return str(value), "number"
            case Literal(str() as value):
                return _quoted(value), "text"
            case Literal():
                return _MISSING
            case Dot():
                return dot
            case Variable("$"):
                return "", "root"
            case Variable(name):
                return self._variable(name)
            case Field(of, name):
                return self._field(self._value(of, dot), name)
            case Call("printf", (Literal(str() as pattern), *rest)):
                return self._formatted(pattern, [self._value(argument, dot) for argument in rest])
            case Call(function, arguments):
                return self._call(function, [self._value(argument, dot) for argument in arguments])

    def _field(self, owner: Value, name: str) -> Value:
        code, kind = owner
        if kind == "root":
            return self._root.get(name, _MISSING)
        if name not in _FIELDS.get(kind, {}):
            raise UnknownSyntaxError(f".{name} of a {kind}")
        key, field_kind = _FIELDS[kind][name]
        field = f"{code}['{key}']"
        return (f"({field} or {{}})" if field_kind == "parameters" else field), field_kind

    def _formatted(self, pattern: str, values: Sequence[Value]) -> Value:
        """Go's `printf` with `%s`, `%v` and `%d`."""
        pieces = re.split(r"%(?!%)(.)", pattern.replace("%%", "\0"))
        kinds = {"s": ("text",), "v": ("text", "number"), "d": ("number",)}
        verbs = pieces[1::2]
        if len(verbs) != len(values) or any(
            kind not in kinds.get(verb, ()) for verb, (_, kind) in zip(verbs, values, strict=True)
        ):
            raise UnknownSyntaxError("printf of these values")
        codes = [_quoted(piece.replace("\0", "%")) for piece in pieces[::2]]
        for position, (code, _) in enumerate(values):
            codes.insert(2 * position + 1, code)
        return f"({' ~ '.join(codes)})", "text"

    def _call(self, function: str, values: Sequence[Value]) -> Value:
        codes, kinds = [code for code, _ in values], [kind for _, kind in values]
        match function, kinds:
            case "and" | "or", [_, *_]:
                kind = kinds[0] if len(set(kinds)) == 1 else "condition"
                operands = codes if kind != "condition" else [_tested(value) for value in values]
                return f"({f' {function} '.join(operands)})", kind
            case "not", [_]:
                return f"(not {_tested(values[0])})", "bool"
            case "eq", [first, _, *_] if set(kinds) == {first} and first in ("text", "number", "bool"):
                return f"({' or '.join(f'{codes[0]} == {code}' for code in codes[1:])})", "bool"
            case "ne", [first, second] if first == second and first in ("text", "number", "bool"):
                return f"({codes[0]} != {codes[1]})", "bool"
            case "lt" | "le" | "gt" | "ge", ["number", "number"]:
                sign = {"lt": "<", "le": "<=", "gt": ">", "ge": ">="}[function]
                return f"({codes[0]} {sign} {codes[1]})", "bool"
            case "len", [kind] if kind in _ITEMS:
                return f"({codes[0]} | length)", "number"
            case "slice", [kind, "number", *rest] if kind in _ITEMS and rest in ([], ["number"]):
                return f"({codes[0]}[{codes[1]}:{''.join(codes[2:])}])", kind
            case "index", [kind, "number"] if kind in _ITEMS:
                return f"{codes[0]}[{codes[1]}]", _ITEMS[kind]
            case "print", _ if kinds and set(kinds) == {"text"}:
                return f"({' ~ '.join(codes)})", "text"
            case "json", [kind] if kind in _JSON:
                return codes[0], "json"
            case "currentDate", _:
                return "strftime_now('%Y-%m-%d')", "text"
        raise UnknownSyntaxError(f"{function} of these values")


def _jumps(node: Node) -> bool:
    """Whether a `break` or `continue` of the loop around is in it."""
    return isinstance(node, Jump) or (isinstance(node, If) and any(map(_jumps, [*node.body, *node.otherwise])))


def _tested(value: Value) -> str:
    """A value as a condition."""
    code, kind = value
    if kind in _STRUCTURES:  # which Go takes for true even where all their fields are empty
        return "true"
    return code


def _shown(value: Value) -> str:
    """A value as Go writes it."""
    code, kind = value
    if kind == "missing":
        return "'<no value>'"
    if kind == "bool":
        return f"('true' if {code} else 'false')"
    if kind in _JSON:  # arguments may be JSON text already
        return f"({code} if {code} is string else {code} | tojson(separators=[',', ':']))"
    if kind in ("text", "number"):
        return code
    raise UnknownSyntaxError(f"a {kind}, written")


def _quoted(text: str) -> str:
    for character, escape in (("\\", "\\\\"), ("'", "\\'"), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        text = text.replace(character, escape)
    return f"'{text}'"
