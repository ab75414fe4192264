"""Caches on a machine behind a real sshd are seeded from the model's file that it has itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from sollol_nb.errors import LinkError, RequestCancelledError
from sollol_nb.gguf.facts import read_facts
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.links import seeding
from sollol_nb.llama_cpp.links.seeding import NoFileError, Seed, seed, tensors_of
from tests.support.engines import eventually_async, kill_at_once, posix_only, run
from tests.support.gguf_files import write_heavy
from tests.support.machines import Machine, running_machines, short_folder, wait_gone

pytestmark = [pytest.mark.engine, posix_only]

UNITS = (1, 2, 4)  # the last is the output layer, of which nothing is large enough


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_heavy(tmp_path_factory.mktemp("models") / "heavy.gguf", blocks=4, feed_forward=41_000)


@pytest.fixture(scope="module")
def gpu1() -> Iterator[Machine]:
    with short_folder() as folder, running_machines(folder, ["gpu1"]) as (machine,):
        yield machine


@pytest.fixture
def cache(gpu1: Machine) -> Iterator[Path]:
    """The cache of its worker, which an agent has taken; in the end nothing runs there or is half done."""
    tensors = gpu1.home / ".cache" / "sollol_nb" / "tensors"
    folder = tensors / "ssh-gpu1-CPU-0"
    (folder / "rpc").mkdir(parents=True)
    (folder / "taken").mkdir()
    (folder / "taken" / "by").write_text(f"{os.getpid()}\n")
    yield folder / "rpc"
    wait_gone(gpu1)
    assert sorted(path.name for path in tensors.iterdir()) == [folder.name]
    shutil.rmtree(tensors)


async def seeded(
    machine: Machine, engine: Engine, model: Path, seen: list[int] | None = None, limit_s: float = 120.0
) -> int:
    """Seed the cache of its CPU. The machine shares this one's files, so the model here has a path that means
    something else there."""
    with model.open("rb") as file:
        facts = replace(read_facts(model), path=Path(f"/proc/self/fd/{file.fileno()}"))
        size = sum(facts.cacheable_bytes[unit] for unit in UNITS)
        wanted = Seed(device="CPU", units=UNITS, byte_count=size, limit_s=limit_s)

        async def report(_: str, written: int) -> None:
            if seen is not None:
                seen.append(written)

        done = await seed(machine.target, shlex.split(machine.ssh), engine, facts, [wanted], report)
        return done["CPU"]


@contextlib.contextmanager
def own_copy(machine: Machine, model: Path, name: str) -> Iterator[Path]:
    """The machine has a copy of its own."""
    copy = machine.home / name
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(model, copy)
    try:
        yield copy
    finally:
        copy.unlink()


@pytest.mark.parametrize("name", ["models/llm/other-name.gguf", ".ollama/models/blobs/sha256-0123"])
def test_a_cache_gets_the_tensors_of_these_units_complete_and_sealed(
    gpu1: Machine, engine: Engine, model: Path, cache: Path, name: str
) -> None:
    facts = read_facts(model)
    seen: list[int] = []
    with own_copy(gpu1, model, name):
        byte_count = run(seeded(gpu1, engine, model, seen))
    assert byte_count == sum(facts.cacheable_bytes[unit] for unit in UNITS)
    files = list(cache.iterdir())
    assert {file.stat().st_size for file in files} == facts.cacheable_sizes
    assert sum(file.stat().st_size for file in files) == byte_count
    assert all(file.stat().st_mode & 0o777 == 0o400 for file in files)
    assert seen == sorted(seen)


def test_a_machine_without_the_file_is_not_seeded(gpu1: Machine, engine: Engine, model: Path, cache: Path) -> None:
    with own_copy(gpu1, model, "models/heavy.gguf") as other:
        with other.open("r+b") as file:  # of the same size
            file.seek(-1, os.SEEK_END)
            file.write(b"?")
        with pytest.raises(NoFileError, match=r"^gpu1 does not have "):
            run(seeded(gpu1, engine, model))
    assert not list(cache.iterdir())


@pytest.mark.parametrize("how", ["cancelled", "cut", "silent", "too late", "no cache"])
def test_what_is_seeded_in_part_leaves_nothing(
    gpu1: Machine, engine: Engine, model: Path, cache: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def seed_and_break() -> None:
        task = asyncio.create_task(seeded(gpu1, engine, model, limit_s=0.5 if how == "too late" else 120.0))
        if how != "no cache":
            await eventually_async(lambda: servers(gpu1) or task.done(), "a llama-server runs there")
            for server in servers(gpu1):
                with contextlib.suppress(psutil.NoSuchProcess):
                    server.suspend()  # else all may be seeded before it is broken
        if how == "cancelled":
            task.cancel()
        elif how == "cut":
            kill_at_once(sessions(gpu1))
        elif how == "silent":
            gpu1.cut()
            try:
                await asyncio.to_thread(wait_gone, gpu1)
            finally:
                gpu1.connect_again()
            task.cancel()
        await task

    monkeypatch.setattr(seeding, "SILENCE_S", 3)
    if how == "no cache":
        (cache.parent / "taken" / "by").write_text("999999\n")
    with own_copy(gpu1, model, "models/heavy.gguf"), pytest.raises((LinkError, RequestCancelledError)):
        run(seed_and_break())
    wait_gone(gpu1)
    assert not list(cache.iterdir())


def sessions(machine: Machine) -> list[psutil.Process]:
    found = []
    for process in machine.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name().startswith("sshd"):
                found.append(process)
    return found


def servers(machine: Machine) -> list[psutil.Process]:
    found = []
    for process in machine.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "llama-server" in process.name() and "-m" in process.cmdline():  # not `--version`
                found.append(process)
    return found


def test_the_tensors_of_units() -> None:
    assert tensors_of([0, 2, 10], 12, "^output") == r"^blk\.(0|2|10)\."
    assert tensors_of([11, 12], 12, "^output|^token_embd") == r"^blk\.(11)\.|^output|^token_embd"
    assert tensors_of([12], 12, "^output") == "^output"
