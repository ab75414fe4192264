"""The loop of calls: what the model gets, where functions run, and what ends it. The model's answers are
written."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import pandas as pd
import pytest

from sollol_nb.chat import confirming
from sollol_nb.chat.chunk import CALLING, STEP, Chunk
from sollol_nb.chat.completion import Completion
from sollol_nb.errors import ConfigError
from sollol_nb.hybrid_router import HybridRouter
from sollol_nb.router import tool_loop
from sollol_nb.router.tool_loop import answered_with_tools
from sollol_nb.runtime import callers
from sollol_nb.runtime.io_loop import iterate_blocking, run_blocking, submit

QUESTION = [{"role": "user", "content": "How much?"}]


def calls(*named: tuple[str, Any], text: str = "") -> dict[str, Any]:
    """An answer that calls these functions."""
    return {"content": text, "tool_calls": [{"function": {"name": n, "arguments": a}} for n, a in named]}


class Model:
    """Gives written answers in turn, the last one for ever; notes what it was asked."""

    def __init__(self, *answers: Mapping[str, Any] | str) -> None:
        self.answers = [{"content": each} if isinstance(each, str) else dict(each) for each in answers]
        self.asked: list[list[dict[str, Any]]] = []
        self.options: list[dict[str, Any]] = []

    async def ask(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> AsyncGenerator[Chunk, None]:
        self.asked.append([dict(message) for message in messages])
        self.options.append(options)
        message = self.answers[min(len(self.asked), len(self.answers)) - 1]
        yield {"model": "written", "message": {"role": "assistant", "content": message["content"]}, "done": False}
        last = {name: value for name, value in message.items() if name != "content"}
        yield {"model": "written", "message": {"role": "assistant", "content": "", **last}, "done": True}  # type: ignore[typeddict-item]

    def stream(self, *tools: Any, max_steps: int | None = None, confirm: Any = None, **options: Any) -> Any:
        return answered_with_tools(
            self.ask, QUESTION, {"tools": tools, **options}, max_steps=max_steps, confirm=confirm
        )

    def answer(self, *tools: Any, **options: Any) -> Completion:
        return Completion.from_chunks(iterate_blocking(self.stream(*tools, **options)))


def double(x: int) -> int:
    return 2 * x


def test_a_call_goes_back_with_its_result() -> None:
    model = Model(calls(("double", {"x": 3}), text="Let me see."), "It is 6.")
    chunks = list(iterate_blocking(model.stream(double)))
    answer = Completion.from_chunks(chunks)
    assert answer.text == "It is 6."
    (step,) = answer.steps
    assert (step["call"], step["arguments"], step["result"], step["error"]) == ("double", {"x": 3}, "6", "")
    assert step["text"] == "Let me see."
    question, asked, result = model.asked[1]
    assert question == QUESTION[0]
    assert (asked["content"], asked["tool_calls"][0]["function"]) == (
        "Let me see.",
        {"name": "double", "arguments": {"x": 3}},
    )
    assert (result["role"], result["content"], result["tool_name"]) == ("tool", "6", "double")
    assert result["tool_call_id"] == asked["tool_calls"][0]["id"]
    assert [chunk.get("done", False) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert [mark for chunk in chunks for mark in (CALLING, STEP) if mark in chunk] == [CALLING, STEP]
    assert model.options[0]["tools"][0]["function"]["name"] == "double"


def test_each_request_is_read_to_its_end() -> None:
    ended = []

    class Ending(Model):
        async def ask(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> AsyncGenerator[Chunk, None]:
            async for chunk in super().ask(messages, **options):
                yield chunk
            ended.append(len(self.asked))  # after the last chunk: a request that is left early does not get here

    Ending(calls(("double", {"x": 3})), "6").answer(double)
    assert ended == [1, 2]


def test_several_calls_of_one_answer_stay_together() -> None:
    model = Model(calls(("double", {"x": 1}), ("double", {"x": 2})), calls(("double", {"x": 3})), "done")
    answer = model.answer(double)
    assert [(step["round"], step["result"]) for step in answer.steps] == [(1, "2"), (1, "4"), (2, "6")]
    assert [message["role"] for message in model.asked[2]] == [
        "user",
        "assistant",
        "tool",
        "tool",
        "assistant",
        "tool",
    ]


def broken(x: int) -> int:
    raise LookupError(f"no {x}")


def leaving() -> None:
    raise SystemExit(3)


def stopping() -> None:
    raise StopIteration


@pytest.mark.parametrize(
    ("tool", "call", "error"),
    [
        (broken, ("broken", {"x": 1}), "LookupError: no 1"),
        (stopping, ("stopping", {}), "StopIteration"),
        (leaving, ("leaving", {}), "SystemExit: 3"),
        (double, ("double", {"x": "3"}), "argument x: '3' is not of type 'integer'"),
        (double, ("double", '{"x": '), "the arguments are not valid JSON"),
        (double, ("exec", {"code": "1/0"}), "there is no function exec; call one of: double"),
    ],
)
def test_errors_go_back_to_the_model(tool: Any, call: tuple[str, Any], error: str) -> None:
    model = Model(calls(call), "sorry")
    answer = model.answer(tool)
    assert answer.text == "sorry"
    assert error in answer.steps[0]["error"]
    assert model.asked[1][-1]["content"] == f"Error: {answer.steps[0]['error']}"
    assert isinstance(model.asked[1][-2]["tool_calls"][0]["function"]["arguments"], dict)


def long_text() -> str:
    return "x" * 100_000


def large_frame() -> pd.DataFrame:
    return pd.DataFrame({"n": range(50_000)})


@pytest.mark.parametrize("tool", [long_text, large_frame])
def test_a_long_result_is_cut_and_both_sides_know(tool: Any) -> None:
    model = Model(calls((tool.__name__, {})), "long")
    (step,) = model.answer(tool).steps
    assert len(step["result"]) < 9000
    assert step["result"].splitlines()[-1].startswith("[cut: ")
    assert "the model got a part of the result: " in step["note"]


def test_the_steps_are_limited_and_then_the_model_must_answer() -> None:
    model = Model(calls(("double", {"x": 1}), text="again"))
    answer = model.answer(double, max_steps=2)
    assert [options.get("tool_choice") for options in model.options] == [None, "auto", "none"]
    assert len(answer.steps) == 2
    assert answer["_note"] == "answered without more calls after 2 steps (max_steps)"
    assert "tool_calls" not in answer["message"]


def test_a_required_call_is_required_once() -> None:
    model = Model(calls(("double", {"x": 1})), "2")
    model.answer(double, tool_choice="required")
    assert [options["tool_choice"] for options in model.options] == ["required", "auto"]
    model = Model("I may not")
    assert model.answer(double, tool_choice="none").text == "I may not"


def test_too_many_calls_at_a_time_are_refused() -> None:
    count = tool_loop.MAX_CALLS + 1
    model = Model(calls(*[("double", {"x": n}) for n in range(count)]), "many")
    steps = model.answer(double).steps
    assert [bool(step["error"]) for step in steps] == [False] * (count - 1) + [True]


@pytest.mark.parametrize(
    ("tools", "rules", "why"),
    [
        ([double, double], {}, "two tools are named double"),
        ([double, {"type": "function"}], {}, "either Python functions or dicts"),
        ([double], {"max_steps": 0}, "max_steps=0 must be a whole number"),
        ([double], {"confirm": "yes"}, "confirm='yes' must be True, False, or a function"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_asked(tools: Any, rules: Any, why: str) -> None:
    model = Model("never")
    with pytest.raises(ConfigError, match=why):
        model.answer(*tools, **rules)
    assert model.asked == []


@pytest.mark.parametrize("rules", [{}, {"max_steps": 3}])
def test_one_function_is_a_list_too(rules: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"tools must be a list of functions; write tools=\[double\]"):
        HybridRouter(auto_discover_rpc=False).stream("demo", "hi", tools=double, **rules)


# --- where functions run ---------------------------------------------------------------------------


def test_functions_of_a_blocking_call_run_in_its_thread() -> None:
    seen: list[Any] = []

    def where() -> None:
        seen.append(threading.get_ident())

    Model(calls(("where", {})), "here").answer(where)

    async def joined() -> Completion:
        stream = Model(calls(("where", {})), "here").stream(where)
        return Completion.from_chunks([chunk async for chunk in stream])

    run_blocking(joined())
    assert seen == [threading.get_ident()] * 2


def test_functions_of_an_async_call_hold_up_no_loop() -> None:
    seen: list[Any] = []

    async def ask() -> None:
        loop, turned = asyncio.get_running_loop(), threading.Event()

        def plain() -> bool:
            loop.call_soon_threadsafe(turned.set)
            return turned.wait(30)  # the loop must turn meanwhile

        async def native() -> None:
            seen.append(asyncio.get_running_loop() is loop)

        model = Model(calls(("plain", {}), ("native", {})), "done")
        answer = Completion.from_chunks([chunk async for chunk in model.stream(plain, native)])
        seen.extend(step["result"] for step in answer.steps)

    asyncio.run(ask())
    assert seen == [True, "True", "None"]


def test_functions_in_the_background_run_in_threads_and_coroutines_in_one_loop() -> None:
    seen: list[Any] = []

    def plain() -> None:
        seen.append(threading.current_thread().name)

    async def native() -> None:
        await asyncio.sleep(0)
        seen.append(asyncio.get_running_loop())

    async def joined() -> None:
        stream = Model(calls(("plain", {}), ("native", {}), ("native", {})), "done").stream(plain, native)
        assert len([chunk async for chunk in stream if STEP in chunk]) == 3

    submit(joined()).result(30)
    Model(calls(("native", {})), "done").answer(native)  # a blocking call
    assert seen[0] == "sollol_nb function"
    assert len(set(seen[1:])) == 1
    assert seen[1] is not None


def test_an_interrupt_ends_the_function_that_runs() -> None:
    ended = []

    def interrupted() -> None:
        try:
            raise KeyboardInterrupt  # as the stop button does it in this thread
        finally:
            ended.append(True)

    model = Model(calls(("interrupted", {})), "never")
    with pytest.raises(KeyboardInterrupt):
        model.answer(interrupted)
    assert ended == [True]
    assert len(model.asked) == 1


def test_an_interrupt_just_after_the_function_is_raised_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(Future[Any]):
        def set_result(self, result: Any) -> None:
            super().set_result(result)
            if threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt  # as the stop button does it in this thread

    monkeypatch.setattr(callers, "Future", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        Model(calls(("double", {"x": 1})), "never").answer(double)


def test_closing_the_answer_cancels_a_coroutine() -> None:
    begun, cancelled = threading.Event(), threading.Event()

    async def endless() -> None:
        begun.set()
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async def joined() -> None:
        async for _ in Model(calls(("endless", {})), "never").stream(endless):
            pass

    future = submit(joined())
    assert begun.wait(30)
    future.cancel()
    assert cancelled.wait(30)


def test_a_function_may_ask_a_router_itself() -> None:
    inner = Model("42")

    def oracle() -> str:
        return inner.answer(double).text

    async def async_oracle() -> str:
        chunks = [chunk async for chunk in inner.stream(double)]
        return Completion.from_chunks(chunks).text

    answer = Model(calls(("oracle", {}), ("async_oracle", {})), "done").answer(oracle, async_oracle)
    assert [step["result"] for step in answer.steps] == ["42", "42"]


# --- confirmation ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("replies", "results", "questions"),
    [
        (["y", "n"], ["2", ""], 2),
        (["what?", "YES", "no"], ["2", ""], 3),
        (["a"], ["2", "4"], 1),
    ],
)
def test_the_user_decides_about_each_call(
    monkeypatch: pytest.MonkeyPatch, replies: list[str], results: list[str], questions: int
) -> None:
    shown: list[str] = []

    def reply(question: str) -> str:
        shown.append(question)
        return replies[len(shown) - 1]

    monkeypatch.setattr(confirming, "input", reply, raising=False)
    model = Model(calls(("double", {"x": 1}), ("double", {"x": 2})), "done")
    answer = model.answer(double, confirm=True)
    assert [step["result"] for step in answer.steps] == results
    assert len(shown) == questions
    assert "double(x=1)" in shown[0]
    if "" in results:
        assert model.asked[1][-1]["content"] == "Error: the user declined this call"


def test_where_nobody_can_be_asked_the_answer_ends_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str) -> str:
        raise EOFError

    monkeypatch.setattr(confirming, "input", refuse, raising=False)
    ran = []

    def act() -> None:
        ran.append(True)

    with pytest.raises(ConfigError, match="cannot ask before act is called"):
        Model(calls(("act", {})), "never").answer(act, confirm=True)
    assert ran == []


async def allow_even(name: str, arguments: Mapping[str, Any]) -> bool:
    return name == "double" and arguments["x"] % 2 == 0


@pytest.mark.parametrize("confirm", [allow_even, lambda name, arguments: arguments["x"] % 2 == 0])
def test_a_function_may_confirm(confirm: Callable[..., Any]) -> None:
    model = Model(calls(("double", {"x": 1}), ("double", {"x": 2})), "done")
    assert [step["result"] for step in model.answer(double, confirm=confirm).steps] == ["", "4"]


@pytest.mark.parametrize("run", ["blocking", "awaited"])
def test_a_confirming_function_that_stops_an_iteration_ends_the_answer(run: str) -> None:
    decisions = iter([True])

    def confirm(name: str, arguments: Mapping[str, Any]) -> bool:
        return next(decisions)

    stream = Model(calls(("double", {"x": 1})), calls(("double", {"x": 2})), "never").stream(
        double, confirm=confirm
    )

    async def joined() -> list[Chunk]:
        async with asyncio.timeout(30):
            return [chunk async for chunk in stream]

    with pytest.raises(RuntimeError, match="the function raised StopIteration"):
        asyncio.run(joined()) if run == "awaited" else run_blocking(joined())


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt])
def test_a_coroutine_that_exits_does_not_end_the_loop_of_the_next(kind: type[BaseException]) -> None:
    async def leave(name: str, arguments: Mapping[str, Any]) -> bool:
        raise kind

    async def triple(x: int) -> int:
        return 3 * x

    async def joined(stream: AsyncGenerator[Chunk, None]) -> Completion:
        async with asyncio.timeout(30):
            return Completion.from_chunks([chunk async for chunk in stream])

    with pytest.raises(RuntimeError, match=f"the function was ended by {kind.__name__}"):
        run_blocking(joined(Model(calls(("triple", {"x": 1})), "never").stream(triple, confirm=leave)))
    answer = run_blocking(joined(Model(calls(("triple", {"x": 1})), "done").stream(triple)))
    assert answer.steps[0]["result"] == "3"


def test_the_setting_asks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLLOL_CONFIRM_TOOLS", "true")
    monkeypatch.setattr(confirming, "input", lambda _: "n", raising=False)
    assert Model(calls(("double", {"x": 1})), "no").answer(double).steps[0]["error"]
    assert not Model(calls(("double", {"x": 1})), "no").answer(double, confirm=False).steps[0]["error"]


def test_what_the_model_writes_cannot_disguise_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    def note(text: str) -> str:
        return text

    def reply(question: str) -> str:
        shown.append(question)
        return "n"

    monkeypatch.setattr(confirming, "input", reply, raising=False)
    text = "\x1b[2K\rharmless\n\u202eCall?" + "y" * 10_000
    Model(calls(("note", {"text": text})), "no").answer(note, confirm=True)
    assert "\x1b" not in shown[0]
    assert "\u202e" not in shown[0]
    assert "more characters)" in shown[0]
    assert shown[0].count("\n") == 1


def test_a_function_that_is_cancelled_does_not_cancel_the_answer() -> None:
    async def gives_up() -> None:
        raise asyncio.CancelledError

    answer = Model(calls(("gives_up", {})), "sorry").answer(gives_up)
    assert answer.text == "sorry"
    assert "cancelled" in answer.steps[0]["error"]
