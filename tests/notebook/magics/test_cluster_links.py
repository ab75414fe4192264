"""`%sollol_cluster` with workers of other machines: what it says when they are added, stopped and removed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.links.join_link import JoinLink
from tests.support.engines import QUESTION, unused_port
from tests.support.far_workers import FarWorker, far_workers
from tests.support.kernels import Kernel, kernel
from tests.support.machines import running_machines, short_folder, wait_gone

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def far(engine: Engine) -> Iterator[FarWorker]:
    with far_workers(engine, 1) as (worker,):
        yield worker


@pytest.fixture
def notebook(engine: Engine, tmp_path: Path) -> Iterator[Kernel]:
    with kernel(SOLLOL_STATE_DIR=str(tmp_path), SOLLOL_KEEP_ALIVE="60s") as started:
        assert started.run("%load_ext sollol_nb").status == "ok"
        yield started
        started.run("%sollol_stop --all --force")


def test_a_machine_is_added_used_stopped_and_removed(notebook: Kernel, far: FarWorker) -> None:
    target = far.target
    added = notebook.run(f"%sollol_cluster add {target}")
    assert added.stream.startswith(f"added worker {target}: free, ")
    assert added.stream.count("\n") == 1
    assert [display["text/plain"] for display in added.displays] == [""], "the progress is gone"

    answer = notebook.run(f"%%sollol demo:sharded --max-tokens 3 --out answer\n{QUESTION}")
    assert answer.status == "ok"
    cluster = notebook.run("%sollol_cluster --text").stream
    assert f"0-11 + output  {target}  13 units" in cluster
    assert f"  {target}  ◐ held " in cluster
    html = notebook.run("%sollol_cluster --static").displays[-1]["text/html"]
    endpoint = notebook.value("answer.routing['plan']['shards'][0]['endpoint']").strip("'")
    assert f'title="{endpoint}">{target}</td>' in html

    assert "ready: " in notebook.run(f"%sollol_log {target}").stream
    held = notebook.run(f"%sollol_cluster remove {target}")
    assert f"ConfigError: {target} is held by the coordinator of demo:sharded" in str(held.error)
    stopped = notebook.run(f"%sollol_cluster stop {target}").stream
    assert stopped == f"stopped coordinator demo:sharded, link {target}\n"
    cluster = notebook.run("%sollol_cluster --text").stream
    assert f"{target}  ○ not connected  the next request connects to it" in cluster
    assert notebook.run(f"%sollol_cluster remove {target}").stream == f"removed worker {target}\n"
    assert "no worker is known" in notebook.run("%sollol_cluster --text").stream


def test_each_machine_that_cannot_be_used_is_one_line(notebook: Kernel, far: FarWorker) -> None:
    nobody = f"[::1]:{unused_port()}"
    shown = notebook.run(f"%sollol_cluster add {nobody} {far.target}")
    assert shown.status == "ok"
    lines = shown.stream.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"not added: nothing listens on {nobody}; start a worker there: ")
    assert lines[1].startswith(f"added worker {far.target}: free, ")
    now, _, events = notebook.run("%sollol_cluster --text").stream.partition("\nlast events\n")
    assert nobody not in now
    assert f"removed worker {nobody}" in events

    hosts = notebook.run("%sollol_cluster --ssh nohost.invalid,me@nobody.invalid:2222 --text")
    assert hosts.status == "ok"
    first, second, *_ = hosts.stream.splitlines()
    assert first.startswith("not added: ")
    assert "nohost.invalid" in first
    assert "nobody.invalid" in second
    wrong = notebook.run("%sollol_cluster --ssh gpu1,-oProxyCommand=x")
    assert "--ssh takes hosts such as gpu1,user@gpu2:2222: " in f"{wrong.error}{wrong.stream}"


def test_a_machine_is_invited_and_the_invitation_is_revoked(notebook: Kernel) -> None:
    shown = notebook.run("%sollol_cluster invite gpu1 --uses 2 --for 30m --host 127.0.0.1")
    assert shown.status == "ok", shown.error
    first, command, about = shown.stream.splitlines()
    assert first == "run on the machine that joins:"
    link = JoinLink.of(command.removeprefix("sollol-nb worker --join "))
    assert about.startswith("(can be used 2 times until ")
    assert about.endswith("; its name is gpu1)")
    cluster = notebook.run("%sollol_cluster --text").stream
    assert "invitation gpu1 can be used 2 times until " in cluster
    assert link.token not in cluster
    two = notebook.run("%sollol_cluster invite gpu1 gpu2")
    assert "invite takes one name" in f"{two.error}{two.stream}"
    assert notebook.run("%sollol_cluster revoke gpu1").stream == "revoked gpu1\n"
    assert notebook.run("%sollol_cluster revoke").stream == "no invitation is open, and no worker has joined\n"
    assert "invitation gpu1" not in notebook.run("%sollol_cluster --text").stream


def test_added_machines_are_kept_when_a_setting_changes(notebook: Kernel, far: FarWorker) -> None:
    notebook.run(f"%sollol_cluster add {far.target}")
    notebook.run("%config Sollol.slots = 2")
    assert f"{far.target}  ● free" in notebook.run("%sollol_cluster --text").stream


def test_a_host_of_ssh_is_installed_used_and_left_in_a_few_lines(engine: Engine, tmp_path: Path) -> None:
    with (
        short_folder() as folder,
        running_machines(folder, ["gpu1"]) as (machine,),
        kernel(SOLLOL_STATE_DIR=str(tmp_path), SOLLOL_SSH=machine.ssh) as notebook,
    ):
        notebook.run("%load_ext sollol_nb")
        added = notebook.run("%sollol_cluster --ssh gpu1 --text")
        assert added.stream.startswith("added worker gpu1: free, ")
        assert added.updates > 1, "it was shown what is done there"
        assert added.displays[0]["text/plain"] == "", "and is no more"
        assert "  gpu1  ● free " in added.stream
        answer = notebook.run(f"%%sollol demo:sharded --max-tokens 3 --out answer\n{QUESTION}")
        assert answer.status == "ok"
        assert notebook.value("[shard['name'] for shard in answer.routing['plan']['shards']]") == "['gpu1']"
        assert "0-11 + output  gpu1  13 units" in notebook.run("%sollol_cluster --text").stream
        assert "ready: gpu1: CPU" in notebook.run("%sollol_log gpu1").stream
        stopped = notebook.run("%sollol_cluster stop gpu1").stream
        assert stopped == "stopped coordinator demo:sharded, link ssh://gpu1\n"
        wait_gone(machine)
        assert notebook.run("%sollol_cluster remove gpu1").stream == "removed worker gpu1\n"
        assert "no worker is known" in notebook.run("%sollol_cluster --text").stream
