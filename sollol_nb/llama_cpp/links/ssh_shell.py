"""Run shell scripts on another machine through this machine's `ssh` program, over one connection.

The program brings the user's own configuration: `~/.ssh/config`, agent, ProxyJump, known hosts. One process of it,
the master, keeps the connection in the foreground, so that it ends with this process; all others go through its
socket (`-S`, see ssh(1) and ssh_config(5)). Windows has no such sockets; there each makes its own connection.

What another machine prints is bounded, and not trusted.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sollol_nb.errors import LinkError
from sollol_nb.llama_cpp.links import ssh_errors
from sollol_nb.llama_cpp.links.ssh_session import OUTPUT_LIMIT_BYTES, Lines, Session, end_process, remote_command
from sollol_nb.settings.endpoints import LOOPBACK, SSH, parse_endpoint

CONNECT_LIMIT_S = 60.0
"""For the whole connection: through jump hosts, and with keys whose use the user confirms."""
TCP_LIMIT_S = 15
ALIVE_INTERVAL_S, ALIVE_COUNT = 5, 3
FORWARD_LIMIT_S = 15.0
REACH_LIMIT_S = 10.0
SOCKET_PATH_LIMIT = 80
"""Characters; the system has 104 or 108 with the suffix of 17 that ssh adds for a moment."""
DISCARDED_BYTES = 64 * 1024
POLL_S = 0.02
FOLDER_PREFIX = "sollol-ssh-"


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
        self._master_errors: Lines | None = None
        self._children: set[asyncio.subprocess.Process] = set()
        self._forwards: dict[str, tuple[asyncio.subprocess.Process, Lines]] = {}
        self._trying = asyncio.Lock()

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
        # The fingerprint of an unknown host is shown at no lower level than DEBUG1.
        self._master = await self._spawn([*options, "-S", self._socket, *self._connecting("DEBUG1")], stdin=None)
        assert self._master.stderr is not None
        self._master_errors = errors = Lines(self._master.stderr)
        try:
            async with asyncio.timeout(CONNECT_LIMIT_S):
                while not self._is_accepted():
                    if self._master.returncode is not None:
                        await errors.ended()
                        lines = [*errors.refusals, *errors.lines]
                        raise LinkError(ssh_errors.explain(self.host, self._command, lines))
                    await asyncio.sleep(POLL_S)
            errors.lines.clear()
        except TimeoutError:
            await self.close()
            raise LinkError(
                ssh_errors.explain_silence(self.host, self._command, CONNECT_LIMIT_S, errors.lines)
            ) from None
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

    async def run(self, script: str, *arguments: str, limit_s: float = 60.0) -> Result:
        """Run a script with POSIX `sh`, whatever the user's login shell is.

        What a login shell's start files print is left out. The script has nothing to read.

        Args:
            script: the text of the script; with its arguments, at most 128 KiB after quoting.
            arguments: `$1`, `$2`, ... of the script.
            limit_s: seconds until it is given up.

        Raises:
            LinkError: the machine cannot be reached, has no POSIX shell for this user, or the limit is over.
        """
        session = await self._session(script, arguments, stdin=None)
        try:
            async with asyncio.timeout(limit_s):
                stdout = await session.output()
                code = await session.wait()
        except TimeoutError:
            raise LinkError(
                f"{self.host}: a script did not end within {limit_s:g} s; is the machine overloaded?"
            ) from None
        finally:
            await session.end()
        return Result(code, stdout, "\n".join(session.errors))

    async def start(self, script: str, *arguments: str) -> Session:
        """Start a script that runs for long, or reads what is sent to it, as `run` does.

        Raises:
            LinkError: as for `run`.
        """
        return await self._session(script, arguments, stdin=asyncio.subprocess.PIPE)

    async def forward(self, local_port: int, remote_port: int) -> None:
        """Carry connections to a port on this machine's loopback to a port on that machine's loopback.

        Whether something listens there, and whether its sshd allows it, shows with the first connection. A script
        has to run or to have run: sshd sends small packets at once (TCP_NODELAY) only after a session has begun;
        without one, every seventh exchange of 16 kB takes 40 ms more.

        Raises:
            LinkError: the local port is taken, or the connection is lost.
        """
        where = f"{LOOPBACK}:{local_port}:{LOOPBACK}:{remote_port}"
        if self._shares:
            await self._ask_master("forward", where)
        else:
            options = ["-T", "-o", "ExitOnForwardFailure=yes", "-o", "ControlPath=none", "-L", where]
            waiting = [*self._connecting("INFO"), "exec cat"]
            process = await self._spawn([*options, *waiting], stdin=asyncio.subprocess.PIPE)
            assert process.stderr is not None
            self._forwards[where] = process, Lines(process.stderr)

    async def stop_forwarding(self, local_port: int, remote_port: int) -> None:
        """End what `forward` has begun; connections that it carries live on."""
        where = f"{LOOPBACK}:{local_port}:{LOOPBACK}:{remote_port}"
        if self._shares:
            await self._ask_master("cancel", where)
        elif where in self._forwards:
            await self._end(self._forwards.pop(where)[0])

    async def why_unreachable(self, local_port: int, remote_port: int) -> str:
        """Why a connection through a forwarded port fails, in one line; "" if something accepts it there.

        The connection ends at once. ssh accepts every connection here, then asks the other side and prints what it
        answers, and only then closes the connection.

        Raises:
            LinkError: that machine's sshd forbids it.
        """
        where = f"{LOOPBACK}:{local_port}:{LOOPBACK}:{remote_port}"
        errors = self._master_errors or self._forwards[where][1]
        async with self._trying:  # ssh does not say which connection failed
            errors.refusals.clear()
            try:
                async with asyncio.timeout(REACH_LIMIT_S):
                    reader, writer = await asyncio.open_connection(LOOPBACK, local_port)
                    try:
                        writer.write_eof()
                        while await reader.read(DISCARDED_BYTES):  # it may send without end
                            pass
                    finally:
                        writer.transport.abort()
                    await asyncio.sleep(POLL_S)  # what it has printed is read in another task
            except TimeoutError:
                return f"{self.host}: no answer through port {local_port} within {REACH_LIMIT_S:g} s"
            except OSError as error:
                return f"{self.host}: port {local_port} is not forwarded ({error.strerror})"
            if not errors.refusals:
                return ""
            why = ssh_errors.explain_forwarding(self.host, errors.refusals[-1])
            if ssh_errors.FORBIDDEN in errors.refusals[-1]:
                raise LinkError(why)
            return why

    async def _ask_master(self, what: str, where: str) -> None:
        asking = await self._spawn([*self._sharing(), "-O", what, "-L", where, self._name], stdin=None)
        assert asking.stderr is not None
        errors = Lines(asking.stderr)
        try:
            async with asyncio.timeout(FORWARD_LIMIT_S):
                code = await asking.wait()
                await errors.ended()
        except TimeoutError:
            code = -1
        finally:
            await self._end(asking)
        if code:
            raise LinkError(
                ssh_errors.explain_forwarding(self.host, " ".join(errors.lines) or "ssh does not answer")
            )

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

    def _connecting(self, log_level: str) -> list[str]:
        """Options and destination of a process that connects itself. They win over the user's configuration."""
        options = (
            "BatchMode=yes",
            "Compression=no",  # it would only slow numbers down
            f"ConnectTimeout={TCP_LIMIT_S}",
            f"ServerAliveInterval={ALIVE_INTERVAL_S}",
            f"ServerAliveCountMax={ALIVE_COUNT}",
            "ForwardAgent=no",  # the other machine is not trusted with it, and needs none
            "ForwardX11=no",
            f"LogLevel={log_level}",
            "PermitLocalCommand=no",
            "RemoteCommand=none",
            "RequestTTY=no",
        )
        return [*(word for option in options for word in ("-o", option)), *self._destination]

    def _sharing(self) -> list[str]:
        """Options of a process that goes through the master, and never connects itself."""
        alone = ("-o", "BatchMode=yes", "-o", "ProxyCommand=false")
        return ["-F", "none", "-S", self._socket, "-o", "ControlMaster=no", *alone, "-T"]

    async def _session(self, script: str, arguments: Sequence[str], *, stdin: int | None) -> Session:
        marker = secrets.token_hex(8)
        remote = remote_command(script, arguments, marker)
        if self._shares:
            if self._folder is None:
                raise LinkError(f"{self.host} is not connected")
            options = [*self._sharing(), self._name]
        else:
            options = ["-T", "-o", "ControlPath=none", "-o", "ClearAllForwardings=yes", *self._connecting("ERROR")]
        process = await self._spawn([*options, remote], stdin=stdin, stdout=True)
        return Session(self.host, self._command, process, marker)

    async def _spawn(
        self, options: Sequence[str], *, stdin: int | None, stdout: bool = False
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
        self._children = {child for child in self._children if child.returncode is None} | {process}
        return process

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        await end_process(process)
        self._children.discard(process)


def _destination(target: str) -> list[str]:
    """Options for user and port, and the host, which is an alias of ~/.ssh/config or a name."""
    user, at, address = target.removeprefix(SSH).rpartition("@")
    host, port = parse_endpoint(address, 22)
    has_port = address.removesuffix(f":{port}") != address and not address.endswith("]")
    return [*(["-l", user] if at else []), *(["-p", str(port)] if has_port else []), host]


def _socket_folder() -> Path:
    """A new private folder with a path that is short enough for a socket; those of links that were killed go."""
    for parent in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"):  # noqa: S108 - mkdtemp is safe
        if parent and len(parent.encode()) < SOCKET_PATH_LIMIT - 20 and "%" not in parent and "$" not in parent:
            _remove_left_folders(Path(parent))
            with contextlib.suppress(OSError):
                return Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=parent))
    raise LinkError("no folder for the socket of ssh; set TMPDIR to a writable folder with a short path")


def _remove_left_folders(parent: Path) -> None:
    """Remove folders of this user whose socket nobody listens on."""
    for folder in parent.glob(f"{FOLDER_PREFIX}*"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as trial:
            trial.settimeout(POLL_S)
            if folder.lstat().st_uid == os.getuid() and trial.connect_ex(str(folder / "s")) == errno.ECONNREFUSED:
                shutil.rmtree(folder, ignore_errors=True)
