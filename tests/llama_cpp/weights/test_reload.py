"""On real engines: a model that is loaded again is not sent again, and a full cache changes no answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sollol_nb.gguf.facts import read_facts
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.weights import cache
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import eventually, linux_only, unused_ports
from tests.support.gguf_files import write_heavy

pytestmark = [pytest.mark.engine, linux_only]

MOUNTING = ["unshare", "-m"] if os.name == "posix" and os.geteuid() == 0 else ["unshare", "-rm"]
QUESTION: dict[str, Any] = {"backend": "sharded", "temperature": 0, "max_tokens": 12}


def new_router(port: int) -> HybridRouter:
    return HybridRouter(
        auto_setup_rpc=True, auto_discover_rpc=False, num_rpc_backends=2, rpc_port=port, context_tokens=512
    )


def text_of(router: HybridRouter, model: Path) -> str:
    answer = router.route_request(str(model), "Hello there", **QUESTION)
    return str(answer["message"]["content"])


def sent_bytes(router: HybridRouter) -> int:
    """What the coordinator has sent to its workers until it was ready."""
    assert router.coordinator is not None
    sent = router.coordinator.bytes_sent
    assert sent is not None
    return sent


def all_sealed(count: int) -> None:
    eventually(
        lambda: len(files := [*cache._all_files()]) == count and all(file.is_sealed for file in files),
        f"{count} files are sealed",
    )


def test_a_reload_sends_next_to_nothing(engine: Engine, heavy_model: Path, caches: Path) -> None:
    weights = sum(read_facts(heavy_model).layer_bytes)
    port = unused_ports(2)
    with new_router(port) as router:
        first = text_of(router, heavy_model)
        assert sent_bytes(router) >= weights
        all_sealed(12)
        router.stop_coordinator()
        assert text_of(router, heavy_model) == first
        assert sent_bytes(router) <= 0.01 * weights
        (shown,) = router.status().coordinators
        assert shown.sent.endswith("of 120.7 MiB, the rest was cached on the workers")
    with new_router(port) as router:  # other workers, with what these had
        assert text_of(router, heavy_model) == first
        assert sent_bytes(router) <= 0.01 * weights


def test_what_a_standby_was_sent_need_not_be_sent_again(engine: Engine, tmp_path: Path, caches: Path) -> None:
    model = write_heavy(tmp_path / "heavy.gguf", blocks=2)
    with HybridRouter(
        auto_setup_rpc=True,
        auto_discover_rpc=False,
        num_rpc_backends=1,
        rpc_port=unused_ports(2),
        context_tokens=512,
        standby=True,
    ) as router:
        router.start_workers(2)
        text_of(router, model)
        eventually(lambda: any(each.standby == "ready" for each in router.status().coordinators), "it is ready")
        eventually(
            lambda: (
                all(file.is_sealed for file in cache._all_files())
                and len({file.path.parent for file in cache._all_files()}) == 2
            ),
            "what the workers of both have is sealed",
        )


def test_a_disk_that_fills_up_while_a_model_loads_changes_no_answer(engine: Engine, tmp_path: Path) -> None:
    model = write_heavy(tmp_path / "heavy.gguf", blocks=2, feed_forward=41_000)
    disk = tmp_path / "disk"
    disk.mkdir()
    inside = f'mount -t tmpfs -o size=40m none "{disk}" && exec "$@"'
    program = [sys.executable, "-m", "tests.support.full_disk", str(model), str(disk)]
    run = subprocess.run(
        [*MOUNTING, "sh", "-c", inside, "sh", *program], capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout.splitlines()[-1])
    assert said["cut_files"] > 0, "the disk was full"
    assert said["filling"] == said["plain"]
    assert said["reloaded"] == said["plain"]
    assert said["unguarded"] != said["plain"], "a cut file that the worker finds is used"
