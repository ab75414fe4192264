"""Seed the caches of workers on a machine that has the model's file itself, so that its weights need not be sent.

There, for each worker, a throw-away llama-server loads the worker's part of the model from that file over a
throw-away worker on loopback, which writes the tensors into the cache (`seed.sh`). A tensor in a cache is found by
the hash of its bytes, so a wrong file does no harm; all the same, only a file of the same size is used whose first
and last MiB are the same.

What another machine prints is bounded, and not trusted.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from sollol_nb.errors import LinkError
from sollol_nb.gguf.facts import ModelFacts
from sollol_nb.gguf.header import check_file, read_header
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.links.remote_engine import RemoteEngine, preparation
from sollol_nb.llama_cpp.links.remote_server import server_there
from sollol_nb.llama_cpp.links.ssh_session import Session, far_script
from sollol_nb.llama_cpp.links.ssh_shell import Shell

FIND_LIMIT_S = 120.0
SILENCE_S = 20
"""Without a heartbeat for so many whole seconds, the far side ends everything."""
HEARTBEATS = 4
"""How many are sent in `SILENCE_S`."""
COMPARED_BYTES = 1024 * 1024
"""At the begin and the end of a file."""
MAX_CACHED_SIZES = 200

_SCRIPT = far_script("seed.sh")

Report = Callable[[str, int], Awaitable[None]]
"""Gets the device, and the bytes that its cache has received so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seed:
    """What the cache of one worker is to get.

    Attributes:
        device: of the worker there, as llama.cpp calls it.
        units: of the model: blocks, and the number of blocks for the output layer.
        byte_count: of those of their tensors that workers cache.
        limit_s: after which it is given up.
    """

    device: str
    units: Collection[int]
    byte_count: int
    limit_s: float


class NoFileError(LinkError):
    """The machine does not have the model's file."""


async def seed(
    target: str, ssh: Sequence[str], here: Engine, facts: ModelFacts, seeds: Sequence[Seed], report: Report
) -> dict[str, int]:
    """Seed caches on one machine, one worker after the other.

    Cancelled, it ends what it has started there.

    Args:
        target: `ssh://user@host:port`.
        ssh: the ssh program and its options.
        here: the engine whose llama-server will use the workers.
        facts: of the model's file here.
        report: called about once a second.

    Returns:
        The bytes that each device's cache has received.

    Raises:
        NoFileError: it does not have the file.
        LinkError: another reason why it cannot be done.
    """
    if facts.file_bytes != (await asyncio.to_thread(os.stat, facts.path)).st_size:
        raise LinkError("models of several files are not seeded")
    pattern_of_output = await asyncio.to_thread(_output_pattern, facts.path)
    shell = Shell(target, ssh)
    try:
        await shell.open()
        file = await _find(shell, facts.path)

        async def ignore(_: str) -> None:
            return

        prepared = await preparation(shell, here, ignore)
        engine = await prepared.run()
        server = await server_there(prepared, engine)
        done = {}
        for each in seeds:
            pattern = tensors_of(each.units, facts.layer_count, pattern_of_output)
            done[each.device] = await _seed_one(shell, engine, server, file, each, facts, pattern, report)
        return done
    finally:
        await shell.close()


async def _find(shell: Shell, path: Path) -> str:
    """The model's file there."""
    size, head, tail = await asyncio.to_thread(_fingerprint, path)
    result = await shell.run(_SCRIPT, "find", str(size), head, tail, path.name, str(path), limit_s=FIND_LIMIT_S)
    found = [line.removeprefix("file=") for line in result.stdout.splitlines() if line.startswith("file=/")]
    if not found or not found[0].isprintable():
        raise NoFileError(f"{shell.host} does not have {path.name}")
    return found[0]


async def _seed_one(
    shell: Shell,
    engine: RemoteEngine,
    server: str,
    file: str,
    seed: Seed,
    facts: ModelFacts,
    pattern: str,
    report: Report,
) -> int:
    if seed.device not in {device.name for device in engine.devices}:
        raise LinkError(f"{shell.host} has no device {seed.device} any more")
    sizes = ",".join(map(str, sorted(facts.cacheable_sizes)[:MAX_CACHED_SIZES]))
    what = (engine.worker, seed.device, str(max(1, engine.cores)), server, file, pattern)
    numbers = (sizes, str(seed.byte_count), str(SILENCE_S), str(random.randrange(65537)))  # noqa: S311 - ports
    session = await shell.start(_SCRIPT, "seed", *what, *numbers)

    async def beat() -> None:
        while True:
            session.send("\n")
            await asyncio.sleep(SILENCE_S / HEARTBEATS)

    beating = asyncio.create_task(beat())
    try:
        async with asyncio.timeout(seed.limit_s):
            return await _follow(shell, session, seed, report)
    except TimeoutError:
        raise LinkError(f"seeding {shell.host} took longer than {seed.limit_s:g} s") from None
    finally:
        beating.cancel()
        await session.end()


async def _follow(shell: Shell, session: Session, seed: Seed, report: Report) -> int:
    failed = ""
    while (line := await session.line()) is not None:
        key, _, value = line.partition("=")
        if key in ("written", "seeded") and value.isdecimal() and len(value) < 20:
            if key == "seeded":
                if not int(value):
                    raise LinkError(f"{shell.host}: no tensor was written; is its disk full?")
                return min(int(value), seed.byte_count)
            await report(seed.device, min(int(value), seed.byte_count))
        elif key == "failed":
            failed = "".join(filter(str.isprintable, value))[:300]
    why = failed or (session.errors[-1][:300] if session.errors else "the connection was lost")
    raise LinkError(f"{shell.host}: {why}")


def tensors_of(units: Collection[int], layer_count: int, output: str) -> str:
    """A regular expression of the tensors of units, for llama-server's `--override-tensor`: it has no comma and no
    equals sign."""
    blocks = "|".join(str(unit) for unit in sorted(units) if unit < layer_count)
    parts = [rf"^blk\.({blocks})\."] if blocks else []
    return "|".join([*parts, output] if layer_count in units else parts)


def _output_pattern(path: Path) -> str:
    """The tensors of the output layer; without one of its own, it is the token embedding."""
    names = {tensor.name for tensor in read_header(check_file(path, advice="check the path")).tensors}
    return "^output" if "output.weight" in names else "^output|^token_embd"


def _fingerprint(path: Path) -> tuple[int, str, str]:
    """Size of a file, and the SHA-256 digests of its first and last MiB."""
    with path.open("rb") as file:
        head = file.read(COMPARED_BYTES)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - COMPARED_BYTES))
        tail = file.read(COMPARED_BYTES)
    return size, hashlib.sha256(head).hexdigest(), hashlib.sha256(tail).hexdigest()
