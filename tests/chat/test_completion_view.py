"""How an answer is shown: as Markdown, JSON, code, page or text, while it streams, and with its footer."""

from __future__ import annotations

import html
from typing import Any

import pytest

from sollol_nb.chat.completion import Completion
from sollol_nb.chat.completion_view import LIVE_CHARS, details, live_markdown, split_thinking, tail
from sollol_nb.text.safe_markdown import open_fence
from tests.support.hostile_answers import IMAGE


def completion(text: str, shown_as: str = "markdown", thinking: str = "", **more: Any) -> Completion:
    message = {"role": "assistant", "content": text} | ({"thinking": thinking} if thinking else {})
    made = Completion(model="demo", message=message, done=True, done_reason="stop", **more)
    made.shown_as = shown_as
    return made


def test_the_language_of_code_is_one_word() -> None:
    page = completion(f"~~~a`b{IMAGE}\nx\n~~~", "code")._repr_mimebundle_()["text/markdown"]
    assert page.startswith("```a\nx\n```\n")


def test_of_a_long_answer_the_end_is_shown_while_it_streams() -> None:
    text = "first line\n" + "```py\n" + "code = 1\n" * 5000

    shown = tail(text)

    assert len(shown) < LIVE_CHARS + 200
    assert "first line" not in shown
    assert "characters above" in shown
    assert shown.endswith("code = 1\n")
    assert open_fence(shown) == "```py", "it is still code"
    assert tail("short") == "short"


def test_while_it_streams_an_answer_shows_its_text_or_reasoning_and_the_status() -> None:
    assert live_markdown("", "", "") == ""
    assert live_markdown("Hello", "", "") == "Hello"
    assert live_markdown("", "Hm\nhm", "") == "*reasoning …*\n\n> Hm\n> hm"
    assert live_markdown("Hello", "Hm", "") == "Hello"
    assert live_markdown("", "", "loading 5_b") == "*loading 5\\_b …*"
    assert live_markdown("Hel", "", "replacing") == "Hel\n\n*replacing …*"


def test_reasoning_is_folded_after_the_answer() -> None:
    markdown = completion("Yes.", thinking="I think <b>so</b>.")._repr_mimebundle_()["text/markdown"]

    assert markdown.startswith(
        "Yes.\n\n<details><summary><small>reasoning (3 words)</small></summary>\n\nI think &lt;b>so&lt;/b>."
    )


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("<think>\nHm.\n</think>\n\nYes.", ("Yes.", "Hm.")),
        (" <think>Hm", ("", "Hm")),
        ("Say <think> aloud", ("Say <think> aloud", "")),
    ],
)
def test_reasoning_inside_the_text_is_folded_too(text: str, parts: tuple[str, str]) -> None:
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
def test_an_answer_is_shown_in_the_requested_format(shown_as: str, text: str, begin: str) -> None:
    bundle = completion(text, shown_as)._repr_mimebundle_()

    assert bundle["text/markdown"].startswith(begin + "\n\n")
    assert bundle["text/plain"].startswith(text)


def test_a_page_runs_nothing_and_stays_in_its_frame() -> None:
    bundle = completion('<b>x</b><script>alert("1")</script>', "html")._repr_mimebundle_()

    page = bundle["text/html"]
    assert page.startswith(
        '<iframe sandbox="allow-same-origin" srcdoc="&lt;meta http-equiv=&quot;Content-Security-Policy&quot;'
    )
    assert "default-src &#x27;none&#x27;" in page, "nothing is fetched either"
    assert "&gt;&lt;b&gt;x&lt;/b&gt;&lt;script&gt;alert(&quot;1&quot;)" in page
    assert "<script" not in page
    assert "allow-scripts" not in page
    assert "<pre>&lt;b&gt;x" in page, "the source, where frames are not shown"


def test_a_page_has_no_tag_that_connects_to_a_host_unasked() -> None:
    text = (
        '<LINK rel=preconnect href="//x.invalid"><iframe srcdoc="&lt;link rel=dns-prefetch>"></iframe><b>link</b>'
    )
    page = completion(text, "html")._repr_mimebundle_()["text/html"]
    shown = html.unescape(page.partition('srcdoc="')[2].partition('"')[0])
    assert "<x-LINK rel=preconnect" in shown
    assert "<x-iframe srcdoc=" in shown
    assert "<b>link</b>" in shown
    assert html.escape(text) in page, "its source is as it was written"


def test_as_text_there_is_only_plain_text() -> None:
    assert list(completion("**x**", "text")._repr_mimebundle_()) == ["text/plain"]


def test_the_footer_opens_and_shows_the_details() -> None:
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
            ],
            "reasons": ["c:50052 is left out: its round trip is too long"],
        },
        "drafted_tokens": 20,
        "failovers": [{"what": "b:50053 died", "continued": False}],
        "dropped": "dropped the 2 oldest turns",
    }
    shown = completion("x", eval_count=1200, prompt_eval_count=7, _routing=routing)
    markdown = shown._repr_mimebundle_()["text/markdown"]

    assert "<summary><small>demo · llama.cpp-distributed · layers 5/4 · first token 12 ms · 1,200" in markdown
    assert "dropped the 2 oldest turns</small></summary>" in markdown
    for line in (
        r"- why: listed \* as large",
        "- at http://127.0.0.1:18080",
        "- layers 0-4 on a:50052: 1.0 MiB weights, 1.0 KiB KV cache",
        "- queue 0.5 ms, first token 12 ms",
        "- plan: c:50052 is left out: its round trip is too long",
        "- 7 prompt tokens, 1,200 tokens generated",
        "- drafts: 0 of 20 accepted",
        "- b:50053 died",
    ):
        assert f"- <small>{line.removeprefix('- ')}</small>" in markdown


def test_the_footer_says_why_an_answer_ended_early() -> None:
    for reason, text in (("length", "stopped at max_tokens"), ("cancelled", "stopped"), ("error", "interrupted")):
        assert text in Completion(model="demo", done_reason=reason).footer()


def test_the_footer_names_dropped_turns_and_a_full_context() -> None:
    assert Completion(model="demo", _dropped="dropped 2 turns").footer() == "demo \u00b7 dropped 2 turns"
    full = Completion(model="demo", done_reason="length", _context_full=2048)
    assert full.footer() == "demo \u00b7 stopped: its context of 2,048 tokens is full"


@pytest.mark.parametrize(
    ("routing", "footer", "line"),
    [
        ({"cached_tokens": 5990, "restored_tokens": 5990}, "prompt: 6,020 tokens, 5,990 from a saved context", ""),
        ({"cached_tokens": 5990, "restored_tokens": 0}, "prompt: 6,020 tokens, 5,990 from its slot", ""),
        (
            {"cached_tokens": 5990, "restored_tokens": 5000},
            "prompt: 6,020 tokens, 5,000 from a saved context, 990 from its slot",
            "",
        ),
        # A few tokens from the slot are a detail.
        ({"cached_tokens": 20, "restored_tokens": 0}, "", "prompt: 6,020 tokens, 20 from its slot"),
        ({"cached_tokens": 0, "restored_tokens": 0}, "", ""),
        ({"cached_tokens": None, "restored_tokens": None}, "", ""),
        ({"cached_tokens": 0, "context_note": "its saved context is damaged"}, "its saved context is damaged", ""),
    ],
)
def test_the_footer_says_where_a_long_prompt_came_from(routing: dict[str, Any], footer: str, line: str) -> None:
    answer = Completion(model="demo", prompt_eval_count=6020, _routing=routing)
    assert answer.footer() == " \u00b7 ".join(filter(None, ["demo", footer]))
    shown = [text for text in details(answer) if text.startswith("prompt: ")]
    assert shown == ([line or footer] if routing["cached_tokens"] else [])


def test_an_answer_without_counts_says_what_came_from_a_saved_context() -> None:
    answer = Completion(model="demo", _routing={"cached_tokens": 1990, "restored_tokens": 1990})
    assert answer.footer() == "demo \u00b7 prompt: 1,990 from a saved context"


@pytest.mark.parametrize(
    ("failover", "text"),
    [
        ({"lost_workers": ["a:50052", "b:50052"], "cost_ms": 1234.5},
         "lost a:50052, b:50052 at token 7, continued after 1.2 s"),
        ({"lost_workers": [], "cost_ms": None}, "lost its coordinator at token 7, continued"),
        ({"lost_workers": [], "cost_ms": 300.0, "recovery": "exact"},
         "lost its coordinator at token 7, continued after 0.3 s (exact)"),
        ({"cost_ms": 300.0}, "lost its Ollama node at token 7, continued after 0.3 s"),
    ],
)  # fmt: skip
def test_the_footer_names_the_server_that_was_lost(failover: dict[str, Any], text: str) -> None:
    routing = {"failovers": [{"what": "it died", "continued": True, "tokens_before": 7, **failover}]}
    assert Completion(model="demo", _routing=routing).footer() == f"demo \u00b7 {text}"


@pytest.mark.parametrize(("recovery", "text"), [("fast", "may differ from an undisturbed answer"),
                                                ("exact", "is that of an undisturbed answer")])  # fmt: skip
def test_the_details_say_what_a_recovery_gives(recovery: str, text: str) -> None:
    failover = {"what": "it died", "continued": True, "tokens_before": 7, "recovery": recovery}
    shown = details({"_routing": {"failovers": [failover, failover]}})
    assert [line for line in shown if text in line] == shown[-1:]


def test_a_model_file_is_shown_without_its_folders() -> None:
    assert Completion(model="/models/some.gguf").footer() == "some"


def test_the_details_have_the_path_of_a_model_file() -> None:
    answer = Completion(model="smol", _routing={"reason": "small", "model_path": "/m/s.gguf"})
    assert details(answer)[:2] == ["why: small", "model file: /m/s.gguf"]
