"""Find llama.cpp's two programs, check that they work together, or have them built.

An engine is a pair: `llama-server` (the coordinator) and the RPC worker (`ggml-rpc-server`, in older builds
`rpc-server`). If the user names a folder, as an argument or in the setting `llama_cpp`, only that folder is
searched: if it is not usable, that is an error, never a reason to use another one. Otherwise these are searched in
order: PATH, `~/llama.cpp/build/bin`, and the package's cache folder.

The check is a real use of the pair: the worker is started on a free loopback port, and `llama-server --rpc <port>
--list-devices` must connect to it and list its device. That detects a program that does not run here, one built
without RPC, and two from different builds (another RPC protocol), whatever they print about themselves. The check
takes about 0.1 s on the CPU; its result is kept until a file of the pair changes.
"""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sollol_nb.errors import EngineIncompatibleError, EngineNotFoundError
from sollol_nb.llama_cpp.engine import build
from sollol_nb.llama_cpp.engine.steps import Progress, end_process_tree
from sollol_nb.settings import config
from sollol_nb.settings.endpoints import LOOPBACK

SERVER_NAME = "llama-server"
WORKER_NAMES = ("ggml-rpc-server", "rpc-server")
CHECK_LIMIT_S = 30.0  # a GPU driver may take seconds to start
INSTALL_COMMAND = "sollol-nb install"

_CHECKOUT_FOLDERS = ("build/bin", "build/bin/Release")
_PROTOCOL = re.compile(r"RPC server v(\d+\.\d+\.\d+)")
_VERSION = re.compile(r"^version:\s*(.+?)\s*$", re.MULTILINE)
_NO_RPC = re.compile(
    r"(invalid|unknown) argument: --(rpc|list-devices)|not supported in this build|failed to find RPC"
)
_PORT_ATTEMPTS = 3
_POLL_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A checked pair of programs of one llama.cpp build.

    Attributes:
        server: path of `llama-server`.
        worker: path of the RPC worker.
        version: as `llama-server --version` prints it.
        source: where it was found: `given folder`, `SOLLOL_LLAMA_CPP`, the path of a settings file, `PATH`,
            `~/llama.cpp` or `cache`.
        protocol: RPC protocol of the worker, such as `7.0.0`; "" if unknown.
    """

    server: Path
    worker: Path
    version: str
    source: str
    protocol: str = ""


@dataclass(frozen=True, slots=True)
class _Pair:
    """The two programs of a folder, as far as it has them."""

    server: Path | None
    worker: Path | None

    @property
    def missing(self) -> str:
        parts = [] if self.server else [SERVER_NAME]
        parts += [] if self.worker else [f"RPC worker ({WORKER_NAMES[0]})"]
        return " and no ".join(parts)


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
    searched = "; ".join(f"{', '.join(folders)}: {problem}" for problem, folders in problems.items())
    raise EngineNotFoundError(
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
    folder = build.build_engine(backend, check=_check_built, force=force, progress=progress)
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


def check_pair(server: Path, worker: Path, source: str) -> Engine:
    """Check that both programs run, support RPC, and work with each other.

    Raises:
        EngineIncompatibleError: they do not.
    """
    version, protocol = _checked(server, worker, _fingerprint(server, worker))
    return Engine(server=server, worker=worker, version=version, source=source, protocol=protocol)


def _named_folder(folder: str | Path | None) -> tuple[Path, str] | None:
    if folder is not None:
        return Path(folder).expanduser().absolute(), "given folder"
    own = config.find("llama_cpp")
    return (own.value.absolute(), own.source) if own.value is not None else None


def _in_named_folder(folder: Path, source: str) -> Engine:
    pairs = [_pair_in(folder), *(_pair_in(folder / name) for name in _CHECKOUT_FOLDERS)]
    for pair in pairs:
        if pair.server and pair.worker:
            return check_pair(pair.server, pair.worker, source)
    named = f"{source} ({folder})"
    if not folder.is_dir():
        raise EngineNotFoundError(f"{named} is not a folder; correct or remove it")
    nearest = next((pair for pair in pairs if pair.server or pair.worker), pairs[0])
    raise EngineNotFoundError(f"no {nearest.missing} in {named} or its build/bin; correct or remove it")


def _usual_pairs() -> Iterator[tuple[str, str, _Pair]]:
    """(source, folder as text, its pair), in the order of the search."""
    yield "PATH", "PATH", _pair_on_path()
    with contextlib.suppress(RuntimeError):  # the user has no home folder
        yield "~/llama.cpp", "~/llama.cpp/build/bin", _pair_in(Path.home() / "llama.cpp" / "build" / "bin")
    folders = build.installed_folders()
    for folder in folders:
        yield "cache", str(folder), _pair_in(folder)
    if not folders:
        yield "cache", str(build.engines_folder()), _Pair(None, None)


def _pair_in(folder: Path) -> _Pair:
    workers = (_program(folder, name) for name in WORKER_NAMES)
    return _Pair(_program(folder, SERVER_NAME), next((path for path in workers if path), None))


def _pair_on_path() -> _Pair:
    """The server on PATH and the worker beside it (or beside the target of its link), else the worker on PATH."""
    found = shutil.which(SERVER_NAME)
    server = Path(found).absolute() if found else None
    if server is not None:
        for folder in (server.parent, server.resolve().parent):
            if worker := _pair_in(folder).worker:
                return _Pair(server, worker)
    workers = (shutil.which(name) for name in WORKER_NAMES)
    return _Pair(server, next((Path(path).absolute() for path in workers if path), None))


def _program(folder: Path, name: str) -> Path | None:
    path = folder / (f"{name}.exe" if sys.platform == "win32" else name)
    try:
        return path if path.is_file() else None
    except OSError:  # an unreadable folder
        return None


def _check_built(bin_folder: Path) -> str:
    """The RPC protocol of an engine in the cache folder. Raises EngineError if it does not work."""
    pair = _pair_in(bin_folder)
    if pair.server is None or pair.worker is None:
        raise EngineNotFoundError(f"{bin_folder} has no {pair.missing}")
    return check_pair(pair.server, pair.worker, "cache").protocol


def _fingerprint(server: Path, worker: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, time and size of the programs and of the llama.cpp libraries beside them."""
    found = []
    try:
        files = {server, worker, *server.parent.glob("*ggml*"), *server.parent.glob("*llama*")}
        for path in sorted(files):
            status = path.stat()
            found.append((str(path), status.st_mtime_ns, status.st_size))
    except OSError as error:
        raise EngineIncompatibleError(f"cannot read {server.parent}: {error}") from error
    return tuple(found)


@functools.lru_cache(maxsize=32)
def _checked(server: Path, worker: Path, fingerprint: tuple[tuple[str, int, int], ...]) -> tuple[str, str]:
    """(version, protocol) of a working pair; `fingerprint` makes the cache miss when a file changes."""
    code, output = _run(server, "--version")
    if code != 0:
        raise EngineIncompatibleError(f"{server} does not run here: {_reason(code, output)}")
    found = _VERSION.search(output)
    for _ in range(_PORT_ATTEMPTS):
        protocol = _connect(server, worker)
        if protocol is not None:
            return (found.group(1) if found else "unknown"), protocol
    raise EngineIncompatibleError(f"{worker} could not be started: no free port on {LOOPBACK}")


def _connect(server: Path, worker: Path) -> str | None:
    """Start the worker and let the server connect to it; the RPC protocol, or None if the port was taken."""
    with socket.socket() as unused:
        unused.bind((LOOPBACK, 0))
        port = unused.getsockname()[1]
    endpoint = f"{LOOPBACK}:{port}"
    with tempfile.TemporaryFile() as log:

        def printed() -> str:
            log.seek(0)
            return log.read().decode(errors="replace")

        try:
            process = subprocess.Popen(
                [worker, "-H", LOOPBACK, "-p", str(port)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=config.child_environment(),
            )
        except OSError as error:
            raise EngineIncompatibleError(f"{worker} does not run here: {error.strerror or error}") from error
        try:
            if not _accepts_connections(process, port):
                code = process.poll()
                if code is not None and re.search(r"bind|in use|create server socket", printed()):
                    return None
                raise EngineIncompatibleError(f"{worker} does not run here: {_reason(code, printed())}")
            code, output = _run(server, "--rpc", endpoint, "--list-devices")
        finally:
            end_process_tree(process)
        protocol = _PROTOCOL.search(printed())
    if code == 0 and endpoint in output:
        return protocol.group(1) if protocol else ""
    if _NO_RPC.search(output):
        raise EngineIncompatibleError(
            f"{server} does not know --rpc and --list-devices: it was built without GGML_RPC, or is too old"
        )
    speaks = f" (RPC protocol {protocol.group(1)})" if protocol else ""
    raise EngineIncompatibleError(
        f"{worker}{speaks} does not work with {server}: use two programs of one build ({_reason(code, output)})"
    )


def _accepts_connections(process: subprocess.Popen[bytes], port: int) -> bool:
    """Whether the worker accepts connections, waiting until it does; False if it ends or takes too long."""
    deadline = time.monotonic() + CHECK_LIMIT_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection((LOOPBACK, port), timeout=1).close()
            return True
        except OSError:
            time.sleep(_POLL_S)
    return False


def _run(program: Path, *arguments: str) -> tuple[int | None, str]:
    """(exit code, output) of a program; the code is None if it was stopped at the time limit or did not start."""
    with tempfile.TemporaryFile() as log:
        try:
            process = subprocess.Popen(
                [program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=config.child_environment(),
            )
        except OSError as error:
            return None, error.strerror or str(error)
        try:
            code: int | None = process.wait(CHECK_LIMIT_S)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_process_tree(process)
        log.seek(0)
        output = log.read().decode(errors="replace")
    return code, output if code is not None else f"{output}\nno answer within {CHECK_LIMIT_S:.0f} s"


def _reason(code: int | None, output: str) -> str:
    """Why a program failed, on one line: the signal that ended it, what it printed, or its exit code."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"mismatch|error|fail|cannot|assert", line, re.IGNORECASE)]
    reason = (errors or lines)[-1][:200] if lines else ""
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            reason = f"ended by {signal.Signals(-code).name}" + (f", {reason}" if reason else "")
    return reason or ("it printed nothing" if code is None else f"exit code {code}")
