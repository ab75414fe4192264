"""Find llama.cpp's two programs, or have them built.

An engine is a pair: `llama-server` (the coordinator) and the RPC worker (`ggml-rpc-server`, in older builds
`rpc-server`). If the user names a folder, as an argument or in the setting `llama_cpp`, only that folder is
searched: if it is not usable, that is an error, never a reason to use another one. Otherwise these are searched in
order: PATH, `~/llama.cpp/build/bin`, and the package's cache folder. A pair is used only if it works (`check.py`).
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from sollol_nb.errors import EngineIncompatibleError, EngineNotFoundError
from sollol_nb.llama_cpp.engine import build
from sollol_nb.llama_cpp.engine.check import SERVER_NAME, WORKER_NAMES, Engine, Pair, check_pair, pair_in
from sollol_nb.llama_cpp.engine.steps import Progress
from sollol_nb.settings import config

INSTALL_COMMAND = "sollol-nb install"
_CHECKOUT_FOLDERS = ("build/bin", "build/bin/Release")


def locate_engine() -> Engine:
    """The pair that `find_engine` would try first, without running anything: version and protocol are those that
    its build has recorded, else "". Blocking.

    Raises:
        EngineNotFoundError: there is no pair; the message says where it was searched.
    """
    named = _named_folder(None)
    if named is not None:
        server, worker = _pair_in_named_folder(*named)
        return _as_recorded(server, worker, named[1])
    problems: dict[str, list[str]] = {}
    for source, folder_text, pair in _usual_pairs():
        if pair.server is not None and pair.worker is not None:
            return _as_recorded(pair.server, pair.worker, source)
        problems.setdefault(f"no {pair.missing}", []).append(folder_text)
    raise _not_found(problems)


def _as_recorded(server: Path, worker: Path, source: str) -> Engine:
    record = build.read_record(server.parent)
    version, protocol = str(record.get("version", "")), str(record.get("protocol", ""))
    return Engine(server=server, worker=worker, version=version, source=source, protocol=protocol)


def find_engine(folder: str | Path | None = None) -> Engine:
    """The engine to use, checked. Blocking.

    Args:
        folder: the user's `bin` folder or llama.cpp checkout; by default the setting `llama_cpp`, else the usual
            folders are searched.

    Raises:
        EngineNotFoundError: no usable pair; the message says where it was searched and what was wrong there.
        EngineIncompatibleError: the folder that the user named holds an unusable pair.
    """
    named = _named_folder(folder)
    if named is not None:
        return _in_named_folder(*named)
    problems: dict[str, list[str]] = {}
    for source, folder_text, pair in _usual_pairs():
        if pair.server is None or pair.worker is None:
            problems.setdefault(f"no {pair.missing}", []).append(folder_text)
            continue
        try:
            return check_pair(pair.server, pair.worker, source)
        except EngineIncompatibleError as error:
            problems.setdefault(str(error), []).append(folder_text)
    raise _not_found(problems)


def _not_found(problems: Mapping[str, list[str]]) -> EngineNotFoundError:
    searched = "; ".join(f"{', '.join(folders)}: {problem}" for problem, folders in problems.items())
    return EngineNotFoundError(
        f"no usable llama.cpp found ({searched}); run `{INSTALL_COMMAND}`, "
        "or set SOLLOL_LLAMA_CPP to a folder with llama-server and the RPC worker"
    )


def install_engine(*, backend: str | None = None, force: bool = False, progress: Progress | None = None) -> Engine:
    """Build llama.cpp and install it in the cache folder, unless a working build is installed. Blocks for minutes.

    Args:
        backend: `cpu`, `cuda`, `metal`, `hip` or `vulkan`; by default the one that this machine supports.
        force: build even if a working build is installed.
        progress: called with (text, share done from 0 to 1) at every step, and with (remark, None); by default a
            progress bar.

    Raises:
        ConfigError: there is no such backend.
        EngineBuildError: a tool is missing, or a step failed; the message says what to do.
    """
    folder = build.build_engine(backend, force=force, progress=progress)
    return _in_named_folder(folder, "cache")


def ensure_engine(folder: str | Path | None = None, *, progress: Progress | None = None) -> Engine:
    """The engine to use, built first if there is none. Blocking.

    If the user named a folder, nothing is built: a folder without a usable engine is an error.

    Raises:
        EngineNotFoundError, EngineIncompatibleError: the folder that the user named is not usable.
        EngineBuildError: there was no engine, and building one failed.
    """
    try:
        return find_engine(folder)
    except EngineNotFoundError:
        if _named_folder(folder) is not None:
            raise
    return install_engine(progress=progress)


def _named_folder(folder: str | Path | None) -> tuple[Path, str] | None:
    if folder is not None:
        return Path(folder).expanduser().absolute(), "given folder"
    own = config.find("llama_cpp")
    return (own.value.absolute(), own.source) if own.value is not None else None


def _in_named_folder(folder: Path, source: str) -> Engine:
    return check_pair(*_pair_in_named_folder(folder, source), source)


def _pair_in_named_folder(folder: Path, source: str) -> tuple[Path, Path]:
    pairs = [pair_in(folder), *(pair_in(folder / name) for name in _CHECKOUT_FOLDERS)]
    for pair in pairs:
        if pair.server and pair.worker:
            return pair.server, pair.worker
    named = f"{source} ({folder})"
    if not folder.is_dir():
        raise EngineNotFoundError(f"{named} is not a folder; correct or remove it")
    nearest = next((pair for pair in pairs if pair.server or pair.worker), pairs[0])
    raise EngineNotFoundError(f"no {nearest.missing} in {named} or its build/bin; correct or remove it")


def _usual_pairs() -> Iterator[tuple[str, str, Pair]]:
    """(source, folder as text, its pair), in the order of the search."""
    yield "PATH", "PATH", _pair_on_path()
    with contextlib.suppress(RuntimeError):  # the user has no home folder
        yield "~/llama.cpp", "~/llama.cpp/build/bin", pair_in(Path.home() / "llama.cpp" / "build" / "bin")
    folders = build.installed_folders()
    for folder in folders:
        yield "cache", str(folder), pair_in(folder)
    if not folders:
        yield "cache", str(build.engines_folder()), Pair(None, None)


def _pair_on_path() -> Pair:
    """The server on PATH and the worker beside it (or beside the target of its link), else the worker on PATH."""
    found = shutil.which(SERVER_NAME)
    server = Path(found).absolute() if found else None
    if server is not None:
        for folder in (server.parent, server.resolve().parent):
            if worker := pair_in(folder).worker:
                return Pair(server, worker)
    workers = (shutil.which(name) for name in WORKER_NAMES)
    return Pair(server, next((Path(path).absolute() for path in workers if path), None))
