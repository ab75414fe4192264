"""The script that runs a machine's workers there, in each POSIX shell that is installed, with a stand-in for the
worker: it prints its arguments, and waits."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sollol_nb.llama_cpp.links import ssh
from tests.support.engines import (
    HANG_GUARD_S,
    eventually,
    is_alive,
    kill_at_once,
    linux_only,
    posix_only,
    repeatedly,
)

pytestmark = posix_only

SHELLS = [
    shell
    for shell in (
        ("sh",),
        ("dash",),
        ("bash", "--posix"),
        ("busybox", "sh"),
        ("ksh",),
        ("mksh",),
        ("zsh", "--emulate", "sh"),
    )
    if shutil.which(shell[0])
]
"""Systems have different ones as `sh`."""


class Agent:
    """The running script."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def line(self) -> list[str]:
        """The next line that it reports, as its parts."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().split()

    def send(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text)
        self.process.stdin.flush()

    def beat(self) -> None:
        """Send a heartbeat after half a second: the agent's nap of a second ends early, and is not counted."""
        time.sleep(0.5)
        with contextlib.suppress(OSError):  # the agent has ended
            self.send("\n")

    def workers(self) -> list[psutil.Process]:
        """The stand-ins that run."""
        return list(filter(_is_stand_in, psutil.Process(self.process.pid).children(recursive=True)))

    def ended(self) -> int:
        """Wait until it has ended and all that it has started is gone."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        code = self.process.wait(HANG_GUARD_S)
        eventually(lambda: not any(map(is_alive, family)), "nothing is left")
        return code


def _is_stand_in(process: psutil.Process) -> bool:
    try:
        return "-d" in process.cmdline()
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def agent(
    folder: Path, shell: tuple[str, ...], *devices: str, silence_s: int = 60, body: str = "", cache_kib: int = 0
) -> Iterator[Agent]:
    program = folder / "worker"
    log = f'echo "$@ $GGML_NO_BACKTRACE$LLAMA_ARG_HOST" >>"{folder}/log"'
    never = folder / "never"
    os.mkfifo(never)
    # It waits without a child, whose command line would be the same at first.
    program.write_text(f'#!/bin/sh\n{log}\n{body}\nread -r line <"{never}"\n')
    program.chmod(0o755)
    process = subprocess.Popen(
        [
            *shell,
            "-c",
            ssh.AGENT,
            "sh",
            str(program),
            str(silence_s),
            "7",
            "3",
            str(cache_kib),
            *devices,
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "LLAMA_ARG_HOST": "no"},
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        yield Agent(process)
    finally:
        for left in (
            [process, *psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
        ):
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
def test_each_device_gets_a_worker_that_is_started_again_and_ends_with_the_input(
    tmp_path: Path, shell: tuple[str, ...]
) -> None:
    with agent(tmp_path, shell, "CPU", "CUDA0") as running:
        started = [running.line(), running.line()]
        assert [line[:2] for line in started] == [["worker", "0"], ["worker", "1"]]
        ports = [int(line[2]) for line in started]
        assert all(16384 <= port < 32768 for port in ports)
        assert ports[0] != ports[1]
        log = tmp_path / "log"
        eventually(lambda: log.exists() and len(log.read_text().splitlines()) == 2, "both have started")
        assert sorted(log.read_text().splitlines()) == sorted(
            f"-H 127.0.0.1 -p {port} -t 3 -d {device} 1"
            for port, device in zip(ports, ("CPU", "CUDA0"), strict=True)
        )
        (first,) = (worker for worker in running.workers() if "CPU" in worker.cmdline())
        first.kill()
        assert running.line() == ["ended", "0", "137", "1"]
        again = running.line()
        assert again[:2] == ["worker", "0"]
        running.send("\n")
        assert running.process.stdin is not None
        running.process.stdin.close()
        running.ended()


@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
def test_all_ends_when_no_heartbeat_comes_and_a_worker_that_ends_at_once_gets_another_port(
    tmp_path: Path, shell: tuple[str, ...]
) -> None:
    with agent(
        tmp_path,
        shell,
        "CPU",
        silence_s=3,
        body=f'[ -e "{tmp_path}/again" ] || {{ touch "{tmp_path}/again"; exit 1; }}',
    ) as running:
        with repeatedly(running.beat):  # the stand-in may take long to end
            kind, index, port = running.line()
            assert (kind, index) == ("worker", "0")
            assert running.line() == ["ended", "0", "1", "1"]
        running.send("\n")
        kind, index, other = running.line()
        assert (kind, index) == ("worker", "0")
        assert other != port
        running.ended()


# --- caches of weights ----------------------------------------------------------------------------

MIB = 2**20
SIZE = 11 * MIB
LIMIT_KIB = 100 * 1024
FUNCTIONS = ssh.AGENT.partition("\nprepare_workers\n")[0]


def in_agent(shell: tuple[str, ...], caches: Path, commands: str, limit_kib: int = LIMIT_KIB) -> str:
    """Run functions of the script; returns what they print."""
    done = subprocess.run(
        [*shell, "-c", f"{FUNCTIONS}\nserver=$$\n{commands}", "sh", "worker", "9", "7", "3", str(limit_kib)],
        capture_output=True,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(caches)},
        timeout=HANG_GUARD_S,
        check=True,
    )
    return done.stdout.strip()


def cached(folder: Path, number: int, size: int = SIZE, *, age_s: float = 300.0, sealed: bool = False) -> Path:
    """A file in a cache, as the worker program writes it."""
    path = folder / "rpc" / f"{number:016x}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    os.utime(path, (time.time() - age_s,) * 2)
    if sealed:
        path.chmod(0o400)
    return path


def is_sealed(path: Path) -> bool:
    return not path.stat().st_mode & 0o200


@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
def test_a_cache_belongs_to_one_agent_until_that_has_ended(tmp_path: Path, shell: tuple[str, ...]) -> None:
    claim = "device_0=CPU device_1=CPU; claim_cache 0; claim_cache 1; echo $cache_0 $cache_1"
    first, second = in_agent(shell, tmp_path, claim).split()
    assert first.endswith("-CPU-0")
    assert second.endswith("-CPU-1")
    assert oct((tmp_path / "sollol_nb" / "tensors").stat().st_mode)[-3:] == "700"
    assert in_agent(shell, tmp_path, claim).split() == [first, second], "those that held them have ended"
    assert in_agent(shell, tmp_path, "device_0=CPU; claim_cache 0; echo $cache_0", limit_kib=0) == ""


@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
def test_before_a_worker_starts_what_is_not_sealed_goes_and_what_is_too_much(
    tmp_path: Path, shell: tuple[str, ...]
) -> None:
    folder = tmp_path / "sollol_nb" / "tensors" / "w"
    cut = cached(folder, 1)
    old, new = cached(folder, 2, sealed=True, age_s=900), cached(folder, 3, sealed=True)
    opening = f'open_cache "{folder}" && echo opened'
    assert in_agent(shell, tmp_path, opening) == "opened"
    assert [old.exists(), new.exists(), cut.exists()] == [True, True, False]
    in_agent(shell, tmp_path, opening, limit_kib=20 * 1024)
    assert [old.exists(), new.exists()] == [False, True]
    assert in_agent(shell, tmp_path, f"least_free_kib=999999999999\n{opening} || echo full") == "full"


@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
def test_complete_files_are_sealed_and_one_of_an_unknown_size_takes_the_others_with_it(
    tmp_path: Path, shell: tuple[str, ...]
) -> None:
    folder = tmp_path / "sollol_nb" / "tensors" / "w"
    tend = f'count=1 cache_0="{folder}"; note_sizes "5 {SIZE}"; tend'
    sound = cached(folder, 1)
    fresh = cached(folder, 2, age_s=0)
    in_agent(shell, tmp_path, tend)
    assert not is_sealed(sound), "a load may be running"
    os.utime(fresh, (time.time() - 300,) * 2)
    in_agent(shell, tmp_path, tend)
    assert is_sealed(sound)
    assert is_sealed(fresh)
    others = [cached(folder, 3), cached(folder, 4, SIZE // 2)]
    in_agent(shell, tmp_path, tend)
    assert sound.exists()
    assert not any(other.exists() for other in others)
    assert (folder.parent / "sizes").read_text().split() == ["5", str(SIZE)]


@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
def test_before_a_load_only_complete_files_are_left_in_the_caches_of_its_workers(
    tmp_path: Path, shell: tuple[str, ...]
) -> None:
    tensors = tmp_path / "sollol_nb" / "tensors"
    folder, other = tensors / "w", tensors / "v"
    verify = f'count=2 cache_0="{other}" cache_1="{folder}"; verify 7 1'
    assert in_agent(shell, tmp_path, "count=1 cache_0=; verify 6 0") == "verified 6", "it has no cache"
    sound, fresh = cached(folder, 1, sealed=True), cached(folder, 2, age_s=0)
    loading = cached(other, 3, SIZE // 2, age_s=0)
    assert in_agent(shell, tmp_path, f'note_sizes "5 {SIZE}"; {verify}') == "verified 7"
    assert is_sealed(sound)
    assert is_sealed(fresh)
    assert loading.exists(), "it is another worker's"
    sound.chmod(0o600)
    os.truncate(sound, SIZE // 2)
    sound.chmod(0o400)
    cut, complete = cached(folder, 4, SIZE // 2, age_s=0), cached(folder, 5, age_s=0)
    assert in_agent(shell, tmp_path, verify) == "verified 7"
    assert [path.exists() for path in (sound, fresh, cut, complete)] == [False, True, False, False]
    unwritten = f"dd() {{ return 1; }}\n{verify}"
    failed = cached(folder, 6, age_s=0)
    assert in_agent(shell, tmp_path, unwritten) == "verified 7"
    assert not failed.exists(), "it could not be flushed to the disk"
    cached(folder, 7, SIZE // 2)
    assert in_agent(shell, tmp_path, f"rm() {{ return 1; }}\n{verify} || :") == "", "it cannot be deleted"


@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
def test_a_file_that_is_gone_before_it_is_sealed_is_not_made_again(tmp_path: Path, shell: tuple[str, ...]) -> None:
    """A worker would take an empty file for a tensor."""
    folder = tmp_path / "sollol_nb" / "tensors" / "w"
    files = [cached(folder, number) for number in range(4)]
    once = f'[ -e "{tmp_path}/once" ] || rm -f "{folder}"/rpc/*[23]; : >"{tmp_path}/once"'
    other = f'chmod() {{ command chmod "$@"; {once}; }}\n'  # `tend` and `verify` may run at the same time
    in_agent(shell, tmp_path, f'{other}count=1 cache_0="{folder}"; note_sizes {SIZE}; tend')
    left = [file for file in files if file.exists()]
    assert 1 <= len(left) <= 2
    assert all(is_sealed(file) and file.stat().st_size == SIZE for file in left)


@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
def test_only_a_load_does_not_wait_for_a_slow_disk_and_not_for_each_cache_again(
    tmp_path: Path, shell: tuple[str, ...]
) -> None:
    tensors = tmp_path / "sollol_nb" / "tensors"
    folders = [tensors / name for name in ("w", "v")]
    files = [cached(folder, number) for folder in folders for number in range(2)]
    slow = f'date() {{ echo >>"{tmp_path}/ticks"; echo $(($(wc -l <"{tmp_path}/ticks") * 6)); }}\n'
    caches = " ".join(f'cache_{number}="{folder}"' for number, folder in enumerate(folders))
    assert in_agent(shell, tmp_path, f"{slow}count=2 {caches}; note_sizes {SIZE}; verify 1 0 1") == "verified 1"
    assert sum(map(is_sealed, filter(Path.exists, files))) == 1, "the others are sent again"
    files = [cached(folder, number) for folder in folders for number in range(10, 12)]
    in_agent(shell, tmp_path, f"{slow}count=2 {caches}; tend")
    assert all(map(is_sealed, files))


@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
def test_nothing_is_cached_where_others_can_write(tmp_path: Path, shell: tuple[str, ...]) -> None:
    claim = "device_0=CPU; claim_cache 0; echo $cache_0"
    tensors = tmp_path / "sollol_nb" / "tensors"
    assert in_agent(shell, tmp_path, claim)
    tensors.chmod(0o770)
    assert not in_agent(shell, tmp_path, claim)
    tensors.chmod(0o755)
    assert in_agent(shell, tmp_path, claim)
    if os.geteuid() == 0:
        os.chown(tensors, 1234, -1)
        assert not in_agent(shell, tmp_path, claim)


@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
def test_the_folder_of_the_caches_may_be_a_link(tmp_path: Path, shell: tuple[str, ...]) -> None:
    disk = tmp_path / "disk"
    (tmp_path / "sollol_nb").mkdir()
    (tmp_path / "sollol_nb" / "tensors").symlink_to(disk)
    file = cached(disk / "w", 1)
    disk.chmod(0o700)
    assert in_agent(shell, tmp_path, "device_0=CPU; claim_cache 0; echo $cache_0")
    used = in_agent(shell, tmp_path, "measure; echo $used")
    assert int(used) >= file.stat().st_size // 1024


@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
def test_a_cache_that_would_take_too_much_is_switched_off_while_a_model_loads(
    tmp_path: Path, shell: tuple[str, ...]
) -> None:
    folder = tmp_path / "sollol_nb" / "tensors" / "w"
    tend = f'count=1 cache_0="{folder}"; note_sizes {SIZE}; tend'
    cached(folder, 1, age_s=0)
    cached(folder, 2, age_s=0)
    in_agent(shell, tmp_path, tend, limit_kib=20 * 1024)
    assert not (folder / "rpc").exists()
    for left in (folder / "off").iterdir():
        os.utime(left, (time.time() - 300,) * 2)
    in_agent(shell, tmp_path, tend, limit_kib=20 * 1024)
    assert len([*(folder / "rpc").iterdir()]) == 1, "one was deleted, and the next load may use the cache"
    assert is_sealed(next((folder / "rpc").iterdir()))


@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
def test_the_worker_gets_its_cache_and_the_sizes_come_with_a_heartbeat(
    tmp_path: Path, shell: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    body = f'echo "$LLAMA_CACHE" >>"{tmp_path}/caches"'
    with agent(tmp_path, shell, "CPU", body=body, cache_kib=LIMIT_KIB) as running:
        running.line()
        caches = tmp_path / "caches"
        eventually(lambda: caches.exists() and caches.read_text().endswith("\n"), "it has started")
        log = tmp_path / "log"
        assert " -c " in log.read_text()
        running.send(f"sizes 5 {SIZE}\nverify 3 0\n")
        assert running.line() == ["verified", "3"]
        tensors = tmp_path / "c" / "sollol_nb" / "tensors"
        assert (tensors / "sizes").read_text().split() == ["5", str(SIZE)]
        assert caches.read_text().startswith(str(tensors))
        assert running.process.stdin is not None
        running.process.stdin.close()
        running.ended()
    assert not [*tensors.glob("sizes-*")], "half-written"
    assert not [*tensors.glob("*/taken")]


# --- the end ----------------------------------------------------------------------------------------


@linux_only
@pytest.mark.parametrize("shell", SHELLS, ids=" ".join)
def test_workers_end_where_all_of_the_script_is_killed_at_the_same_moment(
    tmp_path: Path, shell: tuple[str, ...]
) -> None:
    with agent(tmp_path, shell, "CPU", "CUDA0") as running:
        assert [running.line()[0], running.line()[0]] == ["worker", "worker"]
        log = tmp_path / "log"
        eventually(lambda: log.exists() and len(log.read_text().splitlines()) == 2, "both have started")
        workers = running.workers()
        script = psutil.Process(running.process.pid)
        kill_at_once(process for process in [script, *script.children(recursive=True)] if process not in workers)
        try:
            eventually(lambda: not any(map(is_alive, workers)), "no worker is left")
        finally:
            for worker in filter(is_alive, workers):
                worker.kill()
