"""Questions in a chat, the chats of a process, and what happens when a chat grows too long for the context."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from sollol_nb.chat.completion import Completion
from sollol_nb.chat.conversation import Chat
from sollol_nb.chat.conversations import ChatBook, ask_in_chat
from sollol_nb.errors import (
    AnswerInterruptedError,
    ChatBusyError,
    ConfigError,
    ContextOverflowError,
    ModelNotFoundError,
    SollolError,
)
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.models.files import DEMO_MODEL_PATH
from sollol_nb.ollama.pool import OllamaPool
from sollol_nb.runtime.io_loop import iterate_blocking
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.chats import Chunks, answer, assistant, chat_of, user
from tests.support.engines import run, write_endless
from tests.support.ollama_server import CHATML, OllamaServer

CONTEXT_TOKENS = 256


def asked(router: HybridRouter, chat: Chat, model: str, prompt: Any, **options: Any) -> Chunks:
    """All chunks of the answer to a chat's next question."""
    return [*iterate_blocking(ask_in_chat(router.stream_async, chat, model, prompt, **options))]


# --- the chats of a process ----------------------------------------------------------------------


def test_a_book_opens_finds_and_forgets_chats() -> None:
    book = ChatBook()
    trip = book.open("trip")
    assert book.open("trip") is trip is book["trip"] is book.find("trip")
    assert [*book] == ["trip"]
    assert book.remove("trip") is trip
    assert "trip" not in book


@pytest.mark.parametrize(("name", "message"), [("trop", "did you mean trip"), ("zzz", "existing: plan, trip")])
def test_an_unknown_chat_is_an_error_that_names_those_that_exist(name: str, message: str) -> None:
    book = ChatBook()
    book.open("trip")
    book.open("plan")
    with pytest.raises(ConfigError, match=message):
        book.find(name)


def test_a_loaded_chat_replaces_another_only_on_request() -> None:
    book = ChatBook()
    book.open("c")
    with pytest.raises(ConfigError, match="a conversation named c exists already"):
        book.add(chat_of(1))
    book.add(chat_of(1), replace=True)
    assert book["c"].turn_count == 1
    book.add(book["c"])


def test_a_book_lists_its_chats() -> None:
    book = ChatBook()
    assert "no conversations yet" in book._repr_mimebundle_()["text/html"]
    book.open("trip").add(user("Hi"), answer("Hello"))
    shown = book._repr_mimebundle_()
    assert "<td>trip</td><td>1</td><td>m</td>" in shown["text/html"]
    assert "conversation trip: 1 turn, m, " in shown["text/plain"]
    assert repr(book) == "<ChatBook: <Chat trip: 1 turn, m>>"


# --- asking -------------------------------------------------------------------------------------


def interrupted(after: Chunks, error: Exception) -> Callable[..., AsyncGenerator[dict[str, Any], None]]:
    """A router's stream whose backend is lost after these chunks."""

    async def stream(*_: Any, **__: Any) -> AsyncGenerator[dict[str, Any], None]:
        for chunk in after:
            yield chunk
        raise error

    return stream


def test_of_an_interrupted_answer_the_text_received_is_kept() -> None:
    first = {"model": "m", "message": assistant("Hel"), "done": False, "_dropped": "dropped it"}
    stream = interrupted([first, {**first, "message": assistant("lo")}], AnswerInterruptedError("gone"))
    chat = Chat("c")
    with pytest.raises(AnswerInterruptedError):
        list(iterate_blocking(ask_in_chat(stream, chat, "m", "Hi")))
    assert chat.messages == [user("Hi"), assistant("Hello")]
    assert (chat.history[-1].done_reason, chat.history[-1].model, chat.history[-1].note) == (
        "error",
        "m",
        "dropped it",
    )


def test_what_was_dropped_in_mid_answer_is_noted_too() -> None:
    """This happens if the next Ollama node has less context than the lost one."""
    chunk = {"model": "m", "message": assistant("Hel"), "done": False}
    stream = interrupted([chunk, {**chunk, "_dropped": "dropped it"}, chunk], AnswerInterruptedError("gone"))
    chat = Chat("c")
    with pytest.raises(AnswerInterruptedError):
        list(iterate_blocking(ask_in_chat(stream, chat, "m", "Hi")))
    assert [note for _, note in chat.notes] == ["dropped it"]


def test_a_question_that_failed_before_a_word_is_not_kept_and_leaves_the_chat_free() -> None:
    chat = chat_of(1)
    with pytest.raises(AnswerInterruptedError):
        list(iterate_blocking(ask_in_chat(interrupted([], AnswerInterruptedError("gone")), chat, "m", "Hi")))
    assert chat.messages == chat_of(1).messages
    with chat.answering():
        pass  # it is free again


@pytest.mark.engine
def test_the_next_question_is_sent_with_all_messages(router: HybridRouter) -> None:
    chat = Chat("c")
    first, second = "What is a worker?", "What is a coordinator?"
    asked(router, chat, "demo:sharded", first, temperature=0, max_tokens=20)
    chunks = asked(router, chat, "demo:sharded", user(second), temperature=0, max_tokens=20)
    said = chat.messages
    assert [message["content"] for message in said[::2]] == [first, second]
    expected = router.route_request("demo:sharded", said[:3], temperature=0, max_tokens=20)
    assert Completion.from_chunks(chunks).text == expected.text == said[3]["content"]
    assert chunks[-1]["prompt_eval_count"] == expected["prompt_eval_count"] == chat.history[3].prompt_tokens
    assert not chat.notes
    assert chunks[-1]["_routing"]["dropped"] == ""


@pytest.mark.engine
def test_of_a_stopped_answer_the_text_received_is_kept(router: HybridRouter, endless: str) -> None:
    chat = Chat("c")
    stream = ask_in_chat(router.stream_async, chat, endless, "Tell me everything about sharding.", temperature=0)
    with closing(iterate_blocking(stream)) as chunks:
        text = "".join(next(chunks)["message"]["content"] for _ in range(5))
    assert chat.history[-1].done_reason == "cancelled"
    assert chat.messages[-1]["content"].startswith(text)
    with chat.answering():
        pass  # it is free again
    asked(router, chat, "demo", "And?", max_tokens=3)
    assert chat.turn_count == 2


@pytest.mark.engine
def test_a_chat_answers_one_question_at_a_time(router: HybridRouter, endless: str) -> None:
    chat = Chat("c")
    stream = ask_in_chat(router.stream_async, chat, endless, "Tell me everything about sharding.")
    with closing(iterate_blocking(stream)) as chunks:
        next(chunks)
        with pytest.raises(ChatBusyError, match="conversation c is still answering"):
            asked(router, chat, "demo", "Hello?")
    asked(router, chat, "demo", "Hello?", max_tokens=3)


@pytest.mark.engine
def test_an_unknown_model_leaves_the_chat_as_it_was(router: HybridRouter) -> None:
    chat = Chat("c")
    with pytest.raises(ModelNotFoundError):
        asked(router, chat, "no-such-model", "Hi")
    assert not chat.history


# --- a context that is too small, at a coordinator ----------------------------------------------


@pytest.fixture(scope="module")
def small(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HybridRouter, str]]:
    """A router with little context, and a model that does not stop by itself."""
    model = write_endless(tmp_path_factory.mktemp("small"))
    with HybridRouter(context_tokens=CONTEXT_TOKENS, num_rpc_backends=1, coordinator_port=18480) as router:
        yield router, str(model)


@pytest.mark.engine
def test_turns_that_do_not_fit_are_dropped_with_a_note_and_stay_in_the_chat(
    small: tuple[HybridRouter, str],
) -> None:
    router, model = small
    chat = chat_of(6)
    chunks = asked(router, chat, model, "and now?", max_tokens=20, temperature=0)
    note = chunks[0]["_dropped"]
    dropped = chat.turn_count - 1 - dropped_turns(note)
    kept = [chat.messages[0], *chat_of(6).messages[-2 * dropped :], user("and now?")]
    alone = router.route_request(model, kept, max_tokens=20, temperature=0)
    assert chunks[-1]["prompt_eval_count"] == alone["prompt_eval_count"] <= CONTEXT_TOKENS - 20
    assert Completion.from_chunks(chunks).text == alone.text
    assert f"to fit {CONTEXT_TOKENS} tokens of context" in note
    assert chunks[-1]["_dropped"] == chunks[-1]["_routing"]["dropped"] == note
    assert [note for _, note in chat.notes] == [note]
    assert chat.messages[:-2] == chat_of(6).messages


def dropped_turns(note: str) -> int:
    """How many turns were dropped, as the note says."""
    return next((int(word) for word in note.split() if word.isdecimal()), 1)


@pytest.mark.engine
def test_one_turn_more_than_was_dropped_would_not_have_fitted(small: tuple[HybridRouter, str]) -> None:
    router, model = small
    chat = chat_of(6)
    chunks = asked(router, chat, model, "and now?", max_tokens=100)
    kept_turns = 6 - dropped_turns(chunks[0]["_dropped"])
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
    full = router.route_request(model, "Hi", temperature=0)
    assert (full.finish_reason, full["_context_full"]) == ("length", CONTEXT_TOKENS)
    assert "_context_full" not in router.route_request(model, "Hi", max_tokens=5)


@pytest.mark.engine
def test_requests_that_fill_the_shared_context_together_fail_with_what_to_do(
    small: tuple[HybridRouter, str],
) -> None:
    _, model = small

    async def outcome(router: HybridRouter, number: int) -> SollolError | None:
        try:
            async for _ in router.stream_async(model, str(number), temperature=0):
                pass
        except SollolError as error:
            return error
        return None

    async def all_together(router: HybridRouter) -> list[SollolError | None]:
        return await asyncio.gather(*(outcome(router, number) for number in range(4)))

    # So much context that the first answer still runs when the last request arrives.
    with HybridRouter(context_tokens=4096, num_rpc_backends=1, coordinator_port=18490) as router:
        router.route_request(model, "Hi", max_tokens=1)
        errors = [error for error in run(all_together(router)) if error is not None]
    assert errors
    for error in errors:
        assert isinstance(error, ContextOverflowError)
        assert "filled the 4,096 tokens of context that they share" in str(error)


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
def test_at_ollama_turns_that_do_not_fit_are_dropped_with_a_note(small_ollama: OllamaServer) -> None:
    with HybridRouter(OllamaPool(small_ollama.base_url)) as router:
        router.route_request("small", [*chat_of(1).messages, user("Hi")], max_tokens=1)
        chat = chat_of(6)
        chunks = asked(router, chat, "small", "and now?", max_tokens=20, temperature=0)
        note = chunks[0]["_dropped"]
        kept = [chat.messages[0], *chat_of(6).messages[2 * dropped_turns(note) + 1 :], user("and now?")]
        alone = router.route_request("small", kept, max_tokens=20, temperature=0)
    assert chunks[-1]["prompt_eval_count"] == alone["prompt_eval_count"] <= CONTEXT_TOKENS - 20
    assert Completion.from_chunks(chunks).text == alone.text
    assert note.startswith("dropped the ")
    assert f"to fit {CONTEXT_TOKENS} tokens of context" in note
    assert chunks[-1]["_dropped"] == chunks[-1]["_routing"]["dropped"] == note
    assert [note for _, note in chat.notes] == [note]


@pytest.mark.ollama
@pytest.mark.parametrize("keep_alive", ["1m", 0], ids=["loaded", "unloaded"])
def test_at_ollama_the_answer_has_its_room(small_ollama: OllamaServer, keep_alive: str | int) -> None:
    chat = chat_of(1)
    with HybridRouter(OllamaPool(small_ollama.base_url)) as router:
        all_of_it = [*chat.messages, user("and now?")]
        whole = router.route_request("small", all_of_it, max_tokens=1, keep_alive=keep_alive)
        max_tokens = CONTEXT_TOKENS - whole["prompt_eval_count"] + 5
        chunks = asked(router, chat, "small", "and now?", max_tokens=max_tokens, temperature=0)
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
