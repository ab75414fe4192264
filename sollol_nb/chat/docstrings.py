"""What a docstring says about a function and its arguments: Google's, numpy's and Sphinx's form. Pure."""

from __future__ import annotations

import inspect
import re

_SECTION = re.compile(
    "(Args|Arguments|Parameters|Params|Keyword Args|Other Parameters|Returns?|Yields?|Raises|Warns|Examples?|"
    "Notes?|See Also|References|Attributes|Todo):?"
)
_OF_ARGUMENTS = ("Args", "Arguments", "Parameters", "Params", "Keyword Args", "Other Parameters")
_UNDERLINE = re.compile("-{3,}|={3,}")
_SPHINX = re.compile(r":(\w+)(?:\s+[^:]*?(\w+))?\s*:(.*)")
_GOOGLE_ARGUMENT = re.compile(r"\s+\*{0,2}(\w+)\s*(?:\(.*?\))?:(?:\s+(.*)|$)")
_NUMPY_ARGUMENT = re.compile(r"\*{0,2}(\w+(?:, ?\w+)*)\s*(?::.*)?")


def described(docstring: str | None) -> tuple[str, dict[str, str]]:
    """The text before the sections, and the text about each argument."""
    lines = inspect.cleandoc(docstring or "").splitlines()
    text: list[str] = []
    arguments: dict[str, list[str]] = {}
    section, is_numpy, indent, current = "", False, 0, None
    for at, line in enumerate(lines):
        following = lines[at + 1].strip() if at + 1 < len(lines) else ""
        heading = _SECTION.fullmatch(line)
        if heading and (line.endswith(":") or _UNDERLINE.fullmatch(following)):
            section, is_numpy, indent, current = heading[1], not line.endswith(":"), 0, None
        elif match := _SPHINX.match(line):
            section, current = (
                ("Sphinx", match[2]) if match[1] in ("param", "parameter", "arg") else (match[1], None)
            )
            if current:
                arguments[current] = [match[3]]
        elif not section:
            text.append(line)
        elif section in _OF_ARGUMENTS and not _UNDERLINE.fullmatch(line.strip()):
            begins = _NUMPY_ARGUMENT.fullmatch(line) if is_numpy else _GOOGLE_ARGUMENT.fullmatch(line)
            depth = len(line) - len(line.lstrip())
            if begins and (is_numpy or not indent or depth <= indent):
                current, indent = begins[1], depth
                arguments[current] = [] if is_numpy else [begins[2] or ""]
            elif current:
                arguments[current].append(line)
        elif section == "Sphinx" and current:
            arguments[current].append(line)
    return "\n".join(text).strip(), {
        name.strip(): " ".join(" ".join(about).split())
        for names, about in arguments.items()
        for name in names.split(",")  # numpy's form describes several at once
    }
