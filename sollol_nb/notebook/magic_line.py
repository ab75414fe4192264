"""The line of a magic as options: split, expanded, parsed; errors are one line of help.

A line is split at spaces outside quotes and `{{ }}`. An apostrophe inside a word is not a quote. Each magic
declares its options as `magic_arguments`, which its `?` help, tab completion and `options_magic` read.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import re
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from keyword import iskeyword
from types import FrameType
from typing import Any, TypeVar

from IPython.core.error import UsageError
from IPython.core.magic import no_var_expand
from IPython.utils.text import DollarFormatter

from sollol_nb.errors import ConfigError
from sollol_nb.runtime.priority import is_priority, priority_named
from sollol_nb.settings.endpoints import ssh_target
from sollol_nb.text.expansion import expand
from sollol_nb.text.insertions import Insertions
from sollol_nb.text.nearest import nearest, nearest_variable
from sollol_nb.text.tables import shortened

R = TypeVar("R")

MAX_WHOLE_NUMBER = 2**31 - 1
"""The engines read a number of tokens into 32 bits."""
_MOST_DIGITS, _LONGEST_SHOWN_CHARS = 20, 40
NO_EXPAND_HINT = "to send braces unchanged, use --no-expand"
_ESCAPES = {"n": "\n", "t": "\t", '"': '"', "\\": "\\"}
_SHELL_STYLE = re.compile(r"(?:\$\{?|\{)([A-Za-z_]\w*)")
_ASSIGNMENT = re.compile(r"\s*(\w+)\s*<<(?:\s+|$)(.*)", re.DOTALL)
_REQUIRED = re.compile(r"the following arguments are required: (.+)")
_INVALID_CHOICE = re.compile(r"argument (.+?): invalid choice: '?(.*?)'? \(choose from (.+)\)")
_ARGUMENT = re.compile(r"argument (.+?): (.+)")


class Word(str):
    """A word of a line, without quotes.

    Attributes:
        raw: the word as typed, with its quotes.
        marked: the word with marks of the images that its expressions have inserted; its own text describes them.
        insertions: what its expressions have inserted; None without expressions.
    """

    raw: str
    marked: str
    insertions: Insertions | None

    def __new__(cls, text: str, raw: str = "") -> Word:  # a copy is made without `raw`, and gets it afterwards
        """The word `text`, typed as `raw`."""
        word = super().__new__(cls, text)
        word.raw, word.marked, word.insertions = raw, text, None
        return word

    @classmethod
    def expanded(cls, marked: str, before: Word, insertions: Insertions | None = None) -> Word:
        """A word whose expressions are replaced; quoted as it was before."""
        text = marked if insertions is None else insertions.in_words(marked)
        word = cls(text, f'"{text}"' if before.is_quoted else text)
        word.marked, word.insertions = marked, insertions
        return word

    @property
    def raw_marked(self) -> str:
        """As `raw`, with the marks of `marked`."""
        if self.insertions is None:
            return self.raw
        return f'"{self.marked}"' if self.is_quoted else self.marked

    @property
    def is_quoted(self) -> bool:
        """Whether it was typed in quotes."""
        return self.raw[:1] in "\"'" and len(self.raw) > 1 and self.raw[-1] == self.raw[0]


def split(line: str) -> list[Word]:
    """The words of a line."""
    words: list[Word] = []
    at = 0
    while at < len(line):
        if line[at].isspace():
            at += 1
            continue
        end, text = _word_at(line, at)
        words.append(Word(text, line[at:end]))
        at = end
    return words


def _word_at(line: str, at: int) -> tuple[int, str]:
    """End and text of the word that begins here."""
    text = ""
    while at < len(line) and not line[at].isspace():
        opens = line[at] in "\"'" and (not text or text.endswith("="))
        if opens and (end := _quote_end(line, at)) is not None:
            text += _unquoted(line[at:end])
        elif line.startswith("{{", at):
            end = _expression_end(line, at)
            text += line[at:end]
        else:
            end = at + 1
            text += line[at]
        at = end
    return at, text


def _quote_end(line: str, at: int) -> int | None:
    """The end of the quoted text that begins here; None if its quote is never closed."""
    mark, end = line[at], at + 1
    while end < len(line) and line[end] != mark:
        end += 2 if line[end] == "\\" and mark == '"' else 1
    return end + 1 if end < len(line) else None


def _unquoted(text: str) -> str:
    inner = text[1:-1]
    if text[0] == "'":
        return inner
    return re.sub(r"\\(.)", lambda match: _ESCAPES.get(match[1], match[0]), inner)


def _expression_end(line: str, at: int) -> int:
    """The end of the `{{ expression }}` that begins here, which may contain braces and quoted texts."""
    depth, end = 0, at + 2
    while end < len(line):
        if line[end] in "\"'" and (quote_end := _quote_end(line, end)) is not None:
            end = quote_end
            continue
        if line.startswith("}}", end) and depth == 0:
            return end + 2
        depth += {"{": 1, "}": -1}.get(line[end], 0)
        end += 1
    return len(line)


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a magic.

    Attributes:
        name: of the magic, such as `%%sollol`, for messages.
        arguments: its options.
        variables: what `{{ }}` may use: the notebook's variables, the caller's local ones, and each `--var`.
        cell: the text below the first line; None for the line form.
    """

    name: str
    arguments: argparse.Namespace
    variables: Mapping[str, Any]
    cell: str | None = None

    def named_value(self, expression: str, option: str) -> Any:
        """The value of an option that names a variable, or is a Python expression or JSON.

        Raises:
            ConfigError: it cannot be evaluated; the message suggests the nearest name.
        """
        if expression.startswith("{"):
            with contextlib.suppress(ValueError):  # JSON, else a Python dict
                return json.loads(expression)
        try:
            return eval(expression, dict(self.variables))  # noqa: S307 - the user's own code
        except NameError as error:
            near = nearest_variable(getattr(error, "name", None) or expression, self.variables)
            hint = f"; did you mean {near}?" if near else ""
            raise ConfigError(f"{option} {shortened(expression, 60)}: {error}{hint}") from None
        except Exception as error:  # the user's own expression can raise anything
            raise ConfigError(f"{option} {shortened(expression, 60)}: {type(error).__name__}: {error}") from None


def split_assignment(line: str) -> tuple[str | None, str]:
    """`name << rest` as (name, rest); (None, line) for other lines.

    Raises:
        UsageError: the name is not a valid variable name.
    """
    match = _ASSIGNMENT.match(line)
    return (variable_name(match[1], "before <<"), match[2]) if match else (None, line)


def variable_name(text: str, where: str) -> str:
    """The text, if it is a valid variable name.

    Raises:
        UsageError: it is not; the message says where it stands.
    """
    if not text.isidentifier() or iskeyword(text):
        raise UsageError(f"{text!r} ({where}) is not a valid variable name")
    return text


def options_magic(*, shell_style: bool = True) -> Callable[[Callable[[Any, Call], R]], Callable[..., R | None]]:
    """Let a magic get its line as options: the decorated method takes a `Call`.

    Its `{{ }}` see the variables of a function that runs the magic, and of the functions around that one. `-h` and
    `--help` print the help that `?` shows. Goes above `@magic_arguments()`.

    Args:
        shell_style: whether IPython's `$name` and `{name}` are expanded, too. Not where the line has a prompt.
    """

    def decorate(method: Callable[[Any, Call], R]) -> Callable[..., R | None]:
        @functools.wraps(method)
        def magic(self: Any, line: str, cell: str | None = None) -> R | None:
            if not {"-h", "--help"}.isdisjoint(word.raw for word in split(line)):
                print(textwrap.dedent((method.__doc__ or "").removeprefix("::\n")).strip())
                return None
            name = f"{'%' if cell is None else '%%'}{method.__name__}"
            namespace = {**self.shell.user_ns, **_variables_of_caller()}
            arguments, variables = parse(method, line, name=name, namespace=namespace, shell_style=shell_style)
            return method(self, Call(name, arguments, variables, cell))

        marked: Callable[..., R | None] = no_var_expand(magic)
        return marked

    return decorate


def _variables_of_caller() -> dict[str, Any]:
    """The variables where IPython was called to run the magic: the local ones, and those of the functions around
    that code as far as these still run. Python itself keeps of the latter only what the code names.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and str(frame.f_globals.get("__name__")).startswith("IPython.core."):
        frame = frame.f_back
    scopes: list[Mapping[str, Any]] = []
    code = None
    while frame is not None:
        if code is None or code in frame.f_code.co_consts:
            scopes.append(frame.f_locals)
            code = frame.f_code
        frame = frame.f_back
    return {name: value for scope in reversed(scopes) for name, value in scope.items()}


def parse(
    magic: Any, line: str, *, name: str, namespace: Mapping[str, Any] | None = None, shell_style: bool = False
) -> tuple[argparse.Namespace, Mapping[str, Any]]:
    """The options of a line, and the variables for the `{{ }}` of the cell: the namespace and each `--var`.

    `NAME << rest` is the same as `rest --out NAME` for magics with that option.

    Args:
        magic: the decorated method, which has the parser.
        name: of the magic, such as `%%sollol`, for messages.
        namespace: the variables that the line may use; without them nothing is expanded.
        shell_style: whether `$name` and `{name}` are expanded, too.

    Raises:
        UsageError: an option is wrong; the message suggests the nearest valid one.
        ConfigError: an expression cannot be expanded.
    """
    out: str | None = None
    if "--out" in magic.parser._option_string_actions:
        out, line = split_assignment(line)
    words, variables = [_in_full(word, magic.parser) for word in split(line)], dict(namespace or {})
    if namespace is not None and "--no-expand" not in words:
        words = _expanded(words, variables, name, shell_style=shell_style)
    try:
        # Intermixed, since a prompt may come after options.
        arguments = magic.parser.parse_intermixed_args(_with_dashed_values(words, magic.parser))
    except UsageError as error:
        raise UsageError(_usage_message(str(error), magic.parser, name)) from None
    if out is not None:
        if arguments.out is not None:
            raise UsageError(f"{name}: two variables, {out} and {arguments.out}; name one of them")
        arguments.out = out
    elif getattr(arguments, "out", None) is not None:
        variable_name(arguments.out, "--out")
    return arguments, variables


def option_named(name: str, parser: argparse.ArgumentParser) -> str | None:
    """The option of this name, or the only one that begins so, as argparse accepts it; else None."""
    known = parser._option_string_actions
    if name in known:
        return name
    found = [option for option in known if option.startswith(name)] if name.startswith("--") else []
    return found[0] if len(found) == 1 else None


def _in_full(word: Word, parser: argparse.ArgumentParser) -> Word:
    """The word; an abbreviated option in full."""
    name, sign, value = word.partition("=")
    option = option_named(name, parser)
    return word if option in (None, name) else Word(f"{option}{sign}{value}", word.raw)


def _with_dashed_values(words: list[Word], parser: argparse.ArgumentParser) -> list[Word]:
    """The words; a quoted value that begins with `-` is joined to its option, or argparse takes it for another."""
    joined: list[Word] = []
    for word in words:
        option = parser._option_string_actions.get(joined[-1]) if joined else None
        if option is not None and option.nargs is None and word.is_quoted and word.startswith("-"):
            word = Word(f"{joined[-1]}={word}", f"{joined.pop().raw} {word.raw}")
        joined.append(word)
    return joined


def _expanded(words: list[Word], variables: dict[str, Any], name: str, *, shell_style: bool) -> list[Word]:
    """The words with their expressions replaced; each `--var NAME=VALUE` adds to the variables."""
    expanded: list[Word] = []
    insertions = Insertions()
    for word in words:
        text = expand(word, variables, hint=NO_EXPAND_HINT if not shell_style else "", insertions=insertions)
        new = word if text == word else Word.expanded(text, word, insertions)
        if text == word and shell_style:
            text = _shell_expanded(word, variables, name)
            new = word if text == word else Word.expanded(text, word)
        text = str(new)
        expanded.append(new)
        value_of_var = text.removeprefix("--var=") if text.startswith("--var=") else None
        if len(expanded) > 1 and expanded[-2] == "--var":
            value_of_var = text
        if value_of_var is not None:
            variable, sign, value = value_of_var.partition("=")
            if not sign:
                raise UsageError(f"{name}: --var takes NAME=VALUE, such as --var city=Rome, not {value_of_var!r}")
            variables[variable_name(variable, "--var")] = value
    return expanded


def _shell_expanded(word: Word, variables: Mapping[str, Any], name: str) -> str:
    """A word with IPython's `$name` and `{name}` replaced."""
    match = _SHELL_STYLE.search(word)
    if match is None:
        return word
    text: str = word
    with contextlib.suppress(Exception):  # as in IPython: what cannot be expanded stays as it is
        text = DollarFormatter().vformat(word, (), variables)
    if text == word and not word.is_quoted:
        near = nearest_variable(match[1], variables)
        hint = f"did you mean {near}?" if near else "define it first, or quote the text"
        raise UsageError(f"{name}: there is no variable {match[1]} for {word}; {hint}")
    return text


def _usage_message(message: str, parser: argparse.ArgumentParser, name: str) -> str:
    """argparse's message as one line that says what to do."""
    options = sorted(option for option in parser._option_string_actions if option.startswith("--"))
    help_ = f"see {name}? for the options"
    if message.startswith("unrecognized arguments: "):
        unknown = message.removeprefix("unrecognized arguments: ").split()
        first = next((word for word in unknown if word.startswith("-")), "")
        if not first:
            return f"{name}: unexpected {' '.join(unknown)!r}; {help_}"
        near = nearest(first.partition("=")[0], options)
        hint = f"did you mean {near}? {help_.capitalize()}" if near else help_
        return f"{name}: unknown option {first}; {hint}"
    if match := _REQUIRED.match(message):
        return f"{name}: {match[1]} is missing; {help_}"
    if match := _INVALID_CHOICE.match(message):
        choices = [choice.strip("' ") for choice in match[3].split(",")]
        near = nearest(match[2], choices)
        hint = f"did you mean {near}?" if near else f"choose from {', '.join(choices)}"
        return f"{name}: invalid {match[1]} {match[2]!r}; {hint}"
    if match := _ARGUMENT.match(message):
        return f"{name}: {match[1]} {match[2].replace('expected one argument', 'takes a value')}; {help_}"
    return f"{name}: {message}; {help_}"


# --- types of options: their errors go into the usage message --------------------------------------


def whole_number(text: str) -> int:
    """A whole number from 1 to `MAX_WHOLE_NUMBER`."""
    value = _integer(text)
    if value is None:
        raise argparse.ArgumentTypeError(f"takes a whole number such as 100, not {_shown(text)}")
    if not 1 <= value <= MAX_WHOLE_NUMBER:
        bound = "1 or more" if value < 1 else f"at most {MAX_WHOLE_NUMBER}"
        raise argparse.ArgumentTypeError(f"must be {bound}, not {_shown(text)}")
    return value


def seed(text: str) -> int:
    """A seed."""
    value = _integer(text)
    if value is None:
        raise argparse.ArgumentTypeError(f"takes a whole number such as 42, not {_shown(text)}")
    return value


def number(text: str) -> float:
    """A finite number."""
    with contextlib.suppress(ValueError):
        value = float(text)
        if math.isfinite(value):
            return value
    raise argparse.ArgumentTypeError(f"takes a number such as 0.7, not {_shown(text)}")


def _integer(text: str) -> int | None:
    """The integer that a text is; None for other texts. Of a very long one only the size counts."""
    if not re.fullmatch(r"[+-]?\d+", text, re.ASCII):
        return None
    return int(text[:_MOST_DIGITS])


def _shown(text: str) -> str:
    return repr(shortened(text, _LONGEST_SHOWN_CHARS))


def ssh_hosts(text: str) -> list[str]:
    """Machines with commas between them, each as `ssh://host`."""
    try:
        return [ssh_target(host) for host in text.split(",")]
    except ConfigError as error:
        raise argparse.ArgumentTypeError(f"takes hosts such as gpu1,user@gpu2:2222: {error}") from None


def priority(text: str) -> int:
    """A priority by number or by name."""
    number = _integer(text)
    priority = priority_named(text) if number is None else number
    if not is_priority(priority):
        raise argparse.ArgumentTypeError(f"takes 1 to 10 or a name such as high, not {_shown(text)}")
    return int(priority)
