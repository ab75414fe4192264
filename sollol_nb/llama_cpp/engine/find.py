"""Find llama.cpp's two programs, check that they work together, or have them built.

An engine is a pair: `llama-server` (the coordinator) and the RPC worker (`ggml-rpc-server`, in older builds
`rpc-server`). A folder that the user names, as an argument or in `SOLLOL_LLAMA_CPP`, is the only one looked at:
if it cannot be used, that is an error and never a reason to take another. Without one the usual places are
tried in order: PATH, `~/llama.cpp/build/bin`, and the package's own cache.

A pair is checked by letting it do what it is for: the worker is started on a free loopback port, and
`llama-server --rpc <port> --list-devices` has to greet it and list its device. That finds a program that does
not run here, one built without RPC, and two from different builds (another RPC protocol), whatever they print
about themselves. The check takes about 0.1 s on the CPU and is remembered for as long as no file of the pair
changes.
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
from sollol_nb.llama_cpp.engine import build as engine_build
from sollol_nb.llama_cpp.engine.steps import Progress, end_process_tree
from sollol_nb.settings import config
from sollol_nb.settings.endpoints import LOOPBACK

SERVER_NAME = "llama-server"
WORKER_NAMES = ("ggml-rpc-server", "rpc-server")
CHECK_LIMIT_S = 30.0  # a GPU's driver may take seconds to start
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
        source: `given folder`, `SOLLOL_LLAMA_CPP`, `PATH`, `~/llama.cpp` or `cache`.
        protocol: RPC protocol of the worker, such as `7.0.0`; empty if it does not say.
    """

    server: Path
    worker: Path
    version: str
    source: str
    protocol: str = ""


@dataclass(frozen=True, slots=True)
class _Pair:
    """What a place holds of the two programs."""

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
        folder: the user's own `bin` folder or llama.cpp checkout; None takes `SOLLOL_LLAMA_CPP`, else looks in
            the usual places.

    Raises:
        EngineNotFoundError: no usable pair; the message says where was looked and what was wrong there.
        EngineIncompatibleError: the user's own folder holds a pair that cannot be used.
    """
    named = _named_folder(folder)
    if named is not None:
        return _in_named_folder(*named)
    looked: list[str] = []
    for source, where, pair in _usual_places():
        if pair.server is None or pair.worker is None:
            looked.append(f"{where}: no {pair.missing}")
            continue
        try:
            return check_pair(pair.server, pair.worker, source)
        except EngineIncompatibleError as error:
            looked.append(f"{where}: {error}")
    raise EngineNotFoundError(
        f"no usable llama.cpp found ({'; '.join(looked)}); run `{INSTALL_COMMAND}`, "
        "or set SOLLOL_LLAMA_CPP to a folder with llama-server and the RPC worker"
    )


def install_engine(*, backend: str | None = None, force: bool = False, progress: Progress | None = None) -> Engine:
    """Build llama.cpp into the cache unless a working build of it is there. Blocking, for minutes.

    Args:
        backend: `cpu`, `cuda`, `metal`, `hip` or `vulkan`; None takes what this machine has.
        force: build even if a working build is there.
        progress: called with (text, share done from 0 to 1) at every step, and with (remark, None); None shows
            a progress bar.

    Raises:
        ConfigError: no such backend.
        EngineBuildError: a tool is missing, or a step failed; the message says what to do.
    """
    folder = engine_build.build_engine(backend, check=_check_built, force=force, progress=progress)
    return _in_named_folder(folder, "cache")


def ensure_engine(folder: str | Path | None = None, *, progress: Progress | None = None) -> Engine:
    """The engine to use, built first if there is none. Blocking.

    Nothing is built for a user who named a folder: if that has no usable engine, that is the error.

    Raises:
        EngineNotFoundError, EngineIncompatibleError: the folder that the user named cannot be used.
        EngineBuildError: none was there, and building one failed.
    """
    try:
        return find_engine(folder)
    except EngineNotFoundError:
        if _named_folder(folder) is not None:
            raise
    return install_engine(progress=progress)


def check_pair(server: Path, worker: Path, source: str) -> Engine:
    """Check that both programs run, speak RPC, and speak it with each other.

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
    pairs = [_pair_in(place) for place in (folder, *(folder / name for name in _CHECKOUT_FOLDERS))]
    for pair in pairs:
        if pair.server and pair.worker:
            return check_pair(pair.server, pair.worker, source)
    what = f"{source} ({folder})"
    if not folder.is_dir():
        raise EngineNotFoundError(f"{what} is not a folder; correct it, or leave it out")
    nearest = next((pair for pair in pairs if pair.server or pair.worker), pairs[0])
    raise EngineNotFoundError(
        f"{what} has no {nearest.missing}, neither there nor in build/bin; correct it, or leave it out"
    )


def _usual_places() -> Iterator[tuple[str, str, _Pair]]:
    """(source, place in words, what it holds), in the order of trying."""
    yield "PATH", "PATH", _pair_on_path()
    with contextlib.suppress(RuntimeError):  # a user without a home folder
        yield "~/llama.cpp", "~/llama.cpp/build/bin", _pair_in(Path.home() / "llama.cpp" / "build" / "bin")
    folders = engine_build.installed_folders()
    for folder in folders:
        yield "cache", str(folder), _pair_in(folder)
    if not folders:
        yield "cache", str(engine_build.engines_folder()), _Pair(None, None)


def _pair_in(folder: Path) -> _Pair:
    workers = (_program(folder, name) for name in WORKER_NAMES)
    return _Pair(_program(folder, SERVER_NAME), next((path for path in workers if path), None))


def _pair_on_path() -> _Pair:
    """PATH's server with the worker beside it, also beside what its link leads to, else PATH's worker."""
    found = shutil.which(SERVER_NAME)
    server = Path(found).absolute() if found else None
    if server is not None:
        for folder in (server.parent, server.resolve().parent):
            if worker := _pair_in(folder).worker:
                return _Pair(server, worker)
    others = (shutil.which(name) for name in WORKER_NAMES)
    return _Pair(server, next((Path(path).absolute() for path in others if path), None))


def _program(folder: Path, name: str) -> Path | None:
    path = folder / (f"{name}.exe" if sys.platform == "win32" else name)
    try:
        return path if path.is_file() else None
    except OSError:  # a folder we may not read
        return None


def _check_built(bin_folder: Path) -> str:
    """The protocol of an engine in the cache. Raises EngineError if it does not work."""
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
        raise EngineIncompatibleError(f"{server.parent} cannot be read: {error}") from error
    return tuple(found)


@functools.lru_cache(maxsize=32)
def _checked(server: Path, worker: Path, fingerprint: tuple[tuple[str, int, int], ...]) -> tuple[str, str]:
    """(version, protocol) of a working pair; `fingerprint` makes a changed file a new question."""
    code, output = _run(server, "--version")
    if code != 0:
        raise EngineIncompatibleError(f"{server} does not run here: {_reason(code, output)}")
    found = _VERSION.search(output)
    for _ in range(_PORT_ATTEMPTS):
        protocol = _greet(server, worker)
        if protocol is not None:
            return (found.group(1) if found else "unknown"), protocol
    raise EngineIncompatibleError(f"{worker} could not be started: no free port on {LOOPBACK}")


def _greet(server: Path, worker: Path) -> str | None:
    """Start the worker, let the server greet it; the worker's protocol, or None if its port was taken."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port = probe.getsockname()[1]
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
    speaks = f" speaks RPC protocol {protocol.group(1)}, which" if protocol else ""
    raise EngineIncompatibleError(
        f"{worker}{speaks} does not fit {server}: take both from one build ({_reason(code, output)})"
    )


def _accepts_connections(process: subprocess.Popen[bytes], port: int) -> bool:
    """Wait until the worker accepts connections; False if it ended or took too long."""
    deadline = time.monotonic() + CHECK_LIMIT_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection((LOOPBACK, port), timeout=1).close()
            return True
        except OSError:
            time.sleep(_POLL_S)
    return False


def _run(program: Path, *arguments: str) -> tuple[int | None, str]:
    """(exit code, output) of a program; the code is None if it had to be ended or could not start."""
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
    """Why a program failed, on one line: the signal that ended it, what it said, or its exit code."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"mismatch|error|fail|cannot|assert", line, re.IGNORECASE)]
    said = (telling or lines)[-1][:200] if lines else ""
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            said = f"ended by {signal.Signals(-code).name}" + (f", {said}" if said else "")
    return said or ("it was silent" if code is None else f"exit code {code}")
