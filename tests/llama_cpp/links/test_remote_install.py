"""The engine of another machine, seen through a local shell: what is sent, built, refused, and left behind."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from sollol_nb.errors import LinkError
from sollol_nb.llama_cpp.engine import build
from sollol_nb.llama_cpp.links import remote_engine, remote_facts
from sollol_nb.llama_cpp.links.remote_engine import RemoteEngine
from sollol_nb.llama_cpp.links.remote_facts import Facts
from tests.support.engines import eventually, eventually_async, posix_only, run
from tests.support.shell_machine import ShellMachine, engine_in, let_this_cpu_have_more, tiny_source

pytestmark = posix_only

SHELLS = [name for name in ("dash", "bash", "busybox") if shutil.which(name)]
# What every POSIX machine has, as far as `engine.sh` needs it.
USUAL_PROGRAMS = """
    awk cat chmod cut df dirname grep gzip head id mkdir mv ps readlink rm rmdir sed sh sha256sum sleep tail
    tar tr uname
"""
BUILD_PROGRAMS = "cmake make cc c++ as ld ar ranlib"  # without ninja and nice
MOUNTING = ["unshare", "-m"] if os.name == "posix" and os.geteuid() == 0 else ["unshare", "-rm"]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ShellMachine:
    monkeypatch.setenv("SOLLOL_CACHE_DIR", str(tmp_path / "cache"))
    return ShellMachine(tmp_path / "gpu1")


def with_file_system(machine: ShellMachine, options: str) -> None:
    """Give the cache folder there a small file system of its own; each command gets an empty one."""
    mounted = f"mount -t tmpfs -o {options} none {machine.home}/.cache"
    (machine.home / ".cache").mkdir(exist_ok=True)
    machine.through = f"{' '.join(MOUNTING)} sh -c '{mounted} && exec \"$@\"' sh"


# --- found and sent -----------------------------------------------------------------------------


@pytest.mark.parametrize("shell", SHELLS)
def test_a_worker_is_sent_to_a_machine_with_any_posix_shell_and_found_the_next_time(
    machine: ShellMachine, tmp_path: Path, shell: str
) -> None:
    program = shutil.which(shell)
    assert program is not None
    if shell == "busybox":  # nothing else is there
        subprocess.run([program, "--install", "-s", machine.own_path], check=True)
        machine.path = ""
    else:
        (machine.own_path / "sh").symlink_to(program)
    here = engine_in(tmp_path / "here")
    sent = machine.prepare(here)
    assert sent.how == "shipped"
    assert sent.commit == build.GIT_COMMIT
    assert [(device.name, device.total_bytes) for device in sent.devices] == [("CPU", 2048 * 1024**2)]
    assert sent.cores >= 1
    assert Path(sent.worker).parent.parent.parent == machine.engines
    found = machine.prepare(here)
    assert (found.how, found.worker) == ("found", sent.worker)
    assert len(machine.installed()) == 1


def test_an_engine_that_was_installed_there_is_used(machine: ShellMachine, tmp_path: Path) -> None:
    there = engine_in(machine.engines / f"llama.cpp-{build.VERSION}-cpu")
    older = machine.engines / "llama.cpp-0000000-cpu"
    engine_in(older)
    found = machine.prepare(engine_in(tmp_path / "here"))
    assert (found.how, found.worker) == ("found", str(there.worker))
    assert older.is_dir()


def test_the_users_own_build_is_identified_by_its_contents(machine: ShellMachine, tmp_path: Path) -> None:
    here = engine_in(tmp_path / "here", record=False)
    first = machine.prepare(here)
    assert (first.how, Path(first.worker).name) == ("shipped", "run")
    assert (machine.prepare(here)).how == "found"
    with here.worker.with_name("libggml.so.0").open("a") as library:
        library.write("# changed\n")
    changed = machine.prepare(here)
    assert changed.how == "shipped"
    assert changed.commit != first.commit
    assert Path(first.worker).exists()


def test_what_arrives_damaged_is_not_installed_and_the_next_try_works(
    machine: ShellMachine, tmp_path: Path
) -> None:
    here = engine_in(tmp_path / "here")
    machine.before = 'head -c 1000 | sh -c "$last"; exit'
    with pytest.raises(LinkError, match=r"llama.cpp arrived damaged on gpu1 \(SHA-256 .*\); try again"):
        machine.prepare(here)
    assert machine.installed() == []
    machine.before = ""
    assert (machine.prepare(here)).how == "shipped"


def test_what_a_killed_installation_left_is_taken_over(machine: ShellMachine, tmp_path: Path) -> None:
    command = [
        str(machine.shell()._command[0]),
        f"sh {remote_script(tmp_path)} ship worker-x-cpu-1 0 '{{}}' program",
    ]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    eventually(lambda: list(machine.engines.glob(".work-*/archive")), "it receives")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (left,) = machine.engines.glob(".work-*")
    assert (machine.prepare(engine_in(tmp_path / "here"))).how == "shipped"
    assert not left.exists()
    assert len(machine.installed()) == 1


def remote_script(folder: Path) -> Path:
    path = folder / "engine.sh"
    path.write_text(remote_engine.SCRIPT)
    return path


# --- built --------------------------------------------------------------------------------------


def test_two_clients_at_once_build_it_only_once(
    machine: ShellMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_this_cpu_have_more(monkeypatch)
    here = engine_in(tmp_path / "here")
    both_are_there = tmp_path / "both are there"
    waits = f"until [ -e '{both_are_there}' ]; do sleep 0.1; done"
    fetch = tiny_source(
        f'add_custom_target(waits COMMAND sh -c "{waits}" VERBATIM)\nadd_dependencies(ggml-rpc-server waits)\n'
    )
    waiting = "another connection is installing llama.cpp on gpu1; waiting for it"

    async def both() -> list[RemoteEngine]:
        preparing = asyncio.gather(*(machine.preparing(here, fetch=fetch) for _ in range(2)))
        try:
            await eventually_async(lambda: waiting in machine.reports or preparing.done(), "the second one waits")
        finally:
            both_are_there.touch()  # else the build would wait for ever
        return await preparing

    first, second = run(both())
    assert first.how == second.how == "built"
    assert first.worker == second.worker
    assert (machine.home / "configured").read_text() == "once\n"
    assert waiting in machine.reports
    assert len(machine.installed()) == 1
    assert list(machine.engines.parent.glob("*.log")) == []


def test_a_program_that_does_not_run_there_is_built_there(machine: ShellMachine, tmp_path: Path) -> None:
    here = engine_in(tmp_path / "here")
    here.worker.write_text("#!/bin/sh\necho libstdc++.so.6 is missing >&2; exit 127\n")
    machine.only_programs([*USUAL_PROGRAMS.split(), *BUILD_PROGRAMS.split()])
    assert (machine.prepare(here, fetch=tiny_source())).how == "built"


def test_a_program_that_hangs_there_is_not_waited_for_forever(machine: ShellMachine, tmp_path: Path) -> None:
    machine.only_programs(USUAL_PROGRAMS.split())
    machine.add_program("timeout", '[ "$2" = true ] || exit 124')
    with pytest.raises(LinkError, match="it has not listed its devices within 50 s"):
        machine.prepare(engine_in(tmp_path / "here"))


def test_a_failed_build_names_its_error_and_its_log_and_leaves_nothing(
    machine: ShellMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_this_cpu_have_more(monkeypatch)
    fetch = tiny_source("target_compile_definitions(ggml-rpc-server PRIVATE main=5)\n")
    with pytest.raises(
        LinkError, match=r"building llama.cpp on gpu1 failed: .*error: .*; log there: (\S+)"
    ) as raised:
        machine.prepare(engine_in(tmp_path / "here"), fetch=fetch)
    assert "\n" not in str(raised.value)
    assert "error: " in Path(str(raised.value).rpartition(" ")[2]).read_text()
    assert machine.installed() == []


def test_gpus_without_a_toolkit_are_named_and_with_one_get_a_build_and_a_worker_each(
    machine: ShellMachine, tmp_path: Path
) -> None:
    here = engine_in(tmp_path / "here")
    machine.add_program("nvidia-smi", "echo GPU 0: A GPU; echo GPU 1: A GPU")
    without = machine.prepare(here, fetch=tiny_source())
    assert [device.name for device in without.devices] == ["CPU"]
    assert without.remark == (
        "it has 2 GPUs, but its CPU is used, since it has no nvcc; install the CUDA toolkit there to use them"
    )
    machine.add_program("nvcc", "exit 1")
    built = machine.prepare(here, fetch=tiny_source())
    assert (built.how, built.backend, built.remark) == ("built", "cuda", "")
    assert [device.name for device in built.devices] == ["CUDA0", "CUDA1"]


# --- refused ------------------------------------------------------------------------------------


def test_a_machine_without_compiler_gets_the_command_that_installs_one(
    machine: ShellMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_this_cpu_have_more(monkeypatch)
    machine.only_programs(USUAL_PROGRAMS.split())
    machine.add_program("dnf", "")
    with pytest.raises(LinkError) as raised:
        machine.prepare(engine_in(tmp_path / "here"))
    assert str(raised.value) == (
        "cannot build llama.cpp on gpu1: it has no C++ compiler, cmake or make; "
        "run `sudo dnf install gcc-c++ cmake make` there (its CPU lacks avx1024)"
    )


def test_another_protocol_is_refused_before_anything_is_built(
    machine: ShellMachine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_this_cpu_have_more(monkeypatch)
    here = engine_in(tmp_path / "here", record=False, protocol="6.1.0")
    with pytest.raises(LinkError, match=r"speaks RPC protocol 7.0.0, but the llama.cpp here speaks 6.1.0; unset"):
        machine.prepare(here, fetch=tiny_source())
    assert machine.installed() == []


def test_a_full_disk_is_reported_with_what_is_needed(machine: ShellMachine, tmp_path: Path) -> None:
    here = engine_in(tmp_path / "here")
    with_file_system(machine, "size=256k")
    full = r"no space on gpu1: installing llama.cpp in \S+ needs about 2 MB, and 0 MB are free; .*run `du -sh"
    with pytest.raises(LinkError, match=full):
        machine.prepare(here)
    machine.add_program("df", "echo; echo none 1 1 99999999 1 /")  # it fills up only meanwhile
    with pytest.raises(LinkError, match=r"no space on gpu1: installing llama.cpp in \S+ needs about 2 MB"):
        machine.prepare(here)


def test_a_cache_folder_that_cannot_be_used_is_reported(machine: ShellMachine, tmp_path: Path) -> None:
    here = engine_in(tmp_path / "here")
    (machine.home / ".cache").touch()
    with pytest.raises(LinkError, match=r"cannot write to \S+ on gpu1: .*; make it writable for \S+, or set XDG"):
        machine.prepare(here)
    (machine.home / ".cache").unlink()
    with_file_system(machine, "size=8m,noexec")
    with pytest.raises(
        LinkError, match=r"no program can be started in \S+ on gpu1 .*; run `ln -s FOLDER \S+sollol_nb`"
    ):
        machine.prepare(here)


# --- what a machine says is not trusted -----------------------------------------------------------


def test_reports_that_are_not_complete_or_not_sensible_are_refused_or_bounded() -> None:
    with pytest.raises(ValueError, match="not complete"):
        Facts.parse("system=Linux\narchitecture=x86_64\n")
    lines = ["system=Linux", "architecture=x\x1b[31m", "folder=/f", "cores=999999999999", "free.kib=" + "9" * 50]
    lines += ["engine=/e", "record=" + "[" * 100_000, "cmake=x", "end=probe"]
    facts = Facts.parse("\n".join(lines))
    assert (facts.architecture, facts.cores, facts.free_bytes) == ("x[31m", 1, None)
    assert facts.engines[0].record == {}


def test_a_gpu_is_preferred_to_the_cpu_and_other_lines_are_not_devices() -> None:
    lines = [
        "CPU: c (10 MiB, 5 MiB free)",
        "BLAS: b (0 MiB, 0 MiB free)",
        "Metal: m (10 MiB, 5 MiB free)",
        "CPU: c",
    ]
    assert [device.name for device in remote_facts.devices(lines)] == ["Metal"]
    assert [device.name for device in remote_facts.devices(lines[:2])] == ["CPU"]
    many = [f"CUDA{number}: g (10 MiB, 5 MiB free)" for number in range(1000)]
    assert len(remote_facts.devices(many)) == 64
