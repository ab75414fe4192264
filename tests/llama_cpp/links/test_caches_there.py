"""On real engines: damaged files in the caches of other machines' workers are never used, by whichever link."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest

from sollol_nb.errors import WorkersUnavailableError
from sollol_nb.gguf.facts import read_facts
from sollol_nb.llama_cpp.coordinators import cached_weights
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.processes.registry import Entry
from sollol_nb.llama_cpp.processes.running import stop_engines
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import posix_only, run
from tests.support.gguf_files import write_heavy
from tests.support.joining import connected, invite, join
from tests.support.machines import Machine, running_machines, short_folder, wait_gone

pytestmark = [pytest.mark.engine, posix_only]

QUESTION: dict[str, Any] = {"backend": "sharded", "temperature": 0, "max_tokens": 12}
TENSORS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_heavy(tmp_path_factory.mktemp("models") / "heavy.gguf", blocks=TENSORS // 3, feed_forward=41_000)


@pytest.fixture(scope="module")
def gpu1() -> Iterator[Machine]:
    with short_folder() as folder, running_machines(folder, ["gpu1"]) as (machine,):
        yield machine


@pytest.fixture(autouse=True)
def empty_state(gpu1: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A user without any engine here, whose ssh reaches the machine; at the end nothing runs here or there."""
    monkeypatch.setenv("SOLLOL_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("SOLLOL_SSH", gpu1.ssh)
    monkeypatch.setenv("SOLLOL_TENSOR_CACHE_GB", "50")
    yield
    run(stop_engines(also_used=True))
    for process in gpu1.started:
        if process is not gpu1.sshd and process.poll() is None:
            process.terminate()
            process.wait()
    wait_gone(gpu1)
    shutil.rmtree(gpu1.home / ".cache" / "sollol_nb" / "tensors")


@contextlib.contextmanager
def over_its_worker(machine: Machine, engine: Engine, how: str) -> Iterator[HybridRouter]:
    """A router with the machine's worker, by a link of this kind."""
    common: dict[str, Any] = {"auto_setup_rpc": False, "auto_discover_rpc": False, "context_tokens": 512}
    if how == "ssh":
        with HybridRouter(rpc_backends=[machine.target], **common) as router:
            yield router
    else:
        with HybridRouter(num_rpc_backends=1, **common) as router:
            worker: subprocess.Popen[Any] = join(machine, engine, invite(router, machine))
            connected(router, "gpu1")
            yield router
            router.revoke(None)
            worker.wait()


def cut(file: Path) -> None:
    """As a full disk or a damaged file system leaves it."""
    mode = file.stat().st_mode
    file.chmod(0o600)
    os.truncate(file, file.stat().st_size // 2 // 4096 * 4096)
    file.chmod(mode)


def to_disk(file: Path) -> None:
    """Returns when all of it is on the disk, however slow that is."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def test_a_worker_whose_cache_cannot_be_verified_is_not_used(
    engine: Engine, gpu1: Machine, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Collection[str], Collection[int]]] = []

    async def no_answer(entry: Entry, endpoints: Collection[str], sizes: Collection[int]) -> bool:
        asked.append((endpoints, sizes))
        return False

    with over_its_worker(gpu1, engine, "ssh") as router:
        monkeypatch.setattr(cached_weights, "verify", no_answer)
        with pytest.raises(WorkersUnavailableError):
            router.route_request(str(model), "Hello there", **QUESTION)
        (worker,) = router.check_workers()
        assert asked == [({worker.endpoint}, read_facts(model).cacheable_sizes)]
        assert any(
            "its cache of weights could not be verified" in event.message for event in router.events.recent()
        )


@pytest.mark.skipif(sys.platform != "linux", reason="counts what was sent")
@pytest.mark.parametrize("how", ["ssh", "join"])
def test_a_file_that_is_cut_between_two_loads_is_not_used(
    engine: Engine, gpu1: Machine, model: Path, how: str
) -> None:
    size = max(read_facts(model).cacheable_sizes)

    def text_and_sent() -> tuple[str, int]:
        answer = router.route_request(str(model), "Hello there", **QUESTION)
        assert router.coordinator is not None
        sent = router.coordinator.bytes_sent
        assert sent is not None
        router.stop_coordinator()
        return str(answer["message"]["content"]), sent

    with over_its_worker(gpu1, engine, how) as router:
        plain, first = text_and_sent()
        assert first > TENSORS * size
        files = [*(gpu1.home / ".cache" / "sollol_nb" / "tensors").glob("*/rpc/*")]
        assert len(files) == TENSORS
        cut(files[0])
        text, sent = text_and_sent()  # at once: nothing was sealed by itself
        assert text == plain
        assert sent > TENSORS * size, "others may not be complete either"
        for file in files:
            to_disk(file)  # a load waits no longer than some seconds until they are on the disk
        text, sent = text_and_sent()
        assert text == plain
        assert sent < size
        assert all(not file.stat().st_mode & 0o200 for file in files), "they are sealed"
        cut(files[1])
        text, sent = text_and_sent()
        assert text == plain
        assert size < sent < 2 * size, "only that one was sent again"
