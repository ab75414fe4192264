"""One chat: what it keeps and sends again, its names, how it is written to a file, and how it is shown."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sollol_nb.chat.completion import Completion
from sollol_nb.chat.conversation import Chat
from sollol_nb.chat.messages import check_messages
from sollol_nb.errors import ChatBusyError, ConfigError
from tests.support.chats import CALL, Chunks, answer, assistant, chat_of, user

# --- what is kept -------------------------------------------------------------------------------


def test_a_turn_is_kept_with_what_is_known_of_it() -> None:
    chat = Chat("c", system="Be brief.")
    assert chat.add(user("Hi"), Completion({**answer("Hello"), "prompt_eval_count": 9, "_dropped": "dropped it"}))
    question, reply = chat.history
    assert (question.role, question.model, question.done_reason) == ("user", "", "")
    assert (reply.role, reply.model, reply.done_reason) == ("assistant", "m", "stop")
    assert (reply.prompt_tokens, reply.answer_tokens) == (9, 3)
    assert chat.notes == [(reply.at, "dropped it")]
    assert (chat.model, chat.turn_count) == ("m", 1)


def test_a_tool_call_that_was_cut_is_kept_as_text_and_the_chat_continues() -> None:
    cut = {"function": {"name": "now", "arguments": '{"zone": "U'}}
    chat = Chat("c")

    assert chat.add(user("Hi"), Completion({**answer(""), "message": assistant("Wait.", tool_calls=[CALL, cut])}))

    reply = assistant('Wait.\nnow {"zone": "U', tool_calls=[CALL])
    assert check_messages(chat.messages) == [user("Hi"), reply]
    assert Chat.from_dict(json.loads(json.dumps(chat.as_dict())), name="c").messages == [user("Hi"), reply]


@pytest.mark.parametrize(
    ("message", "is_kept"),
    [
        (assistant("Hel"), True),
        (assistant("", tool_calls=[CALL]), True),
        (assistant(""), False),
        (assistant("", thinking="Hm"), False),
    ],
)
def test_a_turn_without_an_answer_is_not_kept(message: dict[str, Any], is_kept: bool) -> None:
    chat = Chat("c")
    assert chat.add(user("Hi"), Completion(message=message, done_reason="cancelled")) is is_kept
    assert len(chat.history) == 2 * is_kept


def test_earlier_reasoning_is_kept_and_not_sent_again() -> None:
    chat = Chat("c", system="Be brief.")
    chat.add(user("Hi"), answer("Hello", thinking="They greet me."))
    system = {"role": "system", "content": "Be brief."}
    assert chat.messages == [system, user("Hi"), assistant("Hello")]
    assert chat.to_messages() == [system, user("Hi"), assistant("Hello", thinking="They greet me.")]


def test_messages_handed_out_are_copies() -> None:
    chat = chat_of(1)
    for messages in (chat.messages, chat.to_messages()):
        messages[1]["content"] = "changed"
        messages.pop()
    assert chat.messages == chat_of(1).messages


def test_a_cleared_chat_keeps_its_system_message_only() -> None:
    chat = chat_of(2)
    chat.clear()
    assert chat.messages == [{"role": "system", "content": "Be brief."}]


# --- to and from plain data ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "messages",
    [
        [user("Hi")],
        [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Hello", thinking="Hm")],
        [user("Hi"), {"role": "system", "content": "Now be long."}, user("Well?")],
        [user("Time?"), assistant("", tool_calls=[CALL]), {"role": "tool", "content": "noon"}, assistant("Noon.")],
        [{"role": "user", "content": "What is this?", "images": ["aGk="]}, assistant("A cat.")],
    ],
)
def test_messages_come_back_as_they_went_in(messages: Chunks) -> None:
    assert Chat.from_messages(messages).to_messages() == messages


@pytest.mark.parametrize("messages", [[], [{"role": "nobody", "content": "Hi"}], ["Hi"]])
def test_invalid_messages_make_no_chat(messages: Any) -> None:
    with pytest.raises(ConfigError, match="messages"):
        Chat.from_messages(messages)


def test_a_chat_comes_back_from_its_file_with_all_that_is_known(tmp_path: Path) -> None:
    chat = chat_of(1, "trip")
    chat.add(user("Grüße?"), Completion({**answer("你好", thinking="Hm"), "_dropped": "dropped it"}))
    path = chat.export(tmp_path / "trip.json")
    again = Chat.load(path)
    assert (again.name, again.system, again.history) == (chat.name, chat.system, chat.history)
    assert "Grüße" in path.read_text(encoding="utf-8")
    assert Chat.load(str(path), name="other").name == "other"


def test_an_exported_file_says_what_it_is(tmp_path: Path) -> None:
    data = json.loads(chat_of(1).export(tmp_path / "c.json").read_text(encoding="utf-8"))
    assert (data["format"], data["version"], data["name"], data["system"]) == (
        "sollol_nb chat",
        1,
        "c",
        "Be brief.",
    )
    assert [entry["message"] for entry in data["said"]] == [user("question 0"), assistant("answer 0")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read"),
        ("{", "is not JSON"),
        ("[]", "is not an exported conversation"),
        ('{"format": "else"}', "is not an exported conversation"),
        ('{"format": "sollol_nb chat", "version": 2}', "has version 2"),
        ('{"format": "sollol_nb chat", "version": 1}', "is damaged"),
        ('{"format": "sollol_nb chat", "version": 1, "name": "c", "system": "", "said": ["Hi"]}', "is damaged"),
        ('{"format": "sollol_nb chat", "version": 1, "name": "", "system": "", "said": []}', "is damaged"),
    ],
)
def test_a_file_that_holds_no_chat_is_refused_in_one_line(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "c.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message) as error:
        Chat.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write"):
        chat_of(1).export(tmp_path / "missing" / "c.json")


def test_an_interrupted_answer_is_replaced_by_the_whole_one() -> None:
    chat = chat_of(1)
    broken = Completion({**answer("Hel"), "done_reason": "error", "_dropped": "dropped it"})
    chat.add(user("Hi"), broken)
    chat.amend(answer("Hello"))
    assert chat.messages == [*chat_of(1).messages, user("Hi"), assistant("Hello")]
    assert chat.history[-1].note == "dropped it"
    assert chat.history[-2].at < chat.history[-1].at, "the question was asked before"
    with pytest.raises(ConfigError, match="was not interrupted"):
        chat.amend(answer("Hello"))


def test_an_interrupted_answer_stays_where_it_cannot_be_replaced() -> None:
    chat = Chat("c")
    chat.add(user("Hi"), Completion({**answer("Hel"), "done_reason": "error"}))
    with pytest.raises(ConfigError, match="no text"):
        chat.amend(answer(""))
    with chat.answering(), pytest.raises(ChatBusyError):
        chat.amend(answer("Hello"))
    assert chat.messages == [user("Hi"), assistant("Hel")]


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["c", "trip-2", "v1.0", "_x", "7", "äpfel", "a" * 64])
def test_names_that_can_be_written_on_a_magic_line_are_good(name: str) -> None:
    assert Chat(name).name == name


@pytest.mark.parametrize("name", ["", "a b", "-x", ".x", "a/b", "a" * 65, "a\n", "<b>", None])
def test_other_names_are_refused(name: Any) -> None:
    with pytest.raises(ConfigError, match="cannot be the name of a conversation"):
        Chat(name)


# --- shown --------------------------------------------------------------------------------------


def test_messages_are_shown_and_never_run() -> None:
    chat = Chat("c", system="<script>0</script>")
    chat.add(user("<script>1</script>"), answer("<img src=x onerror=2>", thinking="<b>3</b>"))
    chat.add(
        user("x"), Completion({**answer("<q>"), "_dropped": "<u>", "model": "<m>", "done_reason": "cancelled"})
    )
    shown = chat._repr_mimebundle_()["text/markdown"]
    for tag in ("<script", "<img", "<b>3", "<q>", "<u>", "<m>"):
        assert tag not in shown
    for text in ("&lt;script>1", "&lt;img src=x onerror=2>", "reasoning", "stopped"):
        assert text in shown


def test_answers_are_shown_as_markdown_and_questions_line_by_line() -> None:
    chat = Chat("my_tour")
    code = "Use `for`:\n\n```python\nfor i in x:\n    print(i)\n```"
    chat.add(user("a,b\n1,2\n\n```\n1\n2\n```"), answer(code))
    shown = chat._repr_mimebundle_()
    assert "text/html" not in shown, "frontends would take it instead"
    assert shown["text/markdown"].endswith(
        f"<small>**user**</small>\n\na,b  \n1,2\n\n```\n1\n2\n```\n\n</div>\n\n<small>**m**</small>\n\n{code}"
    )
    assert shown["text/markdown"].startswith(
        '**conversation my\\_tour**<small class="sollol-code"> · 1 turn · m · '
    )


def test_long_questions_and_what_systems_and_tools_say_are_folded_and_lose_nothing() -> None:
    call = {"function": {"name": "now", "arguments": {"zone": "UTC"}}}
    messages = [{"role": "system", "content": "Be brief."}, user("word " * 1000), assistant("", tool_calls=[call])]
    chat = Chat.from_messages(
        [*messages, {"role": "tool", "tool_name": "clock", "content": "noon"}, assistant("term " * 1000)]
    )
    shown = chat._repr_mimebundle_()
    folds = re.findall(r"<details><summary>(?:<small>)?([^<]{,17})", shown["text/markdown"])
    assert folds == ["system message (9", "word word word wo", "result of clock ("]
    for text in ("Be brief.", "word " * 1000, '[calls now(zone="UTC")]', "noon", "term " * 1000):
        assert text in shown["text/markdown"]
    assert "more characters" in shown["text/plain"]
    assert len(shown["text/plain"]) < 2000


@pytest.mark.parametrize("more", [{}, {"_context_full": 2048}])
def test_an_answer_cut_by_either_limit_is_shown_as_cut(more: dict[str, Any]) -> None:
    chat = Chat("c")
    chat.add(user("Hi"), Completion({**answer("Hello"), "done_reason": "length", **more}))
    assert str(chat).endswith("assistant (m, stopped at max_tokens): Hello")


def test_the_text_names_speakers_and_dropped_turns() -> None:
    chat = Chat("c", system="Be brief.")
    chat.add(user("Hi"), Completion({**answer("Hello"), "_dropped": "dropped it", "done_reason": "error"}))
    title, *lines = str(chat).splitlines()
    assert title.startswith("conversation c: 1 turn, m, ")
    assert lines == ["system: Be brief.", "user: Hi", "[dropped it]", "assistant (m, interrupted): Hello"]
    assert repr(chat) == "<Chat c: 1 turn, m>"
