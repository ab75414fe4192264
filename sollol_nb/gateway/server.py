"""The gateway's process: it listens, serves, and lets running answers finish before it ends.

Everything except signal handling runs on the I/O loop, as the router does.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Iterator
from concurrent import futures
from concurrent.futures import Future
from dataclasses import dataclass
from types import FrameType

from sollol_nb.errors import ConfigError
from sollol_nb.gateway.access import DRAIN_RETRY_S, AccessRules
from sollol_nb.gateway.access_log import AccessLog
from sollol_nb.gateway.app import application
from sollol_nb.gateway.connections import BACKLOG, HttpServer
from sollol_nb.gateway.failures import ApiError
from sollol_nb.gateway.gateway import Gateway
from sollol_nb.gateway.keys import Keys
from sollol_nb.gateway.limits import DEFAULT_MAX_REQUESTS, Limits
from sollol_nb.hybrid_router import HybridRouter
from sollol_nb.ollama.pool import OllamaPool
from sollol_nb.runtime.io_loop import io_loop, submit
from sollol_nb.settings.endpoints import format_endpoint
from sollol_nb.settings.kinds import LOCAL
from sollol_nb.text.tables import counted

logger = logging.getLogger(__name__)

DEFAULT_DRAIN_S = 30.0
SOON_S = 0.2
"""How long requests may take at the end before the gateway prints that it waits for them."""
STOP_S = 5.0
"""How long the gateway waits for the last bytes of answers once the drain time is over."""
CLOSE_S = 10.0
WANTED_FILES = 65536
_SIGNALS = [signal.SIGINT, signal.SIGTERM]
if sys.platform == "win32":
    _SIGNALS.append(signal.SIGBREAK)
_WAIT_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """How a gateway serves.

    Attributes:
        host, port: where it listens; port 0 is any free one.
        tls_cert, tls_key: PEM files, for HTTPS; the key may be in the certificate's file.
        hosts: further names of this machine by which clients call the gateway.
        origins: of web pages that may send requests.
        requires_key: whether a key is also required on loopback.
        drain_s: how long running requests may take at the end.
        log: the file of the log of requests, `-` for stderr; None for the one in the state folder.
        max_requests: at the same time.
    """

    host: str
    port: int
    tls_cert: str | None = None
    tls_key: str | None = None
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    requires_key: bool = False
    drain_s: float = DEFAULT_DRAIN_S
    log: str | None = None
    max_requests: int = DEFAULT_MAX_REQUESTS


def serve(options: ServeOptions) -> None:
    """Run a gateway until SIGINT or SIGTERM. A second one ends it without waiting for answers.

    Raises:
        ConfigError: it cannot start; the message says why.
    """
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # no log line for each invalid request
    tls = tls_context(options.tls_cert, options.tls_key)
    keys = Keys()
    try:
        log = AccessLog(options.log)
    except OSError as error:
        raise ConfigError(f"cannot write the log {error.filename}: {error.strerror}; give another --log") from None
    with listen(options.host, options.port) as listening:
        is_local = ipaddress.ip_address(listening.getsockname()[0]).is_loopback
        if not is_local and not keys.exist:
            raise ConfigError(
                f"other machines can reach the gateway on {options.host}, so it needs a key: make one with "
                "`sollol-nb key add NAME`, or listen on 127.0.0.1"
            )
        rules = AccessRules(
            requires_key=options.requires_key or not is_local,
            hosts=[*options.hosts, *([] if _is_address(options.host) else [options.host])],
            origins=options.origins,
        )
        if not is_local:
            rules.learn_full_name()
        _allow_many_connections()
        service = _Service(options, listening, tls, keys, rules, log)
        with _ending_at_signals(service):
            running: Future[None] = submit(service.run())
            while not running.done():  # a wait without a limit blocks signals on Windows
                futures.wait([running], timeout=_WAIT_S)
            running.result()


class _Service:
    """One run of a gateway, on the I/O loop."""

    def __init__(
        self,
        options: ServeOptions,
        listening: socket.socket,
        tls: ssl.SSLContext | None,
        keys: Keys,
        rules: AccessRules,
        log: AccessLog,
    ) -> None:
        self._options = options
        self._listening = listening
        self._tls = tls
        self._keys = keys
        self._rules = rules
        self._log = log
        self._loop = io_loop()  # not in a signal handler: it takes a lock, which the main thread may hold by then
        self._ends = asyncio.Event()
        self._ends_at_once = asyncio.Event()
        self._signals = 0

    def end(self) -> None:
        """End the gateway after the running requests, the second time without waiting. For signal handlers."""
        self._signals += 1
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe((self._ends if self._signals == 1 else self._ends_at_once).set)

    async def run(self) -> None:
        """Serve until `end`."""
        ollama = OllamaPool.auto_configure()
        router = HybridRouter(ollama, gateway=LOCAL)
        gateway = Gateway(router, ollama, keys=self._keys, limits=Limits(self._options.max_requests))
        gateway.on_finished.append(self._log.note)
        server = HttpServer(application(gateway, self._rules), self._listening, self._tls)
        logging_task = asyncio.create_task(self._log.write_always())
        try:
            await server.start()
            _say("\n".join(self._introduction()))
            await self._ends.wait()
            await self._drain(gateway, server)
        finally:
            await server.close()
            logging_task.cancel()
            await asyncio.gather(logging_task, return_exceptions=True)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_S):
                    await router.close(keep=True)

    async def _drain(self, gateway: Gateway, server: HttpServer) -> None:
        """Wait for the requests that run, then end them with an error."""
        gateway.draining.set()
        server.stop_listening()
        await server.wait_for_requests(SOON_S)
        if server.running:
            waits = f"waits up to {self._options.drain_s:g} s for {counted(server.running, 'request')}"
            _say(f"the gateway {waits}, then ends; a second signal ends it at once")
        await self._wait_for_requests(server, self._options.drain_s)
        message = "the gateway was stopped; try again later"
        gateway.stopped.set_result(ApiError(503, "unavailable", message, retry_after_s=DRAIN_RETRY_S))
        self._ends_at_once.clear()
        await self._wait_for_requests(server, STOP_S)

    async def _wait_for_requests(self, server: HttpServer, limit_s: float) -> None:
        waits = [
            asyncio.create_task(server.wait_for_requests(limit_s)),
            asyncio.create_task(self._ends_at_once.wait()),
        ]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waits:
                task.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    def _introduction(self) -> Iterator[str]:
        host, port = self._listening.getsockname()[:2]
        address = ipaddress.ip_address(host)
        scheme = "http" if self._tls is None else "https"
        url = f"{scheme}://{format_endpoint(host, port)}"
        reach = "this machine only" if address.is_loopback else "reachable from other machines"
        key = "a key is required" if self._rules.requires_key else "no key is required"
        yield f"the gateway listens on {url} ({reach}, {key})"
        if address.is_unspecified:
            url = f"{scheme}://{socket.gethostname()}:{port}"
        yield f"  Ollama's and Anthropic's API: {url}   OpenAI's: {url}/v1   status page: {url}/"
        if self._log.path is not None:
            yield f"  log of requests: {self._log.path}"
        if self._tls is None and not address.is_loopback:
            yield "  keys and prompts are sent unencrypted; --tls-cert and --tls-key encrypt them"


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the reader has closed the pipe, as after `| head`
        print(text, flush=True)


# --- what the process needs -------------------------------------------------------------------


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there.

    Raises:
        ConfigError: it cannot; the message says why.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise ConfigError(
            f"cannot listen on {host}: this machine has no such address; give another --host"
        ) from None
    family, *_, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)  # localhost is 127.0.0.1
    is_dual = family == socket.AF_INET6 and address[0] == "::" and socket.has_dualstack_ipv6()
    try:
        return socket.create_server(address[:2], family=family, backlog=BACKLOG, dualstack_ipv6=is_dual)
    except OSError as error:
        where = format_endpoint(host, port)
        reason = _holder(port) or error.strerror or str(error)
        raise ConfigError(f"cannot listen on {where}: {reason}; give another --port") from None


def _holder(port: int) -> str:
    """The program that listens on a port of this machine; "" if it is not known."""
    import psutil

    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:2] == (port,):
                if connection.pid is None:
                    return "a program of another user already listens there"
                name = psutil.Process(connection.pid).name()
                return f"{name} (pid {connection.pid}) already listens there"
    return ""


def tls_context(cert: str | None, key: str | None) -> ssl.SSLContext | None:
    """The context for HTTPS with these PEM files; None without files.

    Raises:
        ConfigError: they cannot be used; the message says why.
    """
    if cert is None:
        if key is not None:
            raise ConfigError("--tls-key needs --tls-cert, the file of the certificate")
        return None
    for path in (cert, key):
        try:
            if path is not None:
                with open(path, "rb"):  # noqa: PTH123  # as ssl does, whose error does not say which file
                    pass
        except OSError as error:
            raise ConfigError(f"cannot read the TLS file {path}: {error.strerror}") from None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except (ssl.SSLError, OSError, ValueError) as error:
        files = cert if key is None else f"{cert} and {key}"
        why = getattr(error, "reason", None) or str(error)
        raise ConfigError(
            f"{files} are not a certificate and its unencrypted private key in PEM form ({why})"
        ) from None
    return context


def _no_password() -> str:
    raise ValueError("the key is encrypted")


@contextlib.contextmanager
def _ending_at_signals(service: _Service) -> Iterator[None]:
    """End the service at a signal, if this is the main thread; other threads get no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        service.end()

    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _allow_many_connections() -> None:
    """Raise the limit of open files, each connection being one, where the system lets the user do that."""
    if os.name != "posix":
        return
    import resource

    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED_FILES if most == resource.RLIM_INFINITY else min(WANTED_FILES, most)
    if now != resource.RLIM_INFINITY and now < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
