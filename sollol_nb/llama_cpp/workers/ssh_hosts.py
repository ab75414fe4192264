"""Look at hosts through the ssh program: whether they can be reached, and what they have; nothing is installed."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from sollol_nb.errors import LinkError
from sollol_nb.llama_cpp.links.ssh_shell import Shell
from sollol_nb.llama_cpp.workers.announcements import cleaned
from sollol_nb.settings import config
from sollol_nb.settings.kinds import split_command
from sollol_nb.text.tables import counted

HOSTS_AT_ONCE = 8
SCRIPT_LIMIT_S = 15.0
MAX_GPUS = 16

_LOOK = r"""
echo "system $(uname -s) $(uname -m)"
echo "cores $(getconf _NPROCESSORS_ONLN 2>/dev/null)"
echo "kib $(sed -n 's/^MemAvailable: *\([0-9]*\) kB$/\1/p' /proc/meminfo 2>/dev/null)"
nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | sed 's/^/gpu /'
exit 0
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SshHost:
    """A host as seen through ssh.

    Attributes:
        target: `ssh://host`.
        description: its system, cores and GPUs.
        free_bytes: its free memory; None if unknown.
        trouble: why it cannot be reached, and what to do; "" if it can be.
    """

    target: str
    description: str = ""
    free_bytes: int | None = None
    trouble: str = ""


async def look_at(targets: Sequence[str]) -> list[SshHost]:
    """These hosts, in the same order."""
    gate = asyncio.Semaphore(HOSTS_AT_ONCE)

    async def look(target: str) -> SshHost:
        shell = Shell(target, split_command(config.default("ssh")))
        async with gate:
            try:
                await shell.open()
                answer = (await shell.run(_LOOK, limit_s=SCRIPT_LIMIT_S)).stdout
            except LinkError as error:
                return SshHost(target=target, trouble=str(error))
            finally:
                await shell.close()
        return _read(target, answer)

    return list(await asyncio.gather(*map(look, targets)))


def _read(target: str, answer: str) -> SshHost:
    """What the script has printed."""
    facts: dict[str, list[str]] = {}
    for line in answer.splitlines():
        name, _, value = line.partition(" ")
        facts.setdefault(name, []).append(cleaned(value))
    (cores,), (kib,) = ([*facts.get(name, []), ""][:1] for name in ("cores", "kib"))
    parts = facts.get("system", [])[:1]
    parts += [counted(int(cores), "core")] if cores.isdecimal() else []
    parts += facts.get("gpu", [])[:MAX_GPUS]
    return SshHost(
        target=target,
        description=", ".join(filter(None, parts)),
        free_bytes=int(kib) * 1024 if kib.isdecimal() else None,
    )
