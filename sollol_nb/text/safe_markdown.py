"""Markdown that a model wrote, made safe: nothing in it runs or is fetched, however a frontend parses it.

Frontends run scripts in the Markdown of a cell that the user has executed. So HTML outside of code is shown as
text, links to scripts lead nowhere, and an image is a link that names it: nothing is fetched from an address that
a model made up. Escape sequences of terminals, other control characters, and those that reorder what is read, are
dropped. Source of the syntax: CommonMark 0.31 (fenced code, code spans, HTML blocks, links).

A dollar is a formula only where it can be one (pandoc's rules): `$5 and $10` are two amounts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_FENCE = re.compile(r"^ {0,3}(?P<marks>`{3,}|~{3,})(?P<info>[^\n]*)$", re.MULTILINE)
_LANGUAGE = re.compile(r"[\w+#.-]*")
# The beginning of a tag, or of a character reference; an image, which is fetched unasked; a link's definition
# with a title, which may span blank lines; an address that is a script; and the mark that JupyterLab puts in
# place of a formula. It puts formulas back unchecked, also into addresses, where a quote ends the attribute.
# Browsers ignore tabs and line ends in a scheme, and MathJax does not look for them in the address of a `\\href`.
# TeX can put such an address together from a macro's arguments, so a `\\href` needs one that begins harmlessly;
# `\\mmlToken`, which can set an address too, is never needed.


def _scheme(name: str) -> str:
    return r"[\t\n]*".join(name)


_SCRIPT = rf"(?:{_scheme('javascript')}|{_scheme('vbscript')})(?=[\s\\]*:)"
_TYPES = "|".join(map(_scheme, ("text", "application", "image/svg")))
_DATA = rf"{_scheme('data')}(?=[\s\\]*:[\s\\]*(?:{_TYPES}))"
_DANGER = (
    r"<(?=[a-z/!?])|&(?=#|(?:tab|newline|colon);)|!(?=\[)|\](?=:\s*(?:<[^\n>]*>|\S+)\s+[\"'(])|@(?=\\*@)"
    r"|\\(?=href(?![a-z])(?!\s*\{\s*(?:https?:|mailto:|#(?!\d)))|mmlToken)"
    rf"|{_SCRIPT}|{_DATA}"
)
_ADDRESS = re.compile(r"\][(:]|://|www\.", re.IGNORECASE)
_IN_CODE = re.compile(_DANGER, re.IGNORECASE)
# Code spans on one line, tags that are harmless and common in tables, links; then dangerous parts.
_SPAN_OR_DANGER = re.compile(
    r"(?<![\\`])(?P<ticks>`+)(?!`)(?P<code>[^\n]+?)(?<!`)(?P=ticks)(?!`)"
    r"|</?(?:br|sub|sup) ?/?>"
    r"|<(?:https?|mailto):[^\s<>\"]+>"
    r"|\\\\|(?P<image>!\[(?P<unnamed>\])?)|(?P<escaped_image>\\!(?=\[))"
    rf"|(?P<danger>{_DANGER})|(?P<quote>\")",
    re.IGNORECASE,
)
# In nbconvert a formula may span blank lines and fences. These cannot: on one line, or beginning a line.
_FORMULA = re.compile(
    r"(?<![\\$])\$\$[^$\n]*[^$\n\\]\$\$(?!\$)|^\$\$[^$]*[^$\\]\$\$(?!\$)|(?P<open>\$(?=\$)|\\(?=begin|\\\[))",
    re.MULTILINE | re.IGNORECASE,
)
# A dollar and what decides whether it is a formula. Lines of indented code, code spans, escaped characters and
# `$$ $$` are taken as a whole.
_SPAN_OR_DOLLAR = re.compile(
    r"^(?: {4}|\t)(?!\s*(?:[-*+]|\d+[.)])\s).*"
    r"|(?<!`)(?P<ticks>`+)(?!`)[^\n]+?(?<!`)(?P=ticks)(?!`)"
    r"|\\[^$\n]"
    r"|(?P<address>(?:\w:/{2}|\bwww\.|\]\()[^\s<>)]*)"
    r"|\$\$[^$]*\$\$|\$\$+"
    r"|(?<!\d)\$(?P<formula>(?!\s)(?:[^$`\n\\]|\\.|\n(?!\s*\n))+(?<!\s))\$(?![0-9A-Z_$])"
    r"|(?P<dollar>\\?\$)",
    re.MULTILINE,
)
_AMOUNT = re.compile(r"[0-9].* [A-Za-z]{2,}[ .,;:?!)]", re.DOTALL)
_GROUP = re.compile(r"\{[^{}]*\}")
_DOLLAR = "\ue000"  # in place of a dollar that is only a dollar, until the rest of the text has been looked at
# A separate element: MathJax reads the page, too, and its formulas end with an element.
DOLLAR_AS_TEXT = "<span>&#36;</span>"
"""A dollar in Markdown that begins no formula."""
# Escape sequences of terminals (ECMA-48): control sequences such as colours, strings such as titles, and others.
_ESCAPE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]P_^X]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x90\x98\x9c-\x9f\n]*(?:\x07|\x1b\\|\x9c)"
    r"|\x1b[ -/]*[0-~]"
)
_ESCAPE_BEGINS = re.compile(r"(?:\x1b(?:[ -/]*|\[[0-?]*[ -/]*)|\x9b[0-?]*[ -/]*)\Z")
# Control characters except tab and line feed; those that change the direction of writing.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u202a-\u202e\u2066-\u2069]")


def parts_of(text: str) -> Iterator[tuple[bool, str]]:
    """The parts of a Markdown text in order, as (whether it is fenced code, text); fences belong to the code."""
    begin = at = 0
    opening: re.Match[str] | None = None
    while (fence := _FENCE.search(text, at)) is not None:
        at = fence.end()
        if opening is None:
            if "`" in fence["info"] and fence["marks"][0] == "`":
                continue  # a code span
            yield False, text[begin : fence.start()]
            begin, opening = fence.start(), fence
        elif fence["marks"].startswith(opening["marks"]) and not fence["info"].strip():
            yield True, text[begin:at]
            begin, opening = at, None
    yield opening is not None, text[begin:]


def open_fence(text: str) -> str:
    """The opening line of a code block that the text does not close; "" if all are closed."""
    is_code, last = list(parts_of(text))[-1]
    fence = _FENCE.match(last) if is_code else None
    return fence[0].strip() if fence else ""


def safe_markdown(text: str) -> str:
    """The text with its HTML shown as text, and an open code block closed.

    Frontends disagree on where code begins and ends. So code blocks that contain tags are rewritten in a form that
    every frontend reads as code, and code spans that contain tags as plain characters without any syntax.
    """
    text = printable(text.replace("\r\n", "\n").replace("\r", "\n")).replace(_DOLLAR, "")
    parts = [(is_code, part if is_code else _with_marked_dollars(part)) for is_code, part in parts_of(text)]
    text = "".join(part for _, part in parts)
    may_have_formulas = "$" in text or "\\" in text
    risky = any(is_code and _is_risky(part, may_have_formulas) for is_code, part in parts)
    write = _separated_block if risky else _unchanged_block
    safe = ""
    for is_code, part in parts:
        if is_code:
            safe = write(safe, part)
        else:
            text_part = _with_html_as_text(part, may_have_formulas)
            safe += _with_closed_formulas(text_part) if risky else text_part
    return safe.replace(_DOLLAR, DOLLAR_AS_TEXT)


def _with_marked_dollars(text: str) -> str:
    """Text that is not fenced code, with a mark in place of each dollar that does not belong to a formula."""
    if "$" not in text:
        return text

    def replacement(match: re.Match[str]) -> str:
        if match["dollar"]:
            return _DOLLAR
        if match["address"]:
            return match[0].replace("$", "%24")
        if match["formula"] and _AMOUNT.match(_GROUP.sub("", match["formula"])):
            return f"{_DOLLAR}{match['formula']}{_DOLLAR}"
        return match[0]

    return _SPAN_OR_DOLLAR.sub(replacement, text)


def _is_risky(block: str, may_have_formulas: bool) -> bool:
    """Whether a code block would be dangerous if a frontend did not read it as code."""
    language = block.partition("\n")[0].strip().lstrip("`~").strip()
    quotes_in_addresses = may_have_formulas and '"' in block and _ADDRESS.search(block)
    return bool(_IN_CODE.search(block) or quotes_in_addresses) or not _LANGUAGE.fullmatch(language)


def _separated_block(before: str, block: str) -> str:
    """The text before, and the code block outside of all lists and quotes."""
    language, code = language_and_code(block)
    return f"{before}\n\n{fenced(code, language)}\n\n".lstrip("\n")


def _unchanged_block(before: str, block: str) -> str:
    # The blank line ends a formula that began before.
    between = "" if not before or before.endswith("\n\n") else "\n"
    fence = open_fence(block)
    return f"{before}{between}{block}" + (f"\n{' ' * _indent(block)}{_marks(fence)}" if fence else "")


def _indent(block: str) -> int:
    return len(block) - len(block.lstrip(" "))


def _with_html_as_text(text: str, may_have_formulas: bool) -> str:
    """Text that is not fenced code, with its HTML shown as text."""

    def replacement(match: re.Match[str]) -> str:
        if (code := match["code"]) is not None:
            is_risky = _IN_CODE.search(code) or (may_have_formulas and '"' in code)
            return f"<code>{_by_number(code)}</code>" if is_risky else match[0]
        if match["image"]:
            return "[image]" if match["unnamed"] else "[image: "
        if match["escaped_image"]:
            return "&#33;"
        if match["quote"]:
            return "&quot;" if may_have_formulas else match[0]
        if not match["danger"]:
            return match[0]
        if match[0][0].isalpha() or match[0] == "\\":
            return f"{match[0]}\u200b"  # a space without width: no scheme and no command contains one
        return {"<": "&lt;", "&": "&amp;"}.get(match[0], f"&#{ord(match[0])};")

    return _SPAN_OR_DANGER.sub(replacement, text)


def _with_closed_formulas(text: str) -> str:
    """The text, with every character escaped that could open a formula which a later part closes."""
    return _FORMULA.sub(lambda match: f"&#{ord(match[0])};" if match["open"] else match[0], text)


def _by_number(text: str) -> str:
    """The text with every character that could be syntax as a numeric reference."""
    return "".join(char if char.isalnum() or char == " " else f"&#{ord(char)};" for char in text)


def printable(text: str) -> str:
    """The text without what controls a terminal (colours, say) or reorders what is read."""
    return _CONTROL.sub("", _ESCAPE.sub("", text))


def without_begun_escape(text: str) -> str:
    """A text that may continue, without an escape sequence at its end that is not complete."""
    return _ESCAPE_BEGINS.sub("", text)


def _marks(fence: str) -> str:
    return fence[: len(fence) - len(fence.lstrip(fence[0]))]


def code_in(text: str) -> tuple[str, str]:
    """Language and code of the first fenced code block; `("", text)` without one."""
    return next((language_and_code(part) for is_code, part in parts_of(text) if is_code), ("", text))


def language_and_code(block: str) -> tuple[str, str]:
    """What a fenced code block is written in, and its lines without the fences and their indentation."""
    first, _, rest = block.partition("\n")
    lines = rest.splitlines()
    if lines and _FENCE.fullmatch(lines[-1]) and not lines[-1].strip(" `~"):
        lines.pop()
    code, indent = "\n".join(lines), _indent(block)
    code = re.sub(rf"^ {{1,{indent}}}", "", code, flags=re.MULTILINE) if indent else code
    return first.strip().lstrip("`~").strip(), code


def fenced(text: str, language: str = "") -> str:
    """A text as a fenced code block, even if it contains fences."""
    text = printable(text.replace("\r\n", "\n"))
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    word = _LANGUAGE.match(language)
    return f"{marks}{word[0] if word else ''}\n{text}\n{marks}"
