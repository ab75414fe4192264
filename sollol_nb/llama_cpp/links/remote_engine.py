"""The engine on the far side of a shell: the same build found there, else shipped, else built there.

A machine with a GPU and its toolkit gets a build for the GPU, even if a build for the CPU could be shipped. Only
the worker program is installed, beside engines of other versions, in the cache folder of the user there. The far
side needs a POSIX shell (`engine.sh`) and no Python; to build, CMake and a C++ compiler.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sollol_nb.errors import EngineBuildError, LinkError
from sollol_nb.llama_cpp.engine import archives, build
from sollol_nb.llama_cpp.engine.archives import Archive
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.engine.steps import build_share
from sollol_nb.llama_cpp.engine.tools import Backend, build_options, generator_options
from sollol_nb.llama_cpp.links import remote_facts
from sollol_nb.llama_cpp.links.remote_facts import MIB, Facts, OwnBuild, RemoteDevice
from sollol_nb.llama_cpp.links.ssh_session import far_script
from sollol_nb.llama_cpp.links.ssh_shell import Shell

Report = Callable[[str], Awaitable[None]]
"""Gets one line about what is being done."""

PROBE_LIMIT_S = 60.0  # a GPU driver may take seconds to start
SHIP_LIMIT_S = 3600.0
BUILD_NEEDS_BYTES = 100 * MIB
GPU_BUILD_NEEDS_BYTES = 1024 * MIB
REPORT_INTERVAL_S = 1.0

SCRIPT = far_script("engine.sh")
_ERROR = re.compile(r"\berror\b.*: |\berror: |undefined reference|Killed|\bfatal\b|No space left")
_LOG_LINES = 80
_READ_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteEngine:
    """A worker program on another machine, which runs there.

    Attributes:
        worker: its path there.
        devices: those to use, one worker each.
        machine: identity of the machine since it was started; "" if unknown.
        place: equal for the same user of the same machine; "" if unknown.
        system: for people: `Linux x86_64 (glibc 2.36)`.
        cores: that may be used there.
        commit: of its llama.cpp, or a hash of its files for a build of the user's own.
        backend: that it was built for.
        how: `found`, `shipped` or `built`.
        remark: what people can do there to get more, such as install a GPU's toolkit; "" if nothing.
    """

    worker: str
    devices: tuple[RemoteDevice, ...]
    machine: str
    place: str
    system: str
    cores: int
    commit: str
    backend: Backend
    how: str
    remark: str


@dataclass(slots=True)
class Outcome:
    """What an installation there has printed."""

    worker: str = ""
    failed: str = ""
    detail: str = ""
    log: str = ""
    free_bytes: int | None = None
    share: float = 0.0
    devices: list[str] = field(default_factory=list)
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=_LOG_LINES))


async def prepare(
    shell: Shell, here: Engine, report: Report, *, fetch: build.FetchSource | None = None
) -> RemoteEngine:
    """See that a machine has the worker program of this machine's build.

    Args:
        here: the engine whose llama-server will use it.
        report: gets a line when something is sent or built, at most one a second.
        fetch: fetches llama.cpp's source; by default from git, else from the sdist.

    Raises:
        LinkError: it cannot; the message says what to do.
    """
    return await (await preparation(shell, here, report, fetch=fetch)).run()


async def preparation(
    shell: Shell, here: Engine, report: Report, *, fetch: build.FetchSource | None = None
) -> Preparation:
    """As `prepare`, before anything is installed.

    Raises:
        LinkError: the machine does not say what it has.
    """
    own, facts_here = await _own_build(here)
    result = await shell.run(SCRIPT, "probe", build.VERSION, own.identity, limit_s=PROBE_LIMIT_S)
    try:
        there = Facts.parse(result.stdout)
    except (ValueError, KeyError):
        raise LinkError(
            f"{shell.host} did not report what it has (exit code {result.code}): {_last(result.stderr)}; "
            "does it have the usual POSIX tools?"
        ) from None
    return Preparation(shell, here, own, facts_here, there, report, fetch)


@dataclass(slots=True)
class Preparation:
    """What is known of a machine, and of the engine here, on the way to an engine there."""

    shell: Shell
    engine: Engine
    own: OwnBuild
    here: Facts | None
    there: Facts
    report: Report
    fetch: build.FetchSource | None
    remark: str = ""

    async def run(self) -> RemoteEngine:
        """The worker program there: found, shipped or built."""
        for backend in self.there.backends:
            if (found := await self._find(backend)) is not None:
                return found
            why = self._why_not_shipped(backend)
            if not why:
                shipped = await self._ship(backend)
                if isinstance(shipped, RemoteEngine):
                    return shipped
                why = shipped
            if self.there.can_build(backend):
                return await self._build(backend, why)
            self.remark = self.there.toolkit_advice(backend)
        raise AssertionError("every machine can build for its CPU")

    # --- found ----------------------------------------------------------------------------------

    async def _find(self, backend: Backend) -> RemoteEngine | None:
        for found, commit in remote_facts.usable_engines(self.own, self.there, backend):
            result = await self.shell.run(SCRIPT, "devices", found.worker, limit_s=PROBE_LIMIT_S)
            lines = [line.removeprefix("device=") for line in result.stdout.splitlines()]
            if remote_facts.devices(lines):
                return self._engine(found.worker, lines, commit, backend, "found")
        return None

    # --- shipped --------------------------------------------------------------------------------

    def _why_not_shipped(self, backend: Backend) -> str:
        if self.here is None:
            return "the programs of this machine's system do not run there"
        if self.own.backend != backend:
            return f"this machine's build is for {self.own.backend}, not for {backend}"
        return remote_facts.misfit(self.own, self.here, self.there)

    async def _ship(self, backend: Backend) -> RemoteEngine | str:
        """The shipped engine, or why it does not run there."""
        with_script = not self.own.commit
        worker = self.engine.worker
        pack = archives.packed_worker(worker, with_script=with_script)
        archive = await asyncio.to_thread(pack.__enter__)
        try:
            self.check_folder(2 * archive.unpacked_bytes)
            record = self._record(backend, self.own.features)
            record |= {"commit": self.own.commit} if self.own.commit else {"content": self.own.content}
            program = archives.RUN if with_script else worker.resolve().name
            outcome = await self.install(
                ("ship", self.own.key(), archive.sha256, json.dumps(record), program), archive, SHIP_LIMIT_S
            )
        finally:
            await asyncio.to_thread(pack.__exit__, None, None, None)
        if outcome.failed == "run":
            return f"this machine's build does not run there ({outcome.detail})"
        self._check(outcome, 2 * archive.unpacked_bytes)
        commit = self.own.commit or self.own.content
        return self._engine(outcome.worker, outcome.devices, commit, backend, "shipped")

    # --- built ----------------------------------------------------------------------------------

    async def _build(self, backend: Backend, why: str) -> RemoteEngine:
        host = self.shell.host
        if not self.own.accepts_pinned:
            raise LinkError(
                f"{host} cannot use this machine's own llama.cpp: {why}; llama.cpp {build.VERSION}, which can be "
                f"built there, speaks RPC protocol {build.PROTOCOL}, but the llama.cpp here speaks "
                f"{self.own.protocol}; unset SOLLOL_LLAMA_CPP here, and run `sollol-nb install`"
            )
        if trouble := self.there.build_trouble():
            raise LinkError(f"cannot build llama.cpp on {host}: {trouble} ({why})")
        needs = BUILD_NEEDS_BYTES if backend == "cpu" else GPU_BUILD_NEEDS_BYTES
        self.check_folder(needs)
        archive = await self._source()
        tools = self.there.tools
        options = build_options(
            backend,
            commit=build.VERSION,
            on_mac=self.there.system == "Darwin",
            cuda_compiler=tools.get("nvcc", ""),
        )
        options += generator_options(tools.get("ninja", ""))
        if backend != "cpu":
            options.append("-DCMAKE_INSTALL_RPATH_USE_LINK_PATH=ON")  # the toolkit's libraries may be anywhere
        key = remote_facts.engine_key(build.VERSION, backend, self.there.features)
        record = self._record(backend, self.there.features) | {"commit": build.GIT_COMMIT}
        limit_s = build.BUILD_LIMIT_S if backend == "cpu" else build.GPU_BUILD_LIMIT_S
        await self.report(f"building llama.cpp on {host}")
        what = ("build", key, archive.sha256, json.dumps(record), build.TARGETS[1], *options)
        outcome = await self.install(what, archive, limit_s)
        if outcome.failed == "build":
            reason = _short(_build_error(list(outcome.lines))) or outcome.detail
            raise LinkError(f"building llama.cpp on {host} failed: {reason}; log there: {outcome.log}")
        self._check(outcome, needs)
        return self._engine(outcome.worker, outcome.devices, build.GIT_COMMIT, backend, "built")

    async def _source(self) -> Archive:
        stopped = threading.Event()
        loop = asyncio.get_running_loop()

        def progress(text: str, share: float | None) -> None:
            asyncio.run_coroutine_threadsafe(self._report_safely(text), loop)

        try:
            return await asyncio.to_thread(archives.packed_source, progress, stopped.is_set, self.fetch)
        except EngineBuildError as error:
            raise LinkError(f"cannot build llama.cpp on {self.shell.host}: {_short(str(error))}") from error
        finally:
            stopped.set()

    async def _report_safely(self, text: str) -> None:
        with contextlib.suppress(LinkError, OSError):
            await self.report(text)

    # --- both -----------------------------------------------------------------------------------

    def check_folder(self, needs: int) -> None:
        """Refuse what cannot work, before anything is sent."""
        host, there = self.shell.host, self.there
        if there.free_bytes is not None and there.free_bytes < needs:
            raise LinkError(self._full(needs, there.free_bytes))
        if there.folder_trouble:
            if "No space left" in there.folder_trouble or "quota" in there.folder_trouble:
                raise LinkError(self._full(needs, there.free_bytes))
            raise LinkError(
                f"cannot write to {there.folder} on {host}: {_short(there.folder_trouble)}; make it writable for "
                f"{there.user}, or set XDG_CACHE_HOME there to a folder that is"
            )
        if there.noexec:
            link = there.folder.removesuffix("/engines")
            raise LinkError(
                f"no program can be started in {there.folder} on {host} ({_short(there.noexec)}); run "
                f"`ln -s FOLDER {link}` there with a FOLDER of a file system that is not mounted noexec"
            )

    def _full(self, needs: int, free: int | None) -> str:
        unused = "" if free is None else f", and {free // MIB} MB are free"
        return (
            f"no space on {self.shell.host}: installing llama.cpp in {self.there.folder} needs about "
            f"{max(1, needs // MIB)} MB{unused}; to see what can be deleted, run `du -sh ~/.cache/*` there"
        )

    def _check(self, outcome: Outcome, needs: int) -> None:
        """Raise if an installation has failed."""
        host = self.shell.host
        match outcome.failed:
            case "" if outcome.worker and remote_facts.devices(outcome.devices):
                return
            case "disk":
                # The work folder is gone again, so what is free now is what was free before.
                raise LinkError(self._full(needs, outcome.free_bytes or self.there.free_bytes))
            case "hash":
                raise LinkError(f"llama.cpp arrived damaged on {host} ({outcome.detail}); try again")
            case "run":
                raise LinkError(f"llama.cpp was built on {host}, but it does not run there: {outcome.detail}")
            case "":
                raise LinkError(f"the connection to {host} was lost while llama.cpp was installed; try again")
        raise LinkError(f"installing llama.cpp in {self.there.folder} on {host} failed: {outcome.detail}")

    async def install(self, what: tuple[str, ...], archive: Archive, limit_s: float) -> Outcome:
        """Run an installation of `engine.sh` there, with the archive as its input; what it has printed.

        Raises:
            LinkError: it did not end within the limit.
        """
        outcome = Outcome()
        session = await self.shell.start(SCRIPT, *what)
        feeding = asyncio.create_task(session.feed(self._sent(archive)))
        try:
            async with asyncio.timeout(limit_s):
                while (line := await session.line()) is not None:
                    await self._note(outcome, *line.partition("=")[::2])
                await session.wait()
        except TimeoutError:
            raise LinkError(
                f"installing llama.cpp on {self.shell.host} was stopped after {limit_s / 60:.0f} min"
            ) from None
        finally:
            feeding.cancel()
            await session.end()
        return outcome

    async def _note(self, outcome: Outcome, key: str, value: str) -> None:
        host = self.shell.host
        match key:
            case "waiting":
                await self.report(f"another connection is installing llama.cpp on {host}; waiting for it")
            case "step":
                if (share := build_share(value)) is not None and share != outcome.share:
                    outcome.share = share
                    await self.report(f"building llama.cpp on {host}: {100 * share:.0f}%")
            case "device" if len(outcome.devices) < _LOG_LINES:
                outcome.devices.append(value)
            case "line":
                outcome.lines.append(value)
            case "log":
                outcome.log = _short(value)
            case "free.kib" if value.isdecimal() and len(value) < 16:
                outcome.free_bytes = int(value) * 1024
            case "installed":
                outcome.worker = value
            case "failed":
                outcome.failed = value or "unknown"
            case "detail":
                outcome.detail = _short(value)

    async def _sent(self, archive: Archive) -> AsyncIterator[bytes]:
        size = archive.path.stat().st_size
        sent, reported = 0, float("-inf")
        with archive.path.open("rb") as file:
            while data := file.read(_READ_BYTES):
                if time.monotonic() - reported > REPORT_INTERVAL_S:
                    reported = time.monotonic()
                    share = f"{100 * sent // size}% of {max(1, size // MIB)} MB"
                    await self.report(f"sending llama.cpp to {self.shell.host}: {share}")
                yield data
                sent += len(data)

    def _record(self, backend: Backend, features: frozenset[str]) -> dict[str, Any]:
        return {"version": self.own.identity, "backend": backend, "features": sorted(features)}

    def _engine(
        self, worker: str, device_lines: list[str], commit: str, backend: Backend, how: str
    ) -> RemoteEngine:
        devices = remote_facts.devices(device_lines)
        if backend in self.there.gpus and all(device.name == "CPU" for device in devices):
            self.remark = (
                f"llama.cpp sees none of its GPUs, so its CPU is used; check their driver on {self.shell.host}"
            )
        return RemoteEngine(
            worker=worker,
            devices=devices,
            machine=self.there.boot,
            place=self.there.place,
            system=self.there.name,
            cores=self.there.cores,
            commit=commit,
            backend=backend,
            how=how,
            remark=self.remark,
        )


async def _own_build(engine: Engine) -> tuple[OwnBuild, Facts | None]:
    """What identifies this machine's build, and what this machine has; None where it has no POSIX shell."""
    here = await _local_facts()
    record: Mapping[str, Any] = build.read_record(engine.worker.resolve().parent)
    is_pinned = record.get("commit") == build.GIT_COMMIT
    names = [path.name for path in await asyncio.to_thread(archives.worker_files, engine.worker)]
    content = "" if is_pinned else await asyncio.to_thread(archives.content_hash, engine.worker)
    portable = here is None or remote_facts.has_variants(names)
    own = OwnBuild(
        commit=build.GIT_COMMIT if is_pinned else "",
        content=content,
        backend=remote_facts.backend_of(names),
        features=frozenset() if here is None or portable else here.features,
        protocol=engine.protocol,
    )
    return own, here


async def _local_facts() -> Facts | None:
    if os.name != "posix":
        return None
    process = await asyncio.create_subprocess_exec(
        "sh",
        *("-c", SCRIPT, "sh", "probe", build.VERSION, build.VERSION),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(PROBE_LIMIT_S):
            output, _ = await process.communicate()
    except TimeoutError:
        return None
    finally:
        if process.returncode is None:
            process.kill()
    try:
        return Facts.parse(output.decode(errors="replace"))
    except (ValueError, KeyError):
        return None


def _build_error(lines: list[str]) -> str:
    """The line of a build log that says most, else the last one."""
    for number, line in enumerate(lines):
        if line.startswith("CMake Error"):  # its message follows
            return " ".join(lines[number : number + 3])
        if _ERROR.search(line):
            return line
    return next((line for line in reversed(lines) if line.strip()), "")


def _last(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return _short(lines[-1]) if lines else "it printed nothing"


def _short(text: str) -> str:
    return " ".join("".join(filter(str.isprintable, text.replace("\t", " "))).split())[:300]
