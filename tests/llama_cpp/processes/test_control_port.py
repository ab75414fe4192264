"""The control port of a supervisor: serves clients with the engine's key, and withstands everybody else."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.engines import eventually, posix_only, suspended
from tests.support.supervised import (
    IGNORES,
    KEY,
    MINUTES,
    Control,
    Supervised,
    supervised,
    with_constants,
)

# --- control ----------------------------------------------------------------------------------


def test_leases_are_counted_over_all_clients_and_end_with_their_connection(folder: Path) -> None:
    with supervised(folder) as owner:
        first, second, watcher = owner.connect(), owner.connect(), owner.connect()
        assert [client.ask("hold")["ok"] for client in (first, first, second)] == [True, True, True]
        status = watcher.ask("status")
        assert (status["clients"], status["leases"]) == (2, 3)
        assert status["idle_s"] is status["ends_in_s"] is None, "it is held"
        assert second.ask("free")["ok"]
        assert second.ask("free")["ok"], "it has none, and another client's lease is not touched"
        assert watcher.ask("status")["leases"] == 2
        first.close()
        eventually(lambda: watcher.ask("status")["clients"] == 1, "the end of a connection is seen")
        status = watcher.ask("status")
        assert status["leases"] == 0
        assert 0 < status["ends_in_s"] <= 600 - status["idle_s"]


def test_requests_in_one_write_are_answered_in_order(folder: Path) -> None:
    with supervised(folder) as owner:
        control = owner.connect(key=None)
        control.send({"key": KEY}, *({"n": n, "do": "hold"} for n in range(50)), {"n": "x", "do": "status"})
        answers = [control.line() for _ in range(52)]
    assert answers[0] is not None
    assert answers[0]["event"] == "hello"
    assert answers[1:51] == [{"n": n, "ok": True} for n in range(50)]
    assert answers[51] is not None
    assert answers[51]["leases"] == 50


@pytest.mark.parametrize(
    ("seconds", "kept"), [(1000, 1000.0), (0.5, 0.5), (0, 0.0), (-3, 0.0), (None, None)], ids=str
)
def test_keep_alive_is_set_and_is_in_the_entry(seconds: float | None, kept: float | None, folder: Path) -> None:
    with supervised(folder, program=with_constants(folder, MIN_IDLE_S=100.0)) as owner:
        control = owner.connect()
        assert control.ask("keep_alive", seconds=seconds) == {"ok": True}
        assert owner.entry()["keep_alive_s"] == kept
        ends_in_s = control.ask("status")["ends_in_s"]
        assert ends_in_s is None if kept is None else 0 < ends_in_s <= max(kept, 100)


def test_about_is_merged_into_the_entry(folder: Path) -> None:
    with supervised(folder, about={"model": "a", "port": 1}) as owner:
        assert owner.connect().ask("about", about={"port": 2, "url": "\u00fc"}) == {"ok": True}
        assert owner.entry()["about"] == {"model": "a", "port": 2, "url": "\u00fc"}


def test_the_end_is_reported_to_every_client(folder: Path) -> None:
    with supervised(folder, f"print('up', flush=True); {MINUTES}") as owner:
        owner.line("up")
        clients = [owner.connect() for _ in range(3)]
        assert clients[0].ask("stop", why="as a test") == {"ok": True}
        for client in clients:
            report = client.exited()
            assert (report["tail"], report["why"]) == (["up"], "as a test")
            assert report["code"] == -signal.SIGTERM or os.name != "posix"
        owner.all_gone()
    assert owner.log_path.read_text("utf-8").splitlines()[-1] == (
        f"[the engine ended: exit code {report['code']}, as a test]"
    )


def test_stop_unless_used_spares_an_engine_of_other_processes_and_one_that_is_held(folder: Path) -> None:
    with supervised(folder) as owner:
        mine, idle, other = (owner.connect(pid=pid, name=name) for pid, name in [(7, "a"), (7, "b"), (8, "c")])
        for unless in ("used", "foreign"):
            assert mine.ask("stop", unless=unless) == {"ok": False, "users": ["c"]}
        other.close()
        eventually(lambda: mine.ask("status")["clients"] == 1, "the other process has left")
        idle.ask("hold")
        assert mine.ask("stop", unless="used") == {"ok": False, "users": ["b"]}
        idle.ask("free")
        assert mine.ask("stop", unless="used") == {"ok": True}
        mine.exited()


@pytest.mark.parametrize("unless", ["shared", "used", "foreign"])
def test_of_two_that_stop_an_engine_at_the_same_time_the_second_one_ends_it(folder: Path, unless: str) -> None:
    with supervised(folder) as owner:
        first, second = owner.connect(pid=7, name="a"), owner.connect(pid=8, name="b")
        first.ask("hold")
        assert first.ask("stop", unless=unless, leave=True) == {"ok": False, "users": ["b"]}
        status = second.ask("status")
        assert (status["clients"], status["leases"]) == (0, 0), "though it is still connected"
        assert second.ask("stop", unless=unless, leave=True) == {"ok": True}
        assert second.exited()["why"] == "stopped"


def test_stop_unless_shared_spares_an_engine_that_others_are_connected_to(folder: Path) -> None:
    with supervised(folder) as owner:
        mine, other, keyless = owner.connect(), owner.connect(), owner.connect(key=None)
        assert mine.ask("stop", unless="shared") == {"ok": False, "users": ["another process"]}
        assert mine.ask("hold")["ok"], "the engine is not ending"
        other.close()
        eventually(lambda: mine.ask("status")["clients"] == 0, "the other has left")
        assert mine.ask("stop", unless="shared") == {"ok": True}, "a client without a key does not count"
        mine.exited()
        assert keyless.line() is None


@posix_only
def test_engine_that_is_ending_grants_no_lease_and_is_killed_after_the_shortest_grace(folder: Path) -> None:
    with supervised(folder, f"{IGNORES} print('up', flush=True); {MINUTES}") as owner:
        owner.line("up")
        control = owner.connect()
        assert control.ask("stop", grace_s=1000) == {"ok": True}
        assert control.ask("hold") == {"ok": False}
        assert owner.is_running()
        assert control.ask("stop", grace_s=0.1, why="another reason") == {"ok": True}
        assert control.exited() == {"code": -signal.SIGKILL, "tail": ["up"], "why": "stopped"}


def test_unknown_request_is_refused_and_the_connection_stays(folder: Path) -> None:
    with supervised(folder) as owner:
        control = owner.connect()
        assert control.ask("explode") == {"ok": False}
        assert control.ask("hold") == {"ok": True}


# --- other programs----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Supervised]:
    """A supervisor that many programs without a key connect to."""
    with supervised(tmp_path_factory.mktemp("standing")) as owner:
        yield owner


STOP = b'{"n": 1, "do": "stop"}\n'
GREETING = json.dumps({"key": KEY}).encode() + b"\n"


@pytest.mark.parametrize(
    "data",
    [
        b'{"key": "wrong"}\n',
        b'{"key": ""}\n',
        b'{"key": null}\n',
        b'{"key": ["' + KEY.encode() + b'"]}\n',
        b'{"key": "\\ud800"}\n',
        b'{"key": "' + KEY.encode()[:-1] + b'"}\n',
        b'{"key": "' + KEY.encode() + b'!"}\n',
        b'{"KEY": "' + KEY.encode() + b'"}\n',
        b'["key"]\n',
        b"3\n",
        b"\n",
        b"not JSON\n",
        b"\xff\xfe\0\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"[" * 100_000 + b"\n",
        b"9" * 100_000 + b"\n",
        STOP,
    ],
    ids=lambda data: ascii(data[:24]),
)
def test_client_without_the_key_is_dropped_without_an_answer(data: bytes, standing: Supervised) -> None:
    keyless = standing.connect(key=None)
    with contextlib.suppress(OSError):  # dropped before everything was sent
        keyless.socket.sendall(data + STOP)
    assert keyless.line() is None
    assert standing.connect().ask("hold")["ok"], "others are served"
    assert standing.is_running()


@pytest.mark.parametrize(
    "data",
    [
        b'{"do": "hold"}\n',
        b'{"n": 1}\n',
        b'{"n": 1, "do": "keep_alive"}\n',
        b'{"n": 1, "do": "keep_alive", "seconds": "ten"}\n',
        b'{"n": 1, "do": "keep_alive", "seconds": 1' + b"0" * 400 + b"}\n",
        b'{"n": 1, "do": "stop", "grace_s": []}\n',
        b'{"n": 1, "do": "about", "about": 3}\n',
        b'{"n": ' + b"[" * 9000 + b"]" * 9000 + b', "do": "x"}\nnot JSON\n',
        b'{"n": 1, "do": ["hold"]}\nnot JSON\n',
        b"null\n",
        GREETING,
    ],
    ids=lambda data: ascii(data[:40]),
)
def test_a_malformed_request_ends_its_connection_and_no_other(data: bytes, standing: Supervised) -> None:
    confused, watcher = standing.connect(), standing.connect()
    assert confused.ask("hold")["ok"]
    held = watcher.ask("status")["leases"]
    confused.socket.sendall(data)
    while (answer := confused.line()) is not None:
        assert not answer["ok"]
    eventually(lambda: watcher.ask("status")["leases"] < held, "its lease has ended")
    assert standing.is_running()


def pour(control: Control, data: bytes) -> None:
    """Send the same again and again, and read nothing."""
    for _ in range(100_000):
        control.socket.sendall(data)


@pytest.mark.parametrize("greeting", [b"", GREETING], ids=["without a key", "with the key"])
def test_endless_line_is_cut_off(greeting: bytes, standing: Supervised) -> None:
    endless = standing.connect(key=None)
    endless.socket.sendall(greeting)
    with pytest.raises(ConnectionError):
        pour(endless, b"a" * 65536)
    assert standing.connect().ask("hold")["ok"]
    assert psutil.Process(standing.process.pid).memory_info().rss < 30 * 1024**2


def test_client_that_never_reads_is_dropped(standing: Supervised) -> None:
    deaf = standing.connect()
    with pytest.raises(ConnectionError):
        pour(deaf, json.dumps({"n": "x" * 10_000, "do": "status"}).encode() + b"\n")
    assert standing.connect().ask("hold")["ok"]
    assert psutil.Process(standing.process.pid).memory_info().rss < 30 * 1024**2


def test_missing_greeting_is_not_waited_for(folder: Path) -> None:
    with supervised(folder, program=with_constants(folder, GREETING_LIMIT_S=0.2)) as owner:
        with suspended(psutil.Process(owner.process.pid)):  # the time begins when it notices them
            silent, half, known = (owner.connect(key=None) for _ in range(3))
            half.socket.sendall(GREETING[:-5])
            known.socket.sendall(GREETING)
        assert known.line() is not None
        assert silent.line() is half.line() is None
        assert known.ask("status")["clients"] == 0


def test_many_clients_without_a_key_leave_room_for_clients_with_it(folder: Path) -> None:
    with supervised(folder) as owner, contextlib.ExitStack() as crowd:
        process = psutil.Process(owner.process.pid)
        known = [owner.connect() for _ in range(3)]
        for _ in range(200):
            crowd.enter_context(socket.create_connection(("127.0.0.1", owner.control_port)))
        late = owner.connect()
        assert late.ask("status")["clients"] == len(known)
        assert all(client.ask("hold")["ok"] for client in known)
        if os.name == "posix":
            assert process.num_fds() < 150, "far below the limit of open files"
