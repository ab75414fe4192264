"""Run shell scripts on another machine through this machine's `ssh` program, over one connection.

The program brings the user's own configuration: `~/.ssh/config`, agent, ProxyJump, known hosts. One process of it,
the master, keeps the connection in the foreground, so that it ends with this process; all others go through its
socket (`-S`, see ssh(1) and ssh_config(5)). Windows has no such sockets; there each makes its own connection.

What another machine prints is bounded, and not trusted.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import shlex
import shutil
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from sollol_nb.errors import LinkError
from sollol_nb.llama_cpp.links import ssh_errors
from sollol_nb.settings.endpoints import LOOPBACK, SSH, parse_endpoint

CONNECT_LIMIT_S = 60.0
"""For the whole connection: through jump hosts, and with keys whose use the user confirms."""
TCP_LIMIT_S = 15
ALIVE_INTERVAL_S, ALIVE_COUNT = 5, 3
FORWARD_LIMIT_S = 15.0
OUTPUT_LIMIT_BYTES = 1024 * 1024
ERROR_LINES = 40
LINE_LIMIT_BYTES = 4096
SOCKET_PATH_LIMIT = 80
"""Characters; the system has 104 or 108 with the suffix of 17 that ssh adds for a moment."""
POLL_S = 0.02

Stdin = bytes | Path | AsyncIterator[bytes] | None

_UNSAFE = re.compile(r"[^\w ./:,=@%+-]", re.ASCII)
_READ_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Result:
    """How a script ended: its exit code, and what it printed, cut after 1 MiB (stdout) and 40 lines (stderr)."""

    code: int
    stdout: str
    stderr: str


class Shell:
    """The shell of one machine. `open` connects, `close` ends all that runs through it."""

    def __init__(self, target: str, command: Sequence[str] = ("ssh",), *, shares: bool = os.name != "nt") -> None:
        """
        Args:
            target: `ssh://user@host:port`; user and port may be left out.
            command: the ssh program, and options for all its calls.
            shares: whether all goes through one connection; Windows cannot.
        """
        self.target = target
        self._command = list(command)
        self._shares = shares
        self._destination = _destination(target)
        self._folder: Path | None = None
        self._master: asyncio.subprocess.Process | None = None
        self._master_errors: _Lines | None = None
        self._children: set[asyncio.subprocess.Process] = set()

    @property
    def host(self) -> str:
        """The machine as the user calls it, for messages: `user@host:port` with what the target has."""
        return self.target.removeprefix(SSH)

    async def open(self) -> None:
        """Connect, within 60 s.

        Raises:
            LinkError: it cannot; the message has the command that helps.
        """
        if not self._shares:
            await self.run("exit 0", limit_s=CONNECT_LIMIT_S)
            return
        self._folder = _socket_folder()
        options = [
            "-M",
            "-N",
            "-o",
            "ControlMaster=yes",
            "-o",
            "ControlPersist=no",
            "-o",
            "ClearAllForwardings=yes",
        ]
        self._master = await self._spawn([*options, "-S", self._socket, *self._connecting()], stdin=None)
        assert self._master.stderr is not None
        self._master_errors = errors = _Lines(self._master.stderr)
        try:
            async with asyncio.timeout(CONNECT_LIMIT_S):
                while not self._is_accepted():
                    if self._master.returncode is not None:
                        await errors.ended()
                        raise LinkError(ssh_errors.explain(self.host, self._command, errors.lines))
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            await self.close()
            raise LinkError(ssh_errors.explain_silence(self.host, CONNECT_LIMIT_S, errors.lines)) from None
        except BaseException:
            await self.close()
            raise

    async def lost(self) -> str:
        """Wait until the connection is lost; returns why, in one line. Without sharing it never returns."""
        if self._master is None:
            await asyncio.Event().wait()
        assert self._master is not None
        assert self._master_errors is not None
        await self._master.wait()
        await self._master_errors.ended()
        return ssh_errors.explain(self.host, self._command, self._master_errors.lines)

    async def run(self, script: str, *arguments: str, stdin: Stdin = None, limit_s: float = 60.0) -> Result:
        """Run a script with POSIX `sh`, whatever the user's login shell is.

        What a login shell's start files print is left out.

        Args:
            script: the text of the script; with its arguments, at most 128 KiB after quoting.
            arguments: `$1`, `$2`, ... of the script.
            stdin: what the script reads; by default nothing.
            limit_s: seconds until it is given up.

        Raises:
            LinkError: the machine cannot be reached, has no POSIX shell for this user, or the limit is over.
        """
        session = await self._session(script, arguments, stdin)
        feeding = asyncio.create_task(session.feed(stdin)) if not isinstance(stdin, Path | None) else None
        try:
            async with asyncio.timeout(limit_s):
                stdout = await session.output()
                code = await session.wait()
        except TimeoutError:
            raise LinkError(
                f"{self.host}: a script did not end within {limit_s:g} s; is the machine overloaded?"
            ) from None
        finally:
            if feeding is not None:
                feeding.cancel()
            await session.end()
        return Result(code, stdout, "\n".join(session.errors))

    async def start(self, script: str, *arguments: str) -> Session:
        """Start a script that runs for long, as `run` does.

        Raises:
            LinkError: as for `run`.
        """
        return await self._session(script, arguments, b"")

    async def forward(self, local_port: int, remote_port: int) -> None:
        """Carry connections to a port on this machine's loopback to a port on that machine's loopback.

        Raises:
            LinkError: the local port is taken, or that machine's sshd forbids it.
        """
        where = f"{LOOPBACK}:{local_port}:{LOOPBACK}:{remote_port}"
        if self._shares:
            asking = await self._spawn([*self._sharing(), "-O", "forward", "-L", where, self._name], stdin=None)
            assert asking.stderr is not None
            errors = _Lines(asking.stderr)
            try:
                async with asyncio.timeout(FORWARD_LIMIT_S):
                    code = await asking.wait()
                    await errors.ended()
            except TimeoutError:
                code = -1
            finally:
                await self._end(asking)
            if code:
                raise LinkError(ssh_errors.explain(self.host, self._command, errors.lines))
        else:
            options = ["-N", "-o", "ExitOnForwardFailure=yes", "-L", where]
            await self._spawn([*options, *self._connecting()], stdin=None)

    async def close(self) -> None:
        """End the connection and all that runs through it. Closing twice is fine."""
        for process in [*self._children]:
            await self._end(process)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    # --- processes ------------------------------------------------------------------------------

    def _is_accepted(self) -> bool:
        """Whether the master has made its socket, which it does once the machine has accepted the user."""
        return Path(self._socket).exists()

    @property
    def _socket(self) -> str:
        assert self._folder is not None
        return str(self._folder / "s")

    @property
    def _name(self) -> str:
        return self._destination[-1]

    def _connecting(self) -> list[str]:
        """Options and destination of a process that connects itself. They win over the user's configuration."""
        options = (
            "BatchMode=yes",
            f"ConnectTimeout={TCP_LIMIT_S}",
            f"ServerAliveInterval={ALIVE_INTERVAL_S}",
            f"ServerAliveCountMax={ALIVE_COUNT}",
            "ForkAfterAuthentication=no",
            "LogLevel=DEBUG1",  # the fingerprint of an unknown host is shown at no lower level
            "PermitLocalCommand=no",
            "RemoteCommand=none",
            "RequestTTY=no",
        )
        return [*(word for option in options for word in ("-o", option)), *self._destination]

    def _sharing(self) -> list[str]:
        """Options of a process that goes through the master, and never connects itself."""
        return ["-F", "none", "-S", self._socket, "-o", "ControlMaster=no", "-o", "ProxyCommand=false", "-T"]

    async def _session(self, script: str, arguments: Sequence[str], stdin: Stdin) -> Session:
        marker = secrets.token_hex(8)
        remote = remote_command(script, arguments, marker)
        if self._shares:
            if self._folder is None:
                raise LinkError(f"{self.host} is not connected")
            options = [*self._sharing(), self._name]
        else:
            options = ["-T", "-o", "ControlPath=none", "-o", "ClearAllForwardings=yes", *self._connecting()]
        with contextlib.ExitStack() as stack:
            source: int | IO[bytes] | None = asyncio.subprocess.PIPE
            if stdin is None:
                source = None
            elif isinstance(stdin, Path):
                source = stack.enter_context(stdin.open("rb"))
            process = await self._spawn([*options, remote], stdin=source, stdout=True)
        return Session(self, process, marker)

    async def _spawn(
        self, options: Sequence[str], *, stdin: int | IO[bytes] | None, stdout: bool = False
    ) -> asyncio.subprocess.Process:
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                *options,
                stdin=asyncio.subprocess.DEVNULL if stdin is None else stdin,
                stdout=asyncio.subprocess.PIPE if stdout else asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                limit=OUTPUT_LIMIT_BYTES,
            )
        except OSError as error:
            raise LinkError(ssh_errors.explain_missing_program(self._command[0], error)) from error
        self._children.add(process)
        return process

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(1.0):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        self._children.discard(process)


class Session:
    """A script that runs on the machine: what it prints after its login shell's own output."""

    def __init__(self, shell: Shell, process: asyncio.subprocess.Process, marker: str) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        self._shell = shell
        self._process = process
        self._marker = marker
        self._stdout = process.stdout
        self._stderr = _Lines(process.stderr)
        self._noise: deque[str] = deque(maxlen=ERROR_LINES)
        self._has_begun = False

    @property
    def errors(self) -> list[str]:
        """The last lines of its stderr."""
        lines = list(self._stderr.lines)
        return lines[lines.index(self._marker) + 1 :] if self._marker in lines else lines

    async def line(self) -> str | None:
        """The next line of its stdout, without its end; None at the end.

        Raises:
            LinkError: no POSIX shell has run it.
        """
        await self._begin()
        return await _read_line(self._stdout)

    async def output(self) -> str:
        """All its stdout, cut after 1 MiB.

        Raises:
            LinkError: no POSIX shell has run it.
        """
        await self._begin()
        kept = bytearray()
        while data := await self._stdout.read(_READ_BYTES):
            kept += data[: OUTPUT_LIMIT_BYTES - len(kept)]
        return kept.decode("utf-8", "replace")

    def send(self, text: str) -> None:
        """Give it input."""
        assert self._process.stdin is not None
        if not self._process.stdin.is_closing():
            self._process.stdin.write(text.encode())

    async def feed(self, stdin: bytes | AsyncIterator[bytes]) -> None:
        """Give it all its input."""
        assert self._process.stdin is not None
        with contextlib.suppress(ConnectionError):  # it need not read all
            if isinstance(stdin, bytes):
                self._process.stdin.write(stdin)
                await self._process.stdin.drain()
            else:
                async for data in stdin:
                    self._process.stdin.write(data)
                    await self._process.stdin.drain()
        self._process.stdin.close()

    async def wait(self) -> int:
        """Wait until it ends; its exit code, 255 where the connection was lost."""
        code = await self._process.wait()
        await self._stderr.ended()
        return code

    async def end(self) -> None:
        """Close its input and output; the machine's sshd may let it run on."""
        await self._shell._end(self._process)

    async def _begin(self) -> None:
        while not self._has_begun:
            line = await _read_line(self._stdout)
            if line is None:
                await self.wait()
                raise LinkError(
                    ssh_errors.explain_no_shell(self._shell.host, self._shell._command, self._noise, self.errors)
                )
            self._has_begun = line == self._marker
            self._noise.append(line)


class _Lines:
    """The last lines of a stream, read as they come."""

    def __init__(self, stream: asyncio.StreamReader) -> None:
        self.lines: deque[str] = deque(maxlen=ERROR_LINES)
        self._stream = stream
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        while (line := await _read_line(self._stream)) is not None:
            if ssh_errors.is_wanted(line):
                self.lines.append(line)

    async def ended(self) -> None:
        """Wait until all is read; a process that inherited the stream may keep it open, so not for long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await asyncio.shield(self._reading)


async def _read_line(stream: asyncio.StreamReader) -> str | None:
    """The next line without its end, cut after 4096 bytes; None at the end."""
    try:
        line = await stream.readuntil(b"\n")
    except asyncio.IncompleteReadError as error:
        line = error.partial
        if not line:
            return None
    except asyncio.LimitOverrunError as error:
        line = await stream.read(error.consumed)
    return line[:LINE_LIMIT_BYTES].decode("utf-8", "replace").rstrip("\r\n")


def remote_command(script: str, arguments: Sequence[str], marker: str) -> str:
    """The command for the login shell: it becomes `sh`, which prints the marker, then runs the script.

    Between its quotes it has only characters that sh, csh and fish all leave alone there; others are written as
    `\\0ooo`, which `printf %b` decodes (POSIX).
    """
    text = f"set -- {shlex.join(arguments)}\nprintf '\\n%s\\n' {marker}; printf '\\n%s\\n' {marker} >&2\n{script}"
    encoded = "".join(chr(byte) if not _UNSAFE.match(chr(byte)) else f"\\0{byte:03o}" for byte in text.encode())
    return f"""exec sh -c 'eval "$(printf %b "$1")"' sh '{encoded}'"""


def _destination(target: str) -> list[str]:
    """Options for user and port, and the host, which is an alias of ~/.ssh/config or a name."""
    user, at, address = target.removeprefix(SSH).rpartition("@")
    host, port = parse_endpoint(address, 22)
    has_port = address.removesuffix(f":{port}") != address and not address.endswith("]")
    return [*(["-l", user] if at else []), *(["-p", str(port)] if has_port else []), host]


def _socket_folder() -> Path:
    """A new private folder with a path that is short enough for a socket."""
    for parent in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"):  # noqa: S108 - mkdtemp is safe
        if parent and len(parent.encode()) < SOCKET_PATH_LIMIT - 20 and "%" not in parent and "$" not in parent:
            with contextlib.suppress(OSError):
                return Path(tempfile.mkdtemp(prefix="sollol-", dir=parent))
    raise LinkError("no folder for the socket of ssh; set TMPDIR to a writable folder with a short path")
