"""The workers of a real Dask cluster run models, and end with it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from distributed import Client, LocalCluster

from sollol_nb import workers_from_dask
from sollol_nb.errors import ConfigError, WorkerStartError
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.processes.running import stop_engines
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import (
    QUESTION,
    all_end,
    eventually,
    is_alive,
    posix_only,
    run,
    suspended,
    with_variable,
)
from tests.support.kernels import notebook_kernel

pytestmark = [pytest.mark.engine, posix_only]

HERE = "127.0.0.1"
MARK = "SOLLOL_TEST_DASK"
"""Variable by which processes are found that descend from a cluster of these tests."""


def rpc_workers(mark: str) -> list[psutil.Process]:
    found = []
    for process in with_variable(MARK, mark):
        with suppress(psutil.NoSuchProcess):  # it may end at any moment
            if "rpc-server" in process.name():
                found.append(process)
    return found


@pytest.fixture
def mark(alone: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    monkeypatch.setenv(MARK, str(tmp_path))
    yield str(tmp_path)
    run(stop_engines(also_used=True))  # an open invitation listens on


@pytest.fixture
def client(engine: Engine, mark: str, tmp_path: Path) -> Iterator[Client]:
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, host=HERE, dashboard_address=None, local_directory=str(tmp_path)
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def test_an_answer_continues_when_a_dask_worker_is_killed_and_all_ends_with_the_cluster(
    client: Client, mark: str, endless: str
) -> None:
    workers = workers_from_dask(client, host=HERE)
    assert isinstance(workers, list)
    before = rpc_workers(mark)
    assert len(before) == 2
    with HybridRouter(rpc_backends=workers, num_rpc_backends=2) as router:
        first = router.route_request("demo:sharded", QUESTION, temperature=0)
        assert "worker" in first["message"]["content"]
        assert len(router.coordinator.rpc_backends) == 2
        router.stop_coordinator()

        victim = min(client.run(os.getpid).values())
        chunks = []
        for chunk in router.stream(
            endless, QUESTION, backend="llama.cpp-distributed", max_tokens=400, temperature=0
        ):
            chunks.append(chunk)
            if len(chunks) == 20:
                with suspended(psutil.Process(router.coordinator.pid)):
                    os.kill(victim, signal.SIGKILL)
                    eventually(lambda: not all(map(is_alive, before)), "its RPC worker has ended")
        assert chunks[-1]["done_reason"] == "length"
        assert chunks[-1]["_routing"]["failovers"]
        # Dask starts its worker again, and so it has an RPC worker again.
        eventually(
            lambda: len(set(rpc_workers(mark)) - set(before)) == 1, "a worker has taken the lost one's place"
        )
        eventually(
            lambda: sum(worker.state in ("free", "held") for worker in router.check_workers()) == 2,
            "it has joined",
        )
        running = rpc_workers(mark)
        client.cluster.close()
        all_end(running)
        eventually(lambda: not router.invitations().joined, "no membership is left")


CELLS = (
    """
from distributed import Client, LocalCluster
from sollol_nb import workers_from_dask

cluster = LocalCluster(n_workers=1, threads_per_worker=1, host="127.0.0.1", dashboard_address=None)
client = Client(cluster)
%config Sollol.workers = workers_from_dask(client, host="127.0.0.1")
""",
    "%%sollol demo:sharded --temperature 0 --out answer\nWhat is a worker?",
)


def test_a_notebook_asks_the_workers_of_its_cluster(engine: Engine, mark: str, tmp_path: Path) -> None:
    with notebook_kernel(tmp_path / "state", *CELLS) as notebook:
        assert notebook.value("answer.routing['backend']") == "'llama.cpp-distributed'"
        assert len(rpc_workers(mark)) == 1
        assert notebook.run("client.close(); cluster.close()").status == "ok"
        eventually(lambda: not rpc_workers(mark), "it has ended with the cluster")


def test_a_second_call_replaces_the_workers_of_the_first_also_with_an_asynchronous_client(
    client: Client, mark: str
) -> None:
    workers_from_dask(client, host=HERE)
    before = rpc_workers(mark)

    async def again() -> list[str]:
        async with Client(client.scheduler.address, asynchronous=True) as other:
            return await workers_from_dask(other, threads=1, host=HERE)

    assert asyncio.run(again())
    all_end(before)
    assert len(rpc_workers(mark)) == 2
    with HybridRouter() as router:
        assert len(router.invitations().joined) == 2
    client.unregister_worker_plugin("sollol-nb-worker")
    eventually(lambda: not rpc_workers(mark), "all have ended")


def test_what_keeps_a_dask_worker_from_running_one_is_one_line(
    client: Client, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hide_llama_cpp() -> None:
        os.environ["SOLLOL_LLAMA_CPP"] = "/nowhere"

    client.run(hide_llama_cpp)
    with pytest.raises(WorkerStartError, match="/nowhere") as caught:
        workers_from_dask(client, host=HERE)
    assert "\n" not in str(caught.value)
    assert not rpc_workers(mark)
    with HybridRouter() as router:
        assert not router.invitations().open


def test_a_cluster_without_workers_is_named(mark: str) -> None:
    with (
        LocalCluster(n_workers=0, host=HERE, dashboard_address=None) as cluster,
        Client(cluster) as client,
        pytest.raises(ConfigError, match="wait_for_workers"),
    ):
        workers_from_dask(client)
