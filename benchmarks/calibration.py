"""Predicted times of tokens against measured ones, after a calibration of three loopback workers.

    python benchmarks/calibration.py [MODEL.gguf] [--rounds 5] [--json FILE]

Three clusters: equal workers; one that may use a third of a processor core (by a quota of a Linux control group;
left out where none can be made); one behind a proxy that delays what is sent there by 2 ms. Layers are split
evenly over all three, and over the first two, which are undisturbed. Times are predicted before the first token.

A prediction serves to choose between layouts, so besides the ratio of the predicted time to the measured one, the
table has this ratio relative to that of the equal workers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from sollol_nb.llama_cpp.engine.find import find_engine
from sollol_nb.llama_cpp.processes.machine import free_ports
from sollol_nb.llama_cpp.workers.local import START_TIMEOUT_S
from sollol_nb.llama_cpp.workers.probe import ProbeOutcome, probe
from sollol_nb.runtime.io_loop import run_blocking
from sollol_nb.settings.endpoints import LOOPBACK, format_endpoint
from sollol_nb.sync_wrapper import HybridRouter

QUESTION = "Write a long story about a lighthouse."
MAX_TOKENS = 24
FIRST_PORT = 23100
CONTROL_GROUPS = Path("/sys/fs/cgroup/cpu")
PERIOD_US, QUOTA_US = 6000, 2000
DELAY_S = 0.002


@dataclass(frozen=True)
class Row:
    """One layout: milliseconds for each token, predicted before the first one, and measured."""

    cluster: str
    workers: int
    predicted_ms: float
    measured_ms: float

    @property
    def ratio(self) -> float:
        """Predicted to measured."""
        return self.predicted_ms / self.measured_ms


@dataclass(frozen=True)
class Worker:
    """A worker that the router did not start."""

    endpoint: str
    pid: int


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="demo:sharded", help="default: the demo model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows: list[Row] = []
    with ExitStack() as stack:
        first, second, third = (stack.enter_context(running_worker()) for _ in range(3))
        pair = [first.endpoint, second.endpoint]
        rows += of_cluster("equal", arguments.model, [*pair, third.endpoint], arguments.rounds)
        with slowed(third) as is_slowed:
            if is_slowed:
                name = f"{QUOTA_US / PERIOD_US:.0%} of a core"
                rows += of_cluster(name, arguments.model, [*pair, third.endpoint], arguments.rounds)
        with delayed(third) as endpoint:
            name = f"{DELAY_S * 1000:g} ms away"
            rows += of_cluster(name, arguments.model, [*pair, endpoint], arguments.rounds)
    usual = median(row.ratio for row in rows if row.cluster == "equal")
    print(
        f"\n{'cluster':<16} {'workers':>7} {'predicted ms':>13} {'measured ms':>12} {'ratio':>6} {'relative':>9}"
    )
    for row in rows:
        figures = f"{row.predicted_ms:>13.2f} {row.measured_ms:>12.2f} {row.ratio:>6.2f} {row.ratio / usual:>9.2f}"
        print(f"{row.cluster:<16} {row.workers:>7} {figures}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) | {"ratio": row.ratio} for row in rows], indent=1))


def of_cluster(cluster: str, model: str, endpoints: list[str], rounds: int) -> list[Row]:
    """Calibrate these workers; then predict and measure layouts over all three, and over the first two."""
    rows = []
    with HybridRouter(rpc_backends=endpoints, auto_discover_rpc=False) as router:
        print(f"{cluster}:")
        for result in router.calibrate():
            print(f"  {result}")
    for count in (3, 2):
        layout = {"rpc_backends": endpoints[:count], "num_rpc_backends": count, "layer_strategy": "even"}
        # A new router has measured no token of the model.
        with HybridRouter(auto_discover_rpc=False, distributed_threshold_params=1e-6, **layout) as router:
            router.preload(model)
            coordinator = router.coordinator
            assert coordinator is not None
            assert coordinator.plan is not None
            predicted_ms = coordinator.plan.predicted_token_ms
            assert predicted_ms is not None
            times = [token_ms(router, model) for _ in range(rounds)]
            rows.append(Row(cluster, count, predicted_ms, median(times)))
    return rows


def token_ms(router: HybridRouter, model: str) -> float:
    """Milliseconds for each token of one answer, as the engine measured them."""
    answer = router.route_request(model, QUESTION, temperature=0, max_tokens=MAX_TOKENS)
    return 1000 / float(answer.routing["tokens_per_s"])


# --- workers ----------------------------------------------------------------------------------


@contextmanager
def running_worker() -> Iterator[Worker]:
    """A worker with one thread."""
    (port,) = free_ports(FIRST_PORT, 1)
    process = subprocess.Popen(
        [str(find_engine().worker), "-H", LOOPBACK, "-p", str(port), "-t", "1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while run_blocking(probe(LOOPBACK, port)).outcome is not ProbeOutcome.FREE:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the worker on port {port} does not answer")
            time.sleep(0.02)
        yield Worker(format_endpoint(LOOPBACK, port), process.pid)
    finally:
        process.kill()
        process.wait()


@contextmanager
def slowed(worker: Worker) -> Iterator[bool]:
    """Hold a worker to its quota meanwhile; False where control groups of version 1 cannot be used."""
    group = CONTROL_GROUPS / f"sollol-{worker.pid}"
    try:
        group.mkdir()
        (group / "cpu.cfs_period_us").write_text(str(PERIOD_US))
        (group / "cpu.cfs_quota_us").write_text(str(QUOTA_US))
        (group / "cgroup.procs").write_text(str(worker.pid))
    except OSError:
        with suppress(OSError):
            group.rmdir()
        yield False
        return
    try:
        yield True
    finally:
        (CONTROL_GROUPS / "cgroup.procs").write_text(str(worker.pid))
        group.rmdir()


@contextmanager
def delayed(worker: Worker) -> Iterator[str]:
    """The endpoint of a proxy to a worker that passes on after a delay what is sent to it."""
    port = int(worker.endpoint.rpartition(":")[2])

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
        loop, last = asyncio.get_running_loop(), 0.0
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def pass_on() -> None:
            while True:
                due_s, data = await waiting.get()
                if due_s > loop.time():
                    await asyncio.sleep(due_s - loop.time())
                writer.write(data)
                await writer.drain()
                if not data:
                    writer.close()
                    return

        passing = asyncio.create_task(pass_on())
        with suppress(OSError):
            while data := await reader.read(65536):
                last = loop.time() + delay_s
                waiting.put_nowait((last, data))
        waiting.put_nowait((0.0, b""))
        with suppress(OSError):
            await passing

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_worker, to_worker = await asyncio.open_connection(LOOPBACK, port)
        await asyncio.gather(copy(reader, to_worker, DELAY_S), copy(from_worker, writer, 0.0))

    async def listen() -> asyncio.Server:
        return await asyncio.start_server(serve, LOOPBACK, 0)

    async def close(server: asyncio.Server) -> None:
        server.close()

    server = run_blocking(listen())
    try:
        yield format_endpoint(LOOPBACK, server.sockets[0].getsockname()[1])
    finally:
        run_blocking(close(server))


if __name__ == "__main__":
    main()
