"""The line of a magic as options: split, expanded, parsed; errors are one line of help.

A line is split at spaces outside quotes and `{{ }}`. An apostrophe inside a word is not a quote. Each magic
declares its options as `magic_arguments`, which its `?` help, tab completion and this module read.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import json
import re
from collections.abc import Callable, Mapping
from keyword import iskeyword
from typing import Any

from IPython.core.error import UsageError

from sollol_nb.errors import ConfigError
from sollol_nb.runtime.priority import is_priority, priority_named
from sollol_nb.text.expansion import expand

NO_EXPAND_HINT = "to send braces unchanged, use --no-expand"
_ESCAPES = {"n": "\n", "t": "\t", '"': '"', "\\": "\\"}
_ASSIGNMENT = re.compile(r"\s*(\w+)\s*<<(?:\s+|$)(.*)", re.DOTALL)
_REQUIRED = re.compile(r"the following arguments are required: (.+)")
_INVALID_CHOICE = re.compile(r"argument (.+?): invalid choice: '?(.*?)'? \(choose from (.+)\)")
_ARGUMENT = re.compile(r"argument (.+?): (.+)")


class Word(str):
    """A word of a line, without quotes.

    Attributes:
        raw: the word as typed, with its quotes.
    """

    raw: str

    def __new__(cls, text: str, raw: str) -> Word:
        """The word `text`, typed as `raw`."""
        word = super().__new__(cls, text)
        word.raw = raw
        return word

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


def parse(
    magic: Any, line: str, *, name: str, namespace: Mapping[str, Any] | None = None
) -> tuple[argparse.Namespace, Mapping[str, Any]]:
    """The options of a line, and the variables for the `{{ }}` of the cell: the namespace and each `--var`.

    Args:
        magic: the decorated method, which has the parser.
        name: of the magic, such as `%%sollol`, for messages.
        namespace: the notebook's variables; without them nothing is expanded.

    Raises:
        UsageError: an option is wrong; the message suggests the nearest valid one.
        ConfigError: an expression cannot be expanded.
    """
    words, variables = split(line), dict(namespace or {})
    if namespace is not None and "--no-expand" not in words:
        words = _expanded(words, variables, name)
    try:
        # Intermixed, since a prompt may come after options.
        return magic.parser.parse_intermixed_args(words), variables
    except UsageError as error:
        raise UsageError(_usage_message(str(error), magic.parser, name)) from None


def _expanded(words: list[Word], variables: dict[str, Any], name: str) -> list[Word]:
    """The words with their expressions replaced; each `--var NAME=VALUE` adds to the variables."""
    expanded: list[Word] = []
    for word in words:
        text = expand(word, variables, hint=NO_EXPAND_HINT)
        expanded.append(word if text == word else Word(text, f'"{text}"' if word.is_quoted else text))
        value_of_var = text.removeprefix("--var=") if text.startswith("--var=") else None
        if len(expanded) > 1 and expanded[-2] == "--var":
            value_of_var = text
        if value_of_var is not None:
            variable, sign, value = value_of_var.partition("=")
            if not sign:
                raise UsageError(f"{name}: --var takes NAME=VALUE, such as --var city=Rome, not {value_of_var!r}")
            variables[variable_name(variable, "--var")] = value
    return expanded


def _usage_message(message: str, parser: argparse.ArgumentParser, name: str) -> str:
    """argparse's message as one line that says what to do."""
    options = sorted(option for option in parser._option_string_actions if option.startswith("--"))
    help_ = f"see {name}? for the options"
    if message.startswith("unrecognized arguments: "):
        unknown = message.removeprefix("unrecognized arguments: ").split()
        first = next((word for word in unknown if word.startswith("-")), "")
        if not first:
            return f"{name}: unexpected {' '.join(unknown)!r}; {help_}"
        near = difflib.get_close_matches(first.partition("=")[0], options, 1, 0.5)
        hint = f"did you mean {near[0]}? {help_.capitalize()}" if near else help_
        return f"{name}: unknown option {first}; {hint}"
    if match := _REQUIRED.match(message):
        return f"{name}: {match[1]} is missing; {help_}"
    if match := _INVALID_CHOICE.match(message):
        choices = [choice.strip("' ") for choice in match[3].split(",")]
        near = difflib.get_close_matches(match[2], choices, 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(choices)}"
        return f"{name}: invalid {match[1]} {match[2]!r}; {hint}"
    if match := _ARGUMENT.match(message):
        return f"{name}: {match[1]} {match[2].replace('expected one argument', 'takes a value')}; {help_}"
    return f"{name}: {message}; {help_}"


# --- types of options: their errors go into the usage message --------------------------------------


def whole_number(text: str) -> int:
    """A whole number greater than 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"takes a whole number such as 100, not {text!r}")
    return int(text)


def seed(text: str) -> int:
    """A seed."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes a whole number such as 42, not {text!r}") from None


def number(text: str) -> float:
    """A number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"takes a number such as 0.7, not {text!r}") from None


def priority(text: str) -> int:
    """A priority by number or by name."""
    priority = int(text) if text.isdecimal() else priority_named(text)
    if not is_priority(priority):
        raise argparse.ArgumentTypeError(f"takes 1 to 10 or a name such as high, not {text!r}")
    return int(priority)


def named_value(evaluate: Callable[[str], Any], expression: str, option: str, namespace: Mapping[str, Any]) -> Any:
    """The value of an option that names a variable, or is an expression or JSON.

    Raises:
        ConfigError: it cannot be evaluated; the message suggests the nearest name.
    """
    if expression.startswith("{"):
        with contextlib.suppress(ValueError):  # JSON, else a Python dict
            return json.loads(expression)
    try:
        return evaluate(expression)
    except NameError as error:
        near = difflib.get_close_matches(getattr(error, "name", None) or expression, list(namespace), 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"{option} {expression}: {error}{hint}") from None
    except Exception as error:  # the user's own expression can raise anything
        raise ConfigError(f"{option} {expression}: {type(error).__name__}: {error}") from None
