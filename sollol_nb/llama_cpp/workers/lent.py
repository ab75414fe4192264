"""The workers that `sollol-nb worker` runs for other machines: one for each device, started again when they end.

Those of a machine that has joined another one keep caches of weights (`weights/cache.py`), which are looked after
here. All end with the process that started them, however it ends: it has their only lease.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import subprocess
from collections.abc import Callable, Collection, Sequence

from sollol_nb.errors import ConfigError, WorkerStartError
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.process import EngineProcess
from sollol_nb.llama_cpp.weights import cache
from sollol_nb.llama_cpp.workers.local import PORT_TRIES, WorkerPortTakenError, wait_until_free
from sollol_nb.llama_cpp.workers.probe import Client
from sollol_nb.settings import config
from sollol_nb.settings.endpoints import ALL_ADDRESSES, LOOPBACK, format_endpoint

CPU = "CPU"
DEVICES_LIMIT_S = 30.0
AGAIN_AFTER_S = 1.0
TEND_S = 2.0
"""How often the caches are looked after."""
_DEVICE = re.compile(r"^ +(\w+): ", re.MULTILINE)


def devices_of(engine: Engine) -> list[str]:
    """llama.cpp's names of the devices that it can compute on here: GPUs, else the CPU. Blocks shortly.

    Raises:
        WorkerStartError: the engine cannot list them.
    """
    try:
        done = subprocess.run(
            [engine.server, "--list-devices"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=config.child_environment(),
            timeout=DEVICES_LIMIT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise WorkerStartError(
            f"{engine.server} cannot list its devices: {error}; run `sollol-nb doctor`"
        ) from error
    return _DEVICE.findall(done.stdout.decode(errors="replace")) or [CPU]


class LentWorkers:
    """Worker processes, one for each device (or one for several), while this object's coroutines run.

    Args:
        caches: whether they keep weights: only where `verify` is called before each load.
    """

    def __init__(
        self,
        engine: Engine,
        devices: Sequence[str],
        *,
        threads: int,
        say: Callable[[str], None],
        caches: bool = False,
    ) -> None:
        self._engine = engine
        self._devices = devices
        self._threads = threads
        self._say = say
        self._processes: dict[int, EngineProcess] = {}
        self._ports: dict[int, int] = {}
        self._watches: list[asyncio.Task[None]] = []
        self._has_caches = caches
        self._verifying = asyncio.Lock()
        self._caches: dict[int, str] = {}
        self._claims = contextlib.ExitStack()

    async def start(self, host: str = LOOPBACK, port: int | None = None) -> Callable[[int], int]:
        """Start them; returns what gives the port of each (by its position) now.

        Args:
            port: of the first; the others follow. By default free ones.

        Raises:
            EngineError, WorkerStartError: one cannot be started.
        """
        for position, device in enumerate(self._devices):
            if self._has_caches:
                with contextlib.suppress(OSError, ConfigError):  # then it works without one
                    self._caches[position] = self._claims.enter_context(cache.claimed(device))
            wanted = None if port is None else port + position
            await self._start(position, host, wanted)
            self._watches.append(asyncio.create_task(self._watch(position, host, wanted)))
        if self._caches:
            self._watches.append(asyncio.create_task(self._tend()))
        return self._ports.__getitem__

    async def _start(self, position: int, host: str, port: int | None) -> None:
        for tries_left in reversed(range(PORT_TRIES)):
            try:
                await self._start_at(position, host, port or _free_port(host))
                break
            except WorkerPortTakenError:
                if port is not None or not tries_left:
                    raise

    async def _start_at(self, position: int, host: str, port: int) -> None:
        device = self._devices[position]
        name = self._caches.get(position)
        folder = None if name is None else await asyncio.to_thread(cache.open_cache, name)
        argv = [str(self._engine.worker), "-H", host, "-p", str(port), "-t", str(self._threads)]
        argv += [] if device == CPU else ["-d", device]
        process = await EngineProcess.start(
            [*argv, cache.FLAG] if folder else argv,
            kind=registry.LENT,
            about={"endpoint": format_endpoint(host, port), "threads": self._threads},
            keep_alive_s=0.0,
            log_path=registry.new_log_path(registry.LENT, port),
            env=cache.worker_environment(folder),
        )
        self._processes[position], self._ports[position] = process, port
        await process.hold()
        await wait_until_free(
            format_endpoint(LOOPBACK if host in ALL_ADDRESSES else host, port), process, Client.of(self._engine)
        )

    async def _watch(self, position: int, host: str, port: int | None) -> None:
        while True:
            report = await self._processes[position].wait()
            if (name := self._caches.get(position)) is not None:
                await asyncio.to_thread(cache.discard, name)
            why = report.why or (report.tail[-1] if report.tail else f"exit code {report.code}")
            self._say(f"the worker of {self._devices[position]} has ended ({why}); starting it again")
            await asyncio.sleep(AGAIN_AFTER_S)
            while True:
                try:
                    await self._start(position, host, port)
                    break
                except Exception as error:
                    self._say(f"cannot start the worker of {self._devices[position]}: {error}")
                    await asyncio.sleep(AGAIN_AFTER_S)

    async def _tend(self) -> None:
        while True:
            await asyncio.sleep(TEND_S)
            async with self._verifying:
                await asyncio.to_thread(cache.tend, [*self._caches.values()])

    async def verify(self, positions: Collection[int], sizes: Collection[int]) -> bool:
        """Before a load over the workers of these devices, which are idle: whether their caches have only complete
        files now.

        Args:
            sizes: of the model's tensors that are cached; they are remembered.
        """
        names = [self._caches[position] for position in positions if position in self._caches]
        async with self._verifying:
            return not await asyncio.to_thread(cache.prepare, dict.fromkeys(names, 0), sizes)

    async def stop(self) -> None:
        """End them at once."""
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*(process.stop(grace_s=0.0) for process in self._processes.values()))
        self._claims.close()


def _free_port(host: str) -> int:
    with socket.socket() as trial:
        trial.bind((host, 0))
        return int(trial.getsockname()[1])
