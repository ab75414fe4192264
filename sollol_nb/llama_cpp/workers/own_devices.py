"""The CPU and GPUs of the coordinators' own machine, on which layers are placed without a worker."""

from __future__ import annotations

import asyncio
import logging
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

from sollol_nb.layers.plan import CPU, own_endpoint
from sollol_nb.layers.strategies import WorkerCapacity
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.settings import config
from sollol_nb.settings.endpoints import LOOPBACK

logger = logging.getLogger(__name__)

LEAST_MARGIN_BYTES = 2**30
MARGIN = 0.1
"""Of this machine's memory, which layers on its CPU leave free, but at least `LEAST_MARGIN_BYTES`: somebody works
on it."""
LIST_LIMIT_S = 30.0
MIB = 2**20
MAX_GPUS = 16
_DEVICE = re.compile(r"^\s+([A-Za-z][\w.-]*): .*\((\d{1,9}) MiB, (\d{1,9}) MiB free\)\s*$", re.MULTILINE)
_UNIFIED = ("MTL", "Metal")  # GPUs of machines whose CPU has the same memory


@dataclass(frozen=True, slots=True)
class OwnGpu:
    """A GPU of this machine, by llama.cpp's name for it, such as `CUDA0`."""

    name: str
    total_bytes: int
    free_bytes: int


class OwnDevices:
    """This machine's CPU and GPUs. Lives on the I/O loop.

    Attributes:
        repacks_weights: whether weights on the own CPU are rearranged for it, which makes it faster. Some CPUs and
            virtual machines lack an instruction that the code for that takes for granted: False once it crashed.
    """

    def __init__(self) -> None:
        self.repacks_weights = True
        self._gpus: tuple[OwnGpu, ...] = ()
        self._without_gpus: set[Path] = set()  # llama-servers that list none

    async def refresh(self, engine: Engine) -> None:
        """Ask an engine which GPUs it can use, and how much of their memory is free. An engine that lists none, or
        fails to, is not asked again."""
        if engine.server in self._without_gpus:
            self._gpus = ()
            return
        self._gpus = await asyncio.to_thread(list_gpus, engine.server)
        if not self._gpus:
            self._without_gpus.add(engine.server)

    def capacities(self) -> list[WorkerCapacity]:
        """What a layer plan needs to know about the CPU and the GPUs; the memory of the latter as seen last."""
        memory = psutil.virtual_memory()
        free_bytes = max(0, memory.available - max(LEAST_MARGIN_BYTES, round(memory.total * MARGIN)))
        cpu = WorkerCapacity(
            own_endpoint(CPU),
            free_bytes=free_bytes,
            total_bytes=memory.total,
            memory_domain=LOOPBACK,  # which the workers on this machine share
            device=CPU,
        )
        return [cpu, *map(_capacity, self._gpus)]

    def endpoints(self) -> list[str]:
        """What stands for an endpoint of each."""
        return [own_endpoint(CPU), *(own_endpoint(gpu.name) for gpu in self._gpus)]


def _capacity(gpu: OwnGpu) -> WorkerCapacity:
    return WorkerCapacity(
        own_endpoint(gpu.name),
        free_bytes=gpu.free_bytes,
        total_bytes=gpu.total_bytes,
        memory_domain=LOOPBACK if gpu.name.startswith(_UNIFIED) else None,
        device=gpu.name,
    )


def list_gpus(server: Path) -> tuple[OwnGpu, ...]:
    """The GPUs that a llama-server can use; none if it does not say."""
    command = [str(server), "--list-devices"]
    try:
        answer = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LIST_LIMIT_S,
            check=False,
            env=config.child_environment(),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        logger.warning("this machine's GPUs are not used: `%s` failed (%s)", " ".join(command), error)
        return ()
    return read_gpus(answer.stdout)


def read_gpus(listed: str) -> tuple[OwnGpu, ...]:
    """The GPUs in what `llama-server --list-devices` prints, a line each: `CUDA0: NAME (81079 MiB, 80650 MiB
    free)`. Devices without memory of their own, such as BLAS, are not among them."""
    found = {
        name: OwnGpu(name, int(total) * MIB, min(int(free), int(total)) * MIB)
        for name, total, free in _DEVICE.findall(listed)
        if int(total)
    }
    return tuple(found.values())[:MAX_GPUS]
