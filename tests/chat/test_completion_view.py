"""How an answer looks: nothing of it can run, code stays code, and the footer tells what is worth telling."""

from __future__ import annotations

import re
from typing import Any

import pytest
from nbconvert.filters.markdown import markdown2html

from sollol_nb.chat.completion import Completion
from sollol_nb.chat.completion_view import LIVE_CHARS, live_markdown, split_thinking, tail
from sollol_nb.text.safe_markdown import code_in, fenced, open_fence, parts_of, safe_markdown
from tests.support.hostile_answers import ADDRESSES, IMAGE, TAGS


def completion(text: str, shown_as: str = "markdown", thinking: str = "", **more: Any) -> Completion:
    message = {"role": "assistant", "content": text} | ({"thinking": thinking} if thinking else {})
    made = Completion(model="demo", message=message, done=True, done_reason="stop", **more)
    made.shown_as = shown_as
    return made


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
        ("![x](https://example.org/?q=secret)", "&#33;[x](https://example.org/?q=secret)"),
        ("[x](&#106;avascript:alert(1))", "[x](&amp;#106;avascript:alert(1))"),
        ("here is the data: 1, 2", "here is the data: 1, 2"),
        ("[x]: data:text/html,y", "[x]: data\u200b:text/html,y"),
        ("```html\n<b>x</b>\n```\n<b>", "```html\n<b>x</b>\n```\n\n\n&lt;b>"),
        ("~~~\n<b>\n```\n~~~\n<b>", "````\n<b>\n```\n````\n\n\n&lt;b>"),
        ("- a\n  ```\n  <b>\n   c\n  ```\n- d", "- a\n\n\n```\n<b>\n c\n```\n\n\n- d"),
        ("- a\n  ```py\n  x\n  ```\n- d", "- a\n\n  ```py\n  x\n  ```\n- d"),
        ("- a\n  ```py\n  x", "- a\n\n  ```py\n  x\n  ```"),
        ('"a" costs 5', '"a" costs 5'),
        ('"a" costs $5', "&quot;a&quot; costs $5"),
        ("```py\nx = 1", "```py\nx = 1\n```"),
        ("````\n```\n<b>", "````\n```\n<b>\n````\n\n"),
        ("", ""),
    ],
)
def test_html_of_a_model_is_shown_as_text_and_code_stays_code(text: str, safe: str) -> None:
    assert safe_markdown(text) == safe


@pytest.mark.parametrize("text", TAGS)
def test_no_tag_of_a_model_is_one_however_its_text_is_read(text: str) -> None:
    safe = safe_markdown(text)
    assert "<img" not in markdown2html(safe)
    assert "<img" not in without_blocks(safe), "tags are left in code only, which is apart from all else"


def without_blocks(markdown: str) -> str:
    """The text without its code blocks that begin at the margin, between blank lines."""
    return re.sub(r"(?:\A|(?<=\n\n))(`{3,})[\w+#.-]*\n.*?\n\1(?=\n\n|\Z)", "", markdown, flags=re.DOTALL)


@pytest.mark.parametrize("text", ADDRESSES)
def test_a_formula_brings_no_quote_into_an_address(text: str) -> None:
    # JupyterLab takes formulas out of the text before it reads Markdown, and puts them back without a check.
    formulas = re.findall(r"\$(?:(?!\n\s*\n)[^$])*\$", without_blocks(safe_markdown(text)))
    assert not any('"' in one for one in formulas)


@pytest.mark.parametrize("text", ["@@0@@", r"@\@0@@", r"@\\@0@@"])
def test_the_places_of_formulas_are_not_made_up(text: str) -> None:
    assert safe_markdown(text).startswith("&#64;")


def test_formulas_are_left_alone_unless_they_may_end_in_code() -> None:
    code = "\n```\n<b>\n```"
    for formula in ("$a$", "$$a$$", "so $$a$$ b", "$$\na\n$$"):
        assert safe_markdown(formula + code).startswith(f"{formula}\n")
    for formula in ("$$a", "$$a\\$$", "a $$b\n$$ c", "\\\\[a\\\\]"):
        assert not safe_markdown(formula + code).startswith(f"{formula}\n")
        assert safe_markdown(formula) == formula


def test_a_language_of_code_is_a_word() -> None:
    page = completion(f"~~~a`b{IMAGE}\nx\n~~~", "code")._repr_mimebundle_()["text/markdown"]
    assert page.startswith("```a\nx\n```\n")


def test_the_parts_of_a_text_are_the_text() -> None:
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
def test_code_is_found_in_an_answer(text: str, language: str, code: str) -> None:
    assert code_in(text) == (language, code)
    assert completion(text).code == code


def test_a_fence_is_longer_than_those_inside() -> None:
    assert fenced("a ```` b", "md") == "`````md\na ```` b\n`````"


def test_a_long_answer_under_way_is_shown_by_its_end() -> None:
    text = "first line\n" + "```py\n" + "code = 1\n" * 5000

    shown = tail(text)

    assert len(shown) < LIVE_CHARS + 200
    assert "first line" not in shown
    assert "characters above" in shown
    assert shown.endswith("code = 1\n")
    assert open_fence(shown) == "```py", "it is still code"
    assert tail("short") == "short"


def test_an_answer_under_way_shows_its_text_else_its_reasoning_and_what_goes_on() -> None:
    assert live_markdown("", "", "") == ""
    assert live_markdown("Hello", "", "") == "Hello"
    assert live_markdown("", "Hm\nhm", "") == "*reasoning …*\n\n> Hm\n> hm"
    assert live_markdown("Hello", "Hm", "") == "Hello"
    assert live_markdown("", "", "loading 5_b") == "*loading 5\\_b …*"
    assert live_markdown("Hel", "", "replacing") == "Hel\n\n*replacing …*"


def test_reasoning_is_folded_after_the_answer() -> None:
    markdown = completion("Yes.", thinking="I think <b>so</b>.")._repr_mimebundle_()["text/markdown"]

    assert markdown.startswith(
        "Yes.\n\n<details><summary>reasoning (3 words)</summary>\n\nI think &lt;b>so&lt;/b>."
    )


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<think>\nHm.\n</think>\n\nYes.", ("Yes.", "Hm.")),
        (" <think>Hm", ("", "Hm")),
        ("Say <think> aloud", ("Say <think> aloud", "")),
    ],
)
def test_reasoning_that_was_left_in_the_text_is_folded_too(text: str, parts: tuple[str, str]) -> None:
    assert split_thinking(text, "") == parts
    assert split_thinking(text, "known") == (text, "known")
    shown = completion(text)._repr_mimebundle_()["text/markdown"]
    assert ("reasoning (1 word)" in shown) is bool(parts[1])


@pytest.mark.parametrize(
    ("shown_as", "text", "begin"),
    [
        ("json", '{"a":[1,2]}', '```json\n{\n  "a": [\n    1,\n    2\n  ]\n}\n```'),
        ("json", "no json", "```json\nno json\n```"),
        ("code", "Sure:\n```python\nx = 1\n```\nDone.", "```python\nx = 1\n```"),
        ("html", "```html\n<b>x</b>\n```", "```html\n<b>x</b>\n```"),
    ],
)
def test_an_answer_is_shown_in_the_form_asked_for(shown_as: str, text: str, begin: str) -> None:
    bundle = completion(text, shown_as)._repr_mimebundle_()

    assert bundle["text/markdown"].startswith(begin + "\n\n")
    assert bundle["text/plain"].startswith(text)


def test_a_page_runs_nothing_and_leaves_its_frame_nowhere() -> None:
    bundle = completion('<b>x</b><script>alert("1")</script>', "html")._repr_mimebundle_()

    page = bundle["text/html"]
    assert page.startswith('<iframe sandbox="" srcdoc="&lt;meta http-equiv=&quot;Content-Security-Policy&quot;')
    assert "default-src &#x27;none&#x27;" in page, "nothing is fetched either"
    assert "&gt;&lt;b&gt;x&lt;/b&gt;&lt;script&gt;alert(&quot;1&quot;)" in page
    assert "<script" not in page
    assert "<pre>&lt;b&gt;x" in page, "where frames are not shown, the source is"


def test_text_is_nothing_but_text() -> None:
    assert list(completion("**x**", "text")._repr_mimebundle_()) == ["text/plain"]


def test_the_footer_opens_and_tells_why() -> None:
    routing = {
        "backend": "llama.cpp-distributed",
        "reason": "listed * as large",
        "coordinator_url": "http://127.0.0.1:18080",
        "layout": "5/4",
        "ttft_ms": 12.0,
        "queue_ms": 0.5,
        "plan": {
            "shards": [
                {"layers": "0-4", "endpoint": "a:50052", "weight_bytes": 2**20, "kv_bytes": 2**10},
                {"layers": "5-7 + output", "endpoint": "b:50052", "weight_bytes": 2**20, "kv_bytes": 2**10},
            ]
        },
        "failovers": [{"what": "b:50053 died", "continued": False}],
        "dropped": "dropped the 2 oldest turns",
    }
    shown = completion("x", eval_count=1200, prompt_eval_count=7, _routing=routing)
    markdown = shown._repr_mimebundle_()["text/markdown"]

    assert "<summary><small>demo · llama.cpp-distributed · layers 5/4 · first token 12 ms · 1200" in markdown
    assert "dropped the 2 oldest turns</small></summary>" in markdown
    for line in (
        r"- why: listed \* as large",
        "- at http://127.0.0.1:18080",
        "- layers 0-4 on a:50052: 1.0 MiB weights, 1.0 KiB KV cache",
        "- queue 0.5 ms, first token 12 ms",
        "- 7 prompt tokens, 1,200 tokens generated",
        "- b:50053 died",
    ):
        assert line in markdown


def test_what_came_short_is_told() -> None:
    for reason, words in (("length", "stopped at max_tokens"), ("cancelled", "stopped"), ("error", "interrupted")):
        assert words in Completion(model="demo", done_reason=reason).footer()


def test_what_was_left_out_and_a_full_context_are_told() -> None:
    assert Completion(model="demo", _dropped="dropped 2 turns").footer() == "demo \u00b7 dropped 2 turns"
    full = Completion(model="demo", done_reason="length", _context_full=2048)
    assert full.footer() == "demo \u00b7 stopped: its context of 2,048 tokens is full"


def test_a_file_is_named_by_its_name() -> None:
    assert Completion(model="/models/some.gguf").footer() == "some.gguf"
