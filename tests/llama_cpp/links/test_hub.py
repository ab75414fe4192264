"""The hub of join links at bad moments: members stay. It runs in this process, so that a test can hold it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from sollol_nb.errors import ConfigError, JoinError
from sollol_nb.llama_cpp.links import memberships
from sollol_nb.llama_cpp.links.invitations import Hub
from sollol_nb.llama_cpp.links.join_link import Build, Connection, Facts, JoinLink, beat, connect, receive, send
from sollol_nb.llama_cpp.links.link import LOST, READY, LinkedWorker
from sollol_nb.llama_cpp.links.memberships import Memberships
from sollol_nb.llama_cpp.links.program import Report
from sollol_nb.settings.endpoints import parse_endpoint
from tests.support.engines import eventually_async, run

BUILD = Build(commit="0c1e570", protocol="7.0.0")
FACTS = Facts(host="far", machine="boot", devices=("CPU",), threads=1, build=BUILD, give_up_s=60.0)
SECRET = "s" * 40


@pytest.fixture(autouse=True)
def empty_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user whom nobody has joined yet."""
    monkeypatch.setenv("SOLLOL_STATE_DIR", str(tmp_path))


class Noted:
    """What a hub reports."""

    def __init__(self) -> None:
        self.state = ""
        self.workers: Mapping[str, LinkedWorker] = {}
        self.more: dict[str, Any] = {}
        self.ended = asyncio.Event()

    async def set(self, state: str, detail: str, workers: Mapping[str, LinkedWorker], **more: Any) -> None:
        self.state, self.workers, self.more = state, workers, more

    async def keep(self, is_kept: bool) -> None:
        pass

    async def supervisor_ended(self) -> None:
        await self.ended.wait()


@asynccontextmanager
async def inviting() -> AsyncIterator[tuple[Noted, JoinLink]]:
    """A hub that has invited one worker."""
    known, _, token = memberships.made(
        Memberships(), name="gpu1", uses=1, expires_s=60.0, host="127.0.0.1", port=None, build=BUILD
    )
    memberships.write(known)
    noted = Noted()
    serving = asyncio.create_task(Hub(cast("Report", noted)).serve())
    try:
        await eventually_async(lambda: noted.more.get("listens"), "it listens")
        port = parse_endpoint(noted.more["listens"])[1]
        yield noted, JoinLink(host="127.0.0.1", port=port, token=token, fingerprint=memberships.certificate())
    finally:
        noted.ended.set()
        await serving


@asynccontextmanager
async def member(link: JoinLink) -> AsyncIterator[Connection]:
    """One that has joined and can be used."""
    reader, writer = await connect(link)
    beating: asyncio.Task[None] | None = None
    try:
        send(writer, {"secret": SECRET, "token": link.token, "facts": FACTS.as_dict()})
        assert (await receive(reader))["welcome"] == {"name": "gpu1"}
        send(writer, {"ready": True})
        beating = asyncio.create_task(beat(writer))
        yield reader, writer
    finally:
        if beating is not None:
            beating.cancel()
        writer.transport.abort()


def test_a_worker_that_joins_while_the_file_is_read_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    read = memberships.read
    armed, is_read, goes_on = threading.Event(), threading.Event(), threading.Event()

    def slow() -> Memberships:
        known = read()  # before it joins
        if armed.is_set():
            armed.clear()
            is_read.set()
            goes_on.wait(30)
        return known

    async def check() -> None:
        async with inviting() as (noted, link):
            monkeypatch.setattr(memberships, "read", slow)
            armed.set()
            await eventually_async(is_read.is_set, "the hub reads the file")
            async with member(link) as (reader, _):
                goes_on.set()
                await eventually_async(lambda: noted.more["connected"] == ["gpu1"], "it is connected")
                assert await receive(reader) == {}

    run(check())


def test_a_file_that_cannot_be_read_for_a_moment_ends_no_member(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        async with inviting() as (noted, link), member(link):
            await eventually_async(lambda: noted.more["connected"] == ["gpu1"], "it is connected")
            with monkeypatch.context() as patch:
                patch.setattr(memberships, "read_private", lambda path: None)
                with pytest.raises(ConfigError, match="cannot read"):
                    memberships.read()
                await eventually_async(lambda: noted.state == LOST, "the hub reports it")
            await eventually_async(lambda: noted.state == READY, "it has read the file again")
            assert noted.more["connected"] == ["gpu1"]

    run(check())


def test_a_worker_that_joins_before_the_disk_is_full_can_be_used_once_it_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = memberships.write
    is_full = True

    def failing(known: Memberships) -> None:
        if is_full and any(item.ports for item in known.members):
            raise JoinError("cannot write the file (No space left on device)")
        write(known)

    async def check() -> None:
        nonlocal is_full
        monkeypatch.setattr(memberships, "write", failing)
        async with inviting() as (noted, link), member(link):
            await eventually_async(lambda: noted.state == LOST, "the hub reports it")
            is_full = False
            await eventually_async(lambda: noted.workers, "it has an endpoint")
            assert noted.state == READY

    run(check())


def test_many_members_with_long_names_fit_the_file() -> None:
    long = "\U0001d400" * 64  # a letter of four bytes, and twelve as JSON
    facts = Facts.of(
        {
            **FACTS.as_dict(),
            "host": long,
            "machine": long,
            "devices": [long] * 16,
            "build": {"commit": long, "protocol": long},
        }
    )
    known, invitation, _ = memberships.made(
        Memberships(), name=None, uses=64, expires_s=60.0, host="127.0.0.1", port=None, build=BUILD
    )
    for number in range(memberships.MAX_MEMBERS):
        known, _ = known.with_member(replace(invitation, uses_left=64), f"{SECRET}{number}", facts)
    memberships.write(known)
    assert len(memberships.read().members) == memberships.MAX_MEMBERS
