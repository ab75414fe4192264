"""The probe distinguishes five outcomes, in bounded time, whatever the peer does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import struct
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from sollol_nb.errors import ConfigError
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.process import EngineProcess
from sollol_nb.llama_cpp.workers import probe as probe_module
from sollol_nb.llama_cpp.workers.probe import (
    DEFAULT_TIMEOUT_S,
    PROTOCOL_MAJOR,
    PROTOCOL_MINOR,
    Probe,
    ProbeOutcome,
    discover,
    probe,
    probe_all,
    test_rpc_backend,
)
from tests.support.engines import HANG_GUARD_S, Peer, listening, run, unused_port
from tests.support.ollama_server import OllamaServer

SHORT_S = 0.4  # the probe's time limit for a silent peer
HELLO, DEVICE_COUNT, GET_DEVICE_MEMORY = 14, 15, 11
GIB = 1024**3
OURS = (PROTOCOL_MAJOR, PROTOCOL_MINOR, 3)


# --- peers ------------------------------------------------------------------------------------


def answer(payload: bytes) -> bytes:
    return struct.pack("<Q", len(payload)) + payload


def hello(major: int, minor: int, patch: int = 0) -> bytes:
    return bytes([major, minor, patch, 0]) + bytes(24)


async def forever() -> None:
    await asyncio.Event().wait()


def worker(
    *,
    greeting: bytes | None = hello(*OURS),
    devices: bytes | None = struct.pack("<I", 1),
    memory: bytes | None = struct.pack("<QQ", 3 * GIB, 4 * GIB),
) -> Peer:
    """Answers each command with the given payload, or not at all if it is None."""
    payloads = {HELLO: greeting, DEVICE_COUNT: devices, GET_DEVICE_MEMORY: memory}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            command, length = struct.unpack("<BQ", await reader.readexactly(9))
            if command not in payloads:  # workers close then
                return
            await reader.readexactly(length)
            payload = payloads[command]
            if payload is None:
                await forever()
            else:
                writer.write(answer(payload))

    return serve


def says(data: bytes, *, then: str) -> Peer:
    """Sends `data` after the first request, then closes or stays silent."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(9)
        writer.write(data)
        await writer.drain()
        if then == "silence":
            await forever()

    return serve


def trickles(data: bytes, pause_s: float) -> Peer:
    """Sends `data` a byte at a time, over and over."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            for byte in data:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(pause_s)

    return serve


def of_protocol_3(major: int = 3, minor: int = 6, patch: int = 1) -> Peer:
    """Greets without capabilities; a client that sends some is cut off."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _, length = struct.unpack("<BQ", await reader.readexactly(9))
        if length == 0:
            writer.write(answer(bytes([major, minor, patch])))

    return serve


async def closes_immediately(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    pass


async def resets(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(1)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def probed(peer: Peer, timeout_s: float = SHORT_S) -> Probe:
    async with listening(peer) as port:
        result = await probe("127.0.0.1", port, timeout_s=timeout_s)
        assert result.endpoint == f"127.0.0.1:{port}"
        return result


# --- the five outcomes ------------------------------------------------------------------------


def test_free_worker_reports_version_devices_memory_and_round_trip() -> None:
    result = run(probed(worker(devices=struct.pack("<I", 2)), timeout_s=HANG_GUARD_S))

    assert result.outcome is ProbeOutcome.FREE
    assert result.protocol == OURS
    assert result.device_free_bytes == (3 * GIB, 3 * GIB)
    assert (result.free_bytes, result.total_bytes) == (6 * GIB, 8 * GIB)
    assert result.round_trip_ms is not None
    assert result.round_trip_ms > 0


def test_nothing_listening_is_refused_and_says_how_to_start_a_worker() -> None:
    port = unused_port()

    result = run(probe("127.0.0.1", port))

    assert result.outcome is ProbeOutcome.REFUSED
    assert f"ggml-rpc-server -H 127.0.0.1 -p {port}" in result.detail


def test_host_with_two_addresses_that_both_refuse_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    port = unused_port()

    async def check() -> Probe:
        async def both(*_: Any, **__: Any) -> list[Any]:
            six = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", port, 0, 0))
            return [six, (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", both)
        return await probe("worker.example", port)

    assert run(check()).outcome is ProbeOutcome.REFUSED


def test_unknown_host_is_unreachable() -> None:
    result = run(probe("worker.invalid", 50052))

    assert result.outcome is ProbeOutcome.UNREACHABLE
    assert "check the address" in result.detail


@pytest.mark.skipif(sys.platform != "linux", reason="a full backlog drops new connections on Linux only")
def test_host_that_drops_connection_attempts_is_unreachable() -> None:
    async def check() -> Probe:
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(socket.socket())
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)
            for _ in range(8):  # fills the backlog; nobody accepts
                filler = stack.enter_context(socket.socket())
                filler.setblocking(False)
                filler.connect_ex(listener.getsockname())
            return await probe("127.0.0.1", listener.getsockname()[1], timeout_s=SHORT_S)

    result = run(check())

    assert result.outcome is ProbeOutcome.UNREACHABLE
    assert "no answer within 0.4 s" in result.detail


@pytest.mark.parametrize(
    ("host", "port"),
    [("127.0.0.1", 0), ("127.0.0.1", 65536), ("127.0.0.1", -1), ("", 50052), ("a\0b", 50052), ("a b", 50052)],
)
def test_an_invalid_endpoint_is_a_config_error(host: str, port: int) -> None:
    with pytest.raises(ConfigError, match="is not an endpoint"):
        run(probe(host, port))


def test_host_name_too_long_for_dns_is_unreachable() -> None:
    assert run(probe("a" * 70, 50052)).outcome is ProbeOutcome.UNREACHABLE


# --- misbehaving peers ------------------------------------------------------------------------

FREE, BUSY, INCOMPATIBLE = ProbeOutcome.FREE, ProbeOutcome.BUSY, ProbeOutcome.INCOMPATIBLE
UNREACHABLE = ProbeOutcome.UNREACHABLE
NOT_RPC = "a protocol that is not RPC protocol 7"
CLOSES = "closes each connection without an answer"
HUGE = struct.pack("<Q", 2**62)
GREETING = answer(hello(*OURS))


MISBEHAVING = [
    pytest.param(closes_immediately, UNREACHABLE, CLOSES, id="closes immediately"),
    pytest.param(says(b"", then="close"), UNREACHABLE, CLOSES, id="closes after HELLO"),
    pytest.param(resets, UNREACHABLE, CLOSES, id="resets the connection"),
    pytest.param(says(os.urandom(200), then="close"), INCOMPATIBLE, NOT_RPC, id="random bytes"),
    pytest.param(
        says(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", then="close"),
        INCOMPATIBLE,
        "is an HTTP server, not an RPC worker",
        id="HTTP answer",
    ),
    pytest.param(says(b"SSH-2.0-OpenSSH_9.6\r\n", then="silence"), INCOMPATIBLE, NOT_RPC, id="SSH banner"),
    pytest.param(says(HUGE, then="silence"), INCOMPATIBLE, NOT_RPC, id="huge length, then silence"),
    pytest.param(says(HUGE + bytes(5000), then="close"), INCOMPATIBLE, NOT_RPC, id="huge length and data"),
    pytest.param(says(b"", then="silence"), BUSY, "accepts connections but does not answer", id="silence"),
    pytest.param(says(bytes(4), then="silence"), BUSY, "does not answer", id="half a length, then silence"),
    pytest.param(
        says(GREETING[:20], then="silence"),
        BUSY,
        "does not answer",
        id="half a HELLO, then silence",
    ),
    pytest.param(says(GREETING[:20], then="close"), INCOMPATIBLE, NOT_RPC, id="half a HELLO, closes"),
    pytest.param(says(GREETING, then="close"), INCOMPATIBLE, NOT_RPC, id="closes after its HELLO"),
    pytest.param(says(GREETING, then="silence"), BUSY, "does not answer", id="only a HELLO"),
    pytest.param(worker(memory=None), BUSY, "does not answer", id="silent about memory"),
    pytest.param(trickles(b"\xff", 0.001), INCOMPATIBLE, NOT_RPC, id="endless trickle of garbage"),
    pytest.param(trickles(GREETING, 0.1), BUSY, "does not answer", id="endless slow trickle"),
    pytest.param(worker(greeting=b""), INCOMPATIBLE, NOT_RPC, id="empty HELLO"),
    pytest.param(worker(greeting=bytes(5)), INCOMPATIBLE, NOT_RPC, id="HELLO of 5 bytes"),
    pytest.param(worker(greeting=bytes(29)), INCOMPATIBLE, NOT_RPC, id="HELLO of 29 bytes"),
    pytest.param(of_protocol_3(), INCOMPATIBLE, "RPC protocol 3.6.1", id="older, closes on capabilities"),
    pytest.param(
        worker(greeting=bytes([6, 0, 2])), INCOMPATIBLE, "RPC protocol 6.0.2", id="older, answers 3 bytes"
    ),
    pytest.param(
        worker(greeting=bytes([6, 1, 2, 0])), INCOMPATIBLE, "RPC protocol 6.1.2", id="older, answers 4 bytes"
    ),
    pytest.param(worker(greeting=hello(8, 0)), INCOMPATIBLE, "RPC protocol 8.0.0", id="newer major"),
    pytest.param(worker(greeting=hello(7, 9)), INCOMPATIBLE, "RPC protocol 7.9.0", id="newer minor"),
    pytest.param(worker(devices=bytes(4)), INCOMPATIBLE, "0 devices", id="no device"),
    pytest.param(worker(devices=b"\xff" * 4), INCOMPATIBLE, "4294967295 devices", id="4 billion devices"),
    pytest.param(worker(devices=bytes(3)), INCOMPATIBLE, "device count is malformed", id="short device count"),
    pytest.param(worker(memory=bytes(8)), INCOMPATIBLE, "memory answer is malformed", id="short memory"),
    pytest.param(worker(memory=bytes(24)), INCOMPATIBLE, "memory answer is malformed", id="long memory"),
]


@pytest.fixture(scope="module")
def probes_of_misbehaving() -> dict[object, Probe]:
    """What the probe finds of each of these peers. Those that are silent cost its whole time limit, at the same
    time; the others need not be quick."""
    silent = [case.values[0] for case in MISBEHAVING if case.values[1] is BUSY]
    others = [case.values[0] for case in MISBEHAVING if case.values[1] is not BUSY]

    async def check(peers: list[Peer], timeout_s: float) -> list[Probe]:
        return await asyncio.gather(*(probed(peer, timeout_s) for peer in peers))

    found = run(check(others, HANG_GUARD_S)) + run(check(silent, DEFAULT_TIMEOUT_S))
    return dict(zip(others + silent, found, strict=True))


@pytest.mark.parametrize(("peer", "outcome", "message"), MISBEHAVING)
def test_misbehaving_peer_is_classified(
    probes_of_misbehaving: dict[object, Probe], peer: Peer, outcome: ProbeOutcome, message: str
) -> None:
    result = probes_of_misbehaving[peer]

    assert result.outcome is outcome
    assert message in result.detail
    assert "\n" not in result.detail
    assert not result.device_free_bytes


def test_older_and_newer_versions_are_also_numbers() -> None:
    assert run(probed(of_protocol_3(2, 5, 0), HANG_GUARD_S)).protocol == (2, 5, 0)
    assert run(probed(worker(greeting=hello(8, 1, 4)), HANG_GUARD_S)).protocol == (8, 1, 4)


@pytest.mark.parametrize("seed", range(4))
def test_random_garbage_never_crashes_or_hangs_the_probe(seed: int) -> None:
    chance = random.Random(seed)

    def garbage() -> bytes:
        """Short random bytes, most of them with a length in front that makes them look valid."""
        payload = chance.randbytes(chance.choice((0, 1, 3, 4, 16, 28, 28, 40)))
        if len(payload) == 28 and chance.random() < 0.7:
            payload = bytes([7, 0]) + payload[2:]
        return answer(payload) if chance.random() < 0.7 else payload

    async def babbles(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(chance.randrange(1, 5)):
            await reader.read(64)
            writer.write(garbage())
        if chance.random() < 0.3:
            await forever()

    async def check() -> list[Probe]:
        async with listening(babbles) as port:
            # Those that answer get the time for it also on a busy machine; some are silent, and take all of it.
            return await probe_all([f"127.0.0.1:{port}"] * 50, timeout_s=5 * SHORT_S)

    outcomes = {result.outcome for result in run(check())}

    assert outcomes <= {FREE, BUSY, INCOMPATIBLE, UNREACHABLE}
    assert ProbeOutcome.INCOMPATIBLE in outcomes


async def waits_for_a_line(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """As HTTP servers do: HELLO has no line, so they say nothing to it."""
    while await reader.readline() != b"\r\n":
        pass
    writer.write(b"HTTP/1.1 404 Not Found\r\nServer: llama.cpp\r\nContent-Length: 0\r\n\r\n")
    await writer.drain()


def test_an_http_port_that_is_given_as_a_worker_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_module, "_HTTP_SHARE", 0.99)  # of the time
    monkeypatch.setattr(probe_module, "_HTTP_LIMIT_S", HANG_GUARD_S)

    result = run(probed(waits_for_a_line, HANG_GUARD_S / 2))

    assert result.outcome is ProbeOutcome.INCOMPATIBLE
    assert "is a llama-server, not an RPC worker; give the port on which ggml-rpc-server listens" in result.detail


@pytest.mark.ollama
def test_an_ollama_port_that_is_given_as_a_worker_is_recognised(ollama: OllamaServer) -> None:
    result = run(probe("127.0.0.1", ollama.port))

    assert result.outcome is ProbeOutcome.INCOMPATIBLE
    name = f"127.0.0.1:{ollama.port}"
    assert result.detail == f"{name} is Ollama, not an RPC worker; to use it, set OLLAMA_HOST={name}"


def test_a_name_that_has_only_ipv6_addresses_is_unreachable_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> Probe:
        async def only_ipv6(*_: Any, **__: Any) -> list[Any]:
            return [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fd00::10", 50052, 0, 0))]

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", only_ipv6)
        return await probe("box", 50052)

    result = run(check())

    assert result.outcome is ProbeOutcome.UNREACHABLE
    assert result.detail == (
        "box:50052 cannot be reached: box has no IPv4 address; give its IPv6 address, such as [fd00::10]:50052"
    )


# --- discovery --------------------------------------------------------------------------------


def test_discovery_finds_free_and_busy_workers_on_the_given_ports_and_nothing_else() -> None:
    async def check() -> tuple[set[str], set[str]]:
        web = says(b"HTTP/1.1 200 OK\r\n\r\n", then="close")
        async with (
            listening(worker()) as free,
            listening(worker(greeting=None)) as busy,
            listening(web) as web_port,
            listening(worker()) as unlisted,
        ):
            found = await discover(ports=[free, busy, web_port, unused_port()])
            assert f"127.0.0.1:{unlisted}" not in {result.endpoint for result in found}
            return {result.endpoint for result in found}, {f"127.0.0.1:{free}", f"127.0.0.1:{busy}"}

    found, expected = run(check())
    assert found == expected


def test_probe_all_keeps_the_order_of_the_endpoints() -> None:
    async def check() -> None:
        async with listening(worker()) as free, listening(worker(greeting=None)) as busy:
            endpoints = [f"127.0.0.1:{port}" for port in (busy, free, unused_port(), free)]
            results = await probe_all(endpoints)
        assert [result.endpoint for result in results] == endpoints
        assert [result.outcome.value for result in results] == ["busy", "free", "refused", "free"]

    run(check())


@pytest.mark.parametrize(
    ("peer", "usable", "timeout_s"),
    [
        (worker(), True, HANG_GUARD_S),
        (worker(greeting=None), False, SHORT_S),
        (worker(greeting=hello(8, 0)), False, HANG_GUARD_S),
    ],
)
def test_the_blocking_check_says_whether_a_worker_can_be_used(peer: Peer, usable: bool, timeout_s: float) -> None:
    async def check() -> bool:
        async with listening(peer) as port:
            return await asyncio.to_thread(test_rpc_backend, "127.0.0.1", port, timeout=timeout_s)

    assert run(check()) is usable


def test_the_blocking_check_knows_a_held_worker_by_its_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    port = unused_port()
    monkeypatch.setattr(registry, "holders", lambda: {f"127.0.0.1:{port}": None})
    assert test_rpc_backend("localhost", port, timeout=SHORT_S)
    assert not test_rpc_backend("127.0.0.2", port, timeout=SHORT_S)


def test_the_blocking_check_is_not_taken_for_a_test() -> None:
    assert test_rpc_backend.__test__ is False  # type: ignore[attr-defined]


# --- real workers -----------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def real_worker(engine: Engine, folder: Path) -> AsyncIterator[tuple[int, EngineProcess]]:
    port = unused_port()
    argv = [str(engine.worker), "-H", "127.0.0.1", "-p", str(port)]
    process = await EngineProcess.start(
        argv,
        kind="worker",
        about={"endpoint": f"127.0.0.1:{port}"},
        keep_alive_s=60,
        log_path=folder / "worker.log",
    )
    try:
        await until_free(port)
        yield port, process
    finally:
        await process.stop()


async def until_free(port: int) -> Probe:
    while True:  # ends with the hang guard
        result = await probe("127.0.0.1", port)
        if result.outcome is ProbeOutcome.FREE:
            return result
        await asyncio.sleep(0.02)


@pytest.mark.engine
def test_real_worker_is_free_and_tells_its_memory(engine: Engine, tmp_path: Path) -> None:
    async def check() -> Probe:
        async with real_worker(engine, tmp_path) as (port, _):
            return await until_free(port)

    result = run(check())

    assert result.protocol is not None
    assert result.protocol[0] == PROTOCOL_MAJOR
    assert len(result.device_free_bytes) >= 1
    assert 0 < result.free_bytes <= result.total_bytes


async def attach(port: int) -> asyncio.StreamWriter:
    """Hold a worker as a coordinator does: greet, and stay connected."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(struct.pack("<BQ", HELLO, 24) + bytes(24))
    await reader.readexactly(8 + 28)
    return writer


@pytest.mark.engine
def test_real_worker_is_busy_while_a_client_holds_it_and_free_afterwards(engine: Engine) -> None:
    async def check() -> tuple[Probe, Probe]:
        # Started as on another machine, without a supervisor: here SIGPIPE would end it.
        port = unused_port()
        argv = (str(engine.worker), "-H", "127.0.0.1", "-p", str(port))
        process = await asyncio.create_subprocess_exec(*argv, stdout=asyncio.subprocess.DEVNULL)
        try:
            await until_free(port)
            holder = await attach(port)
            held = await probe("127.0.0.1", port)  # connecting may take long
            holder.close()
            return held, await until_free(port)
        finally:
            process.kill()
            await process.wait()

    held, afterwards = run(check())

    assert held.outcome is ProbeOutcome.BUSY
    assert "a coordinator holds it" in held.detail
    assert afterwards.outcome is ProbeOutcome.FREE


@pytest.mark.engine
def test_supervised_worker_survives_a_client_that_disconnects_before_its_answer(
    engine: Engine, tmp_path: Path
) -> None:
    async def check() -> Probe:
        async with real_worker(engine, tmp_path) as (port, _):
            holder = await attach(port)
            _, impatient = await asyncio.open_connection("127.0.0.1", port)
            impatient.write(struct.pack("<BQ", HELLO, 24) + bytes(24))
            await impatient.drain()
            impatient.close()
            await impatient.wait_closed()
            holder.close()
            return await until_free(port)

    assert run(check()).outcome is ProbeOutcome.FREE


@pytest.mark.engine
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGSTOP")
def test_stopped_real_worker_is_busy_and_free_when_it_continues(engine: Engine, tmp_path: Path) -> None:
    async def check() -> tuple[Probe, Probe]:
        async with real_worker(engine, tmp_path) as (port, process):
            os.kill(process.pid, signal.SIGSTOP)
            stopped = await probe("127.0.0.1", port)  # connecting may take long
            os.kill(process.pid, signal.SIGCONT)
            return stopped, await until_free(port)

    stopped, afterwards = run(check())

    assert stopped.outcome is ProbeOutcome.BUSY
    assert afterwards.outcome is ProbeOutcome.FREE
