"""Fetch llama.cpp at one pinned commit and build the two programs the package needs.

A build runs in a temporary folder inside the cache folder (same file system), under one lock per engine: fetch,
configure, build, pack, check, and finally one rename to `<cache>/engines/<key>/`. So a failed or interrupted build
leaves no partial engine, and if two kernels need one at the same time, only the first builds it. An installed
engine is `bin/` (programs and their shared libraries, which find each other wherever the folder is moved) and
`engine.json`, which describes it.

The source is the git commit below or, if the git host is not reachable, the `llama-cpp-python` sdist from the
Python index that pip is configured for. The sdist contains the same commit, so both speak the same RPC protocol.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import stat
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import filelock
import psutil

from sollol_nb.errors import EngineBuildError, EngineError
from sollol_nb.llama_cpp.engine.check import check_folder
from sollol_nb.llama_cpp.engine.steps import BuildSteps, Progress, build_share, shown_progress
from sollol_nb.llama_cpp.engine.tools import BuildTools, choose_backend, cmake_options, find_build_tools, find_tool
from sollol_nb.settings import config

GIT_URL = "https://github.com/ggml-org/llama.cpp"
GIT_COMMIT = "0c1e57098bba43ac29e6e3b677cdceebdd22334f"  # tag b11312; a tag can be moved, a commit cannot
SDIST_VERSION = "0.3.36"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
VERSION = GIT_COMMIT[:7]
PROTOCOL = "7.0.0"
"""The RPC protocol of this commit."""
TARGETS = ("llama-server", "ggml-rpc-server")

GIT_PROBE_LIMIT_S = 10.0
FETCH_LIMIT_S = 600.0
CONFIGURE_LIMIT_S = 600.0
BUILD_LIMIT_S = 3600.0
GPU_BUILD_LIMIT_S = 3 * 3600.0  # GPU kernels are most of the compile time

_SHARE_AFTER_FETCH = 0.05
_SHARE_AFTER_CONFIGURE = 0.08
_SDIST_UNUSED = (".git", "docs/", "media/", "models/")  # two thirds of the bytes, none of the build
_SHARED_LIBRARY = re.compile(r"\.(so(\.\d+)*|dylib|dll)$")


FetchSource = Callable[[Path, BuildSteps], str]
"""Puts llama.cpp's source tree into a folder and returns its origin."""


def engines_folder() -> Path:
    """The folder of the installed engines, one folder each."""
    return config.cache_dir() / "engines"


def installed_folders() -> list[Path]:
    """`bin` folders of the installed engines of this version, the most recently installed or chosen first."""
    records = engines_folder().glob(f"llama.cpp-{VERSION}-*/engine.json")
    return [path.parent / "bin" for path in sorted(records, key=_modified_ns, reverse=True)]


def read_record(bin_folder: Path) -> dict[str, Any]:
    """`engine.json` of an installed engine: version, commit, backend, source, protocol; empty if there is none."""
    try:
        record = json.loads((bin_folder.parent / "engine.json").read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def build_engine(
    backend: str | None,
    *,
    force: bool = False,
    progress: Progress | None = None,
    fetch: FetchSource | None = None,
    check: Callable[[Path], str] = check_folder,
) -> Path:
    """Build and install the engine, unless a working one is installed; returns its `bin` folder.

    Args:
        backend: one of `tools.BACKENDS`; by default that of the GPU toolkit found here, else `cpu`.
        force: build even if a working engine is installed.
        progress: called at every step; by default a progress bar.
        fetch: fetches the source; by default from git, else from the sdist.
        check: takes a `bin` folder, returns the RPC protocol, raises EngineError if the engine does not work.

    Raises:
        ConfigError: there is no such backend.
        EngineBuildError: a tool is missing, or a step failed.
    """
    chosen = choose_backend(backend)
    key = f"llama.cpp-{VERSION}-{chosen}"
    final = engines_folder() / key
    with shown_progress(progress) as report:
        try:
            final.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            limit_s = BUILD_LIMIT_S if chosen in ("cpu", "metal") else GPU_BUILD_LIMIT_S
            with locked(final.parent / f".{key}.lock", FETCH_LIMIT_S + CONFIGURE_LIMIT_S + limit_s, report):
                if not force and _works(final, check):
                    (final / "engine.json").touch()  # the most recently chosen engine is found first
                    return final / "bin"
                for leftover in final.parent.glob(f".build-{key}-*"):
                    remove_tree(leftover)
                tools = find_build_tools()
                work = Path(tempfile.mkdtemp(prefix=f".build-{key}-", dir=final.parent))
                try:
                    steps = BuildSteps(config.log_dir() / f"build-{key}.log", report)
                    source = (fetch or fetch_source)(work / "source", steps)
                    _compile(work, tools, cmake_options(chosen, tools, commit=VERSION), limit_s, steps)
                    _pack(work)
                    protocol = _checked(work / "engine" / "bin", chosen, check)
                    record = {"version": VERSION, "commit": GIT_COMMIT, "backend": chosen}
                    record |= {"source": source, "protocol": protocol}
                    (work / "engine" / "engine.json").write_text(json.dumps(record, indent=1) + "\n")
                    _swap_in(work, final)
                finally:
                    remove_tree(work)
            report(f"llama.cpp {VERSION} ({chosen}) installed", 1.0)
        except OSError as error:
            raise EngineBuildError(f"installing llama.cpp in {final.parent} failed: {error}") from error
    return final / "bin"


def fetch_source(into: Path, steps: BuildSteps) -> str:
    """Fetch llama.cpp at the pinned commit from git, else from the sdist; returns `git` or `sdist`.

    Raises:
        EngineBuildError: neither is available.
    """
    if _fetch_git(into, steps):
        return "git"
    remove_tree(into)
    _fetch_sdist(into, steps)
    return "sdist"


def _fetch_git(into: Path, steps: BuildSteps) -> bool:
    host = urlsplit(GIT_URL).hostname or GIT_URL
    git = find_tool("git")
    if git is None:
        steps.progress("git is not installed; fetching llama.cpp from the Python index", None)
        return False
    steps.progress(f"contacting {host}", 0.0)
    if steps.run(git, "ls-remote", "--exit-code", GIT_URL, "HEAD", limit_s=GIT_PROBE_LIMIT_S) != 0:
        steps.progress(f"{host} is not reachable; fetching llama.cpp from the Python index", None)
        return False
    steps.progress("fetching llama.cpp with git", 0.0)
    commands: tuple[tuple[str | Path, ...], ...] = (
        ("init", "--quiet", into),
        ("-C", into, "fetch", "--quiet", "--depth", "1", GIT_URL, GIT_COMMIT),
        ("-C", into, "-c", "core.autocrlf=false", "checkout", "--quiet", GIT_COMMIT),
    )
    # git verifies a commit that is fetched by its hash: another tree has another hash.
    for command in commands:
        if steps.run(git, *command, limit_s=FETCH_LIMIT_S) != 0:
            steps.progress("git could not fetch llama.cpp; fetching it from the Python index", None)
            return False
    return True


def _fetch_sdist(into: Path, steps: BuildSteps) -> None:
    if importlib.util.find_spec("pip") is None:
        raise EngineBuildError(
            f"pip is needed to fetch llama.cpp, but this Python ({sys.executable}) has no pip; "
            "run: python -m ensurepip"
        )
    steps.progress("fetching llama.cpp from the Python index (77 MB)", 0.0)
    download = into.with_name("download")
    download.mkdir()
    pinned = download / "requirements.txt"
    pinned.write_text(f"llama-cpp-python=={SDIST_VERSION} --hash=sha256:{SDIST_SHA256}\n")
    pip = (sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check")
    what = ("--no-binary", "llama-cpp-python", "--no-deps", "--require-hashes", "-r", pinned)
    steps.must_run("fetching llama.cpp from the Python index", *pip, *what, "-d", download, limit_s=FETCH_LIMIT_S)
    archives = list(download.glob("*.tar.gz"))
    if len(archives) != 1:
        raise EngineBuildError(f"pip fetched {len(archives)} archives of llama-cpp-python instead of one")
    unpack_sdist(archives[0], into, SDIST_SHA256)
    remove_tree(download)


def unpack_sdist(archive: Path, into: Path, sha256: str) -> None:
    """Unpack `<name>/vendor/llama.cpp` of an sdist into a folder, without what no build needs.

    Raises:
        EngineBuildError: the archive is not the pinned one, or contains no llama.cpp.
    """
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise EngineBuildError(f"{archive.name} has SHA-256 {found}, not the pinned {sha256}; it is not used")
    with tarfile.open(archive) as tar:
        # Python before 3.11.4 has no filters; there the hash alone guarantees the contents.
        tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
        members = []
        for member in tar.getmembers():
            # Below the archive's own folder: git's data of the same name is not the source.
            before, _, inside = member.name.partition("/")[2].partition("vendor/llama.cpp/")
            if not before and inside and not inside.startswith(_SDIST_UNUSED):
                member.name = inside
                members.append(member)
        if not members:
            raise EngineBuildError(f"{archive.name} contains no vendor/llama.cpp")
        tar.extractall(into, members)  # noqa: S202 - pinned by hash, and filtered


def _compile(work: Path, tools: BuildTools, options: list[str], limit_s: float, steps: BuildSteps) -> None:
    steps.progress("configuring llama.cpp", _SHARE_AFTER_FETCH)
    configure: list[str | Path] = [tools.cmake, "-S", work / "source", "-B", work / "build", *options]
    steps.must_run("configuring llama.cpp", *configure, limit_s=CONFIGURE_LIMIT_S)

    def show(line: str) -> None:
        share = build_share(line)
        if share is not None:
            span = 1.0 - _SHARE_AFTER_CONFIGURE
            steps.progress("building llama.cpp", _SHARE_AFTER_CONFIGURE + span * min(share, 0.999))

    steps.progress("building llama.cpp", _SHARE_AFTER_CONFIGURE)
    cores = len(psutil.Process().cpu_affinity()) if sys.platform == "linux" else os.cpu_count() or 1
    build: list[str | Path] = [tools.cmake, "--build", work / "build", "--config", "Release"]
    build += ["--parallel", str(cores), "--target", *TARGETS]
    steps.must_run("building llama.cpp", *build, limit_s=limit_s, on_line=show)


def _pack(work: Path) -> None:
    """Move the programs and shared libraries to `engine/bin`; links stay links."""
    built = work / "build" / "bin"
    if (built / "Release").is_dir():  # the layout of Visual Studio
        built = built / "Release"
    packed = work / "engine" / "bin"
    packed.mkdir(parents=True)
    for path in built.iterdir():
        if path.name.removesuffix(".exe") in TARGETS or _SHARED_LIBRARY.search(path.name):
            path.rename(packed / path.name)


def _checked(bin_folder: Path, backend: str, check: Callable[[Path], str]) -> str:
    try:
        return check(bin_folder)
    except EngineError as error:
        advice = "" if backend == "cpu" else "; try `sollol-nb install --backend cpu`"
        raise EngineBuildError(f"llama.cpp was built, but {error}{advice}") from error


def _works(folder: Path, check: Callable[[Path], str]) -> bool:
    if not read_record(folder / "bin"):
        return False
    try:
        check(folder / "bin")
    except EngineError:
        return False
    return True


def _swap_in(work: Path, final: Path) -> None:
    """Move the finished engine to its folder, and an old one into the work folder, which is removed later."""
    old = work / "old"
    try:
        if final.exists():
            final.rename(old)
        (work / "engine").rename(final)
    except BaseException:
        if old.exists() and not final.exists():
            old.rename(final)
        raise


@contextmanager
def locked(path: Path, limit_s: float, report: Progress, doing: str = "building llama.cpp") -> Iterator[None]:
    """Hold a lock; report if another process holds it. The system releases a dead process's lock.

    Raises:
        EngineBuildError: another process holds it for longer than the limit.
    """
    lock = filelock.FileLock(path)
    try:
        with suppress(filelock.Timeout):
            lock.acquire(timeout=0)
        if not lock.is_locked:
            report(f"another process is {doing}; waiting for it", None)
            lock.acquire(timeout=limit_s)
        yield
    except filelock.Timeout:
        raise EngineBuildError(
            f"another process has been {doing} for {limit_s / 60:.0f} min; end it, then try again"
        ) from None
    finally:
        lock.release()


def remove_tree(folder: Path) -> None:
    """Remove a folder as far as possible, including git's read-only files on Windows."""
    if sys.platform == "win32":
        for path in folder.rglob("*"):
            with suppress(OSError):
                path.chmod(stat.S_IWRITE)
    shutil.rmtree(folder, ignore_errors=True)


def _modified_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
