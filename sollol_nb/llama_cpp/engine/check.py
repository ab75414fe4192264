"""Check that llama.cpp's two programs run on this machine and work with each other.

The check is a real use of the pair: the worker is started on a free loopback port, and `llama-server --rpc <port>
--list-devices` must connect to it and list its device. That detects a program that does not run here, one built
without RPC, and two from different builds (another RPC protocol), whatever they print about themselves. The check
takes about 0.1 s on the CPU; its result is kept until a file of the pair changes.
"""

from __future__ import annotations

import contextlib
import functools
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from sollol_nb.errors import EngineIncompatibleError, EngineNotFoundError
from sollol_nb.llama_cpp.engine.steps import end_process_tree
from sollol_nb.settings import config
from sollol_nb.settings.endpoints import LOOPBACK

SERVER_NAME = "llama-server"
WORKER_NAMES = ("ggml-rpc-server", "rpc-server")
CHECK_LIMIT_S = 30.0  # a GPU driver may take seconds to start

_PROTOCOL = re.compile(r"RPC server v(\d+\.\d+\.\d+)")
_VERSION = re.compile(r"^version:\s*(.+?)\s*$", re.MULTILINE)
_NO_RPC = re.compile(
    r"(invalid|unknown) argument: --(rpc|list-devices)|not supported in this build|failed to find RPC"
)
_PORT_ATTEMPTS = 3
_POLL_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """A pair of programs of one llama.cpp build: checked, except where `find.locate_engine` says so.

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
class Pair:
    """The two programs of a folder, as far as it has them."""

    server: Path | None
    worker: Path | None

    @property
    def missing(self) -> str:
        """The names of those that it lacks, to be put after `no`."""
        parts = [] if self.server else [SERVER_NAME]
        parts += [] if self.worker else [f"RPC worker ({WORKER_NAMES[0]})"]
        return " and no ".join(parts)


def pair_in(folder: Path) -> Pair:
    """The programs that a folder contains, not checked yet."""
    workers = (_program(folder, name) for name in WORKER_NAMES)
    return Pair(_program(folder, SERVER_NAME), next((path for path in workers if path), None))


def _program(folder: Path, name: str) -> Path | None:
    path = folder / (f"{name}.exe" if sys.platform == "win32" else name)
    try:
        return path if path.is_file() else None
    except OSError:  # an unreadable folder
        return None


def check_pair(server: Path, worker: Path, source: str) -> Engine:
    """Check that both programs run, support RPC, and work with each other.

    Raises:
        EngineIncompatibleError: they do not.
    """
    version, protocol = _checked(server, worker, _fingerprint(server, worker))
    return Engine(server=server, worker=worker, version=version, source=source, protocol=protocol)


def check_folder(bin_folder: Path) -> str:
    """Check the pair in a `bin` folder of the cache; returns its RPC protocol.

    Raises:
        EngineNotFoundError: a program is missing.
        EngineIncompatibleError: they do not work with each other.
    """
    pair = pair_in(bin_folder)
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
