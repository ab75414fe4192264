"""The port of join links: who gets in, who does not, and what a member can do. The peers here are scripted."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import ssl
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from sollol_nb.errors import ConfigError, JoinError
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.links import invitations as hub
from sollol_nb.llama_cpp.links import memberships
from sollol_nb.llama_cpp.links.join_link import Build, Connection, Facts, JoinLink, connect, receive, send
from sollol_nb.llama_cpp.links.joining import Membership
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.registry import Entry
from sollol_nb.llama_cpp.workers import invited
from sollol_nb.llama_cpp.workers.links import Links
from sollol_nb.llama_cpp.workers.workers import Workers
from sollol_nb.runtime.events import EventBus
from sollol_nb.settings import config
from sollol_nb.settings.endpoints import INVITATIONS
from tests.support.engines import REPOSITORY, Peer, eventually_async, listening, posix_only, run

HERE = Build(commit="0c1e570", protocol="7.0.0")
FACTS = Facts(host="far", machine="boot", devices=("CPU",), threads=1, build=HERE, give_up_s=60.0)


@pytest.fixture(autouse=True)
def empty_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user whom nobody has joined yet."""
    monkeypatch.setenv("SOLLOL_STATE_DIR", str(tmp_path))
    return tmp_path


async def engine_here() -> Engine:
    """An engine of this build; the link runs none."""
    program = Path("/nonexistent")
    return Engine(server=program, worker=program, version="1 (0c1e570)", source="", protocol=HERE.protocol)


@pytest.fixture
def links() -> Iterator[Links]:
    """The links of a router, without a link yet."""
    made: Links = Workers((), EventBus()).links
    yield made
    run(made.let_go(force=True))


async def invite(links: Links, **options: object) -> JoinLink:
    """A link that leads to loopback."""
    arguments = {"keep_alive_s": 60.0, "host": "127.0.0.1", **options}
    return JoinLink.of((await invited.invite(links, engine_here, **arguments)).link)  # type: ignore[arg-type]


def secret(name: str) -> str:
    """A secret of a member."""
    return f"{name}-{'x' * 40}"


@asynccontextmanager
async def connected(link: JoinLink) -> AsyncIterator[Connection]:
    reader, writer = await connect(link)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def ask(link: JoinLink, name: str, *, token: str | None = None, facts: Facts = FACTS) -> dict[str, object]:
    """The answer to a member's first message, without the beats before it."""
    async with connected(link) as (reader, writer):
        send(writer, {"secret": secret(name), "token": token, "facts": facts.as_dict()})
        while not (answer := await receive(reader)):
            pass
        return answer


async def ended_by_hub(reader: asyncio.StreamReader) -> bool:
    """Wait until the other side closes; it must, within the limits of a test."""
    with suppress(OSError):
        while await reader.read(65536):
            pass
    return True


def hub_entry() -> Entry:
    (entry,) = [entry for entry in registry.entries(registry.LINK) if entry.name == INVITATIONS]
    return entry


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()


@asynccontextmanager
async def joined(link: JoinLink, worker: Peer = echo, facts: Facts = FACTS) -> AsyncIterator[asyncio.Task[str]]:
    """A member whose worker treats each connection as `worker` does."""
    said: list[str] = []
    async with listening(worker) as port:

        async def start() -> Callable[[int], int]:
            return lambda device: port

        serving = asyncio.create_task(Membership(link, facts, start, said.append).serve())
        try:
            await eventually_async(lambda: said or serving.done(), "it has joined")
            yield serving
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)


async def endpoint_of(name: str) -> tuple[str, int]:
    """The loopback endpoint of a connected member."""

    await eventually_async(lambda: name in hub_entry().about.get("connected", ()), f"{name} is connected")
    (member,) = [member for member in memberships.read().members if member.name == name]
    return "127.0.0.1", member.ports[0]


# --- tokens ---------------------------------------------------------------------------------------


def test_a_token_counts_as_often_as_it_was_given_and_its_replay_is_refused(links: Links) -> None:
    async def check() -> None:
        link = await invite(links, uses=2)
        assert (await ask(link, "first", token=link.token))["welcome"] == {"name": "far"}
        assert (await ask(link, "second", token=link.token))["welcome"] == {"name": "far-2"}
        refused = await ask(link, "third", token=link.token)
        assert "it was used already" in str(refused["refused"])
        # Its owner comes back without the token.
        assert (await ask(link, "first"))["welcome"] == {"name": "far"}

    run(check())


def test_wrong_expired_and_revoked_tokens_are_refused_with_the_reason(links: Links) -> None:
    async def check() -> None:
        link = await invite(links, name="open")
        expired, revoked = await invite(links, name="short"), await invite(links, name="gone")
        async with memberships.changing() as known:
            memberships.write(
                replace(
                    known,
                    invitations=tuple(
                        replace(item, expires_at=time.time() - 1) if item.name == "short" else item
                        for item in known.invitations
                    ),
                )
            )
        assert await invited.revoke("gone") == ["gone"]
        answers = await asyncio.gather(
            ask(link, "a", token="x" * 22),
            ask(link, "b", token=expired.token),
            ask(link, "c", token=revoked.token),
            ask(link, "d"),
        )
        reasons = ("no invitation has this token", "has expired", "was revoked", "a member no longer")
        for answer, reason in zip(answers, reasons, strict=True):
            assert reason in str(answer["refused"])
        assert [item.name for item in (await invited.invitations()).open] == ["open"]

    run(check())


def test_a_worker_of_another_build_is_refused_with_both_and_its_token_still_counts(links: Links) -> None:
    async def check() -> None:
        link = await invite(links)
        other = replace(FACTS, build=Build(commit="abcdef0", protocol="6.2.0"))
        text = str((await ask(link, "a", token=link.token, facts=other))["refused"])
        for part in ("abcdef0", "6.2.0", "0c1e570", "7.0.0", "`sollol-nb install` there"):
            assert part in text
        assert "welcome" in await ask(link, "a", token=link.token)

    run(check())


def test_nothing_is_sent_to_a_server_with_another_certificate(links: Links) -> None:
    async def check() -> None:
        link = await invite(links)
        received: list[bytes] = []

        async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            received.append(await reader.read(65536))

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(REPOSITORY / "tests" / "support" / "tls" / "loopback.pem")
        server = await asyncio.start_server(between, "127.0.0.1", 0, ssl=context)
        async with server:
            port = server.sockets[0].getsockname()[1]
            with pytest.raises(JoinError, match="another certificate"):
                await connect(replace(link, port=port))
        assert b"".join(received) == b""

    run(check())


# --- members ----------------------------------------------------------------------------------------


def test_bytes_are_carried_both_ways_through_the_connection_that_the_member_made(links: Links) -> None:
    async def check() -> None:
        async with joined(await invite(links)):
            host, port = await endpoint_of("far")
            data = os.urandom(3_000_000)
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(data)
            assert await reader.readexactly(len(data)) == data
            writer.close()
            # Connections are separate, and the end of one is the end of its other side.
            pairs = [await asyncio.open_connection(host, port) for _ in range(5)]
            for number, (_, pair_writer) in enumerate(pairs):
                pair_writer.write(b"%d" % number)
            assert [await pair_reader.read(1) for pair_reader, _ in pairs] == [b"0", b"1", b"2", b"3", b"4"]
            for _, pair_writer in pairs:
                pair_writer.close()

    run(check())


def test_a_revoked_member_ends_soon_and_cannot_come_back(links: Links) -> None:
    async def check() -> None:
        link = await invite(links, name="gpu1", uses=2)
        async with joined(link) as serving:
            host, port = await endpoint_of("gpu1")
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(b"x")
            assert await reader.readexactly(1) == b"x"
            assert (await ask(link, "stolen", token=link.token))["welcome"] == {"name": "gpu1-2"}
            assert await invited.revoke("gpu1") == ["gpu1", "gpu1-2"]
            assert hub.POLL_S < 1.0
            async with asyncio.timeout(FACTS.give_up_s / 2):  # before it could notice the silence
                assert "revoked" in await serving
                assert await ended_by_hub(reader)
            writer.close()
        await invite(links)  # it listens again
        assert "a member no longer" in str((await ask(link, "stolen"))["refused"])

    run(check())


def test_a_member_cannot_take_the_connection_of_another_or_one_that_nobody_requested(links: Links) -> None:
    async def check() -> None:
        link = await invite(links, uses=2)
        async with connected(link) as (reader, writer), connected(link) as (_, thief):
            for name, end in (("victim", writer), ("thief", thief)):
                send(end, {"secret": secret(name), "token": link.token, "facts": FACTS.as_dict()})
                send(end, {"ready": True})
                await endpoint_of("far" if name == "victim" else "far-2")
            host, port = await endpoint_of("far")
            client, client_writer = await asyncio.open_connection(host, port)
            while "open" not in (message := await receive(reader)):
                pass
            for stolen in (message["open"], 999, -1, "1", None, [1]):
                async with connected(link) as (there, there_writer):
                    send(there_writer, {"secret": secret("thief"), "stream": stolen})
                    assert await ended_by_hub(there)
            async with connected(link) as (there, there_writer):
                send(there_writer, {"secret": secret("victim"), "stream": message["open"]})
                client_writer.write(b"tensor")
                assert await there.readexactly(6) == b"tensor"
            assert await client.read() == b""
            client_writer.close()

    run(check())


def test_what_a_worker_says_about_itself_is_shown_plainly(links: Links) -> None:
    async def check() -> None:
        link = await invite(links, uses=2)
        hostile = replace(FACTS, host="a\x1b[2J<b>\n" + "\u0430" * 99, devices=("CUDA0\n", *["CPU"] * 50))
        answer = await ask(link, "hostile", token=link.token, facts=hostile)
        (name,) = dict(answer["welcome"]).values()  # type: ignore[call-overload]
        assert name.startswith("a--2J-b----")  # a Cyrillic letter that looks like a Latin one, too
        assert len(name) == 64
        (member,) = (await invited.invitations()).joined
        assert (len(member.devices), member.devices[0]) == (16, "CUDA0-")
        for wrong in ({}, {"host": 1}, {**FACTS.as_dict(), "threads": "many"}, {**FACTS.as_dict(), "devices": []}):
            async with connected(link) as (reader, writer):
                send(writer, {"secret": secret("w"), "token": link.token, "facts": wrong})
                assert await ended_by_hub(reader)

    run(check())


def test_a_member_comes_back_by_itself_after_the_link_was_killed(links: Links) -> None:
    async def check() -> None:
        link = await invite(links)
        async with joined(link):
            before = await endpoint_of("far")
            killed = hub_entry()
            psutil.Process(killed.pid).kill()
            await eventually_async(lambda: not killed.is_alive(), "the link has ended")
            await links.refresh()
            await links.connect([INVITATIONS], keep_alive_s=60.0, engine=engine_here)
            assert hub_entry().pid != killed.pid
            assert await endpoint_of("far") == before  # coordinators find it where it was
            reader, writer = await asyncio.open_connection(*before)
            writer.write(b"x")
            assert await reader.readexactly(1) == b"x"
            writer.close()

    run(check())


def test_a_worker_that_leaves_is_forgotten(links: Links) -> None:
    async def check() -> None:
        async with joined(await invite(links)):
            await endpoint_of("far")
        await eventually_async(lambda: not memberships.read().members, "it is no member")

    run(check())


# --- the port -----------------------------------------------------------------------------------------


def test_it_listens_only_while_somebody_is_invited_and_at_the_same_port_again(links: Links) -> None:
    async def check() -> None:
        link = await invite(links, name="one")
        process = psutil.Process(hub_entry().pid)

        def ports() -> list[int]:
            return [item.laddr.port for item in process.net_connections("tcp") if item.status == "LISTEN"]

        assert ports() == [link.port]
        await invited.revoke()
        await eventually_async(lambda: not ports(), "nothing listens")
        again = await invite(links, name="two")
        assert (again.port, again.fingerprint) == (link.port, link.fingerprint)
        with pytest.raises(ConfigError, match=r"lead to 127\.0\.0\.1.*revoke them first"):
            await invite(links, host="127.0.0.2")

    run(check())


def test_a_port_that_is_taken_is_one_line_and_leaves_no_invitation(links: Links) -> None:
    async def check() -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with pytest.raises(JoinError, match=rf"cannot listen on 127\.0\.0\.1:{port} .*in use"):
                await invite(links, port=port)
        assert not (await invited.invitations()).open
        assert await invite(links)

    run(check())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"uses": 0}, "uses=0"),
        ({"uses": True}, "uses=True"),
        ({"uses": 65}, "uses=65"),
        ({"expires": "forever"}, "expires"),
        ({"expires": 0}, "expires=0"),
        ({"expires": "31d"}, "expires"),
        ({"expires": "soon"}, "expires='soon'"),
        ({"name": "a b"}, "name='a b'"),
        ({"port": 70000}, "port=70000"),
        ({"host": "a/b"}, "not an endpoint"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_listens(
    links: Links, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(invite(links, **options))
    assert not registry.entries()


@posix_only
def test_the_files_are_private_and_have_no_token(links: Links, empty_state: Path) -> None:
    link = run(invite(links))
    for name in (memberships.FILE, memberships.CERTIFICATE_FILE):
        assert stat.S_IMODE((empty_state / name).stat().st_mode) == 0o600
    texts = [path.read_text(errors="replace") for path in empty_state.rglob("*") if path.is_file()]
    assert not any(link.token in text for text in texts)


HOSTILE: dict[str, Callable[[asyncio.StreamWriter], None]] = {
    "a long line": lambda writer: writer.write(b"{" + b" " * 600_000),
    "a long message": lambda writer: send(writer, {"secret": secret("x"), "pad": "x" * 9000}),
    "no JSON": lambda writer: writer.write(b"GET / HTTP/1.1\r\n\r\n"),
    "deep JSON": lambda writer: writer.write(b"[" * 4000 + b"\n"),
    "a list": lambda writer: writer.write(b"[1, 2]\n"),
    "no secret": lambda writer: send(writer, {"token": "x" * 22, "facts": FACTS.as_dict()}),
    "a secret of another type": lambda writer: send(writer, {"secret": {"a": 1}}),
    "bytes that are no text": lambda writer: writer.write(b"\xff\xfe\x00\n"),
    "numbers without end": lambda writer: writer.write(b'{"secret": ' + b"9" * 5000 + b"}\n"),
}


def test_hostile_bytes_do_not_stop_a_worker_from_joining(links: Links) -> None:
    async def idle(link: JoinLink) -> socket.socket:
        """Connects, and says nothing (it does not even begin with TLS)."""
        return await asyncio.to_thread(socket.create_connection, (link.host, link.port))

    async def hostile(link: JoinLink, act: Callable[[asyncio.StreamWriter], None]) -> bool:
        async with connected(link) as (reader, writer):
            act(writer)
            return await ended_by_hub(reader)

    async def no_tls(link: JoinLink) -> bool:
        reader, writer = await asyncio.open_connection(link.host, link.port)
        writer.write(b'{"secret": "plain"}\n' * 100)
        try:
            return await ended_by_hub(reader)
        finally:
            writer.close()

    async def check() -> None:
        link = await invite(links)
        outcomes: list[Awaitable[bool]] = [hostile(link, act) for act in HOSTILE.values()]
        assert all(await asyncio.gather(*outcomes, no_tls(link)))
        waiting = [await idle(link) for _ in range(2 * hub.MAX_UNKNOWN)]
        try:
            assert "welcome" in await ask(link, "good", token=link.token)
        finally:
            for connection in waiting:
                connection.close()
        assert psutil.Process(hub_entry().pid).is_running()

    run(check())


# --- links as text --------------------------------------------------------------------------------------


def test_the_text_of_a_link_is_one_plain_word_and_can_be_read_back() -> None:
    link = JoinLink(host="10.0.0.5", port=40123, token="A-b_" * 6, fingerprint=bytes(range(32)))
    assert JoinLink.of(f" {link.text}\n") == link
    assert not set(link.text) & set(" '\"\\$&|;<>()*?#~!`{}[]")
    assert link.token not in repr(link)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sollol://",
        "http://a:1/b",
        "sollol://a:1",
        "sollol://a:1/secrettoken.short",
        "sollol://a/b.c",
        "x" * 9999,
    ],
)
def test_text_that_is_not_a_link_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(ConfigError, match="not a join link") as caught:
        JoinLink.of(text)
    assert "secret" not in str(caught.value)


def test_a_broken_file_admits_nobody(links: Links, empty_state: Path) -> None:
    run(invite(links))
    for text in ("", "{", "[]", json.dumps({"host": "a"}), json.dumps({"host": 1, "port": "x", "members": [{}]})):
        config.state_file(memberships.FILE).write_text(text)
        assert memberships.read() == memberships.Memberships()
