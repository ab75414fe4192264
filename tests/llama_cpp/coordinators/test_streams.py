"""An engine that saves, restores or checks a context answers nobody meanwhile, and is not taken for dead."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sollol_nb.chat.messages import check_messages
from sollol_nb.llama_cpp.answers.base import Answer
from sollol_nb.llama_cpp.contexts.store import ContextStore, SavedContext
from sollol_nb.llama_cpp.contexts.visit import Identity
from sollol_nb.llama_cpp.coordinators.pace import Pace
from sollol_nb.llama_cpp.coordinators.streams import AnswerStreams
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.process import EngineProcess
from sollol_nb.runtime.exchange import Exchange
from sollol_nb.runtime.http_client import JsonClient

LONG = "You are a careful assistant. " * 100


class Process:
    """Stands for the process of an engine."""

    entry = SimpleNamespace(id="coordinator-1")

    def __init__(self) -> None:
        self.stopped = asyncio.Event()

    def is_running(self) -> bool:
        return not self.stopped.is_set()

    async def status(self) -> dict[str, Any]:
        return {}

    async def stop(self, *, grace_s: float, why: str) -> None:
        self.stopped.set()

    def ask_lease(self) -> None:
        raise AssertionError("nothing is to be saved")


class SlowClient:
    """An engine whose actions on slots take until they may end."""

    base_url = "http://127.0.0.1:1"

    def __init__(self) -> None:
        self.acting, self.may_end = asyncio.Event(), asyncio.Event()

    async def post(self, path: str, body: Mapping[str, Any], *, timeout_s: float | None = None) -> Any:
        if path.startswith("/slots"):
            self.acting.set()
            await self.may_end.wait()
        return {"prompt": LONG}

    async def get(self, path: str, *, timeout_s: float | None = None) -> Any:
        await self.may_end.wait()
        return []


class ToTheClient:
    """Stands for a connection of its own; the answer never comes."""

    def __init__(self, client: SlowClient) -> None:
        self.post = client.post

    async def __aenter__(self) -> ToTheClient:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    def close(self) -> None: ...

    async def lines(self, path: str, body: Mapping[str, Any]) -> Any:
        await asyncio.Event().wait()
        yield ""


class AnswersAtOnce(ToTheClient):
    """Gives one event to each request."""

    async def lines(self, path: str, body: Mapping[str, Any]) -> Any:
        yield "data: {}"


class AskedTwice:
    """Stands for an answer whose first stream is abandoned: its prompt was foreseen wrongly, say."""

    options: Mapping[str, Any] = {}
    prompt_text = context_text = LONG
    unconfirmed = None
    waiting_prompt_tokens = 1
    recovers_exactly = is_deterministic = is_abandoned = is_complete = False

    def __init__(self) -> None:
        self.requests = 0

    async def request(self, _: object) -> tuple[str, dict[str, Any]] | None:
        self.requests, self.is_abandoned = self.requests + 1, False
        return None if self.is_complete else ("/completion", {})

    def translate(self, _: object) -> None:
        self.is_abandoned, self.is_complete = self.requests == 1, self.requests == 2

    def final(self) -> dict[str, Any]:
        return {"message": {}, "done": True}


def streams_of(
    process: Process,
    client: SlowClient,
    store: ContextStore,
    connection: Callable[[SlowClient], ToTheClient] = ToTheClient,
) -> AnswerStreams:
    """With a saved context of a prompt, and a pace by a clock of which each look takes a second."""
    streams = AnswerStreams(
        "demo",
        cast(EngineProcess, process),
        cast(JsonClient, client),
        lambda: cast(Exchange, connection(client)),
        context_tokens=4096,
        slots=2,
    )
    clock = itertools.count(0.0, 1.0)
    streams.pace = Pace(clock=lambda: next(clock))
    streams.pace.set_load_time(0.0)
    streams.pace.calibrate(0.0001)
    part = store.begin(10)
    assert part is not None
    part.write_bytes(b"x" * 10)
    facts: dict[str, Any] = {"id": "", "model": "demo", "title": "t", "made_of": {}, "text": LONG}
    assert store.keep(part, SavedContext(**facts, tokens=700, size=10, prefill_ms=5.0))
    identity = Identity(model="demo", title="t", made_of={}, bytes_per_token=1, context_tokens=4096)
    streams.contexts.use(store, identity, lambda *_, **__: None)
    return streams


def new(streams: AnswerStreams) -> Answer:
    return streams.new_answer(check_messages("What?"), {})


async def asked(streams: AnswerStreams) -> None:
    async for _ in streams.stream(new(streams)):
        pass


@pytest.mark.parametrize("with_another_stream", [False, True])
def test_a_restore_is_no_silence(tmp_path: Path, with_another_stream: bool) -> None:
    async def main() -> None:
        process, client = Process(), SlowClient()
        streams = streams_of(process, client, ContextStore(tmp_path / "contexts", 10**6))
        if with_another_stream:  # it gets no token meanwhile
            streams.pace.open(new(streams))
        asking = asyncio.create_task(asked(streams))
        await client.acting.wait()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(process.stopped.wait(), 3.0)
        client.may_end.set()
        await process.stopped.wait()  # from now on it owes a token
        asking.cancel()
        await asyncio.wait({asking})
        streams.close()

    asyncio.run(main())


def test_the_check_of_a_large_file_is_no_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(*_: object) -> bool:
        time.sleep(3.0)
        return True

    async def main() -> None:
        process, client = Process(), SlowClient()
        store = ContextStore(tmp_path / "contexts", 10**6)
        streams = streams_of(process, client, store)
        monkeypatch.setattr(store, "is_whole", slowly)
        asking = asyncio.create_task(asked(streams))
        await client.acting.wait()
        assert process.is_running()
        asking.cancel()
        client.may_end.set()
        await asyncio.wait({asking})
        streams.close()

    asyncio.run(main())


def test_why_a_saved_context_was_not_used_is_said_though_the_answer_is_requested_again(tmp_path: Path) -> None:
    async def main() -> None:
        client, store, answer = SlowClient(), ContextStore(tmp_path / "contexts", 10**6), AskedTwice()
        client.may_end.set()
        streams = streams_of(Process(), client, store, AnswersAtOnce)
        for file in (tmp_path / "contexts").rglob("*"):
            if file.is_file() and file.read_bytes() == b"x" * 10:
                file.write_bytes(b"y" * 10)
        *_, last = [chunk async for chunk in streams.stream(cast(Answer, answer))]
        assert "damaged" in last["_cached"]["context_note"]
        assert answer.requests == 3
        streams.close()

    asyncio.run(main())


def test_what_it_does_for_another_kernel_is_no_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[str] = []

    def find(entry_id: str) -> Any:
        looks.append(entry_id)
        return SimpleNamespace(about={"acts_until": time.time() + 60 if len(looks) < 4 else 0.0})

    monkeypatch.setattr(registry, "find", find)

    async def main() -> None:
        process = Process()
        streams = streams_of(process, SlowClient(), ContextStore(tmp_path / "contexts", 10**6))
        streams.pace.open(new(streams))
        await streams._kill_when_silent()
        assert process.stopped.is_set()

    asyncio.run(main())
    assert looks == ["coordinator-1"] * 4
