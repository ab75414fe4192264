"""Prompts foreseen from earlier ones: only time depends on whether they were right, never an answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, cast

import pytest

from sollol_nb.chat.messages import check_messages
from sollol_nb.errors import ContextOverflowError, CoordinatorLostError, RequestRejectedError
from sollol_nb.llama_cpp.answers.base import Answer
from sollol_nb.llama_cpp.answers.kinds import answer_for
from sollol_nb.llama_cpp.answers.prompts import MOST_CHARACTERS, MOST_KINDS, MOST_MISTAKES, ForeseenPrompts
from sollol_nb.llama_cpp.coordinators.streams import AnswerStreams
from sollol_nb.llama_cpp.processes.exit_reasons import describe_exit
from sollol_nb.llama_cpp.processes.process import EngineProcess, ExitReport
from sollol_nb.runtime.exchange import Exchange
from sollol_nb.runtime.http_client import JsonClient
from tests.support.engines import listening
from tests.support.llama_server import GREEDY, PLAIN, Run, Server, new_answer, whole


def asked(*contents: object, roles: Sequence[str] = ("system", "user"), **others: Any) -> dict[str, Any]:
    """The body of a request to `/apply-template`."""
    messages = [{"role": role, "content": content} for role, content in zip(roles[-len(contents) :], contents)]  # noqa: B905
    return {"messages": messages, **others}


def test_the_text_between_contents_is_kept_for_requests_of_the_same_kind() -> None:
    prompts = ForeseenPrompts()
    assert prompts.foresee(asked("Be brief.", "Hi")) is None
    prompts.learn(asked("Be brief.", "Hi"), "<s>Be brief.</s><u>Hi</u><a>")
    assert prompts.foresee(asked("Be kind.", "What?")) == "<s>Be kind.</s><u>What?</u><a>"
    other_kinds = [
        asked("Hi"),
        asked("Be kind.", "What?", roles=("user", "user")),
        asked("Be kind.", "What?", chat_template_kwargs={"enable_thinking": False}),
        asked("Be kind.", "What?", continue_final_message=True),
        asked("Be kind.", [{"type": "text", "text": "What?"}]),
        asked("Be kind.", None),
        asked("Be kind.", ""),
        asked("Be kind.", "?" * MOST_CHARACTERS),
    ]
    assert [prompts.foresee(request) for request in other_kinds] == [None] * len(other_kinds)


def test_contents_that_the_template_changes_teach_nothing() -> None:
    prompts = ForeseenPrompts()
    prompts.learn(asked(" Hi "), "<u>Hi</u>")
    assert prompts.foresee(asked(" Ho ")) is None


def test_a_kind_that_was_foreseen_wrongly_too_often_is_given_up() -> None:
    prompts, day = ForeseenPrompts(), 1
    prompts.learn(asked("Hi"), "Day 1: Hi")
    while (foreseen := prompts.foresee(asked("Ho"))) is not None:
        assert foreseen == f"Day {day}: Ho"
        day += 1
        prompts.learn(asked("Ho"), f"Day {day}: Ho", foreseen=foreseen)
    assert day == 1 + MOST_MISTAKES


def test_only_so_many_kinds_are_kept() -> None:
    prompts = ForeseenPrompts()
    for number in range(MOST_KINDS + 1):
        prompts.learn(asked("Hi", number=number), "Hi!")
    known = [prompts.foresee(asked("Ho", number=number)) for number in range(MOST_KINDS + 1)]
    assert known == [None, *["Ho!"] * MOST_KINDS]


@pytest.mark.engine
def test_answers_to_foreseen_prompts_are_those_to_rendered_ones(run: Run) -> None:
    prompts = ForeseenPrompts()
    conversation = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "I am"}]
    questions = ["What is a worker?", "Tell me about sharding.", " Spaces around? ", "<|im_end|>", conversation]

    async def test(server: Server) -> int:
        foreseen = 0
        for question in [*questions, *questions]:
            plain = whole(await server.finish(new_answer(cast(str, question), GREEDY)))
            answer = answer_for("demo", check_messages(question), GREEDY, chat_template=PLAIN, prompts=prompts)
            assert whole(await server.finish(answer)) == plain
            foreseen += prompts.foresee({"messages": check_messages(question)}) is not None
        return foreseen

    assert run(test) >= len(questions)


# --- what is sent, and when -------------------------------------------------------------------


class FakeEngine:
    """A llama-server whose template is a function of the question; it answers with the prompt that it was given.

    Attributes:
        posted: path and prompt of each request.
        renders: waits before it renders; set by default.
    """

    def __init__(self, template: Callable[[str], str]) -> None:
        self.template = template
        self.posted: list[tuple[str, str]] = []
        self.renders = asyncio.Event()
        self.renders.set()
        self._changed = asyncio.Condition()

    async def received(self, count: int) -> None:
        """Wait until it has so many requests."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self.posted) >= count)

    async def _note(self, path: str, prompt: str) -> None:
        async with self._changed:
            self.posted.append((path, prompt))
            self._changed.notify_all()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = next(int(line[15:]) for line in head.splitlines() if line.startswith(b"Content-Length:"))
            body = json.loads(await reader.readexactly(length))
            path = head.split()[1].decode()
            if path == "/apply-template":
                await self._note(path, "")
                await self.renders.wait()
                try:
                    self._answer(writer, {"prompt": self.template(body["messages"][-1]["content"])})
                except ValueError as error:
                    self._answer(writer, {"error": {"message": str(error)}}, 500)
                continue
            if path.startswith("/slots/"):
                self._answer(writer, {})
                continue
            await self._note(path, body["prompt"])
            if "long" in body["prompt"]:
                message = "the request (910 tokens) exceeds the available context size (512 tokens)"
                self._answer(writer, {"error": {"message": message}}, 400)
                continue
            events = [{"content": body["prompt"], "tokens": [1], "tokens_predicted": 1, "tokens_evaluated": 1}]
            events.append({"stop": True, "stop_type": "eos", "tokens_predicted": 1, "tokens_evaluated": 1})
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            writer.write(b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events))
            return

    @staticmethod
    def _answer(writer: asyncio.StreamWriter, answer: Any, status: int = 200) -> None:
        content = json.dumps(answer).encode()
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(content), content))


class EndedProcess:
    """Stands for the process of a fake engine."""

    log_path = "log"

    def is_running(self) -> bool:
        return True

    async def ended_within(self, _: float) -> ExitReport:
        return ExitReport(1, ())


@asynccontextmanager
async def streams_of(engine: FakeEngine) -> AsyncIterator[AnswerStreams]:
    async with listening(engine.serve) as port:
        url = f"http://127.0.0.1:{port}"
        client = JsonClient(url)
        exchange = partial(Exchange, url, api_key="key", read_timeout_s=30.0)
        streams = AnswerStreams(
            "demo", cast(EngineProcess, EndedProcess()), client, exchange, context_tokens=512, slots=1
        )
        try:
            yield streams
        finally:
            streams.close()
            await client.aclose()


async def text_of(streams: AnswerStreams, question: str, **options: Any) -> str:
    chunks = [chunk async for chunk in streams.stream(new(streams, question, **options))]
    return "".join(chunk["message"]["content"] for chunk in chunks)


def new(streams: AnswerStreams, question: str, **options: Any) -> Answer:
    return streams.new_answer(check_messages(question), options)


def test_an_answer_is_requested_before_its_prompt_is_rendered_and_shown_after_it() -> None:
    async def ask() -> None:
        engine = FakeEngine("<{}>".format)
        async with streams_of(engine) as streams:
            assert await text_of(streams, "one") == "<one>"
            engine.renders.clear()
            asking = asyncio.create_task(text_of(streams, "two"))
            await engine.received(4)
            assert ("/completion", "<two>") in engine.posted
            assert not asking.done()
            engine.renders.set()
            assert await asking == "<two>"
        assert len(engine.posted) == 4

    asyncio.run(ask())


def test_a_prompt_that_was_foreseen_wrongly_is_answered_again() -> None:
    async def ask() -> None:
        engine = FakeEngine("<{}>".format)
        async with streams_of(engine) as streams:
            await text_of(streams, "one")
            engine.template = "Monday: <{}>".format
            assert await text_of(streams, "two") == "Monday: <two>"
            assert await text_of(streams, "three") == "Monday: <three>"
        completions = [prompt for path, prompt in engine.posted if path == "/completion"]
        assert completions == ["<one>", "<two>", "Monday: <two>", "Monday: <three>"]

    asyncio.run(ask())


def test_an_error_about_a_wrong_prompt_is_not_reported() -> None:
    async def ask() -> None:
        engine = FakeEngine("<{}>".format)
        async with streams_of(engine) as streams:
            await text_of(streams, "one")
            with pytest.raises(ContextOverflowError):
                await text_of(streams, "a long one")
            engine.template = lambda _: "<short>"
            assert await text_of(streams, "a long one") == "<short>"

    asyncio.run(ask())


def test_what_the_template_refuses_is_refused() -> None:
    def refuses(content: str) -> str:
        raise ValueError(f"no {content}")

    async def ask() -> None:
        engine = FakeEngine("<{}>".format)
        async with streams_of(engine) as streams:
            await text_of(streams, "one")
            engine.template = refuses
            for _ in range(2):
                with pytest.raises(RequestRejectedError, match="no two"):
                    await text_of(streams, "two")

    asyncio.run(ask())


def test_an_engine_that_is_lost_before_the_prompt_is_confirmed_leaves_no_prompt_behind() -> None:
    async def ask() -> None:
        engine = FakeEngine("<{}>".format)
        async with streams_of(engine) as streams:
            await text_of(streams, "one")
            engine.renders.clear()
            answer = new(streams, "two")

            async def read() -> None:
                async for _ in streams.stream(answer):
                    raise AssertionError("nothing is confirmed")

            reading = asyncio.create_task(read())
            await engine.received(4)
        with pytest.raises(CoordinatorLostError, match=describe_exit(1)):
            await reading
        assert answer.state()["prompt"] is None

        other = FakeEngine("other <{}>".format)
        async with streams_of(other) as streams:
            assert [chunk["message"]["content"] async for chunk in streams.stream(answer)] == ["other <two>", ""]
        assert [path for path, _ in other.posted] == ["/apply-template", "/completion"]

    asyncio.run(ask())


@pytest.mark.parametrize("options", [{"recovery": "exact"}, {"deterministic": True}])
def test_answers_that_are_to_be_repeated_wait_for_their_prompt(options: dict[str, Any]) -> None:
    async def ask() -> None:
        engine = FakeEngine("<{}>".format)
        async with streams_of(engine) as streams:
            for question in ("one", "two"):
                await text_of(streams, question, **options)
        assert [path for path, _ in engine.posted] == ["/apply-template", "/completion"] * 2

    asyncio.run(ask())
