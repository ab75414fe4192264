"""A link to the workers of one machine over SSH: one worker for each of its devices, started and watched there.

Each is reached through a port on loopback here, which stays the same when the connection is lost and made again.
The far side ends its workers when this link ends, or is silent for too long (`agent.sh`).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import sys
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sollol_nb.errors import LinkError, SollolError
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.links.link import CONNECTING, INSTALLING, LOST, READY, LinkedWorker
from sollol_nb.llama_cpp.links.program import Report, run
from sollol_nb.llama_cpp.links.remote_engine import RemoteEngine, prepare
from sollol_nb.llama_cpp.links.ssh_session import LOST_CODE, Session, far_script
from sollol_nb.llama_cpp.links.ssh_shell import Shell
from sollol_nb.llama_cpp.links.verifying import VERIFIES, AgentVerifying, answer_requests
from sollol_nb.llama_cpp.processes.exit_reasons import describe_exit
from sollol_nb.llama_cpp.processes.machine import free_ports
from sollol_nb.llama_cpp.weights import cache
from sollol_nb.settings.endpoints import LOOPBACK, format_endpoint
from sollol_nb.text.tables import counted

AGENT = far_script("agent.sh")
SILENCE_S = 20
"""Without a heartbeat for this long, the far side ends its workers."""
HEARTBEATS = 4
"""How many are sent in `SILENCE_S`."""
FIRST_PORT, LAST_PORT = 20000, 32000  # below the ports that systems give to outgoing connections
LONGEST_PAUSE_S = 30.0
STEADY_S = 60.0
"""After this long without a failure, the pauses are short again."""
START_LIMIT_S = 120.0
"""For a worker to listen: a GPU driver may take long."""
FIRST_LIMIT_S = 300.0
"""Until it is known of each worker of a new link whether it can be reached."""
POLL_S = 0.1
MAX_ENDS = 3
"""A worker that has ended this often before it answered is not waited for."""

SHOWN_CHARACTERS = 200

_TROUBLE = re.compile(r"fail|error|abort|cannot|invalid|closed|reset|terminat|denied|not found", re.IGNORECASE)
_LINE = re.compile(r"(worker|ended) (\d{1,4}) (\d{1,5})(?: \d+)?", re.ASCII)


@dataclass(slots=True)
class _Device:
    """A device there and its worker.

    Attributes:
        name: as llama.cpp calls it.
        port: of its worker here; it stays the same.
        remote_port: of its worker there, while that is forwarded.
        is_ready: whether its worker has accepted a connection.
        ends: how often its worker has ended since it was last ready.
        is_given_up: whether its worker cannot be reached, although it runs.
        why: how its worker ended, or why it is not reached.
    """

    name: str
    port: int
    remote_port: int | None = None
    is_ready: bool = False
    ends: int = 0
    is_given_up: bool = False
    why: str = ""

    @property
    def is_settled(self) -> bool:
        """Whether there is nothing to wait for."""
        return self.is_ready or self.is_given_up or self.ends >= MAX_ENDS

    def reset(self) -> None:
        """Its worker is not known any more."""
        self.is_ready, self.is_given_up, self.why = False, False, ""


class _Link:
    """The connection to one machine, made again whenever it is lost."""

    def __init__(self, spec: Mapping[str, Any], report: Report) -> None:
        self._spec = spec
        self._report = report
        self._silence_s = int(spec.get("silence_s", SILENCE_S))
        self._devices: dict[str, _Device] = {}
        self._here = Engine(
            server=Path(spec["server"]),
            worker=Path(spec["worker"]),
            version=str(spec["version"]),
            source=str(spec["source"]),
            protocol=str(spec["protocol"]),
        )
        self._there: RemoteEngine | None = None
        self._was_ready = False
        self._told: tuple[str, str, dict[str, LinkedWorker]] | None = None
        self._shell = self._new_shell()
        self._agent: AgentVerifying | None = None

    def _new_shell(self) -> Shell:
        return Shell(str(self._spec["target"]), [str(word) for word in self._spec.get("ssh", ["ssh"])])

    async def verify(self, endpoints: Collection[str], sizes: Sequence[int]) -> bool:
        """Whether the caches of these workers have only complete files; they are verified by the agent."""
        return self._agent is not None and await self._agent.verify(endpoints, sizes)

    @property
    def _host(self) -> str:
        """How people call the machine: as in the target, without the user."""
        return self._shell.host.rpartition("@")[2]

    async def run(self) -> None:
        """Connect, and again whenever the connection is lost, until cancelled.

        Raises:
            LinkError: no worker could be reached the first time.
        """
        loop = asyncio.get_running_loop()
        pause_s = 1.0
        while True:
            began = loop.time()
            try:
                why = await self._connection()
            except (SollolError, OSError) as error:
                why = " ".join(str(error).split())
            finally:
                await self._shell.close()
            if not self._was_ready:
                raise LinkError(why)
            if loop.time() - began > STEADY_S:
                pause_s = 1.0
            await self._tell(LOST, f"{why}; connecting again")
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - against many at the same moment
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            self._shell = self._new_shell()

    async def _connection(self) -> str:
        """Connect, and serve until the connection is lost; returns why."""
        for device in self._devices.values():
            device.reset()
            device.remote_port, device.ends = None, 0
        if not self._was_ready:
            await self._tell(CONNECTING, f"connecting to {self._host}")
        await self._shell.open()
        lost = asyncio.create_task(self._shell.lost())
        serving = asyncio.create_task(self._serve())
        try:
            await asyncio.wait({lost, serving}, return_when=asyncio.FIRST_COMPLETED)
            return lost.result() if lost.done() else serving.result()
        finally:
            for task in (lost, serving):
                task.cancel()
            await asyncio.gather(lost, serving, return_exceptions=True)

    async def _serve(self) -> str:
        """Run the agent there, again whenever it ends, until the connection is lost; returns why."""
        loop = asyncio.get_running_loop()
        pause_s = 1.0
        engine = await prepare(self._shell, self._here, self._tell_installing)
        self._there = engine
        ports = {name: device.port for name, device in self._devices.items()}
        self._devices = {}
        for name in (device.name for device in engine.devices):
            self._devices[name] = _Device(name, ports.get(name) or self._free_port())
        while True:
            began = loop.time()
            seed = random.randrange(65537)  # noqa: S311 - ports that are probably free
            cache_kib = int(float(self._spec.get("tensor_cache_gb", 0)) * 1e9 / 1024)
            numbers = (str(self._silence_s), str(seed), str(max(1, engine.cores)), str(cache_kib))
            arguments = (engine.worker, *numbers, *self._devices)
            session = await self._shell.start(AGENT, *arguments)
            try:
                code = await self._follow(session)
            finally:
                await session.end()
            why = _trouble(session) or describe_exit(code)
            if code == LOST_CODE:
                return f"{self._host}: the connection was lost ({why})"
            if not self._was_ready:
                raise LinkError(f"{self._host}: its workers could not be started: {why}")
            for device in self._devices.values():
                device.reset()
            await self._tell(LOST, f"{self._host}: the watcher of its workers ended ({why}); it is started again")
            if loop.time() - began > STEADY_S:
                pause_s = 1.0
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    async def _follow(self, session: Session) -> int:
        """Act on what the agent reports, until it ends; returns its exit code.

        Raises:
            LinkError: no worker was reached the first time.
        """
        limit = asyncio.get_running_loop().time() + FIRST_LIMIT_S
        events: asyncio.Queue[str | None] = asyncio.Queue(64)

        async def read() -> None:
            with contextlib.suppress(OSError):
                while (line := await session.line()) is not None:
                    await events.put(line)
            await events.put(None)

        async def beat() -> None:
            told = frozenset[int]()
            while True:
                # Which sizes are right for a cached tensor, the other side cannot know.
                sizes = await asyncio.to_thread(cache.known_sizes)
                session.send("\n" if sizes == told else f"sizes {' '.join(map(str, sorted(sizes)))}\n")
                told = sizes
                await asyncio.sleep(self._silence_s / HEARTBEATS)

        async def attach(device: _Device, remote_port: int) -> None:
            try:
                await self._attach(device, remote_port)
            except LinkError as error:
                device.is_given_up, device.why = True, str(error)
            await events.put("")

        async with self._limited(limit):
            await session.begin()
        reading = asyncio.create_task(read())
        beating = asyncio.create_task(beat())
        attaching: dict[str, asyncio.Task[None]] = {}
        devices = list(self._devices.values())
        agent = self._agent = AgentVerifying(
            session.send, lambda: [format_endpoint(LOOPBACK, device.port) for device in devices]
        )
        try:
            while True:
                async with self._limited(None if self._was_ready else limit):
                    line = await events.get()
                if line is None:
                    return await session.wait()
                if agent.heard(line):
                    continue
                for device, remote_port in self._understood(line, devices, session):
                    if (before := attaching.pop(device.name, None)) is not None:
                        before.cancel()
                        await asyncio.gather(before, return_exceptions=True)  # it may be forwarding the port
                    if remote_port:
                        attaching[device.name] = asyncio.create_task(attach(device, remote_port))
                await self._tell_workers()
        finally:
            self._agent = None
            tasks = [reading, beating, *attaching.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @contextlib.asynccontextmanager
    async def _limited(self, limit: float | None) -> AsyncIterator[None]:
        """Wait for the agent until a limit, in the loop's time.

        Raises:
            LinkError: the limit is over.
        """
        try:
            async with asyncio.timeout_at(limit):
                yield
        except TimeoutError:
            raise LinkError(
                f"{self._host}: its workers did not start within {FIRST_LIMIT_S:g} s; is it overloaded?"
            ) from None

    def _understood(self, line: str, devices: list[_Device], session: Session) -> list[tuple[_Device, int]]:
        """The device that a line of the agent is about, and the port of its new worker there, 0 if it ended.

        The other side is not trusted: what is not a line of `agent.sh` is ignored.
        """
        found = _LINE.fullmatch(line)
        if found is None:
            return []
        kind, index, number = found.group(1), int(found.group(2)), int(found.group(3))
        if index >= len(devices):
            return []
        device = devices[index]
        device.reset()
        if kind == "worker":
            return [(device, number)] if 0 < number < 65536 else []
        device.ends += 1
        reason = _trouble(session)
        ending = describe_exit(128 - number if 128 < number < 192 else number)
        device.why = f"its worker ended ({ending}{f', {reason}' if reason else ''})"
        return [(device, 0)]

    async def _attach(self, device: _Device, remote_port: int) -> None:
        """Forward the device's port to its worker, and wait until that accepts connections.

        Raises:
            LinkError: it cannot be forwarded, or nothing accepts connections after 120 s.
        """
        if device.remote_port != remote_port:
            if device.remote_port is not None:
                with contextlib.suppress(LinkError):
                    await self._shell.stop_forwarding(device.port, device.remote_port)
            device.remote_port = remote_port  # also if this is cancelled meanwhile
            try:
                await self._shell.forward(device.port, remote_port)
            except LinkError:  # another program has taken the port
                device.port, device.remote_port = self._free_port(), None
                await self._shell.forward(device.port, remote_port)
                device.remote_port = remote_port
        deadline = asyncio.get_running_loop().time() + START_LIMIT_S
        while why := await self._shell.why_unreachable(device.port, remote_port):
            if asyncio.get_running_loop().time() > deadline:
                raise LinkError(why)
            await asyncio.sleep(POLL_S)
        device.is_ready, device.ends = True, 0

    def _free_port(self) -> int:
        used = {device.port for device in self._devices.values()}
        first = random.randrange(FIRST_PORT, LAST_PORT)  # noqa: S311 - against collisions, not attacks
        return next(port for port in free_ports(first, len(used) + 1) if port not in used)

    # --- what the registry entry says -----------------------------------------------------------

    async def _tell_installing(self, detail: str) -> None:
        await self._tell(LOST if self._was_ready else INSTALLING, detail)

    async def _tell_workers(self) -> None:
        """Report the workers that are ready, once it is known of each whether it is.

        Raises:
            LinkError: none is ready, and none was before.
        """
        devices = self._devices.values()
        if not self._was_ready and not all(device.is_settled for device in devices):
            await self._tell(CONNECTING, f"starting {counted(len(devices), 'worker')} on {self._host}")
            return
        missing = [f"{self._name(device)}: {device.why}" for device in devices if device.why]
        ready = [device.name for device in devices if device.is_ready]
        if ready:
            self._was_ready = True
            assert self._there is not None
            remark = [self._there.remark] if self._there.remark else []
            await self._tell(READY, "; ".join([f"{self._host}: {', '.join(ready)}", *missing, *remark]))
        elif not self._was_ready:
            raise LinkError("; ".join(missing))
        else:
            await self._tell(LOST, "; ".join(missing) or f"{self._host}: its workers are starting")

    def _name(self, device: _Device) -> str:
        return f"{self._host}/{device.name}" if len(self._devices) > 1 else self._host

    async def _tell(self, state: str, detail: str) -> None:
        there = self._there
        workers = {
            format_endpoint(LOOPBACK, device.port): LinkedWorker(
                name=self._name(device),
                machine=there.machine,
                device=device.name,
                engine=there.commit,
                place=there.place,
            )
            for device in self._devices.values()
            if device.is_ready and state == READY and there is not None
        }
        now = (state, detail, workers)
        if now != self._told:
            self._told = now
            await self._report.set(state, detail, workers)


def _trouble(session: Session) -> str:
    """The last line that says why something ended there; "" if there is none."""
    return next((line for line in reversed(session.errors) if _TROUBLE.search(line)), "")[:SHOWN_CHARACTERS]


async def ssh(spec: Mapping[str, Any], report: Report) -> None:
    """Serve until the supervisor ends.

    Arguments: `target`; `ssh`, the ssh program and its options; `silence_s`, after which the far side ends its
    workers; `tensor_cache_gb`, the disk there for caches of weights; `server`, `worker`, `version`, `source` and
    `protocol` of the engine here.
    """
    await report.tell(**{VERIFIES: True})
    link = _Link(spec, report)
    running = asyncio.create_task(link.run())
    answering = asyncio.create_task(answer_requests(report, link.verify))
    ending = asyncio.create_task(report.supervisor_ended())
    try:
        await asyncio.wait({running, ending}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
    finally:
        tasks = (running, answering, ending)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


if __name__ == "__main__":
    sys.exit(run(ssh))
