"""A real gateway: `python -m sollol_nb.gateway` as a process, for the clients of its APIs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from sollol_nb.gateway.access import AccessRules
from sollol_nb.gateway.app import application
from sollol_nb.gateway.gateway import Gateway
from sollol_nb.gateway.keys import Keys
from sollol_nb.hybrid_router import HybridRouter
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.running import stop_engines
from sollol_nb.ollama.pool import OllamaPool
from sollol_nb.runtime.io_loop import run_blocking
from tests.support.engines import HANG_GUARD_S, REPOSITORY, eventually, unused_ports
from tests.support.held_answers import PATIENT

NOTHING_LISTENS = "127.0.0.1:9"
_MAIN = "import runpy\nrunpy.run_module('sollol_nb.gateway', run_name='__main__', alter_sys=True)"


class GatewayProcess:
    """A running gateway.

    Attributes:
        url: such as `http://127.0.0.1:41234`.
        lines: what it has written so far.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        self.url = eventually(self._listening_url, "the gateway says where it listens")

    @property
    def output(self) -> str:
        """What it has written so far."""
        return "".join(self.lines)

    def client(self, **options: object) -> httpx.Client:
        """A plain HTTP client."""
        return httpx.Client(base_url=self.url, timeout=HANG_GUARD_S, **options)  # type: ignore[arg-type]

    def wait(self) -> int:
        """Wait for its end; returns the exit code."""
        return self.process.wait(HANG_GUARD_S)

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(self.process.stdout)

    def _listening_url(self) -> str | None:
        assert self.process.poll() is None, f"the gateway has ended: {self.output}"
        found = re.search(r"https?://\S+:\d+", self.output)
        return found[0] if found else None


@contextmanager
def running_gateway(
    *arguments: str,
    variables: Mapping[str, str] | None = None,
    folder: Path | None = None,
    is_patient: bool = False,
) -> Iterator[GatewayProcess]:
    """A gateway on a free port, with these arguments and environment variables; ended afterwards. A patient one
    takes no silence of an engine for the end of it."""
    command = gateway_command("--port", "0", *arguments, is_patient=is_patient)
    environment = {**os.environ, **(variables or {}), "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=folder
    ) as process:
        try:
            yield GatewayProcess(process)
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(HANG_GUARD_S)
                finally:
                    process.kill()


@contextmanager
def own_gateway(
    folder: Path, *arguments: str, is_patient: bool = False, **variables: str
) -> Iterator[GatewayProcess]:
    """A gateway whose state is in this folder; its engines end with it."""
    own = {"SOLLOL_STATE_DIR": str(folder), **variables}
    try:
        with running_gateway(*arguments, variables=own, is_patient=is_patient) as running:
            yield running
    finally:
        end_engines(folder)


def end_engines(folder: Path) -> None:
    """End all engines and links whose state is in this folder."""
    with pytest.MonkeyPatch.context() as its:
        its.setenv("SOLLOL_STATE_DIR", str(folder))
        run_blocking(stop_engines(also_used=True))


class RestartableGateway:
    """A gateway that can be killed and started again on the same port; the next process finds its engines. Each is
    patient: an engine may be halted for long.

    Attributes:
        url: its address, the same after each start.
        running: the present process.
    """

    def __init__(self, folder: Path, **variables: str) -> None:
        """Args: folder: for its state. variables: of its environment."""
        self._folder = folder
        port = unused_ports(1)  # no other connection gets this port while the gateway is dead
        self.url = f"http://127.0.0.1:{port}"
        self._port = port
        self._variables = {"SOLLOL_STATE_DIR": str(folder), **variables}
        self._stack = ExitStack()
        self.running: GatewayProcess = self.start()

    def start(self) -> GatewayProcess:
        """Start the next process."""
        process = running_gateway("--port", str(self._port), variables=self._variables, is_patient=True)
        self.running = self._stack.enter_context(process)
        return self.running

    def kill(self) -> None:
        """Kill the running process; its engines run on."""
        self.running.process.kill()
        self.running.wait()

    def restart(self) -> None:
        """Kill the running process, and start the next."""
        self.kill()
        self.start()

    def close(self) -> None:
        """End the last process and its engines."""
        self._stack.close()
        end_engines(self._folder)


@asynccontextmanager
async def gateway_without_engines(
    rules: AccessRules | None = None, keys: Keys | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a gateway in this process, on the running loop. It has no workers and no Ollama, so it answers
    only what needs neither."""
    pool = OllamaPool(NOTHING_LISTENS)
    router = HybridRouter(pool, enable_distributed=False)
    transport = httpx.ASGITransport(application(Gateway(router, pool, keys=keys), rules))
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:11440") as client:
            yield client
    finally:
        await router.close()


def busy_slots_at(engine_url: str) -> int:
    """How many slots of a llama-server, which a gateway of this state folder has started, are processing."""
    (entry,) = (entry for entry in registry.entries(registry.COORDINATOR) if entry.about["url"] == engine_url)
    slots = httpx.get(f"{engine_url}/slots", headers={"Authorization": f"Bearer {entry.read_key()}"}).json()
    return sum(slot["is_processing"] for slot in slots)


def engine_at(engine_url: str) -> psutil.Process:
    """The llama-server at this URL, which is of this state folder."""
    (entry,) = (entry for entry in registry.entries(registry.COORDINATOR) if entry.about["url"] == engine_url)
    return psutil.Process(entry.pid)


def gateway_command(*arguments: str, is_patient: bool) -> Sequence[str]:
    """The command that runs a gateway."""
    start = ["-c", f"{PATIENT}\n{_MAIN}"] if is_patient else ["-m", "sollol_nb.gateway"]
    return [sys.executable, *start, *arguments]
