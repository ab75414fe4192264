"""`sollol-nb worker`, `invite` and `revoke`, as people run them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.links import memberships
from sollol_nb.llama_cpp.links.join_link import Build, JoinLink
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.running import stop_engines
from sollol_nb.llama_cpp.workers.probe import ProbeOutcome, probe
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import eventually, is_alive, posix_only, run, unused_port

pytestmark = pytest.mark.engine

COMMAND = (sys.executable, "-m", "sollol_nb")


@pytest.fixture(autouse=True)
def empty_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A user without any engine."""
    monkeypatch.setenv("SOLLOL_STATE_DIR", str(tmp_path))
    yield
    run(stop_engines(also_used=True))


@contextmanager
def worker(*arguments: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A `sollol-nb worker`, ended at the end as by Ctrl-C."""
    process = subprocess.Popen(
        [*COMMAND, "worker", "--threads", "1", *arguments],
        env={**os.environ, **variables},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate() if sys.platform == "win32" else process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)


def line(process: subprocess.Popen[str]) -> str:
    """The next line that it shows."""
    assert process.stderr is not None
    return process.stderr.readline()


def invite(*options: str) -> JoinLink:
    """The link in the command that `sollol-nb invite` prints."""
    done = subprocess.run(
        [*COMMAND, "invite", "--host", "127.0.0.1", *options],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    command, link = done.stdout.strip().rsplit(" ", 1)
    assert command == "sollol-nb worker --join"
    assert link not in done.stderr
    return JoinLink.of(link)


def lent() -> list[psutil.Process]:
    """The workers that run for others."""
    found = []
    for entry in registry.entries(registry.LENT):
        with suppress(psutil.NoSuchProcess):  # it may end at any moment
            found.append(psutil.Process(entry.pid))
    return found


def change_state(**changes: object) -> None:
    memberships.write(replace(memberships.read(), **changes))  # type: ignore[arg-type]


def test_a_worker_joins_by_the_variable_too_is_listed_and_leaves_with_its_terminal(engine: Engine) -> None:
    link = invite("box")
    with worker(SOLLOL_JOIN=link.text) as process:
        assert line(process).startswith(f"sollol-nb: joined {link.address} as box: CPU, 1 thread, llama.cpp ")
        with HybridRouter() as router:
            router.discover_workers()
            eventually(lambda: [item.state for item in router.check_workers()] == ["free"], "it is found")
            (worker_here,) = router.check_workers()
            assert worker_here.name == "box"
            (joined,) = router.invitations().joined
            assert (joined.name, joined.endpoints) == ("box", (worker_here.endpoint,))
            (server,) = lent()
            assert server.net_connections("tcp")[0].laddr.ip == "127.0.0.1"
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
            eventually(lambda: not is_alive(server) and not memberships.read().members, "it has left")


def test_what_cannot_join_is_one_line_and_starts_no_worker(engine: Engine) -> None:
    links = {name: invite(name) for name in ("used", "expired", "wrong", "certificate", "build")}
    change_state(
        invitations=tuple(
            replace(item, uses_left=0)
            if item.name == "used"
            else replace(item, expires_at=0.0)
            if item.name == "expired"
            else item
            for item in memberships.read().invitations
        ),
    )
    texts = {
        "was used already": links["used"].text,
        "has expired": links["expired"].text,
        "no invitation has this token": replace(links["wrong"], token="w" * 22).text,
        "another certificate than the link says": replace(links["certificate"], fingerprint=bytes(32)).text,
        "nothing listens there": replace(links["wrong"], port=unused_port()).text,
        "not a join link": "sollol://somewhere",
    }
    for reason, text in texts.items():
        done = subprocess.run(
            [*COMMAND, "worker", "--join", text], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 1
        assert reason in done.stderr
        assert done.stderr.count("\n") == 1
        assert JoinLink.of(links["used"].text).token not in done.stderr

    change_state(build=Build(commit="abcdef0", protocol="6.0.0"))
    with worker("--join", links["build"].text) as process:
        shown = line(process)
        assert process.wait(30) == 1
    for part in ("llama.cpp abcdef0 (RPC protocol 6.0.0)", engine.protocol, "`sollol-nb install` there"):
        assert part in shown
    assert not list(Path(os.environ["SOLLOL_STATE_DIR"], "logs").glob(f"{registry.LENT}-*"))


@posix_only
def test_nothing_of_a_worker_is_left_when_it_is_killed(engine: Engine) -> None:
    with worker("--port", str(unused_port())) as process:
        assert "a worker listens on 127.0.0.1:" in line(process)
        (server,) = lent()
        process.kill()
        process.wait()
        eventually(lambda: not is_alive(server), "the worker has ended")


def test_a_worker_without_an_invitation_listens_and_no_router_takes_it(engine: Engine) -> None:
    port = unused_port()
    with worker("--port", str(port)) as process:
        assert line(process) == f"sollol-nb: a worker listens on 127.0.0.1:{port}; Ctrl-C ends it\n"
        assert run(probe("127.0.0.1", port)).outcome is ProbeOutcome.FREE
        with HybridRouter(auto_discover_rpc=True) as router:
            assert router.share_workers() == []
            (server,) = lent()
            server.kill()  # it is started again, at the same port
            eventually(lambda: [found for found in lent() if found != server], "another one runs")
            eventually(lambda: run(probe("127.0.0.1", port)).outcome is ProbeOutcome.FREE, "it answers")
    assert not lent()


def test_a_worker_that_others_can_reach_says_so(engine: Engine) -> None:
    with worker("--host", "0.0.0.0", "--port", str(unused_port())) as process:
        line(process)
        assert "warning: whoever can connect to 0.0.0.0:" in line(process)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--threads", "0"), "--threads is 0"),
        (("--port", "70000"), "not an endpoint"),
        (("--device", "CUDA0;x"), "not a list of devices"),
        (("--join", "sollol://a:1/" + "x" * 22 + "." + "A" * 43, "--port", "1"), "with --join nothing listens"),
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments: tuple[str, ...], message: str) -> None:
    done = subprocess.run(
        [*COMMAND, "worker", *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert message in done.stderr


def test_revoke_says_what_it_has_ended(engine: Engine) -> None:
    def revoke(*names: str) -> str:
        done = subprocess.run(
            [*COMMAND, "revoke", *names], capture_output=True, text=True, timeout=60, check=False
        )
        return done.stdout + done.stderr

    invite("one", "--uses", "3", "--for", "10m")
    assert "named two; known: one" in revoke("two")
    assert revoke("one") == "revoked one\n"
    assert revoke() == "no invitation is open, and no worker has joined\n"
