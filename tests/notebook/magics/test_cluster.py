"""`%sollol_cluster` and `%sollol_stop` in real kernels: what each says and does, also beside another notebook."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sollol_nb.llama_cpp.engine.check import Engine
from tests.support.engines import engines_of, eventually, unused_port
from tests.support.kernels import Kernel, kernel

pytestmark = pytest.mark.engine

ASK = "%%sollol demo:sharded --temperature 0 --max-tokens 20 --out answer\nWhat is a worker?"


@pytest.fixture
def state(tmp_path: Path) -> dict[str, str]:
    """A state folder that only these kernels use."""
    return {"SOLLOL_STATE_DIR": str(tmp_path), "SOLLOL_KEEP_ALIVE": "60s"}


@pytest.fixture
def first(engine: Engine, state: dict[str, str]) -> Iterator[Kernel]:
    with kernel(**state, JPY_SESSION_NAME="/home/me/first.ipynb") as notebook:
        assert notebook.run("%load_ext sollol_nb").status == "ok"
        yield notebook
        notebook.run("%sollol_stop --all --force")


@pytest.fixture
def second(engine: Engine, state: dict[str, str]) -> Iterator[Kernel]:
    with kernel(**state, JPY_SESSION_NAME="/home/me/second.ipynb") as notebook:
        assert notebook.run("%load_ext sollol_nb").status == "ok"
        yield notebook


def workers_of(notebook: Kernel) -> list[psutil.Process]:
    """The worker processes below a kernel, by pid."""
    return sorted(engines_of(psutil.Process(notebook.pid), "rpc-server"), key=lambda worker: worker.pid)


def test_start_makes_sure_that_so_many_workers_run(first: Kernel) -> None:
    assert first.run("%sollol_cluster start 2").stream.startswith("started 2 workers: 127.0.0.1:")
    two = workers_of(first)
    assert len(two) == 2
    again = first.run("%sollol_cluster start 2").stream
    assert again.startswith("2 workers already run: 127.0.0.1:")
    assert "`%sollol_cluster start 2 --more` starts more" in again
    assert workers_of(first) == two

    two[0].send_signal(signal.SIGKILL)
    eventually(lambda: len(workers_of(first)) == 1, "it has ended")
    first.run("from sollol_nb.notebook import router")
    lost = "any(event.kind == 'worker.lost' for event in router().events.recent())"
    eventually(lambda: first.value(lost) == "True", "its kernel knows")
    assert first.run("%sollol_cluster start 2").stream.startswith("started 1 worker: 127.0.0.1:")
    assert len(workers_of(first)) == 2
    text = first.run("%sollol_cluster --text").stream
    assert "\n2 workers: all free\n" in text, "the one that died was replaced"

    first.run("%sollol_cluster start 1 --more")
    assert len(workers_of(first)) == 3
    two_numbers = first.run("%sollol_cluster start 3 4")
    assert "UsageError: start takes one number of workers, not '3 4'" in str(two_numbers)
    assert len(workers_of(first)) == 3

    stopped = first.run("%sollol_cluster stop").stream
    assert stopped.startswith("stopped worker 127.0.0.1:")
    assert workers_of(first) == []
    assert first.run("%sollol_cluster stop").stream == "nothing is running\n"
    text = first.run("%sollol_cluster --text").stream
    assert "no worker is known" in text, "a stopped worker is not a lost one"


def test_what_another_notebook_uses_is_let_go_and_not_ended(first: Kernel, second: Kernel) -> None:
    first.run("%sollol_cluster start 2")
    assert second.run("%sollol_cluster start 2").stream.startswith("2 workers already run")
    for notebook in (first, second):
        assert notebook.run(ASK).status == "ok"
    url = first.value("answer.routing['coordinator_url']")
    assert second.value("answer.routing['coordinator_url']") == url
    engines = engines_of(psutil.Process(first.pid))

    stop = second.run("%sollol_stop").stream
    assert stop == "left coordinator demo:sharded running: first.ipynb uses it; --force stops it too\n"
    assert second.run(ASK).status == "ok", "it is found again"
    left = second.run("%sollol_cluster stop").stream
    assert "left coordinator demo:sharded running: first.ipynb uses it" in left
    assert left.count("first.ipynb") == 3
    named = second.run("%sollol_stop demo:sharded").stream
    assert named == "left coordinator demo:sharded running: first.ipynb uses it; --force stops it too\n"
    assert "stopped" not in second.run("%sollol_stop --all").stream
    assert first.run(ASK).status == "ok"
    assert first.value("answer.routing['coordinator_url'], answer.routing['failovers']") == f"({url}, [])"
    assert engines_of(psutil.Process(first.pid)) == engines

    assert second.run("%sollol_stop demo:sharded --force").stream == "stopped coordinator demo:sharded\n"
    assert first.run(ASK).status == "ok", "it starts again"
    assert first.run("%sollol_cluster stop").stream.startswith("stopped coordinator demo:sharded, worker 127")
    assert workers_of(first) == []


def test_add_and_remove_say_in_one_line_what_they_did(first: Kernel) -> None:
    first.run("%sollol_cluster start 1")
    (worker,) = workers_of(first)
    port = worker.net_connections("tcp")[0].laddr.port
    refused = unused_port()
    for line, said in [
        ("add nohost.invalid", "not added: nohost.invalid:50052 cannot be reached ("),
        (f"add 127.0.0.1:{refused}", f"not added: nothing listens on 127.0.0.1:{refused}; start a worker there: "),
        (f"add [::1]:{refused}", f"not added: nothing listens on [::1]:{refused}; start a worker there: "),
        (f"add 127.0.0.1:{port}", f"added worker 127.0.0.1:{port}: free, "),
        (
            f"add localhost:{port}",
            f"not added: localhost:{port}: the same worker as 127.0.0.1:{port}, which is used",
        ),
        (f"remove 127.0.0.1:{port}", f"removed worker 127.0.0.1:{port}"),
    ]:
        stream = first.run(f"%sollol_cluster {line}").stream
        assert stream.startswith(said)
        assert stream.count("\n") == 1


def test_discover_lists_what_could_be_used_and_uses_only_what_is_on_this_machine(
    first: Kernel, second: Kernel
) -> None:
    started = first.run("%sollol_cluster start 1").stream
    name = started.removeprefix("started 1 worker: ").strip()
    said = second.run("%sollol_cluster discover --text --ssh nowhere.invalid --scan 127.0.0.1").stream.splitlines()
    assert said[0] == f"found 1 new worker: {name}"
    assert said[1].split("  ")[0] == "worker"
    (here,) = (line for line in said[2:] if line.startswith(name))
    assert "  used here, started by first.ipynb (process " in here
    assert here.endswith("added already")
    position = next(number for number, line in enumerate(said) if line.startswith("ssh://nowhere.invalid"))
    assert said[position].split() == ["ssh://nowhere.invalid", "ssh", "down"]
    assert said[position + 1].startswith("    nowhere.invalid")
    cluster = said[said.index("no coordinator is running") :]
    assert cluster[1] == "1 worker: free"

    public = second.run("%sollol_cluster discover --scan 8.8.8.0/24")
    assert "ConfigError: 8.8.8.0/24 is not a private network" in str(public.error)
