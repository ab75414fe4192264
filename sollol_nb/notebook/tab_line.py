"""What is expected at the cursor in the line of a magic: an option, or the value of an option or argument.

The magic's own parser says which options and arguments exist, what they take, and which choices they have.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass

from sollol_nb.notebook.magic_line import option_named

_MAGIC = re.compile(r"\s*(?:[^%=]*=\s*)?%{1,2}(sollol\w*)\s+(.*)", re.DOTALL)
_ASSIGNMENT = re.compile(r"\w+\s*<<\s+")
# Quotes count at the beginning of a word and of an option's value; the last may still be open.
_WORD = re.compile(r"""(?:(?<![^\s=])(?:"(?:\\.|[^"\\])*(?:"|$)|'[^']*(?:'|$))|\S)+""", re.DOTALL)


@dataclass(frozen=True, slots=True)
class MagicLine:
    """A magic's line up to the cursor.

    Attributes:
        magic: the name, such as `sollol_route`.
        words: those before the word at the cursor, quotes included.
        fragment: the word at the cursor, up to the cursor, quotes included.
    """

    magic: str
    words: tuple[str, ...]
    fragment: str


@dataclass(frozen=True, slots=True)
class Expected:
    """What can stand at the cursor.

    Attributes:
        fragment: the text before the cursor that a completion replaces.
        names: what the value is, the most specific name first: `sollol_cluster.stop` (an argument after the choice
            `stop`), `sollol_cluster.what`, `what`. Empty where no value can stand.
        choices: the only possible values, if the parser lists them.
        options: options that can stand here.
    """

    fragment: str
    names: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


def line_at_cursor(text: str) -> MagicLine | None:
    """The line up to the cursor, if it begins with the whole name of one of this package's magics; else None.

    Understands `%%magic`, `%magic`, `variable = %magic` and `%%magic variable << ...`.
    """
    match = _MAGIC.fullmatch(text)
    if match is None:
        return None
    magic, rest = match.groups()
    rest = _ASSIGNMENT.sub("", rest, count=1) if _ASSIGNMENT.match(rest) else rest
    words = [word[0] for word in _WORD.finditer(rest)]
    fragment = words.pop() if words and rest.endswith(words[-1]) else ""
    return MagicLine(magic, tuple(words), fragment)


def expected(line: MagicLine, parser: argparse.ArgumentParser) -> Expected:
    """What can stand at the cursor of a line with this parser."""
    given: list[str] = []  # arguments before the cursor
    used: set[argparse.Action] = set()
    pending: argparse.Action | None = None  # the option whose value comes next
    for word in line.words:
        if pending is not None and not word.startswith("--"):
            pending = None
        elif _is_option(word):
            name, sign, _ = word.partition("=")
            pending = _option(parser, name)
            if pending is not None:
                used.add(pending)
            if sign or pending is None or pending.nargs == 0:
                pending = None
        else:
            given.append(word)
    if _is_option(line.fragment):
        name, sign, value = line.fragment.partition("=")
        action = _option(parser, name) if sign else None
        if action is not None:
            return _value(value, line.magic, action, action.dest)
        return Expected(line.fragment, options=_options(parser, used))
    if pending is not None:
        return _value(line.fragment, line.magic, pending, pending.dest)
    return _argument(line, parser, given, _options(parser, used) if not line.fragment else ())


def _is_option(word: str) -> bool:
    return word.startswith("-") and not word.lstrip("-")[:1].isdigit()


def _option(parser: argparse.ArgumentParser, name: str) -> argparse.Action | None:
    option = option_named(name, parser)
    return parser._option_string_actions[option] if option is not None else None


def _options(parser: argparse.ArgumentParser, used: set[argparse.Action]) -> tuple[str, ...]:
    """Options that may still be given: each once, unless it collects its values."""
    free = [
        action for action in parser._actions if action not in used or isinstance(action, argparse._AppendAction)
    ]
    return tuple(option for action in free for option in action.option_strings if option.startswith("--"))


def _value(
    fragment: str,
    magic: str,
    action: argparse.Action,
    name: str,
    *,
    chosen: str | None = None,
    options: tuple[str, ...] = (),
) -> Expected:
    most_specific = () if chosen is None else (f"{magic}.{chosen}",)
    choices = tuple(str(choice) for choice in action.choices or ())
    return Expected(fragment, (*most_specific, f"{magic}.{name}", name), choices, options)


def _argument(
    line: MagicLine, parser: argparse.ArgumentParser, given: list[str], options: tuple[str, ...]
) -> Expected:
    """The argument after those given. The metavar `MODEL [PROMPT]` names the parts of an argument with several."""
    left, chosen = len(given), None
    for action in parser._actions:
        if action.option_strings:
            continue
        parts = _parts(action)
        takes_many = action.nargs in ("*", "+")
        if left == 0 or takes_many:
            part = parts[min(left, len(parts) - 1)]
            return _value(line.fragment, line.magic, action, part, chosen=chosen, options=options)
        left -= 1
        chosen = given[len(given) - left - 1] if action.choices else None
    return Expected(line.fragment, options=options)


def _parts(action: argparse.Action) -> list[str]:
    if not isinstance(action.metavar, str):
        return [action.dest]
    return [part.strip("[]").lower() for part in action.metavar.split()]
