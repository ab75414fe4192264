"""`sollol-nb status`: the cluster as seen from outside of the notebooks that use it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sollol_nb.cli.status import verdict
from sollol_nb.cluster.status import ClusterStatus
from sollol_nb.llama_cpp.workers.status import WorkerStatus
from sollol_nb.ollama.nodes import NodeStatus
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import QUESTION, unused_port
from tests.support.gateway import own_gateway


def sollol_nb(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).with_name("sollol-nb")
    return subprocess.run(
        [program, *arguments], env={**os.environ, **variables}, capture_output=True, text=True, timeout=120
    )


def worker(endpoint: str, state: str) -> WorkerStatus:
    return WorkerStatus(
        endpoint=endpoint,
        state=state,
        detail=f"{endpoint} has a problem",
        held_by=None,
        probe=None,
        is_local=False,
    )


def node(state: str) -> NodeStatus:
    return NodeStatus("http://a:11434", state, (), (), 0, 0, 1, 0.0, None, "no route", None)


def machine(state: str) -> WorkerStatus:
    return replace(worker("ssh://gpu1", state), name="ssh://gpu1", detail="no route to gpu1")


def test_a_lost_machine_needs_attention_and_one_that_nobody_uses_does_not() -> None:
    linked = replace(worker("127.0.0.1:4000", "lost"), name="gpu2/CUDA0", target="ssh://gpu2", detail="no network")
    status = ClusterStatus((machine("unknown"), machine("down"), machine("lost"), linked), ())
    assert status.problems == [
        "no route to gpu1; repair or remove it",
        "no route to gpu1; repair or remove it",
        "gpu2/CUDA0: no network; repair or remove it",
    ]
    assert verdict(status) == "needs attention: 3 problems, see the first lines"


def test_what_needs_attention_is_listed() -> None:
    states = ("free", "held", "busy", "down", "incompatible")
    status = ClusterStatus(tuple(worker(f"{state}:1", state) for state in states), (), (node("absent"),))
    assert status.problems == [
        "down:1 has a problem; repair or remove it",
        "incompatible:1 has a problem; repair or remove it",
        "Ollama at a:11434 is down: no route",
    ]
    assert ClusterStatus((), (), (node("ready"),)).problems == []


def test_a_cluster_in_which_nothing_runs_is_not_called_well() -> None:
    assert verdict(ClusterStatus((), ())).startswith("nothing runs")
    assert verdict(ClusterStatus((), (), (node("ready"),))) == "all is well"
    assert verdict(ClusterStatus((worker("a:1", "free"),), (), ())) == "all is well"


@pytest.mark.engine
def test_status_sees_what_a_notebook_runs(router: HybridRouter) -> None:
    answer = router.route_request("demo:sharded", QUESTION, max_tokens=2)
    endpoints = [shard["endpoint"] for shard in answer.routing["plan"]["shards"]]

    shown = sollol_nb("status", OLLAMA_HOST="")
    assert shown.returncode == 0, shown.stderr
    assert "demo:sharded" in shown.stdout
    assert answer.routing["coordinator_url"] in shown.stdout
    assert shown.stdout.endswith("all is well\n")
    for endpoint in endpoints:
        assert f"{endpoint}  " in shown.stdout
        assert f"  {endpoint}  ◐ held" in shown.stdout

    plain: dict[str, Any] = json.loads(sollol_nb("status", "--json", OLLAMA_HOST="").stdout)
    assert {worker["endpoint"]: worker["state"] for worker in plain["workers"]}.items() >= dict.fromkeys(
        endpoints, "held"
    ).items()
    assert plain["troubles"] == []
    assert router.route_request("demo:sharded", QUESTION, max_tokens=2).routing["load_ms"] is None, (
        "it was not touched"
    )


def test_a_worker_that_is_gone_is_an_exit_code() -> None:
    endpoint = f"127.0.0.1:{unused_port()}"
    for arguments in (("status",), ("status", "--json")):
        shown = sollol_nb(*arguments, RPC_BACKENDS=endpoint, OLLAMA_HOST="")
        assert shown.returncode == 3
        assert f"{endpoint} does not answer: nothing listens there" in shown.stdout


@pytest.mark.engine
def test_where_a_gateway_is_set_its_cluster_is_shown(tmp_path: Path) -> None:
    endpoint = f"127.0.0.1:{unused_port()}"
    with own_gateway(tmp_path, RPC_BACKENDS=endpoint, OLLAMA_HOST="") as gateway:
        shown = sollol_nb("status", SOLLOL_GATEWAY=str(gateway.url), OLLAMA_HOST="")
    assert shown.stderr == ""
    assert f"{endpoint} does not answer" in shown.stdout
    assert shown.returncode == 3


@pytest.mark.engine
def test_workers_are_looked_for_and_measured_from_here_whatever_gateway_is_set() -> None:
    endpoint, gateway = f"127.0.0.1:{unused_port()}", f"http://127.0.0.1:{unused_port()}"
    found = sollol_nb("discover", "--json", SOLLOL_GATEWAY=gateway, RPC_BACKENDS=endpoint)
    assert (found.returncode, found.stderr) == (0, "")
    measured = sollol_nb("calibrate", endpoint, SOLLOL_GATEWAY=gateway)
    assert (measured.returncode, measured.stderr) == (3, "")
    assert endpoint in measured.stdout
