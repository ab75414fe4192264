"""Archives for other machines: the worker program of this machine, and the source that builds it there.

A machine that only serves layers needs the worker and ggml's libraries, not llama-server: a tenth of the bytes and
a fifth of the compile time.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from sollol_nb.errors import EngineBuildError
from sollol_nb.llama_cpp.engine import build
from sollol_nb.llama_cpp.engine.steps import BuildSteps, Progress
from sollol_nb.settings import config

RUN = "run"
"""A script beside a worker program that may not find its libraries when it was moved: it starts the program."""

_BACKENDS_IN_SOURCE = ("blas", "cpu", "cuda", "hip", "metal", "rpc")  # ggml-hip compiles the files of ggml-cuda
_CMAKE_LISTS = """\
# Builds llama.cpp's RPC worker without the rest of llama.cpp, with the defaults of llama.cpp's own CMakeLists.txt.
cmake_minimum_required(VERSION 3.14...3.28)
project("llama.cpp" C CXX)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
option(BUILD_SHARED_LIBS "" ON)
option(GGML_ALL_WARNINGS "" OFF)
set(GGML_LLAMAFILE_DEFAULT ON)
set(GGML_CUDA_GRAPHS_DEFAULT ON)
set(GGML_BUILD_NUMBER ${LLAMA_BUILD_NUMBER})
set(GGML_BUILD_COMMIT ${LLAMA_BUILD_COMMIT})
add_subdirectory(ggml)
add_subdirectory(tools/rpc)
"""
_RUN_SCRIPT = """\
#!/bin/sh
here=${0%%/*}
LD_LIBRARY_PATH=$here${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
DYLD_LIBRARY_PATH=$LD_LIBRARY_PATH
export LD_LIBRARY_PATH DYLD_LIBRARY_PATH
exec "$here/%s" "$@"
"""
_FETCH_WAIT_LIMIT_S = 2 * build.FETCH_LIMIT_S
_TIME = 315532800  # 1980: the same for all files, and not the 0 that some programs take for a missing file
_COMPRESSION = 5  # of gzip: GPU libraries are large


@dataclass(frozen=True, slots=True)
class Archive:
    """A tar.gz file, its SHA-256, and how many bytes its files have."""

    path: Path
    sha256: str
    unpacked_bytes: int


def worker_files(worker: Path) -> list[Path]:
    """A worker program and the llama.cpp libraries beside it that it needs, links included."""
    worker = worker.resolve()
    return [worker, *sorted(path for path in worker.parent.iterdir() if path.name.startswith("libggml"))]


def server_files(server: Path) -> list[Path]:
    """llama-server and the libraries beside it, links included."""
    server = server.resolve()
    return [server, *sorted(path for path in server.parent.iterdir() if path.name.startswith("lib"))]


def content_hash(worker: Path) -> str:
    """SHA-256 of the names and bytes of `worker_files`, for a build that nothing else identifies. Blocking."""
    digest = hashlib.sha256()
    for path in worker_files(worker):
        if path.is_symlink():
            content = str(path.readlink())
        else:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name}\0{content}\0".encode())
    return digest.hexdigest()


@contextmanager
def packed_worker(worker: Path, *, with_script: bool) -> Iterator[Archive]:
    """An archive of `worker_files`, which exists while it is used. Blocking.

    Args:
        with_script: whether to add the script `RUN`: a build of the user's own may look for its libraries at the
            path where it was built.
    """
    with tempfile.TemporaryDirectory(prefix="sollol-worker-") as folder:
        path = Path(folder) / "worker.tar.gz"
        with _writing(path) as tar:
            for file in worker_files(worker):
                _add(tar, file, file.name)
            if with_script:
                script = (_RUN_SCRIPT % worker.resolve().name).encode()
                member = tarfile.TarInfo(RUN)
                member.size, member.mode, member.mtime = len(script), 0o755, _TIME
                tar.addfile(member, io.BytesIO(script))
        yield _archive(path)


@contextmanager
def packed_server(server: Path) -> Iterator[Archive]:
    """An archive of `server_files`, which exists while it is used. Blocking."""
    with tempfile.TemporaryDirectory(prefix="sollol-server-") as folder:
        path = Path(folder) / "server.tar.gz"
        with _writing(path) as tar:
            for file in server_files(server):
                _add(tar, file, file.name)
        yield _archive(path)


def packed_source(
    progress: Progress,
    is_stopped: Callable[[], bool] = lambda: False,
    fetch: build.FetchSource | None = None,
) -> Archive:
    """An archive of the source that builds the worker, fetched unless this machine has it. Blocks for minutes.

    Args:
        is_stopped: asked ten times a second; the download ends once it is true.
        fetch: fetches llama.cpp's source; by default from git, else from the sdist.

    Raises:
        EngineBuildError: the source cannot be fetched.
    """
    folder = config.cache_dir() / "sources"
    final = folder / f"llama.cpp-{build.VERSION}-worker.tar.gz"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with build.locked(folder / ".lock", _FETCH_WAIT_LIMIT_S, progress, "fetching llama.cpp"):
            if not final.exists():
                with tempfile.TemporaryDirectory(prefix=".work-", dir=folder) as work:
                    steps = BuildSteps(config.log_dir() / "fetch-source.log", progress, is_stopped)
                    source, packed = Path(work) / "source", Path(work) / "packed"
                    (fetch or build.fetch_source)(source, steps)
                    _pack_source(source, packed)
                    packed.rename(final)
        return _archive(final)
    except (OSError, tarfile.TarError) as error:
        raise EngineBuildError(f"packing llama.cpp's source in {folder} failed: {error}") from error


def _pack_source(source: Path, into: Path) -> None:
    if not (source / "tools/rpc").is_dir():
        raise EngineBuildError("the source of llama.cpp has no tools/rpc")
    with _writing(into) as tar:
        lists = _CMAKE_LISTS.encode()
        member = tarfile.TarInfo("CMakeLists.txt")
        member.size, member.mode, member.mtime = len(lists), 0o644, _TIME
        tar.addfile(member, io.BytesIO(lists))
        for name in ("LICENSE", "ggml", "tools/rpc"):
            for path in sorted([source / name, *(source / name).rglob("*")]):
                inside = path.relative_to(source)
                if path.is_file() and _is_needed(inside):
                    _add(tar, path, inside.as_posix())


def _is_needed(inside: Path) -> bool:
    """Whether a file of the source belongs to what is built; other backends are most of ggml."""
    parts = inside.parts
    if parts[:2] == ("ggml", "src") and len(parts) > 3:
        return parts[2].removeprefix("ggml-") in _BACKENDS_IN_SOURCE
    return True


@contextmanager
def _writing(path: Path) -> Iterator[tarfile.TarFile]:
    """The same files give the same bytes."""
    with path.open("wb") as file, _gzip(file) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        yield tar


def _gzip(file: IO[bytes]) -> gzip.GzipFile:
    return gzip.GzipFile(filename="", mode="wb", compresslevel=_COMPRESSION, fileobj=file, mtime=0)


def _add(tar: tarfile.TarFile, path: Path, name: str) -> None:
    def plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.mtime = _TIME
        member.uname = member.gname = ""
        member.mode = 0o755 if member.mode & 0o111 else 0o644
        return member

    tar.add(path, name, recursive=False, filter=plain)


def _archive(path: Path) -> Archive:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    with tarfile.open(path) as tar:
        unpacked = sum(member.size for member in tar)
    return Archive(path, sha256, unpacked)
