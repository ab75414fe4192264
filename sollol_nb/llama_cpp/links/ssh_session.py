"""A script that runs on another machine: how it gets there through any login shell, and what it prints."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shlex
from collections import deque
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from sollol_nb.errors import LinkError
from sollol_nb.llama_cpp.links import ssh_errors

OUTPUT_LIMIT_BYTES = 1024 * 1024
ERROR_LINES = 40
LINE_LIMIT_BYTES = 4096
LOST_CODE = 255
"""Exit code of ssh without a connection."""
END_LIMIT_S = 1.0

_UNSAFE = re.compile(r"[^\w ./:,=@%+-]", re.ASCII)
_READ_BYTES = 64 * 1024


class Session:
    """A script that runs on the machine: what it prints after its login shell's own output."""

    def __init__(
        self, host: str, command: Sequence[str], process: asyncio.subprocess.Process, marker: str
    ) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        self._host = host
        self._command = command
        self._process = process
        self._marker = marker
        self._stdout = process.stdout
        self._stderr = Lines(process.stderr)
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
        await self.begin()
        return await _read_line(self._stdout)

    async def output(self) -> str:
        """All its stdout, cut after 1 MiB.

        Raises:
            LinkError: no POSIX shell has run it.
        """
        await self.begin()
        kept = bytearray()
        while data := await self._stdout.read(_READ_BYTES):
            kept += data[: OUTPUT_LIMIT_BYTES - len(kept)]
        return kept.decode("utf-8", "replace")

    def send(self, text: str) -> None:
        """Give it input."""
        assert self._process.stdin is not None
        if not self._process.stdin.is_closing():
            self._process.stdin.write(text.encode())

    async def feed(self, stdin: AsyncIterator[bytes]) -> None:
        """Give it all its input; it ends also where that fails, so that the script does not wait for more."""
        assert self._process.stdin is not None
        try:
            with contextlib.suppress(ConnectionError):  # it need not read all
                async for data in stdin:
                    self._process.stdin.write(data)
                    await self._process.stdin.drain()
        finally:
            self._process.stdin.close()

    async def wait(self) -> int:
        """Wait until it ends; its exit code, 255 where the connection was lost."""
        code = await self._process.wait()
        await self._stderr.ended()
        return code

    async def end(self) -> None:
        """End ssh here, and with it the script's input and output; that machine's sshd may let it run on."""
        await end_process(self._process)

    async def begin(self) -> None:
        """Wait until it runs; what a login shell's start files have printed before is left out.

        Raises:
            LinkError: no POSIX shell has run it.
        """
        while not self._has_begun:
            line = await _read_line(self._stdout)
            if line is None:
                code, host, command = await self.wait(), self._host, self._command
                if code == LOST_CODE:
                    raise LinkError(ssh_errors.explain(host, command, self._stderr.lines))
                raise LinkError(ssh_errors.explain_no_shell(host, command, [*self._noise, *self._stderr.lines]))
            self._has_begun = line == self._marker
            self._noise.append(line)


class Lines:
    """The last lines of what ssh prints on its stderr, read as they come.

    Attributes:
        lines: those that say something about an error.
        refusals: why the other side did not accept forwarded connections.
    """

    def __init__(self, stream: asyncio.StreamReader) -> None:
        self.lines: deque[str] = deque(maxlen=ERROR_LINES)
        self.refusals: deque[str] = deque(maxlen=ERROR_LINES)
        self._stream = stream
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        while (line := await _read_line(self._stream)) is not None:
            line = "".join(character if character.isprintable() else " " for character in line)
            if refusal := ssh_errors.REFUSED_CONNECTION.match(line):
                self.refusals.append(refusal.group(0))
            elif ssh_errors.is_wanted(line):
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


def far_script(name: str) -> str:
    """A script of this folder with what all of them share."""
    folder = Path(__file__).parent
    return "".join((folder / part).read_text("utf-8") for part in ("common.sh", name))


def remote_command(script: str, arguments: Sequence[str], marker: str) -> str:
    """The command for the login shell: it becomes `sh`, which prints the marker, then runs the script.

    Between its quotes it has only characters that sh, csh and fish all leave alone there; others are written as
    `\\0ooo`, which `printf %b` decodes (POSIX).
    """
    text = f"set -- {shlex.join(arguments)}\nprintf '\\n%s\\n' {marker}; printf '\\n%s\\n' {marker} >&2\n{script}"
    encoded = "".join(chr(byte) if not _UNSAFE.match(chr(byte)) else f"\\0{byte:03o}" for byte in text.encode())
    return f"""exec sh -c 'eval "$(printf %b "$1")"' sh '{encoded}'"""


async def end_process(process: asyncio.subprocess.Process) -> None:
    """End a process of ssh, by force if it takes long."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(END_LIMIT_S):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
