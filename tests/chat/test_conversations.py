"""Chats: what is kept and sent again, how they are written and shown, and what happens when one grows too long."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from sollol_nb.chat.completion import Completion
from sollol_nb.chat.conversation import Chat, ChatBook, ask_in_chat
from sollol_nb.errors import (
    AnswerInterruptedError,
    ChatBusyError,
    ConfigError,
    ContextOverflowError,
    ModelNotFoundError,
    SollolError,
)
from sollol_nb.llama_cpp.engine.find import Engine
from sollol_nb.models.files import DEMO_MODEL_PATH
from sollol_nb.ollama.pool import OllamaPool
from sollol_nb.runtime.io_loop import iterate_blocking
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import run, write_endless
from tests.support.ollama_server import CHATML, OllamaServer

CONTEXT_TOKENS = 256
CALL = {"function": {"name": "now", "arguments": {}}}
Chunks = list[dict[str, Any]]


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def answer(content: str, **more: Any) -> Completion:
    return Completion(message=assistant(content, **more), model="m", done_reason="stop", eval_count=3)


def chat_of(turn_count: int, name: str = "c") -> Chat:
    """A chat in which each answer repeats its question's number."""
    messages = [one for at in range(turn_count) for one in (user(f"question {at}"), assistant(f"answer {at}"))]
    return Chat.from_messages([{"role": "system", "content": "Be brief."}, *messages], name=name)


def asked(router: HybridRouter, chat: Chat, model: str, prompt: Any, **options: Any) -> Chunks:
    """All chunks of the answer to a chat's next question."""
    return [*iterate_blocking(ask_in_chat(router.stream_async, chat, model, prompt, **options))]


# --- what is kept -------------------------------------------------------------------------------


def test_a_turn_is_kept_with_what_is_known_of_it() -> None:
    chat = Chat("c", system="Be brief.")
    assert chat.add(user("Hi"), Completion({**answer("Hello"), "prompt_eval_count": 9, "_dropped": "dropped it"}))
    question, said = chat.said
    assert (question.role, question.model, question.done_reason) == ("user", "", "")
    assert (said.role, said.model, said.done_reason) == ("assistant", "m", "stop")
    assert (said.prompt_tokens, said.answer_tokens) == (9, 3)
    assert chat.notes == [(said.at, "dropped it")]
    assert (chat.model, chat.turn_count) == ("m", 1)


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
    assert len(chat.said) == 2 * is_kept


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
def test_what_are_no_messages_makes_no_chat(messages: Any) -> None:
    with pytest.raises(ConfigError, match="messages"):
        Chat.from_messages(messages)


def test_a_chat_comes_back_from_its_file_with_all_that_is_known(tmp_path: Path) -> None:
    chat = chat_of(1, "trip")
    chat.add(user("Grüße?"), Completion({**answer("你好", thinking="Hm"), "_dropped": "dropped it"}))
    path = chat.export(tmp_path / "trip.json")
    again = Chat.load(path)
    assert (again.name, again.system, again.said) == (chat.name, chat.system, chat.said)
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
    assert [one["message"] for one in data["said"]] == [user("question 0"), assistant("answer 0")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[]", "holds no chat"),
        ('{"format": "else"}', "holds no chat"),
        ('{"format": "sollol_nb chat", "version": 2}', "has version 2"),
        ('{"format": "sollol_nb chat", "version": 1}', "is damaged"),
        ('{"format": "sollol_nb chat", "version": 1, "name": "c", "system": "", "said": ["Hi"]}', "is damaged"),
        ('{"format": "sollol_nb chat", "version": 1, "name": "", "system": "", "said": []}', "is damaged"),
    ],
)
def test_a_file_that_holds_no_chat_is_refused_in_one_line(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "c.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=words) as error:
        Chat.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        chat_of(1).export(tmp_path / "missing" / "c.json")


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["c", "trip-2", "v1.0", "_x", "7", "äpfel", "a" * 64])
def test_names_that_can_be_written_on_a_magic_line_are_good(name: str) -> None:
    assert Chat(name).name == name


@pytest.mark.parametrize("name", ["", "a b", "-x", ".x", "a/b", "a" * 65, "a\n", "<b>", None])
def test_other_names_are_refused(name: Any) -> None:
    with pytest.raises(ConfigError, match="is no name for a chat"):
        ChatBook().open(name)


def test_a_book_opens_finds_and_forgets_chats() -> None:
    book = ChatBook()
    trip = book.open("trip")
    assert book.open("trip") is trip is book["trip"] is book.find("trip")
    assert [*book] == ["trip"]
    assert book.remove("trip") is trip
    assert "trip" not in book


@pytest.mark.parametrize(("name", "words"), [("trop", "did you mean trip"), ("zzz", "there are: plan, trip")])
def test_a_chat_that_is_not_there_is_told_with_those_that_are(name: str, words: str) -> None:
    book = ChatBook()
    book.open("trip")
    book.open("plan")
    with pytest.raises(ConfigError, match=words):
        book.find(name)


def test_a_loaded_chat_does_not_take_anothers_place_unless_told_to() -> None:
    book = ChatBook()
    book.open("c")
    with pytest.raises(ConfigError, match="there is a chat c already"):
        book.add(chat_of(1))
    book.add(chat_of(1), replace=True)
    assert book["c"].turn_count == 1
    book.add(book["c"])


# --- shown --------------------------------------------------------------------------------------


def test_what_was_said_is_shown_and_never_run() -> None:
    chat = Chat("c", system="<script>0</script>")
    chat.add(user("<script>1</script>"), answer("<img src=x onerror=2>", thinking="<b>3</b>"))
    chat.add(
        user("x"), Completion({**answer("<q>"), "_dropped": "<u>", "model": "<m>", "done_reason": "cancelled"})
    )
    shown = chat._repr_mimebundle_()["text/html"]
    for tag in ("<script", "<img", "<b>3", "<q>", "<u>", "<m>"):
        assert tag not in shown
    for text in ("&lt;script&gt;1", "&lt;img src=x onerror=2&gt;", "reasoning", "stopped"):
        assert text in shown


def test_long_messages_are_folded_and_lose_nothing() -> None:
    chat = Chat("c")
    chat.add(user("short"), answer("word " * 1000))
    shown = chat._repr_mimebundle_()
    assert shown["text/html"].count("<details>") == 1
    assert "word " * 1000 in shown["text/html"]
    assert "more characters" in shown["text/plain"]
    assert len(shown["text/plain"]) < 1000


def test_text_says_who_said_what_and_what_was_dropped() -> None:
    chat = Chat("c", system="Be brief.")
    chat.add(user("Hi"), Completion({**answer("Hello"), "_dropped": "dropped it", "done_reason": "error"}))
    title, *lines = str(chat).splitlines()
    assert title.startswith("chat c: 1 turn, m, ")
    assert lines == ["system: Be brief.", "user: Hi", "[dropped it]", "assistant (m, broke off): Hello"]
    assert repr(chat) == "<Chat c: 1 turn, m>"


def test_a_book_lists_its_chats() -> None:
    book = ChatBook()
    assert "no chats yet" in book._repr_mimebundle_()["text/html"]
    book.open("trip").add(user("Hi"), answer("Hello"))
    shown = book._repr_mimebundle_()
    assert "<td>trip</td><td>1</td><td>m</td>" in shown["text/html"]
    assert "chat trip: 1 turn, m, " in shown["text/plain"]
    assert repr(book) == "<ChatBook: <Chat trip: 1 turn, m>>"


# --- asking -------------------------------------------------------------------------------------


def breaking_off(after: Chunks, error: Exception) -> Callable[..., AsyncGenerator[dict[str, Any], None]]:
    """A router's stream whose place is lost after these chunks."""

    async def stream(*_: Any, **__: Any) -> AsyncGenerator[dict[str, Any], None]:
        for chunk in after:
            yield chunk
        raise error

    return stream


def test_an_answer_that_breaks_off_is_kept_as_far_as_it_came() -> None:
    first = {"model": "m", "message": assistant("Hel"), "done": False, "_dropped": "dropped it"}
    stream = breaking_off([first, {**first, "message": assistant("lo")}], AnswerInterruptedError("gone"))
    chat = Chat("c")
    with pytest.raises(AnswerInterruptedError):
        list(iterate_blocking(ask_in_chat(stream, chat, "m", "Hi")))
    assert chat.messages == [user("Hi"), assistant("Hello")]
    assert (chat.said[-1].done_reason, chat.said[-1].model, chat.said[-1].note) == ("error", "m", "dropped it")


def test_an_answer_that_broke_off_is_amended_by_the_whole_one() -> None:
    chat = chat_of(1)
    broken = Completion({**answer("Hel"), "done_reason": "error", "_dropped": "dropped it"})
    chat.add(user("Hi"), broken)
    chat.amend(answer("Hello"))
    assert chat.messages == [*chat_of(1).messages, user("Hi"), assistant("Hello")]
    assert chat.said[-1].note == "dropped it"
    assert chat.said[-2].at < chat.said[-1].at, "the question was asked before"
    with pytest.raises(ConfigError, match="did not break off"):
        chat.amend(answer("Hello"))


def test_an_answer_that_broke_off_stays_where_it_cannot_be_amended() -> None:
    chat = Chat("c")
    chat.add(user("Hi"), Completion({**answer("Hel"), "done_reason": "error"}))
    with pytest.raises(ConfigError, match="no text"):
        chat.amend(answer(""))
    with chat.answering(), pytest.raises(ChatBusyError):
        chat.amend(answer("Hello"))
    assert chat.messages == [user("Hi"), assistant("Hel")]


def test_what_was_dropped_in_mid_answer_is_noted_too() -> None:
    """As where the next Ollama node has less context than the one that was lost."""
    chunk = {"model": "m", "message": assistant("Hel"), "done": False}
    stream = breaking_off([chunk, {**chunk, "_dropped": "dropped it"}, chunk], AnswerInterruptedError("gone"))
    chat = Chat("c")
    with pytest.raises(AnswerInterruptedError):
        list(iterate_blocking(ask_in_chat(stream, chat, "m", "Hi")))
    assert [note for _, note in chat.notes] == ["dropped it"]


def test_a_question_that_failed_before_a_word_is_not_kept_and_leaves_the_chat_free() -> None:
    chat = chat_of(1)
    with pytest.raises(AnswerInterruptedError):
        list(iterate_blocking(ask_in_chat(breaking_off([], AnswerInterruptedError("gone")), chat, "m", "Hi")))
    assert chat.messages == chat_of(1).messages
    assert not chat.is_answering


@pytest.mark.engine
def test_the_next_question_is_asked_with_all_that_was_said(router: HybridRouter) -> None:
    chat = Chat("c")
    first, second = "What is a worker?", "What is a coordinator?"
    asked(router, chat, "demo:sharded", first, temperature=0, max_tokens=20)
    chunks = asked(router, chat, "demo:sharded", user(second), temperature=0, max_tokens=20)
    said = chat.messages
    assert [one["content"] for one in said[::2]] == [first, second]
    expected = router.route_request("demo:sharded", said[:3], temperature=0, max_tokens=20)
    assert Completion.from_chunks(chunks).text == expected.text == said[3]["content"]
    assert chunks[-1]["prompt_eval_count"] == expected["prompt_eval_count"] == chat.said[3].prompt_tokens
    assert not chat.notes
    assert chunks[-1]["_routing"]["dropped"] == ""


@pytest.mark.engine
def test_a_stopped_answer_is_kept_as_far_as_it_came(router: HybridRouter) -> None:
    chat = Chat("c")
    stream = ask_in_chat(router.stream_async, chat, "demo", "Tell me everything about sharding.", temperature=0)
    with closing(iterate_blocking(stream)) as chunks:
        text = "".join(next(chunks)["message"]["content"] for _ in range(5))
    assert chat.said[-1].done_reason == "cancelled"
    assert chat.messages[-1]["content"].startswith(text)
    assert not chat.is_answering
    asked(router, chat, "demo", "And?", max_tokens=3)
    assert chat.turn_count == 2


@pytest.mark.engine
def test_a_chat_answers_one_question_at_a_time(router: HybridRouter) -> None:
    chat = Chat("c")
    stream = ask_in_chat(router.stream_async, chat, "demo", "Tell me everything about sharding.")
    with closing(iterate_blocking(stream)) as chunks:
        next(chunks)
        assert chat.is_answering
        with pytest.raises(ChatBusyError, match="chat c is still answering"):
            asked(router, chat, "demo", "Hello?")
    asked(router, chat, "demo", "Hello?", max_tokens=3)


@pytest.mark.engine
def test_an_unknown_model_leaves_the_chat_as_it_was(router: HybridRouter) -> None:
    chat = Chat("c")
    with pytest.raises(ModelNotFoundError):
        asked(router, chat, "no-such-model", "Hi")
    assert not chat.said


# --- a context that is too small, at a coordinator ----------------------------------------------


@pytest.fixture(scope="module")
def small(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HybridRouter, str]]:
    """A router with little context, and a model that does not stop by itself."""
    model = write_endless(tmp_path_factory.mktemp("small"))
    with HybridRouter(context_tokens=CONTEXT_TOKENS, num_rpc_backends=1, coordinator_port=18480) as router:
        yield router, str(model)


@pytest.mark.engine
def test_turns_that_do_not_fit_are_dropped_in_words_and_stay_in_the_chat(small: tuple[HybridRouter, str]) -> None:
    router, model = small
    chat = chat_of(6)
    chunks = asked(router, chat, model, "and now?", max_tokens=20, temperature=0)
    words = chunks[0]["_dropped"]
    dropped = chat.turn_count - 1 - words_count(words)
    kept = [chat.messages[0], *chat_of(6).messages[-2 * dropped :], user("and now?")]
    alone = router.route_request(model, kept, max_tokens=20, temperature=0)
    assert chunks[-1]["prompt_eval_count"] == alone["prompt_eval_count"] <= CONTEXT_TOKENS - 20
    assert Completion.from_chunks(chunks).text == alone.text
    assert f"to fit {CONTEXT_TOKENS} tokens of context" in words
    assert chunks[-1]["_dropped"] == chunks[-1]["_routing"]["dropped"] == words
    assert [note for _, note in chat.notes] == [words]
    assert chat.messages[:-2] == chat_of(6).messages


def words_count(words: str) -> int:
    """How many turns were dropped, in these words."""
    return next((int(word) for word in words.split() if word.isdecimal()), 1)


@pytest.mark.engine
def test_one_turn_more_than_was_dropped_would_not_have_fitted(small: tuple[HybridRouter, str]) -> None:
    router, model = small
    chat = chat_of(6)
    chunks = asked(router, chat, model, "and now?", max_tokens=100)
    kept_turns = 6 - words_count(chunks[0]["_dropped"])
    one_more = [chat.messages[0], *chat_of(6).messages[-2 * kept_turns - 2 :], user("and now?")]
    tokens = router.route_request(model, one_more, max_tokens=1)["prompt_eval_count"]
    assert chunks[-1]["prompt_eval_count"] + 100 <= CONTEXT_TOKENS < tokens + 100


@pytest.mark.engine
@pytest.mark.parametrize("turn_count", [0, 3])
def test_a_question_too_long_by_itself_is_an_error_with_its_tokens(
    small: tuple[HybridRouter, str], turn_count: int
) -> None:
    router, model = small
    chat = chat_of(turn_count) if turn_count else Chat("c")
    with pytest.raises(ContextOverflowError, match="give a larger context_tokens=") as error:
        asked(router, chat, model, "long " * 200)
    assert error.value.context_tokens == CONTEXT_TOKENS
    assert error.value.prompt_tokens is not None
    assert error.value.prompt_tokens > CONTEXT_TOKENS
    assert chat.turn_count == turn_count
    assert router.latency.frame(last=1)["status"].to_list() == ["error"]


@pytest.mark.engine
@pytest.mark.parametrize("options", [{}, {"overflow": "error"}])
def test_outside_of_chats_nothing_is_dropped(small: tuple[HybridRouter, str], options: dict[str, Any]) -> None:
    router, model = small
    with pytest.raises(ContextOverflowError, match=f"too many for its context of {CONTEXT_TOKENS}"):
        router.route_request(model, chat_of(6).messages, **options)
    assert "_dropped" in router.route_request(model, chat_of(6).messages, overflow="drop_oldest", max_tokens=3)


@pytest.mark.engine
def test_an_answer_that_fills_the_context_says_so(small: tuple[HybridRouter, str]) -> None:
    router, model = small
    full = router.route_request(model, "Hi")
    assert (full.finish_reason, full["_context_full"]) == ("length", CONTEXT_TOKENS)
    assert "_context_full" not in router.route_request(model, "Hi", max_tokens=5)


@pytest.mark.engine
def test_requests_that_fill_the_shared_context_together_are_told_what_to_do(
    small: tuple[HybridRouter, str],
) -> None:
    router, model = small

    async def outcome(at: int) -> SollolError | None:
        try:
            async for _ in router.stream_async(model, f"{at} {'long ' * 15}", max_tokens=150):
                pass
        except SollolError as error:
            return error
        return None

    async def all_at_once() -> list[SollolError | None]:
        return await asyncio.gather(*(outcome(at) for at in range(4)))

    router.route_request(model, "Hi", max_tokens=1)
    errors = [error for error in run(all_at_once()) if error is not None]
    assert errors
    for error in errors:
        assert isinstance(error, ContextOverflowError)
        assert "filled the 256 tokens of context that they share" in str(error)


# --- a context that is too small, at Ollama -----------------------------------------------------


@pytest.fixture(scope="module")
def small_ollama(
    start_ollamas: Callable[..., OllamaServer], tmp_path_factory: pytest.TempPathFactory
) -> OllamaServer:
    """An Ollama with little context, and a model that does not stop by itself."""
    server = start_ollamas(OLLAMA_CONTEXT_LENGTH=str(CONTEXT_TOKENS))
    server.create("small", write_endless(tmp_path_factory.mktemp("small_ollama")))
    return server


@pytest.mark.ollama
def test_at_ollama_turns_that_do_not_fit_are_dropped_in_words(small_ollama: OllamaServer) -> None:
    with HybridRouter(OllamaPool(small_ollama.base_url)) as router:
        router.route_request("small", [*chat_of(1).messages, user("Hi")], max_tokens=1)
        chat = chat_of(6)
        chunks = asked(router, chat, "small", "and now?", max_tokens=20, temperature=0)
        words = chunks[0]["_dropped"]
        kept = [chat.messages[0], *chat_of(6).messages[2 * words_count(words) + 1 :], user("and now?")]
        alone = router.route_request("small", kept, max_tokens=20, temperature=0)
    assert chunks[-1]["prompt_eval_count"] == alone["prompt_eval_count"] <= CONTEXT_TOKENS - 20
    assert Completion.from_chunks(chunks).text == alone.text
    assert words.startswith("dropped the ")
    assert f"to fit {CONTEXT_TOKENS} tokens of context" in words
    assert chunks[-1]["_dropped"] == chunks[-1]["_routing"]["dropped"] == words
    assert [note for _, note in chat.notes] == [words]


@pytest.mark.ollama
@pytest.mark.parametrize("keep_alive", ["1m", 0], ids=["loaded", "unloaded"])
def test_at_ollama_the_answer_has_its_room(small_ollama: OllamaServer, keep_alive: str | int) -> None:
    chat = chat_of(1)
    with HybridRouter(OllamaPool(small_ollama.base_url)) as router:
        all_of_it = [*chat.messages, user("and now?")]
        whole = router.route_request("small", all_of_it, max_tokens=1, keep_alive=keep_alive)
        max_tokens = CONTEXT_TOKENS - whole["prompt_eval_count"] + 5
        chunks = asked(router, chat, "small", "and now?", max_tokens=max_tokens)
    assert 5 < max_tokens <= CONTEXT_TOKENS // 2
    assert chunks[0]["_dropped"].startswith("dropped the oldest turn (about ")
    assert chunks[-1]["eval_count"] == max_tokens


@pytest.mark.ollama
def test_a_short_prompt_under_a_long_template_drops_nothing_of_the_next_chat(small_ollama: OllamaServer) -> None:
    small_ollama.create("wordy", DEMO_MODEL_PATH, CHATML, f"SYSTEM {'Be brief. ' * 20}")
    with HybridRouter(OllamaPool(small_ollama.base_url)) as router:
        short = router.route_request("wordy", "Hi", max_tokens=1)
        assert short["prompt_eval_count"] > 2 * len("Hi")
        chunks = asked(router, chat_of(3), "wordy", "and now?", max_tokens=5)
    assert not any("_dropped" in chunk for chunk in chunks)
    assert chunks[-1]["prompt_eval_count"] < CONTEXT_TOKENS // 2


@pytest.mark.ollama
def test_what_ollama_refuses_before_anything_is_known_is_asked_again_with_less(small_ollama: OllamaServer) -> None:
    with HybridRouter(OllamaPool(small_ollama.base_url)) as router:
        chat = chat_of(8)
        chunks = asked(router, chat, "small", "and now?", max_tokens=5)
    assert "about" in chunks[0]["_dropped"]
    assert 0 < chunks[-1]["prompt_eval_count"] < CONTEXT_TOKENS
    assert chat.turn_count == 9


@pytest.mark.ollama
@pytest.mark.parametrize("turn_count", [0, 3])
def test_at_ollama_a_question_too_long_by_itself_is_an_error(small_ollama: OllamaServer, turn_count: int) -> None:
    chat = chat_of(turn_count) if turn_count else Chat("c")
    with (
        HybridRouter(OllamaPool(small_ollama.base_url)) as router,
        pytest.raises(ContextOverflowError, match=f"its context of {CONTEXT_TOKENS}, .*num_ctx") as error,
    ):
        asked(router, chat, "small", "long " * 200)
    assert error.value.context_tokens == CONTEXT_TOKENS
    assert chat.turn_count == turn_count
