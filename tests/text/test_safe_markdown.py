"""Markdown that a model wrote: nothing in it can run, and code stays code."""

from __future__ import annotations

import re

import pytest
from nbconvert.filters.markdown import markdown2html

from sollol_nb.chat.completion import Completion
from sollol_nb.text.safe_markdown import (
    code_in,
    fenced,
    parts_of,
    printable,
    safe_markdown,
    without_begun_escape,
)
from tests.support.hostile_answers import ADDRESSES, TAGS


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("a < b and c > d", "a < b and c > d"),
        ("x <y", "x &lt;y"),
        ("<script>alert(1)</script>", "&lt;script>alert(1)&lt;/script>"),
        ("<img src=x onerror=alert(1)>", "&lt;img src=x onerror=alert(1)>"),
        ("<!-- note -->", "&lt;!-- note -->"),
        ("one<br>two<br/>three H<sub>2</sub>O", "one<br>two<br/>three H<sub>2</sub>O"),
        ("<br onclick=x>", "&lt;br onclick=x>"),
        ("see <https://example.org/a?b=c>", "see <https://example.org/a?b=c>"),
        ("the `div` tag", "the `div` tag"),
        ("the `<div>` tag", "the <code>&#60;div&#62;</code> tag"),
        ("``a ` <b>`` <i>", "<code>a &#96; &#60;b&#62;</code> &lt;i>"),
        (r"\`<script>x</script>`", r"\`&lt;script>x&lt;/script>`"),
        ("`a\n<script>x</script>\n`", "`a\n&lt;script>x&lt;/script>\n`"),
        ("[x](javascript:alert(1))", "[x](javascript\u200b:alert(1))"),
        (r"[x](javascript\:alert(1))", "[x](javascript\u200b\\:alert(1))"),
        ("[x](JavaScript&colon;alert(1))", "[x](JavaScript&amp;colon;alert(1))"),
        ("[x](java&Tab;script:alert(1))", "[x](java&amp;Tab;script:alert(1))"),
        ("![x](https://example.org/?q=secret)", "[image: x](https://example.org/?q=secret)"),
        ("wow![](https://a/b.png)!", "wow[image](https://a/b.png)!"),
        ("![x][y]\n\n[y]: https://a/b.png", "[image: x][y]\n\n[y]: https://a/b.png"),
        ("[![x](https://a/b.png)](https://c)", "[[image: x](https://a/b.png)](https://c)"),
        (r"\![x](y) \\![x](y)", r"&#33;[x](y) \\[image: x](y)"),
        ("`![x](y)`", "<code>&#33;&#91;x&#93;&#40;y&#41;</code>"),
        ("[x](&#106;avascript:alert(1))", "[x](&amp;#106;avascript:alert(1))"),
        ("here is the data: 1, 2", "here is the data: 1, 2"),
        ("[x]: data:text/html,y", "[x]: data\u200b:text/html,y"),
        ("```html\n<b>x</b>\n```\n<b>", "```html\n<b>x</b>\n```\n\n\n&lt;b>"),
        ("~~~\n<b>\n```\n~~~\n<b>", "````\n<b>\n```\n````\n\n\n&lt;b>"),
        ("- a\n  ```\n  <b>\n   c\n  ```\n- d", "- a\n\n\n```\n<b>\n c\n```\n\n\n- d"),
        ("- a\n  ```py\n  x\n  ```\n- d", "- a\n\n  ```py\n  x\n  ```\n- d"),
        ("- a\n  ```py\n  x", "- a\n\n  ```py\n  x\n  ```"),
        ('"a" costs 5', '"a" costs 5'),
        ('"a" is $x$', "&quot;a&quot; is $x$"),
        ("```py\nx = 1", "```py\nx = 1\n```"),
        ("````\n```\n<b>", "````\n```\n<b>\n````\n\n"),
        ("", ""),
    ],
)
def test_html_is_shown_as_text_and_code_stays_code(text: str, safe: str) -> None:
    assert safe_markdown(text) == safe


def scheme_as_a_browser_reads_it(address: str) -> str:
    """Tabs and line ends do not count, nor do control characters before it: https://url.spec.whatwg.org/#url-parsing"""
    return re.sub(r"[\t\n\r]", "", address).lstrip("".join(map(chr, range(33)))).partition(":")[0].lower()


@pytest.mark.parametrize(
    "separator", ["", "\t", "\n", "\r\n", "\r", "\0", "\x1b", "\x0b", "\u202e", "\u2066", "\n\t\n"]
)
@pytest.mark.parametrize("scheme", ["javascript", "VBScript"])
@pytest.mark.parametrize("form", ["$\\href{%s:alert(1)}{x}$", "$$\\href{%s:alert(1)}{x}$$", "[x](<%s:alert(1)>)"])
def test_no_address_is_a_script_whatever_stands_in_its_scheme(form: str, scheme: str, separator: str) -> None:
    safe = safe_markdown(form % separator.join(scheme))
    (address,) = re.findall(r"(?:[{]|&lt;)([^{}<>]*:alert[^{}<>]*)", safe)
    assert scheme_as_a_browser_reads_it(address) != scheme.lower()


@pytest.mark.parametrize(
    "formula",
    [
        "$\\def\\a#1{\\href{#1\nscript:alert(1)}{x}}\\a{java}$",
        "$\\def\\a#1{\\href#1{x}}\\a{{java}}$",
        "$$\\let\\a=\\href \\a{x}{y}$$",
        '$\\def\\a#1{\\mmlToken{mi}[href="#1\nscript:alert(1)"]{x}}\\a{java}$',
    ],
)
def test_a_macro_cannot_put_an_address_together(formula: str) -> None:
    assert not re.search(r"\\(?:href|mmlToken)", safe_markdown(formula))


def test_a_formula_may_link_to_the_web() -> None:
    formula = "$\\href{https://example.org/#1}{x^2}$"
    assert safe_markdown(formula) == formula


@pytest.mark.parametrize("form", ["%s", "a\n\n```py\n%s\n```", "<b>\n```html\n<i>%s\n```", "`%s`"])
def test_characters_that_control_terminals_or_reorder_text_are_dropped(form: str) -> None:
    hostile = "a\0b\x1b[2Jc\x9b1md\u202ee\u2066f\u2069g\x7f"
    shown = Completion(model="m", message={"content": form % hostile})._repr_mimebundle_()
    for text in (safe_markdown(form % hostile), fenced(hostile), *shown.values()):
        assert not re.search(r"[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
        assert "abcdefg" in re.sub(r"&#(\d+);", lambda match: chr(int(match[1])), text)


@pytest.mark.parametrize(
    "sequence",
    [
        "\x1b[31m",
        "\x1b[1;38;2;10;20;30m",
        "\x1b[?25l",
        "\x9b0m",
        "\x1b]0;title\x07",
        "\x1b]8;;https://a\x1b\\",
        "\x1b(B",
        "\x1b7",
    ],
)
def test_escape_sequences_of_terminals_are_dropped_as_a_whole(sequence: str) -> None:
    assert printable(f"a{sequence}b[0m") == "ab[0m"
    assert safe_markdown(f"java{sequence}script:alert(1)") == "javascript\u200b:alert(1)"
    assert printable(f"{sequence}x" * 20_000) == "x" * 20_000


def test_an_escape_sequence_may_arrive_in_parts() -> None:
    for begun in ("\x1b", "\x1b[", "\x1b[38;5", "\x1b(", "\x9b1;"):
        assert without_begun_escape(f"a\x1b[0m b{begun}") == "a\x1b[0m b"
    assert without_begun_escape("a\x1b[0m") == "a\x1b[0m"


@pytest.mark.parametrize(
    "text", ["مرحبا 5 (x)", "שלום", "नमस्ते", "日本語", "\U0001f469\u200d\U0001f467", "e\u0301", "a\u00a0b\u00ad"]
)
def test_text_of_all_languages_stays_unchanged(text: str) -> None:
    assert safe_markdown(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "$5 and $10",
        "between $1,000 and $2,000",
        "$5-$10",
        "($5)-($10)",
        "**$5** to **$10**",
        "$5 each, or 3 for $12",
        "$20/month vs $200/year",
        "5$ or 6$",
        "1$=0.9, 2$=1.8",
        "US$ 5 and 10 $",
        "$5M vs. A$",
        "use $HOME and $PATH",
        "$HOME/$USER",
        "- a\n    - $5 and $10",
        "costs $5",
    ],
)
def test_amounts_and_variables_are_no_formulas(text: str) -> None:
    # A formula in JupyterLab begins and ends with a dollar, in the Markdown as well as in the page.
    safe = safe_markdown(text)
    assert "$" not in safe
    assert safe.replace("<span>&#36;</span>", "$") == text
    assert text.replace("**", "").lstrip("- ") in re.sub(r"<[^>]*>", "", markdown2html(safe)) or "\n" in text


@pytest.mark.parametrize(
    "text",
    [
        "$x$",
        "the $n$th",
        "$5x + 3$",
        "$5 \\text{ if } x$",
        "$\\alpha$ and $\\beta$",
        "if $x > 0$, then $y$.",
        "$1$ and $2$",
        "$a\nb$",
        "$$x$$",
        "$$\nx = 1\n$$",
        "`$5` and `$10`",
        "```sh\necho $HOME $PATH\n```",
        "a\n\n    echo $HOME $PATH",
    ],
)
def test_formulas_and_code_keep_their_dollars(text: str) -> None:
    assert safe_markdown(text) == text


def test_amounts_and_formulas_can_stand_together() -> None:
    assert safe_markdown("$x$ costs $5, `$y` not, \\$6") == (
        "$x$ costs <span>&#36;</span>5, `$y` not, <span>&#36;</span>6"
    )


def test_dollars_in_addresses_do_not_break_them() -> None:
    assert safe_markdown("[a](https://b?x=$5) https://c/$y") == "[a](https://b?x=%245) https://c/%24y"


@pytest.mark.parametrize("text", TAGS)
def test_no_tag_is_left_however_the_text_is_parsed(text: str) -> None:
    safe = safe_markdown(text)
    assert "<img" not in markdown2html(safe)
    assert "<img" not in without_blocks(safe), "tags remain only in separate code blocks"


def without_blocks(markdown: str) -> str:
    """The text without its code blocks that begin at the margin, between blank lines."""
    return re.sub(r"(?:\A|(?<=\n\n))(`{3,})[\w+#.-]*\n.*?\n\1(?=\n\n|\Z)", "", markdown, flags=re.DOTALL)


@pytest.mark.parametrize("text", ADDRESSES)
def test_formulas_put_no_quotes_into_addresses(text: str) -> None:
    # JupyterLab takes formulas out of the text before it reads Markdown, and puts them back without a check.
    formulas = re.findall(r"\$(?:(?!\n\s*\n)[^$])*\$", without_blocks(safe_markdown(text)))
    assert not any('"' in formula for formula in formulas)


@pytest.mark.parametrize("text", ["@@0@@", r"@\@0@@", r"@\\@0@@"])
def test_marks_of_formulas_cannot_be_forged(text: str) -> None:
    assert safe_markdown(text).startswith("&#64;")


def test_formulas_stay_unchanged_unless_they_may_end_in_code() -> None:
    code = "\n```\n<b>\n```"
    for formula in ("$a$", "$$a$$", "so $$a$$ b", "$$\na\n$$"):
        assert safe_markdown(formula + code).startswith(f"{formula}\n")
    for formula in ("$$a", "$$a\\$$", "a $$b\n$$ c", "\\\\[a\\\\]"):
        assert not safe_markdown(formula + code).startswith(f"{formula}\n")
        assert safe_markdown(formula) == formula


def test_the_parts_of_a_text_make_up_the_text() -> None:
    text = "a\n```py\nb\n```\nc\n~~~~\nd\n~~~\n~~~~~\n```x`\ne"
    parts = list(parts_of(text))

    assert "".join(part for _, part in parts) == text
    assert [part for is_code, part in parts if is_code] == ["```py\nb\n```", "~~~~\nd\n~~~\n~~~~~"]


@pytest.mark.parametrize(
    ("text", "language", "code"),
    [
        ("Here:\n```python\nx = 1\ny = 2\n```\nThat is all.", "python", "x = 1\ny = 2"),
        ("```\nplain\n```", "", "plain"),
        ("```sql\nSELECT 1", "sql", "SELECT 1"),
        ("no code", "", "no code"),
        ("~~~js\na\n~~~\n```py\nb\n```", "js", "a"),
    ],
)
def test_the_first_code_block_is_found(text: str, language: str, code: str) -> None:
    assert code_in(text) == (language, code)
    assert Completion(message={"content": text}).code[:1] == ([code] if code != text else [])


def test_a_fence_is_longer_than_those_inside() -> None:
    assert fenced("a ```` b", "md") == "`````md\na ```` b\n`````"
