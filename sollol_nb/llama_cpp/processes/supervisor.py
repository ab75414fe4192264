"""The supervisor: a small process that owns one engine process (a coordinator, a local worker or a link).

Run by path (`python -I -S supervisor.py`) with the standard library and psutil only, so that it starts quickly
and stays small. Its parent writes one JSON line to its stdin (`argv`, `env`, `log_path`, ...: see `EngineProcess`)
and reads one from its stdout: `{"event": "started", "pid": ..., "control_port": ...}` or `{"event": "failed",
"tail": [...]}`. From then on it depends on no other process: kernels come and go, and find the engine through
its registry entry, a file that the supervisor writes (mode 0600, replaced atomically) and removes at the end.

Control protocol, on a loopback port: JSON lines. A client first sends `{"key": ..., "pid": ..., "name": ...}`: the
secret of this engine, which the supervisor keeps in a separate file, and who the client is; then requests `{"n": 1,
"do": ...}`, each answered by `{"n": 1, "ok": ...}`:

| do | does |
|---|---|
| `hold`, `free` | take or end a lease; the end of a connection ends its leases. `others`: leases of others now, `uses_by_others`: ever |
| `keep_alive` | set the `seconds` that the engine lives without a lease; null is forever |
| `about` | merge `about` into the registry entry |
| `status` | `clients` (except the one that asks), `users` (their names, one for each process), `leases`, `idle_s`, `ends_in_s` |
| `stop` | end the engine, by force after `grace_s`; `unless`: `shared`, not if another client is connected; `used`, not if one has a lease or belongs to another process; `foreign`, not if one belongs to another process; then the answer has `users`, and with `leave` the client is none of them from then on |

When the engine has ended, all clients receive `{"event": "exited", "code": ..., "tail": [...], "why": ...}`.

The engine runs in a separate session, so a kernel's interrupt cannot reach it. If the supervisor is killed, a
guard (a forked copy of it on POSIX, a job object on Windows) ends the engine. Secrets travel in `env` through the
pipe, never in arguments.

The supervisor writes the engine's log. After the line that contains `debug_until`, it drops debug lines: at the
verbosity that reports the layer placement, the engine would log every token and prompt.
"""  # noqa: E501 - a table's row is one line

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from typing import IO, Any

LOOPBACK = "127.0.0.1"  # this file runs alone, without the package
END_SIGNALS = (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))
STOP_GRACE_S = 5.0
MIN_IDLE_S = 1.0
"""Shortest life without a lease: with a keep_alive of 0, one request must be able to follow another."""
FIRST_CLIENT_S = 30.0
"""Time for the client that started the engine to connect, if keep_alive is shorter."""
GREETING_LIMIT_S = 5.0
LINE_LIMIT_BYTES = 256 * 1024
UNGREETED_LIMIT = 64
"""Connections that have not sent the key yet; if there are more, the oldest is dropped."""
NAME_LIMIT = 200
GUARD_DONE = b"done"
TAIL_LINES = 40
TAIL_LINE_BYTES = 1000

# llama.cpp's log lines start with a timestamp and a level letter; lines without one continue the previous line.
_LEVEL = re.compile(rb"^\d+\.\d+\.\d+\.\d+ ([A-Z]) ")
# An abort prints lines without a prefix: a source position, "terminate called", the exception.
_ABORT = re.compile(rb"\.(cpp|h|cu|m|c):\d+: |terminate called|what\(\):|GGML_ASSERT|error while loading")
# An abort may print in the middle of another thread's line, right after its prefix.
_ABORT_AFTER_PREFIX = re.compile(rb"\S*\.(cpp|h|cu|m|c):\d+: |terminate called")


class LogDrain(threading.Thread):
    """Copies the engine's output to a file of limited size and keeps the last lines."""

    def __init__(self, pipe: IO[bytes], path: str, limit_bytes: int, debug_until: str | None) -> None:
        super().__init__(name="log drain", daemon=True)
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._pipe = pipe
        self._path = path
        self._limit_bytes = limit_bytes
        self._marker = debug_until.encode() if debug_until else None
        self._quiet = False
        self._dropping = False

    def run(self) -> None:
        # Keep reading whatever happens to the log: the engine would block on a full pipe.
        try:
            descriptor = open_private(self._path, os.O_TRUNC)
        except OSError:
            descriptor = os.open(os.devnull, os.O_WRONLY)
        with os.fdopen(descriptor, "wb", buffering=0) as log:
            written = 0
            for line in self._pipe:
                if not self._is_wanted(line):
                    continue
                self.tail.append(line[:TAIL_LINE_BYTES].decode("utf-8", "replace").rstrip())
                if written < self._limit_bytes:
                    with contextlib.suppress(OSError):
                        written += log.write(line) or 0
                        if written >= self._limit_bytes:
                            log.write(b"[the log ends here: it reached its size limit]\n")

    def _is_wanted(self, line: bytes) -> bool:
        if not self._quiet:
            self._quiet = self._marker is not None and self._marker in line
            return True
        level = _LEVEL.match(line)
        if level and not _ABORT_AFTER_PREFIX.match(line, level.end()):
            self._dropping = level.group(1) == b"D"
            return not self._dropping
        return not self._dropping or _ABORT.search(line) is not None


class Client:
    """One control connection: its unprocessed bytes, the leases it holds, and the process it belongs to."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.unread = b""
        self.leases = 0
        self.uses = 0  # leases that it ever had
        self.greeted = False
        self.has_left = False
        self.pid = 0
        self.name = ""
        self.since = time.monotonic()

    def send(self, message: dict[str, Any]) -> bool:
        """Send a line; False if the client does not read, or has disconnected."""
        try:
            self.connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return False
        return True


class Supervisor:
    """Serves the control port until the engine has ended."""

    def __init__(
        self, spec: dict[str, Any], engine: subprocess.Popen[bytes], drain: LogDrain, held: list[socket.socket]
    ) -> None:
        self._spec = spec
        self._engine = engine
        self._drain = drain
        self._held = held
        self._keep_alive_s: float | None = spec["keep_alive_s"]
        self._about: dict[str, Any] = spec["about"]
        self._clients: set[Client] = set()
        self._idle_since = time.monotonic()
        self._first_client_until = self._idle_since + FIRST_CLIENT_S
        self._uses = 0  # leases that were ever granted
        self._why = ""
        self._kill_at: float | None = None
        self._selector = selectors.DefaultSelector()
        self._listener = socket.create_server((LOOPBACK, 0), backlog=256)
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._woken, self._wake = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ, lambda: self._woken.recv(64))
        self._entry = {
            "id": spec["id"],
            "kind": spec["kind"],
            "pid": engine.pid,
            "pid_started": _start_time(engine.pid),
            "supervisor_pid": os.getpid(),
            "supervisor_started": _start_time(os.getpid()),
            "control_port": self.control_port,
            "key_path": spec["key_path"],
            "log_path": spec["log_path"],
            "started_at": time.time(),
        }

    @property
    def control_port(self) -> int:
        """The loopback port that it listens on."""
        return int(self._listener.getsockname()[1])

    def write_entry(self) -> None:
        """Replace the registry entry; if the disk is full, the old one stays."""
        path = self._spec["entry_path"]
        entry = {**self._entry, "keep_alive_s": self._keep_alive_s, "about": self._about}
        with contextlib.suppress(OSError):
            write_private(path + ".new", json.dumps(entry))
            os.replace(path + ".new", path)

    def serve(self, signals: list[int]) -> None:
        """Serve until the engine has ended; `signals` are the end signals received so far."""
        threading.Thread(target=self._wait_for_engine, daemon=True).start()
        for number in END_SIGNALS:
            signal.signal(number, self._on_end_signal)
        if signals:
            self._on_end_signal()
        while self._engine.poll() is None or self._is_expected():
            now = time.monotonic()
            for client in [*self._clients]:
                if not client.greeted and now - client.since > GREETING_LIMIT_S:
                    self._drop(client)
            if self._kill_at is not None and now >= self._kill_at:
                self._kill_at = None
                _signal(self._engine, getattr(signal, "SIGKILL", signal.SIGTERM))
            elif not self._why and (ends_in := self._ends_in_s()) is not None and ends_in <= 0:
                self._stop("idle")
            for key, _ in self._selector.select(self._pause_s()):
                key.data()
        if os.name == "posix":
            _signal(self._engine, signal.SIGKILL)  # processes that it started may outlive it
        self._drain.join(STOP_GRACE_S)
        code, tail = self._engine.returncode, list(self._drain.tail)
        with (
            contextlib.suppress(OSError),
            os.fdopen(open_private(self._spec["log_path"], os.O_APPEND), "ab") as log,
        ):
            log.write(f"[the engine ended: exit code {code}{', ' * bool(self._why)}{self._why}]\n".encode())
        # Before the report: its receivers must find the entry removed and the held engines free.
        remove_files(self._spec)
        for connection in self._held:
            connection.close()
        for client in self._clients:
            if client.greeted:
                client.connection.settimeout(1.0)
                client.send({"event": "exited", "code": code, "tail": tail, "why": self._why})

    def _is_expected(self) -> bool:
        """Whether to wait for the client that started this engine, to report why it ended immediately."""
        expected_until = self._first_client_until - FIRST_CLIENT_S + GREETING_LIMIT_S
        return not self._why and 0.0 < expected_until > time.monotonic()

    def _on_end_signal(self, *_: object) -> None:
        self._stop("its supervisor was terminated")
        self._wake.send(b"t")

    def _wait_for_engine(self) -> None:
        self._engine.wait()
        self._wake.send(b"e")

    def _leases(self) -> int:
        return sum(client.leases for client in self._clients)

    def _ends_in_s(self) -> float | None:
        if self._keep_alive_s is None or self._leases():
            return None
        ends_at = max(self._idle_since + max(self._keep_alive_s, MIN_IDLE_S), self._first_client_until)
        return ends_at - time.monotonic()

    def _pause_s(self) -> float:
        waits = [60.0]
        if self._kill_at is not None:
            waits.append(self._kill_at - time.monotonic())
        if not self._why and (ends_in := self._ends_in_s()) is not None:
            waits.append(ends_in)
        if self._engine.returncode is not None or any(not client.greeted for client in self._clients):
            waits.append(GREETING_LIMIT_S)
        return max(0.0, min(waits))

    def _stop(self, why: str, grace_s: float = STOP_GRACE_S) -> None:
        kill_at = time.monotonic() + grace_s
        if not self._why:
            self._why, self._kill_at = why, kill_at
            _signal(self._engine, signal.SIGTERM)
        elif self._kill_at is not None:
            self._kill_at = min(self._kill_at, kill_at)

    # --- clients --------------------------------------------------------------------------------

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            # Else the second of two small answers may wait 40 ms for the acknowledgement of the first.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client = Client(connection)
            self._clients.add(client)
            self._selector.register(connection, selectors.EVENT_READ, lambda: self._read(client))
            ungreeted = [known for known in self._clients if not known.greeted]
            if len(ungreeted) > UNGREETED_LIMIT:
                self._drop(min(ungreeted, key=lambda known: known.since))

    def _drop(self, client: Client) -> None:
        if client not in self._clients:  # an earlier event of this round has dropped it
            return
        self._end_leases(client)
        self._clients.discard(client)
        self._selector.unregister(client.connection)
        client.connection.close()

    def _end_leases(self, client: Client) -> None:
        held, client.leases = client.leases, 0
        if held and not self._leases():
            self._idle_since = time.monotonic()

    def _read(self, client: Client) -> None:
        try:
            data = client.connection.recv(65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        *lines, client.unread = (client.unread + data).split(b"\n")
        if not data or len(client.unread) > LINE_LIMIT_BYTES:
            self._drop(client)
            return
        for line in lines:
            try:
                message = json.loads(line)
                answer = self._answer(client, message) if client.greeted else self._greet(client, message)
                understood = answer is not None and client.send(answer)
            except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError):
                understood = False
            if not understood:
                self._drop(client)
                return

    def _others(self, client: Client) -> list[Client]:
        """Except the engine itself: a link keeps its registry entry up to date."""
        return [
            known
            for known in self._clients
            if known.greeted and not known.has_left and known is not client and known.pid != self._engine.pid
        ]

    def _keepers(self, client: Client, unless: str) -> list[Client]:
        """The clients for whose sake the engine is not ended."""
        if unless == "shared":
            return self._others(client)
        if unless == "used":
            return [known for known in self._others(client) if known.leases or known.pid != client.pid]
        if unless == "foreign":
            return [known for known in self._others(client) if known.pid != client.pid]
        return []

    def _greet(self, client: Client, message: dict[str, Any]) -> dict[str, Any] | None:
        if not _is_same_secret(str(message["key"]).encode(), str(self._spec["key"]).encode()):
            return None
        client.greeted = True
        client.pid, client.name = int(message.get("pid", 0)), str(message.get("name", ""))[:NAME_LIMIT]
        # The engine itself, if it is a link, may be faster than the client that has started it.
        if self._first_client_until and client.pid != self._engine.pid:
            self._first_client_until, self._idle_since = 0.0, time.monotonic()
        return {"event": "hello", "id": self._spec["id"], "pid": self._engine.pid}

    def _answer(self, client: Client, message: dict[str, Any]) -> dict[str, Any]:
        answer: dict[str, Any] = {"n": message["n"], "ok": True}
        match message["do"]:
            case "hold":
                answer["ok"] = not self._why
                client.leases += not self._why
                client.uses += not self._why
                self._uses += not self._why
                if self._uses > client.uses:  # others may have changed what the engine's slots hold
                    answer["others"] = self._leases() - client.leases
                    answer["uses_by_others"] = self._uses - client.uses
            case "free":
                if client.leases:
                    client.leases -= 1
                    if not self._leases():
                        self._idle_since = time.monotonic()
            case "keep_alive":
                seconds = message["seconds"]
                self._keep_alive_s = None if seconds is None else max(0.0, float(seconds))
                self.write_entry()
            case "about":
                self._about |= message["about"]
                self.write_entry()
            case "status":
                others = self._others(client)
                idle_s = None if self._leases() else time.monotonic() - self._idle_since
                answer |= {"clients": len(others), "leases": self._leases(), "idle_s": idle_s}
                answer["users"] = _names_of(others, client.pid)
                answer["ends_in_s"] = self._ends_in_s()
            case "stop":
                keepers = self._keepers(client, str(message.get("unless", "")))
                if keepers:
                    answer |= {"ok": False, "users": _names_of(keepers, client.pid)}
                    # At once: of two that stop it at the same time, the second one must not count the first.
                    if message.get("leave"):
                        client.has_left = True
                        self._end_leases(client)
                else:
                    self._stop(str(message.get("why", "stopped")), float(message.get("grace_s", STOP_GRACE_S)))
            case _:
                answer["ok"] = False
        return answer


def _names_of(clients: list[Client], own_pid: int) -> list[str]:
    """Who they are, each process once, other processes first."""
    known = sorted(clients, key=lambda client: client.pid == own_pid)
    return list({client.pid: client.name or "another process" for client in known}.values())


def _is_same_secret(given: bytes, secret: bytes) -> bool:
    """In constant time; `hmac` offers that too, but loads OpenSSL's megabytes."""
    difference = len(given) ^ len(secret)
    for given_byte, secret_byte in zip(given, secret):  # noqa: B905 - lengths are compared above
        difference |= given_byte ^ secret_byte
    return difference == 0


def _start_time(pid: int) -> float | None:
    try:
        import psutil

        return float(psutil.Process(pid).create_time())
    except Exception:  # psutil is missing, or the process is already gone
        return None


def _signal(engine: subprocess.Popen[bytes], number: int) -> None:
    try:
        if os.name == "posix":
            os.killpg(engine.pid, number)  # the engine leads the group of its session
        else:
            engine.terminate()
    except (ProcessLookupError, PermissionError):  # gone; on macOS a group of dead processes is not permitted
        pass


def open_private(path: str, flags: int) -> int:
    """Open a file for writing that only its owner may read, and never through a link."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | flags, 0o600)


def write_private(path: str, text: str) -> None:
    """Write a file that only its owner may read."""
    with os.fdopen(open_private(path, os.O_TRUNC), "w", encoding="utf-8") as file:
        file.write(text)


def remove_files(spec: dict[str, Any]) -> None:
    """Remove the engine's registry entry and its key."""
    for path in (spec["entry_path"], spec["entry_path"] + ".new", spec["key_path"]):
        with contextlib.suppress(OSError):
            os.unlink(path)


def hold_others(holds: list[dict[str, Any]], name: str) -> list[socket.socket]:
    """Leases on other engines (a coordinator's local workers), as long as these connections are open."""
    held = []
    for engine in holds:
        with contextlib.suppress(OSError):
            connection = socket.create_connection((LOOPBACK, engine["port"]), timeout=5.0)
            greeting = {"key": engine["key"], "pid": os.getpid(), "name": name}
            connection.sendall(json.dumps(greeting).encode() + b"\n" + b'{"n": 1, "do": "hold"}\n')
            held.append(connection)
    return held


# --- the guard: ends the engine if the supervisor is killed ---------------------------------------


def start_guard(spec: dict[str, Any]) -> int:
    """Fork the guard (POSIX); returns the pipe that sends it the engine's pid and, by closing, reports our end."""
    reads, writes = os.pipe()
    if os.fork():
        os.close(reads)
        return writes
    try:
        os.close(writes)
        os.setsid()
        devnull = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(devnull, descriptor)
        received = b""
        while data := os.read(reads, 64):
            received += data
        if not received.endswith(GUARD_DONE):  # the supervisor was killed
            if received:
                with contextlib.suppress(OSError):
                    os.killpg(int(received), signal.SIGKILL)
            remove_files(spec)
    finally:
        os._exit(0)


def _send_to_guard(guard: int | None, data: bytes) -> None:
    if guard is not None:
        with contextlib.suppress(OSError):  # without a guard the engine runs, only less safely
            os.write(guard, data)


def end_with_us(engine: subprocess.Popen[bytes]) -> Any:
    """On Windows: a job object that ends the engine when our last handle to it closes; keep the result."""
    if sys.platform != "win32":
        return None
    import ctypes

    kernel32 = ctypes.WinDLL("kernel32")
    kernel32.CreateJobObjectW.restype = ctypes.c_void_p
    job = kernel32.CreateJobObjectW(None, None)
    # JOBOBJECT_EXTENDED_LIMIT_INFORMATION (class 9), where LimitFlags lies after two 64-bit times;
    # 0x2000 is JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE.
    information = (ctypes.c_ubyte * 144)()
    ctypes.c_uint32.from_buffer(information, 16).value = 0x2000
    kernel32.SetInformationJobObject(ctypes.c_void_p(job), 9, information, len(information))
    kernel32.AssignProcessToJobObject(ctypes.c_void_p(job), ctypes.c_void_p(int(engine._handle)))
    return job


def _report_to_parent(message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # the parent may be gone; the engine runs on
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()
    # The parent's pipes must not stay open.
    devnull = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(devnull, descriptor)


def remember_signals() -> list[int]:
    """Collect end signals in the returned list, until the supervisor serves and can act on them."""
    signals: list[int] = []
    for number in END_SIGNALS:
        signal.signal(number, lambda number, _: signals.append(number))
    return signals


def main() -> int:
    spec = json.loads(sys.stdin.readline())
    sys.path.append(spec["psutil_folder"])
    guard = start_guard(spec) if os.name == "posix" else None
    signals = remember_signals()
    if os.name == "posix":
        # The process sends its pid itself, before it becomes the engine: there is no moment without a guard.
        own_session: dict[str, Any] = {
            "start_new_session": True,
            "umask": 0o077,  # saved contexts and the tensors of private models are files of its
            "preexec_fn": lambda: _send_to_guard(guard, b"%d\n" % os.getpid()),
        }
    else:
        own_session = {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
    held = hold_others(spec["holds"], f"the coordinator of {spec['about'].get('model')}")
    try:
        write_private(spec["key_path"], spec["key"])
        engine = subprocess.Popen(
            spec["argv"],
            env=spec["env"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # SIGPIPE stays ignored, as in Python: a client that disconnects must not end the worker.
            restore_signals=False,
            **own_session,
        )
    except OSError as error:
        remove_files(spec)
        _send_to_guard(guard, GUARD_DONE)
        what = spec["key_path"] if error.filename == spec["key_path"] else spec["argv"][0]
        _report_to_parent({"event": "failed", "tail": [f"{what}: {error.strerror}"]})
        return 1
    job = end_with_us(engine)
    assert engine.stdout is not None
    drain = LogDrain(engine.stdout, spec["log_path"], spec["log_limit_bytes"], spec.get("debug_until"))
    drain.start()
    supervisor = Supervisor(spec, engine, drain, held)
    supervisor.write_entry()
    _report_to_parent({"event": "started", "pid": engine.pid, "control_port": supervisor.control_port})
    supervisor.serve(signals)
    _send_to_guard(guard, GUARD_DONE)
    del job  # it had to stay open until here
    return 0


if __name__ == "__main__":
    code = main()
    os._exit(code)  # daemon threads may sit in reads that never end
