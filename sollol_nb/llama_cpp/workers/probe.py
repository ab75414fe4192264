"""Probe llama.cpp RPC workers, and discover them.

The only module that knows the bytes of the protocol (ggml-rpc.cpp of llama.cpp, protocol 7). It is raw TCP: a
request is one command byte, an 8-byte little-endian payload length and the payload; a response is an 8-byte
length and the payload. HELLO (14) comes first and returns the protocol version; DEVICE_COUNT (15) and
GET_DEVICE_MEMORY (11) follow.

A worker serves one client at a time: while a coordinator holds it, a second client can connect, but its HELLO is
never answered. So a probe has five outcomes (`ProbeOutcome`), and a worker that one of our coordinators holds
is not probed: it would only appear busy.

llama.cpp connects to the first IPv4 address of a worker's host (`gethostbyname` in its transport.cpp), and so does
a probe. An IPv6 address, which llama.cpp reaches through a link, is probed directly.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import struct
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from sollol_nb.errors import EngineIncompatibleError
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.machine import worker_at
from sollol_nb.runtime.io_loop import run_blocking
from sollol_nb.settings.endpoints import DEFAULT_RPC_PORT, LOOPBACK, format_endpoint, parse_endpoint

PROTOCOL_MAJOR = 7
PROTOCOL_MINOR = 0
DEFAULT_TIMEOUT_S = 2.0
TOGETHER_TIMEOUT_S = 1.0
DISCOVERY_PORTS = range(DEFAULT_RPC_PORT, DEFAULT_RPC_PORT + 16)

_HELLO, _DEVICE_COUNT, _GET_DEVICE_MEMORY = 14, 15, 11
_CAPABILITIES = bytes(24)  # zeros: plain TCP, no transport upgrade
_HELLO_ANSWER_BYTES = 4 + len(_CAPABILITIES)
_OLD_HELLO_ANSWER_BYTES = (3, 4)  # majors below 7 answer with the bare version
_MAX_DEVICES = 64
_HTTP_SHARE, _HTTP_LIMIT_S = 0.25, 0.5  # of a probe's time, to find out whether a silent peer speaks HTTP
_HTTP_REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
_NO_LINGER = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)


class ProbeOutcome(Enum):
    """What a probe found."""

    FREE = "free"
    BUSY = "busy"  # accepts, but does not answer: held by a coordinator, or hung
    REFUSED = "refused"
    UNREACHABLE = "unreachable"
    INCOMPATIBLE = "incompatible"  # speaks another protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """The result of probing one endpoint.

    Attributes:
        endpoint: `host:port`.
        outcome: one of the five outcomes.
        detail: one line of text, with what to do if something is wrong.
        protocol: version of the RPC protocol, `(major, minor, patch)`; None if unknown.
        device_free_bytes: free memory of each device that the worker offers, in the worker's order.
        total_bytes: memory, summed over its devices.
        round_trip_ms: the fastest round trip of the probe; None if there was none.
    """

    endpoint: str
    outcome: ProbeOutcome
    detail: str
    protocol: tuple[int, int, int] | None = None
    device_free_bytes: tuple[int, ...] = ()
    total_bytes: int = 0
    round_trip_ms: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` reads it."""
        return {**asdict(self), "outcome": self.outcome.value}

    @classmethod
    def from_dict(cls, data: object) -> Probe | None:
        """The probe of an `as_dict`; None if it is not one."""
        try:
            protocol = data["protocol"]  # type: ignore[index]
            return cls(
                endpoint=str(data["endpoint"]),  # type: ignore[index]
                outcome=ProbeOutcome(data["outcome"]),  # type: ignore[index]
                detail=str(data["detail"]),  # type: ignore[index]
                protocol=None if protocol is None else (int(protocol[0]), int(protocol[1]), int(protocol[2])),
                device_free_bytes=tuple(map(int, data["device_free_bytes"])),  # type: ignore[index]
                total_bytes=int(data["total_bytes"]),  # type: ignore[index]
                round_trip_ms=None if data["round_trip_ms"] is None else float(data["round_trip_ms"]),  # type: ignore[index]
            )
        except (TypeError, KeyError, ValueError, IndexError, OverflowError):
            return None

    @property
    def free_bytes(self) -> int:
        """Free memory, summed over its devices."""
        return sum(self.device_free_bytes)


@dataclass(frozen=True, slots=True)
class Client:
    """The llama.cpp here that is to use the workers.

    Attributes:
        version: of llama.cpp; "" before it is known.
        minor: of its RPC protocol, whose major is `PROTOCOL_MAJOR`; that of a worker must not be higher.
    """

    version: str = ""
    minor: int = PROTOCOL_MINOR

    @classmethod
    def of(cls, engine: Engine) -> Client:
        """The client that an engine is.

        Raises:
            EngineIncompatibleError: its RPC protocol is another one than that of the workers.
        """
        if not engine.protocol:
            return cls(engine.version)
        major, minor, *_ = map(int, engine.protocol.split("."))
        if major != PROTOCOL_MAJOR:
            raise EngineIncompatibleError(
                f"llama.cpp {engine.version} in {engine.server.parent} (found in: {engine.source}) speaks RPC "
                f"protocol {engine.protocol}, but only workers of RPC protocol {PROTOCOL_MAJOR} can be used; run "
                "`sollol-nb install` here to build a llama.cpp that fits"
            )
        return cls(engine.version, minor)

    def __str__(self) -> str:
        version = f" {self.version}" if self.version else ""
        return f"llama.cpp{version} here speaks {PROTOCOL_MAJOR}.{self.minor}"


ANY_CLIENT = Client()


class _NotThisProtocol(Exception):
    """The peer answers, but does not follow this protocol."""


class _NoAnswer(Exception):
    """The peer closes the connection before it has sent anything, as a tunnel does whose other end is dead."""


class _Ipv6OnlyError(OSError):
    """The host has no IPv4 address."""


async def probe(
    host: str, port: int, *, timeout_s: float = DEFAULT_TIMEOUT_S, client: Client = ANY_CLIENT
) -> Probe:
    """Probe one endpoint, within `timeout_s` seconds. Whatever the peer does is an outcome, not an exception.

    Args:
        client: what is to use the worker; it decides which protocols are compatible.

    Raises:
        ConfigError: host and port are not an endpoint.
    """
    endpoint = format_endpoint(host, port)
    parse_endpoint(endpoint)
    deadline = time.monotonic() + timeout_s
    http_limit_s = min(_HTTP_SHARE * timeout_s, _HTTP_LIMIT_S)
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await _connect(host, port)
    except TimeoutError:
        # A held worker lets two clients queue; the packets of further ones are dropped, as by a firewall.
        return _unreachable(endpoint, f"no answer within {timeout_s:g} s, or a coordinator holds it")
    except ConnectionRefusedError:
        return Probe(
            endpoint=endpoint,
            outcome=ProbeOutcome.REFUSED,
            detail=f"nothing listens on {endpoint}; start a worker there: ggml-rpc-server -H {host} -p {port}",
        )
    except _Ipv6OnlyError as error:
        return Probe(
            endpoint=endpoint, outcome=ProbeOutcome.UNREACHABLE, detail=f"{endpoint} cannot be reached: {error}"
        )
    except (OSError, UnicodeError) as error:  # no route, unknown host, a label too long for DNS
        return _unreachable(endpoint, getattr(error, "strerror", None) or str(error))
    try:
        async with asyncio.timeout(max(0.0, deadline - http_limit_s - time.monotonic())):
            return await _query(endpoint, reader, writer, client)
    except TimeoutError:
        if (http := await _http_server(endpoint, deadline)) is not None:
            return http
        return Probe(
            endpoint=endpoint,
            outcome=ProbeOutcome.BUSY,
            detail=f"{endpoint} accepts connections but does not answer: a coordinator holds it, or it hangs",
        )
    except (_NotThisProtocol, _NoAnswer, asyncio.IncompleteReadError, OSError) as error:
        version = await _old_version(host, port, deadline - http_limit_s)
        http = await _http_server(endpoint, deadline) if version is None else None
        if http is None and version is None and isinstance(error, _NoAnswer):
            return Probe(
                endpoint=endpoint,
                outcome=ProbeOutcome.UNREACHABLE,
                detail=f"{endpoint} closes each connection without an answer; if it is a tunnel, start the worker "
                "at its other end, else give the port on which ggml-rpc-server listens",
            )
        why = str(error) if isinstance(error, _NotThisProtocol) else ""
        return http or _incompatible(endpoint, version, client, why)
    finally:
        _reset(writer)


async def probe_all(
    endpoints: Iterable[str], *, timeout_s: float = DEFAULT_TIMEOUT_S, client: Client = ANY_CLIENT
) -> list[Probe]:
    """Probe `host:port` endpoints at the same time; results in the same order."""
    pairs = [parse_endpoint(endpoint) for endpoint in endpoints]
    probes = (probe(host, port, timeout_s=timeout_s, client=client) for host, port in pairs)
    return list(await asyncio.gather(*probes))


async def discover(
    hosts: Iterable[str] = (LOOPBACK,),
    ports: Iterable[int] = DISCOVERY_PORTS,
    *,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> list[Probe]:
    """Free and busy workers on the given hosts and ports (default: this machine, ports 50052 to 50067).

    No other address is searched: to find workers on other machines, name the machines.
    """
    port_list = list(ports)
    probes = await probe_all(
        (format_endpoint(host, port) for host in hosts for port in port_list), timeout_s=timeout_s
    )
    return [probe for probe in probes if probe.outcome in (ProbeOutcome.FREE, ProbeOutcome.BUSY)]


def test_rpc_backend(
    host: str,
    port: int = DEFAULT_RPC_PORT,  # noqa: PT028 - not a test
    timeout: float = DEFAULT_TIMEOUT_S,  # noqa: PT028 - not a test
) -> bool:
    """Whether a worker is there that coordinators of this user can use: it speaks a compatible protocol and is
    free, or one of this user's coordinators holds it, under whichever name (then it is not asked)."""
    host, port = parse_endpoint(format_endpoint(host, port))
    held = [worker for worker in map(parse_endpoint, registry.holders()) if worker[1] == port]
    if held and worker_at(host, port) in itertools.starmap(worker_at, held):
        return True
    return run_blocking(probe(host, port, timeout_s=timeout)).outcome is ProbeOutcome.FREE


test_rpc_backend.__test__ = False  # type: ignore[attr-defined]  # its name looks like a test to pytest


async def _connect(host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to the address that llama.cpp would use, or to the given IPv6 address.

    Raises:
        _Ipv6OnlyError: llama.cpp would find none.
        OSError: nothing accepts there.
    """
    if ":" in host:
        return await asyncio.open_connection(host, port, limit=4096)
    addresses = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    address = next((str(address[0]) for family, *_, address in addresses if family == socket.AF_INET), None)
    if address is None:
        raise _Ipv6OnlyError(f"{host} has no IPv4 address; give its IPv6 address, such as [fd00::10]:{port}")
    return await asyncio.open_connection(address, port, limit=4096)


async def _query(
    endpoint: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, client: Client
) -> Probe:
    round_trips: list[float] = []

    async def ask(command: int, payload: bytes) -> bytes:
        started = time.perf_counter()
        writer.write(struct.pack("<BQ", command, len(payload)) + payload)
        try:
            await writer.drain()
            (length,) = struct.unpack("<Q", await reader.readexactly(8))
        except (asyncio.IncompleteReadError, OSError) as error:
            heard = isinstance(error, asyncio.IncompleteReadError) and error.partial
            if round_trips or heard:
                raise
            raise _NoAnswer from error
        if length > _HELLO_ANSWER_BYTES:  # no answer to these requests is longer
            raise _NotThisProtocol("the answer does not follow the RPC protocol")
        answer = await reader.readexactly(length)
        round_trips.append((time.perf_counter() - started) * 1000)
        return answer

    hello = await ask(_HELLO, _CAPABILITIES)
    if len(hello) in _OLD_HELLO_ANSWER_BYTES:
        return _incompatible(endpoint, (hello[0], hello[1], hello[2]), client)
    if len(hello) != _HELLO_ANSWER_BYTES:
        raise _NotThisProtocol("the answer does not follow the RPC protocol")
    protocol = (hello[0], hello[1], hello[2])
    if protocol[0] != PROTOCOL_MAJOR or protocol[1] > client.minor:
        return _incompatible(endpoint, protocol, client)
    count_answer = await ask(_DEVICE_COUNT, b"")
    if len(count_answer) != 4:
        raise _NotThisProtocol("the device count is malformed")
    (device_count,) = struct.unpack("<I", count_answer)
    if not 0 < device_count <= _MAX_DEVICES:
        raise _NotThisProtocol(f"it reports {device_count} devices")
    device_free_bytes: list[int] = []
    total_bytes = 0
    for device in range(device_count):
        memory = await ask(_GET_DEVICE_MEMORY, struct.pack("<I", device))
        if len(memory) != 16:
            raise _NotThisProtocol("the memory answer is malformed")
        free, total = struct.unpack("<QQ", memory)
        device_free_bytes.append(free)
        total_bytes += total
    return Probe(
        endpoint=endpoint,
        outcome=ProbeOutcome.FREE,
        detail="free",
        protocol=protocol,
        device_free_bytes=tuple(device_free_bytes),
        total_bytes=total_bytes,
        # The first answer may wait until the worker notices us; the fastest is that of the network.
        round_trip_ms=min(round_trips),
    )


async def _http_server(endpoint: str, deadline: float) -> Probe | None:
    """What to say of an HTTP server at this endpoint; None if it does not answer like one."""
    with contextlib.suppress(TimeoutError, OSError, asyncio.IncompleteReadError):
        async with asyncio.timeout(max(0.05, deadline - time.monotonic())):
            reader, writer = await _connect(*parse_endpoint(endpoint))
            try:
                writer.write(_HTTP_REQUEST)
                answer = await reader.readexactly(5)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(0.0, deadline - time.monotonic() - 0.02)):
                        answer += await reader.read(4096)
            finally:
                _reset(writer)
        if answer.startswith(b"HTTP/"):
            what, advice = "an HTTP server", "give the port on which ggml-rpc-server listens, usually 50052"
            if b"Ollama is running" in answer:
                what, advice = "Ollama", f"to use it, set OLLAMA_HOST={endpoint}"
            elif b"llama.cpp" in answer:
                what = "a llama-server"
            return Probe(
                endpoint=endpoint,
                outcome=ProbeOutcome.INCOMPATIBLE,
                detail=f"{endpoint} is {what}, not an RPC worker; {advice}",
            )
    return None


async def _old_version(host: str, port: int, deadline: float) -> tuple[int, int, int] | None:
    """The version of a worker older than protocol 7: it expects a HELLO without payload."""
    with contextlib.suppress(TimeoutError, OSError, asyncio.IncompleteReadError):
        async with asyncio.timeout(max(0.05, deadline - time.monotonic())):
            reader, writer = await _connect(host, port)
            try:
                writer.write(struct.pack("<BQ", _HELLO, 0))
                await writer.drain()
                (length,) = struct.unpack("<Q", await reader.readexactly(8))
                if length in _OLD_HELLO_ANSWER_BYTES:
                    answer = await reader.readexactly(length)
                    return answer[0], answer[1], answer[2]
            finally:
                _reset(writer)
    return None


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with a reset. A busy worker reads our HELLO once its client has disconnected; after an ordinary close,
    its answer would raise SIGPIPE in the worker and end it."""
    with contextlib.suppress(OSError):
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
    writer.transport.abort()


async def answering_together(endpoints: Iterable[str], *, timeout_s: float = TOGETHER_TIMEOUT_S) -> list[str]:
    """Those of these free workers that answer while those before them are connected.

    A worker serves one client at a time, so one that is named twice (by two addresses, or through a tunnel) does
    not answer under its second name.
    """
    answering: list[str] = []
    writers: list[asyncio.StreamWriter] = []
    try:
        for endpoint in endpoints:
            with contextlib.suppress(TimeoutError, OSError, asyncio.IncompleteReadError):
                async with asyncio.timeout(timeout_s):
                    reader, writer = await _connect(*parse_endpoint(endpoint))
                    writers.append(writer)
                    writer.write(struct.pack("<BQ", _HELLO, len(_CAPABILITIES)) + _CAPABILITIES)
                    await reader.readexactly(8 + _HELLO_ANSWER_BYTES)
                    answering.append(endpoint)
    finally:
        for writer in writers:
            _reset(writer)
    return answering


def _unreachable(endpoint: str, why: str) -> Probe:
    return Probe(
        endpoint=endpoint,
        outcome=ProbeOutcome.UNREACHABLE,
        detail=f"{endpoint} cannot be reached ({why}); check the address, the network and the firewall",
    )


def _incompatible(endpoint: str, version: tuple[int, int, int] | None, client: Client, why: str = "") -> Probe:
    if version:
        age = "an older" if version < (PROTOCOL_MAJOR, client.minor) else "a newer"
        protocol = f"RPC protocol {'.'.join(map(str, version))} of {age} llama.cpp"
        advice = "run `sollol-nb install` there, or use one llama.cpp build everywhere"
    else:
        protocol = f"a protocol that is not RPC protocol {PROTOCOL_MAJOR}" + (f" ({why})" if why else "")
        advice = "use the same llama.cpp build for workers and coordinators"
    return Probe(
        endpoint=endpoint,
        outcome=ProbeOutcome.INCOMPATIBLE,
        detail=f"{endpoint} speaks {protocol}, but {client}; {advice}",
        protocol=version,
    )
