"""The registry: it lists what runs, removes what is dead, and touches nothing else."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import psutil
import pytest

from sollol_nb.errors import ConfigError, WorkersUnavailableError
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.registry import Entry
from sollol_nb.runtime.process_identity import is_same_process
from sollol_nb.settings import config
from tests.support.engines import HANG_GUARD_S, eventually, is_alive, posix_only, run, says, script
from tests.support.supervised import KEY, MINUTES, PYTHON, nothing_is_left, supervised

US = psutil.Process()
UNUSED_PID = 2**22 + 5  # above the highest pid of Linux, and unused on other systems


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A registry for this test; in the end, none of its processes runs."""
    monkeypatch.setenv("SOLLOL_STATE_DIR", str(tmp_path))
    yield config.registry_dir()
    nothing_is_left(config.registry_dir())


@pytest.fixture
def unrelated() -> Iterator[psutil.Process]:
    """An unrelated process."""
    with subprocess.Popen([*PYTHON, MINUTES]) as process:
        yield psutil.Process(process.pid)
        process.kill()


def write(folder: Path, name: str = "worker-1", **changes: Any) -> Path:
    """Write an entry and its key; its supervisor is this process, and its engine does not exist."""
    (folder / f"{name}.key").write_text(KEY)
    entry = {
        "id": name,
        "kind": "worker",
        "pid": UNUSED_PID,
        "pid_started": 1000.0,
        "supervisor_pid": US.pid,
        "supervisor_started": US.create_time(),
        "control_port": 9,
        "key_path": str(folder / f"{name}.key"),
        "log_path": str(config.log_dir() / f"{name}.log"),
        "started_at": 2000.0,
        "keep_alive_s": 600.0,
        "about": {},
        **changes,
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(entry))
    return path


def ids(kind: str | None = None) -> list[str]:
    return [entry.id for entry in registry.entries(kind)]


# --- what it lists ----------------------------------------------------------------------------


def test_running_engines_are_listed_oldest_first_and_gone_when_they_end(folder: Path) -> None:
    assert registry.entries() == []
    with ExitStack() as running:
        worker = running.enter_context(supervised(folder, name="worker-b", about={"endpoint": "127.0.0.1:1"}))
        about = {"model": "m", "workers": ["127.0.0.1:1"]}
        coordinator = running.enter_context(
            supervised(folder, name="coordinator-a", kind="coordinator", about=about)
        )
        assert ids() == ["worker-b", "coordinator-a"]
        assert ids("worker") == ["worker-b"]
        assert ids("coordinator") == ["coordinator-a"]
        assert [(entry.name, entry.workers) for entry in registry.entries()] == [
            ("127.0.0.1:1", []),
            ("m", ["127.0.0.1:1"]),
        ]
        assert [entry.read_key() for entry in registry.entries()] == [KEY, KEY]
        assert {endpoint: entry.id for endpoint, entry in registry.holders().items()} == {
            "127.0.0.1:1": "coordinator-a"
        }
        for owner in (worker, coordinator):
            control = owner.connect()
            control.ask("stop")
            control.exited()
            assert owner.spec["id"] not in ids(), "it is removed before its end is reported"
            assert owner.files == []


def test_repr_of_an_entry_shows_neither_its_key_nor_its_about(folder: Path) -> None:
    write(folder, about={"model": "m", "prompt": "a secret"})
    (entry,) = registry.entries()
    assert KEY not in repr(entry)
    assert "a secret" not in repr(entry)
    Path(entry.key_path).unlink()
    assert entry.read_key() is None


@pytest.mark.parametrize(
    ("about", "description"),
    [
        ({"owner_pid": os.getpid(), "owner": "x"}, "this kernel"),
        ({"owner_pid": os.getppid(), "owner": "job.ipynb"}, f"job.ipynb (process {os.getppid()})"),
        ({"owner_pid": os.getppid()}, f"a kernel (process {os.getppid()})"),
        ({"owner_pid": UNUSED_PID, "owner": registry.GATEWAY}, "an earlier gateway"),
        ({"owner_pid": UNUSED_PID, "owner": "job.ipynb"}, "an earlier kernel of job.ipynb"),
        ({"owner_pid": UNUSED_PID, "owner": "mine.ipynb"}, "an earlier kernel of this notebook"),
    ],
)
def test_an_owner_is_named_by_its_notebook(
    about: dict[str, Any], description: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JPY_SESSION_NAME", "/home/me/mine.ipynb")
    assert registry.describe_owner(about) == description


@posix_only
def test_registry_is_readable_by_its_owner_only(folder: Path) -> None:
    assert folder.stat().st_mode & 0o777 == 0o700
    assert folder.parent == config.state_dir()


def test_reader_never_sees_a_partial_entry(folder: Path) -> None:
    with supervised(folder, name="worker-1") as owner:
        control, path, is_seen = owner.connect(), Path(owner.spec["entry_path"]), threading.Event()
        written = []

        def update() -> None:
            deadline = time.monotonic() + HANG_GUARD_S
            while len(written) < 400 or (not is_seen.is_set() and time.monotonic() < deadline):
                number = len(written)
                control.ask("about", about={"number": number, "filling": "x" * (number % 7) * 5000})
                written.append(number)

        writer = threading.Thread(target=update)
        writer.start()
        seen = set()
        try:
            while writer.is_alive():
                seen.add(json.loads(path.read_text("utf-8"))["about"].get("number"))
                assert ids() == ["worker-1"]
                if len(seen) > 2:  # it was read while it was written
                    is_seen.set()
        finally:
            is_seen.set()
            writer.join(HANG_GUARD_S)
        assert len(seen) > 2
        assert owner.entry()["about"]["number"] == written[-1]


# --- files that are not entries---------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", '"a"', '{"id": "x"}', "\x00\x01", "[" * 100_000, "{}"], ids=ascii
)
def test_file_that_is_not_an_entry_is_removed_and_the_others_are_read(text: str, folder: Path) -> None:
    write(folder, "good")
    (folder / "bad.json").write_text(text)
    assert ids() == ["good"]
    assert not (folder / "bad.json").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"pid": "17"},
        {"pid": None},
        {"pid": -1, "supervisor_pid": -1},
        {"supervisor_pid": 2**70},
        {"supervisor_pid": 1.5},
        {"supervisor_started": "yesterday"},
        {"control_port": None},
        {"key_path": 3},
        {"started_at": None},
        {"started_at": 10**400},
        {"keep_alive_s": []},
        {"about": []},
        {"about": None},
    ],
    ids=str,
)
def test_entry_with_a_field_of_another_kind_is_removed(change: dict[str, Any], folder: Path) -> None:
    write(folder, "good")
    bad = write(folder, "bad", **change)
    assert ids() == ["good"]
    assert not bad.exists()


@pytest.mark.parametrize("name", [field.name for field in fields(Entry) if field.name != "path"])
def test_entry_that_lacks_a_field_is_removed(name: str, folder: Path) -> None:
    path = write(folder)
    entry = json.loads(path.read_text())
    del entry[name]
    path.write_text(json.dumps(entry))
    assert registry.entries() == []
    assert not path.exists()


def test_entry_of_a_newer_version_is_read_as_far_as_it_is_known(folder: Path) -> None:
    write(folder, added_later="x")
    assert ids() == ["worker-1"]


def test_other_files_in_the_folder_stay(folder: Path) -> None:
    for name in ("claims.lock", "worker-9.key", "worker-9.json.new"):
        (folder / name).write_text("x")
    assert registry.entries() == []
    assert len(list(folder.iterdir())) == 3


# --- what is dead -----------------------------------------------------------------------------


def test_a_process_is_identified_by_pid_and_start_time(unrelated: psutil.Process) -> None:
    started = unrelated.create_time()
    assert is_same_process(unrelated.pid, started)
    assert is_same_process(unrelated.pid, started + 1), "clocks are adjusted now and then"
    assert is_same_process(unrelated.pid, None), "a start time is not always known"
    assert not is_same_process(unrelated.pid, started + 60)
    assert not is_same_process(UNUSED_PID, None)
    unrelated.kill()
    eventually(lambda: not is_alive(unrelated), "it has ended")
    assert not is_same_process(unrelated.pid, started), "dead, but not reaped yet"


@pytest.mark.parametrize("supervisor", ["gone", "a recycled pid"])
@pytest.mark.parametrize("engine", ["gone", "a recycled pid", "a recycled pid, start unknown"])
def test_dead_entry_is_cleaned_up_and_a_process_with_its_pid_is_left_alone(
    supervisor: str, engine: str, unrelated: psutil.Process, folder: Path
) -> None:
    path = write(
        folder,
        pid=UNUSED_PID if engine == "gone" else unrelated.pid,
        pid_started=None if "unknown" in engine else unrelated.create_time() - 100,
        supervisor_pid=UNUSED_PID if supervisor == "gone" else unrelated.pid,
        supervisor_started=unrelated.create_time() - 100,
    )
    entry = registry._read(path)
    assert entry is not None
    assert not entry.is_alive()
    assert registry.entries() == []
    assert list(folder.iterdir()) == []
    assert is_alive(unrelated)


@posix_only
def test_engine_without_supervisor_and_guard_is_ended_by_the_next_reader(folder: Path) -> None:
    with supervised(folder) as owner:
        assert owner.engine is not None
        (guard,) = set(psutil.Process(owner.process.pid).children()) - {owner.engine}
        guard.kill()
        owner.process.kill()
        try:
            eventually(lambda: owner.process.poll() is not None and not is_alive(guard), "both are gone")
            assert is_alive(owner.engine)
            assert len(owner.files) == 2
            assert registry.entries() == []
            assert owner.files == []
            eventually(lambda: not owner.is_running(), "the engine has ended too")
        finally:
            with suppress(psutil.NoSuchProcess):
                owner.engine.kill()


@posix_only
def test_guard_that_is_killed_does_not_disturb_the_supervisor(folder: Path) -> None:
    with supervised(folder) as owner:
        (guard,) = set(psutil.Process(owner.process.pid).children()) - {owner.engine}
        guard.kill()
        control = owner.connect()
        assert control.ask("stop") == {"ok": True}
        control.exited()
        owner.all_gone()
    assert owner.process.returncode == 0


@pytest.mark.parametrize("where", ["outside", "outside by dots", "a folder", "missing"])
def test_cleaning_up_an_entry_removes_nothing_outside_the_registry(
    where: str, folder: Path, tmp_path: Path
) -> None:
    precious, inside = tmp_path / "precious", folder / "inside"
    precious.write_text("x")
    inside.mkdir()
    key_path = {
        "outside": precious,
        "outside by dots": f"{folder}/../precious",
        "a folder": inside,
        "missing": folder / "missing",
    }[where]
    path = write(folder, supervisor_pid=UNUSED_PID, key_path=str(key_path))
    assert registry.entries() == []
    assert precious.exists()
    assert inside.exists()
    assert not path.exists()


# --- what somebody else could have put there -------------------------------------------------------


def test_the_key_and_the_log_of_an_entry_are_those_of_its_own_folders(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a secret of the user")
    path = write(folder, key_path=str(secret), log_path=str(secret))
    (entry,) = registry.entries()
    assert entry.read_key() == KEY
    assert Path(entry.log_path).parent == config.log_dir()
    Path(entry.key_path).unlink()
    Path(entry.key_path).symlink_to(secret)
    assert entry.read_key() is None
    path.unlink()


@posix_only
@pytest.mark.parametrize("mode", [0o666, 0o622], ids=oct)
def test_an_entry_that_others_can_write_does_not_count(mode: int, folder: Path) -> None:
    write(folder, "good")
    write(folder, "bad").chmod(mode)
    assert ids() == ["good"]


@posix_only
def test_an_entry_behind_a_link_does_not_count(folder: Path, tmp_path: Path) -> None:
    write(folder, "bad").rename(tmp_path / "elsewhere.json")
    (folder / "bad.json").symlink_to(tmp_path / "elsewhere.json")
    assert ids() == []
    assert (tmp_path / "elsewhere.json").exists()


@posix_only
def test_no_entry_counts_in_a_folder_where_others_can_write(folder: Path) -> None:
    write(folder)
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match="other users can write in the folder"):
        registry.entries()
    folder.chmod(0o700)
    assert ids() == ["worker-1"]


@posix_only
def test_a_lock_that_is_a_link_is_refused_and_its_target_stays(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    (folder / "claims.lock").symlink_to(tmp_path / "precious")

    async def claim() -> None:
        async with registry.claims():
            pass

    with pytest.raises(ConfigError, match=r"claims\.lock is not used, because it is a symbolic link"):
        run(claim())
    assert (tmp_path / "precious").read_text() == "x"


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "coordinator", "about": {"url": "http://10.0.0.66:18080"}},
        {"kind": "coordinator", "about": {"url": "http://127.0.0.1@10.0.0.66:18080"}},
        {"kind": "coordinator", "about": {"workers": "127.0.0.1:1"}},
        {"kind": "coordinator", "about": {"workers": [3]}},
        {"kind": "coordinator", "about": {"model": ["x"]}},
        {"kind": "coordinator", "about": {"context_tokens": "8192"}},
        {"kind": "coordinator", "about": {"slots": [4]}},
        {"kind": "coordinator", "about": {"probes": ["127.0.0.1:1"]}},
        {"kind": "program"},
        {"id": "../worker-1"},
        {"about": {"endpoint": "127.0.0.1:fifty"}},
        {"about": {"endpoint": "10.0.0.66:50052"}},
        {"about": {"owner_pid": "1"}},
        {"about": {"owner_pid": 1, "owner_started": "today"}},
    ],
    ids=str,
)
def test_an_entry_that_no_supervisor_writes_is_removed(change: dict[str, Any], folder: Path) -> None:
    write(folder, "good")
    bad = write(folder, "bad", **change)
    assert ids() == ["good"]
    assert not bad.exists()


# --- claims -----------------------------------------------------------------------------------

CLAIMS = """
import asyncio, sys
from pathlib import Path
from sollol_nb.llama_cpp.processes import registry

async def hold():
    async with registry.claims():
        print("held", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
    print("released", flush=True)

async def count():
    counter = Path(sys.argv[2])
    for _ in range(8):
        async with registry.claims():
            number = int(counter.read_text())
            await asyncio.sleep(0.001)
            counter.write_text(str(number + 1))

async def both():
    print("ready", flush=True)
    sys.stdin.readline()
    await asyncio.gather(count(), count())

asyncio.run(hold() if sys.argv[1] == "hold" else both())
"""


async def claimed() -> bool:
    async with registry.claims():
        return True


@pytest.mark.parametrize("ending", ["released", "killed"])
def test_claims_wait_until_the_other_process_releases_them_or_dies(
    ending: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with script(CLAIMS, "hold") as other:
        says(other, "held")
        with monkeypatch.context() as patched:
            patched.setattr(registry, "LOCK_TIMEOUT_S", 0.0)
            with pytest.raises(
                WorkersUnavailableError, match="another process has been choosing workers"
            ) as caught:
                run(claimed())
        assert "\n" not in str(caught.value)

        async def waits() -> bool:
            waiting = asyncio.create_task(claimed())
            await asyncio.sleep(0)
            assert not waiting.done()
            if ending == "killed":
                other.kill()
            else:
                assert other.stdin is not None
                other.stdin.write("\n")
                other.stdin.flush()
            return await waiting

        assert run(waits())


def test_claims_exclude_each_other_across_and_within_processes(folder: Path, tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    with ExitStack() as started:
        others = [started.enter_context(script(CLAIMS, "count", str(counter))) for _ in range(2)]
        for other in others:
            says(other, "ready")
        for other in others:
            assert other.stdin is not None
            other.stdin.write("\n")
            other.stdin.flush()
        assert [other.wait(HANG_GUARD_S) for other in others] == [0, 0]
    assert counter.read_text() == str(2 * 2 * 8)


def test_claim_that_fails_or_is_cancelled_is_released(folder: Path) -> None:
    async def interrupted() -> None:
        async with registry.claims():
            raise KeyError("as a test")

    for _ in range(2):
        with pytest.raises(KeyError):
            run(interrupted())
    assert run(claimed())


# --- logs -------------------------------------------------------------------------------------


def test_oldest_logs_are_removed_unless_in_use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "LOGS_KEPT", 3)
    names = [f"{kind}-{number}.log" for number in range(4) for kind in ("worker", "coordinator")]
    for age, name in enumerate(["notes.txt", "mine.log", *names]):
        (config.log_dir() / name).write_text("x")
        os.utime(config.log_dir() / name, (1000 + age, 1000 + age))
    write(folder, log_path=str(config.log_dir() / "coordinator-0.log"))

    registry.prune_logs()

    left = {path.name for path in config.log_dir().iterdir()}
    assert left == {"notes.txt", "mine.log", "coordinator-0.log", *names[-3:]}


def test_each_engine_gets_its_own_log(folder: Path) -> None:
    first, second = (registry.new_log_path(registry.WORKER, 50052) for _ in range(2))
    assert first != second
    assert first.parent == config.log_dir()
    assert re.fullmatch(r"worker-50052-\w+\.log", first.name)
