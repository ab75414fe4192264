"""Every Python block of the older package's guide runs and keeps its promise, on real engines and a real Ollama.

`sollol` is replaced by `sollol_nb`, `[...]` by a message list, the placeholder path by a real one, and hosts by
loopback addresses; nothing else is changed.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from sollol_nb.hybrid_router import MODEL_PROFILES
from sollol_nb.hybrid_router import HybridRouter as AsyncRouter
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.machine import free_ports
from sollol_nb.llama_cpp.processes.process import EngineProcess
from sollol_nb.llama_cpp.processes.running import running_engines, stop_engines
from sollol_nb.llama_cpp.workers.local import start_worker, wait_until_free
from sollol_nb.models.files import DEMO_MODEL_PATH
from sollol_nb.runtime.io_loop import run_blocking
from sollol_nb.settings.endpoints import parse_endpoint
from sollol_nb.sync_wrapper import HybridRouter, OllamaPool
from tests.support.engines import HANG_GUARD_S, REPOSITORY, eventually
from tests.support.ollama_server import OllamaServer

pytestmark = [
    pytest.mark.engine,
    pytest.mark.ollama,
    pytest.mark.skipif(sys.platform == "darwin", reason="only 127.0.0.1 is a loopback address there"),
]

BLOCKS = re.findall(
    r"```python\n(.*?)```", (Path(__file__).parent / "data" / "guide_blocks.md").read_text(), re.DOTALL
)
(SHELL_BLOCK,) = re.findall(
    r"```bash\n(.*?)```", (Path(__file__).parent / "data" / "guide_blocks.md").read_text(), re.DOTALL
)
GATEWAY_PORT = 11440
MODELS = ("llama3.2", "llama3.1:8b", "llama3.1:70b", "llama3.1:405b", "custom-70b")
LARGE = "llama3.1:70b"
QUESTION = [{"role": "user", "content": "What is a worker?"}]
GUIDE_WORKERS = [f"127.0.0.{host}:50052" for host in (1, 2, 3)]
MORE_WORKERS = tuple(f"127.0.0.1:{port}" for port in range(50053, 50058))
DISTRIBUTED, OLLAMA = "llama.cpp-distributed", "ollama-pool"


@dataclass
class Ran:
    """A block after it ran: its variables, its output, its latency rows."""

    names: dict[str, Any]
    output: str
    frame: Any
    is_alone: bool = True  # else other blocks ran before it, and their coordinators still run

    @property
    def router(self) -> HybridRouter:
        return self.names["router"]

    def ask(self, model: str = LARGE) -> dict[str, Any]:
        """The `_routing` of a request through the block's router."""
        return self.router.route_request(model, QUESTION, max_tokens=8)["_routing"]


@pytest.fixture(scope="module")
def guide_world(
    engine: Engine, start_ollamas: Callable[..., OllamaServer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """The guide's machines: an Ollama with its models, three hosts with a worker, and more workers here."""
    ollama = start_ollamas()
    for model in MODELS:
        ollama.create(model)
    # Two names of one file would share one coordinator; more bytes at its end make it another file.
    other = tmp_path_factory.mktemp("other") / "model.gguf"
    other.write_bytes(DEMO_MODEL_PATH.read_bytes() + bytes(32))
    ollama.create("llama3.1:405b", other)
    custom = tmp_path_factory.mktemp("custom") / "model.gguf"
    shutil.copy(DEMO_MODEL_PATH, custom)
    places = [*GUIDE_WORKERS, *MORE_WORKERS]
    workers: list[EngineProcess] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OLLAMA_HOST", f"127.0.0.1:{ollama.port}")
        patch.setenv("OLLAMA_MODELS", str(ollama.models_folder))
        try:
            for place in places:
                host, port = parse_endpoint(place)
                # A test before may have left a worker there, which ends with its `keep_alive`.
                eventually(lambda host=host, port=port: free_ports(port, 1, host) == [port], f"{place} is unused")
                workers.append(run_blocking(start_worker(engine, host, port, 1, 600.0)))
                run_blocking(wait_until_free(place, workers[-1]))
            yield custom
        finally:
            for worker in workers:
                run_blocking(worker.stop())


def with_coordinator(names: dict[str, Any]) -> None:
    names["router"].route_request(LARGE, QUESTION, max_tokens=4)


def never(names: dict[str, Any]) -> None:
    """Nothing has happened before the block."""


def shards(ran: Ran, workers: int | None = None) -> None:
    routing = ran.ask()
    assert routing["backend"] == DISTRIBUTED
    assert not routing["placement_differences"]
    if workers is not None and not (not ran.is_alone and f"instead of {workers}" in routing["reason"]):
        assert len(routing["plan"]["shards"]) == workers


def check_overview(ran: Ran) -> None:
    assert list(ran.frame.backend) == [OLLAMA, DISTRIBUTED]
    assert list(ran.frame.status) == ["ok", "ok"]
    assert ran.names["response"]["message"]["content"]


def check_given_workers(ran: Ran) -> None:
    shards(ran, 3 if ran.is_alone else None)
    assert ran.router.coordinator is not None
    held = ran.router.coordinator.rpc_backends
    assert held == GUIDE_WORKERS or (not ran.is_alone and set(held) <= set(GUIDE_WORKERS))


def check_basic_sharding(ran: Ran) -> None:
    assert ran.output.index("Backend: ollama-pool") < ran.output.index("Backend: llama.cpp-distributed")


def check_agents(ran: Ran) -> None:
    assert ran.output.splitlines() == [
        f"Researcher (llama3.1:70b): {DISTRIBUTED}",
        f"Editor (llama3.2): {OLLAMA}",
        f"Summarizer (llama3.2): {OLLAMA}",
    ]


def check_profiles(ran: Ran) -> None:
    for model, profile in ran.names["MODEL_PROFILES"].items():
        assert MODEL_PROFILES[model] == profile


def check_custom_profile(ran: Ran) -> None:
    assert list(ran.frame.model) == ["custom-70b"]
    assert list(ran.frame.backend) == [DISTRIBUTED]
    assert ran.router.should_use_distributed("custom-70b")


def check_threshold(ran: Ran) -> None:
    assert ran.router.should_use_distributed("qwen3:32b")
    assert not ran.router.should_use_distributed("qwen3:14b")
    assert not HybridRouter().should_use_distributed("qwen3:32b")


def check_reuse(ran: Ran) -> None:
    first, second = ran.names["response1"]["_routing"], ran.names["response2"]["_routing"]
    assert first["coordinator_url"] == second["coordinator_url"]
    assert second["load_ms"] is None


def check_dead_process_is_noticed(ran: Ran) -> None:
    dead = ran.router.coordinator
    assert dead is not None
    psutil.Process(dead.pid).send_signal(signal.SIGTERM if os.name == "nt" else signal.SIGKILL)
    eventually(lambda: ran.router.coordinator is None, "the dead coordinator is noticed")
    shards(ran)


def check_gguf_path(ran: Ran) -> None:
    assert isinstance(ran.router, AsyncRouter)

    async def asked() -> str:
        response = await ran.names["router"].route_request(LARGE, QUESTION, max_tokens=4)
        return str(response["_routing"]["backend"])

    assert asyncio.run(asked()) == DISTRIBUTED
    assert ran.router.coordinator is not None
    assert ran.router.coordinator.settings.model_path.name == "model.gguf"


def check_two_at_once(ran: Ran) -> None:
    routers = {LARGE: ran.names["router_70b"], "llama3.1:405b": ran.names["router_405b"]}
    with ThreadPoolExecutor() as threads:
        asked = [
            threads.submit(router.route_request, model, QUESTION, max_tokens=8)
            for model, router in routers.items()
        ]
        routings = [answer.result()["_routing"] for answer in asked]
    assert [routing["backend"] for routing in routings] == [DISTRIBUTED, DISTRIBUTED]
    held = [{shard["endpoint"] for shard in routing["plan"]["shards"]} for routing in routings]
    # Where other blocks' coordinators hold workers, that of the first to end may have made room for the second.
    has_made_room = not ran.is_alone and None in [router.coordinator for router in routers.values()]
    assert held[0].isdisjoint(held[1]) or has_made_room
    assert not routers[LARGE].should_use_distributed("llama3.1:405b")


def check_strategy(ran: Ran) -> None:
    assert ran.ask()["plan"]["strategy"] == "memory_aware"


def check_stats(ran: Ran) -> None:
    uptime = re.search(r"Coordinator uptime: ([\d.]+)s", ran.output)
    assert uptime is not None
    assert float(uptime[1]) > 0
    assert re.search(r"Distributed requests: [1-9]", ran.output)
    assert re.search(rf"Active RPC backends: {'3' if ran.is_alone else '[1-8]'}\n", ran.output)


def check_coordinator_status(ran: Ran) -> None:
    running, model, workers, *_ = ran.output.splitlines()
    assert (running, model) == ("Coordinator running: True", f"Coordinator model: {LARGE}")
    assert workers == "RPC backends: 3" or not ran.is_alone
    assert re.fullmatch(r"Coordinator URL: http://127\.0\.0\.1:\d+", ran.output.splitlines()[3])


def check_metadata(ran: Ran) -> None:
    assert re.search(rf"Backend: {DISTRIBUTED}\nDuration: [\d.]+ms\nCoordinator: http://127", ran.output)


# For each block: what has happened before it, and what the guide promises after it.
CASES: list[tuple[Callable[[dict[str, Any]], None], Callable[[Ran], object]]] = [
    (never, check_overview),
    (never, lambda ran: shards(ran, 3)),
    (never, check_given_workers),
    (never, check_given_workers),
    (never, lambda ran: ran.output.index("✓ Available")),
    (never, check_basic_sharding),
    (never, lambda ran: ran.output.index("llama3.1:70b will use distributed inference (llama.cpp)")),
    (with_coordinator, check_coordinator_status),
    (never, lambda ran: len(ran.output.strip()) > 0 or pytest.fail("no answer was printed")),
    (never, check_agents),
    (never, check_profiles),
    (never, check_custom_profile),
    (never, check_threshold),
    (never, lambda ran: shards(ran, 6)),
    (never, lambda ran: ran.names["response"]["eval_count"] <= 512 or pytest.fail("max_tokens was not kept")),
    (never, check_reuse),
    (never, check_metadata),
    (never, lambda ran: shards(ran, 3)),
    (never, lambda ran: shards(ran, 3)),
    (never, lambda ran: re.search(r"GGUF: .*blobs.sha256-[0-9a-f]{64}\n", ran.output) or pytest.fail(ran.output)),
    (never, lambda ran: ran.names["response"]["message"]["content"] or pytest.fail("no answer")),
    (with_coordinator, check_dead_process_is_noticed),
    (never, lambda ran: shards(ran, 2)),
    (never, check_gguf_path),
    (never, check_two_at_once),
    (never, check_strategy),
    (with_coordinator, check_stats),
    (never, lambda ran: ran.names["response"]["_routing"]["backend"] == DISTRIBUTED or pytest.fail("not sharded")),
]


def test_there_is_a_case_for_each_block() -> None:
    assert len(CASES) == len(BLOCKS) == 28


@pytest.mark.parametrize("number", range(len(CASES)))
def test_block_of_the_guide(
    number: int, guide_world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, check = CASES[number]
    code = adapted(BLOCKS[number], guide_world)
    profiles = {model: dict(profile) for model, profile in MODEL_PROFILES.items()}
    if "RPC_BACKENDS" in code:
        monkeypatch.setenv("RPC_BACKENDS", ",".join(GUIDE_WORKERS))
    # Blocks that continue an earlier one find its variables.
    earlier = HybridRouter(OllamaPool.auto_configure(), num_rpc_backends=3)
    names: dict[str, Any] = {"router": earlier, "HybridRouter": HybridRouter, "OllamaPool": OllamaPool}
    try:
        before(names)
        rows = len(earlier.latency.frame())
        capsys.readouterr()
        exec(compile(code, f"guide block {number}", "exec"), names)
        check(Ran(names, capsys.readouterr().out, earlier.latency.frame().iloc[rows:]))
    finally:
        close_all([earlier, *names.values()])
        MODEL_PROFILES.clear()
        MODEL_PROFILES.update(profiles)


def test_the_gateway_of_the_guide_shards_over_its_workers(guide_world: Path) -> None:
    script = adapted(SHELL_BLOCK, guide_world)
    folder = Path(sys.executable).parent
    variables = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
    eventually(lambda: free_ports(GATEWAY_PORT, 1) == [GATEWAY_PORT], "the gateway's port is free")
    with subprocess.Popen(["bash", "-c", script], env=variables, start_new_session=True) as shell:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{GATEWAY_PORT}", timeout=HANG_GUARD_S) as client:
                eventually(lambda: is_ready(client), "the gateway is ready")
                body = {"model": LARGE, "messages": QUESTION, "max_tokens": 8}
                answer = client.post("/v1/chat/completions", json=body)
                backend, url = answer.headers["X-Sollol-Route"].split()
            # Before the gateway ends, which may end its coordinator.
            held = [entry for entry in registry.entries(registry.COORDINATOR) if entry.about["url"] == url]
        finally:
            os.killpg(shell.pid, signal.SIGTERM)
    close_all([])
    assert answer.json()["choices"][0]["message"]["content"]
    assert backend == DISTRIBUTED
    assert [set(entry.workers) for entry in held] == [set(GUIDE_WORKERS)]


def is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("direction", ["top to bottom", "bottom to top"])
def test_all_blocks_run_one_after_the_other_in_one_kernel(
    direction: str, guide_world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is closed in between, and no router is garbage: each finds what the ones before left running."""
    profiles = {model: dict(profile) for model, profile in MODEL_PROFILES.items()}
    earlier = HybridRouter(OllamaPool.auto_configure(), num_rpc_backends=3)
    names: dict[str, Any] = {"router": earlier}
    made: list[Any] = [earlier]
    failed: list[str] = []
    numbers = range(len(CASES)) if direction == "top to bottom" else reversed(range(len(CASES)))
    try:
        for number in numbers:
            before, check = CASES[number]
            code = adapted(BLOCKS[number], guide_world)
            names |= {
                "HybridRouter": HybridRouter,
                "OllamaPool": OllamaPool,
            }  # a block has imported the async ones
            with monkeypatch.context() as patch:
                if "RPC_BACKENDS" in code:
                    patch.setenv("RPC_BACKENDS", ",".join(GUIDE_WORKERS))
                try:
                    before(names)
                    rows = len(earlier.latency.frame())
                    capsys.readouterr()
                    exec(compile(code, f"guide block {number}", "exec"), names)
                    made += names.values()
                    check(Ran(names, capsys.readouterr().out, earlier.latency.frame().iloc[rows:], is_alone=False))
                except Exception as error:
                    failed.append(f"block {number}: {type(error).__name__}: {error}")
        assert failed == []
    finally:
        close_all(made)
        MODEL_PROFILES.clear()
        MODEL_PROFILES.update(profiles)


def close_all(made: Iterable[Any]) -> None:
    """Close the routers among these, and end the coordinators that others left over the guide's workers."""
    for router in {id(value): value for value in made}.values():
        if isinstance(router, HybridRouter):
            router.close()
        elif isinstance(router, AsyncRouter):
            run_blocking(router.close())
    # A router that a block made and dropped leaves its coordinator to the next one, as in a notebook.
    for left in run_blocking(running_engines()):
        if left.kind == "coordinator" and set(left.workers) & {*GUIDE_WORKERS, *MORE_WORKERS}:
            run_blocking(stop_engines([left.id]))


def adapted(code: str, custom: Path) -> str:
    """The block with nothing changed but the package's name, elisions, the placeholder path and the hosts."""
    code = re.sub(r"\bsollol\b(?=[. ])", "sollol_nb", code)
    code = code.replace("[...]", repr(QUESTION)).replace("/path/to/custom/model.gguf", custom.as_posix())
    return re.sub(r"192\.168\.1\.1([012])", lambda host: f"127.0.0.{int(host[1]) + 1}", code)
