"""The coordinator: one llama-server running one plan of one model.

The coordinator listens on loopback, has an API key of its own (in its
environment, not in its arguments), and proves before it is used that it is itself what answers on the port: it
refuses a request without the key and names our model file to one with it. A stranger on the port is never used.

It does not depend on the process that started it: its registry entry says what it runs, and `adopt` takes it up
again in a restarted kernel or a second notebook, with its plan, log and layer map.

The true layer placement is only in the engine's debug log, so it starts at that verbosity; the supervisor drops
debug lines from the log once the engine listens.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any

import psutil

from sollol_nb import registry
from sollol_nb.coordinator_settings import CoordinatorSettings, known_flags, server_flags
from sollol_nb.engine_process import EngineProcess, ExitReport
from sollol_nb.errors import (
    ConnectFailedError,
    ConnectionBrokenError,
    CoordinatorLostError,
    CoordinatorStartError,
    CoordinatorTimeoutError,
    HttpStatusError,
    ModelFileError,
    RequestRejectedError,
    TransportError,
    TransportTimeoutError,
)
from sollol_nb.exit_reasons import BAD_MODEL, PORT_TAKEN, code_words, exit_reason
from sollol_nb.gate import Gate
from sollol_nb.http_client import JsonClient
from sollol_nb.layer_plan import LayerPlan
from sollol_nb.llama_answer import Answer, answer_for
from sollol_nb.llama_chat import parse_event
from sollol_nb.pace import Pace
from sollol_nb.placement import Placement, read_placement
from sollol_nb.registry import Entry
from sollol_nb.toolchain import Engine
from sollol_nb.workers import LOOPBACK, addresses_of

READY_POLL_S = 0.02
LISTENING = "listening on http"  # the engine's words when it accepts requests
LOG_DRAIN_LIMIT_S = 2.0
TOLD_LIMIT_S = 10.0
# A stream that went silent is ended by the watch over all streams (see `pace`), long before this.
SILENCE_LIMIT_S = 3600.0
LOAD_CHECK_S = 1.0
LOAD_STALL_S = 60.0
"""A coordinator that loads, but used no processor time for so long, waits for a worker that is gone."""
CALIBRATION_LIMIT_S = 60.0


class Coordinator:
    """A running (or ended) llama-server.

    Attributes:
        settings: what it runs.
        base_url: `http://127.0.0.1:<port>`.
        log_path: the engine's log, drained to a file.
        placement: where the engine says it put the layers; None until it is ready.
        load_ms: from the start of the process until it was ready.
        gate: waiting requests, in order of priority.
        pace: what it usually needs for a token.
        adopted: whether another process (or router) started it.
        last_used_at: `time.monotonic()` of the last request's begin or end.
    """

    def __init__(
        self,
        settings: CoordinatorSettings,
        process: EngineProcess,
        port: int,
        *,
        gate: Gate | None = None,
        adopted: bool = False,
    ) -> None:
        self.settings = settings
        self.port = port
        self.base_url = f"http://{LOOPBACK}:{port}"
        self.log_path = process.log_path
        self.placement: Placement | None = None
        self.load_ms = 0.0
        self.gate = gate if gate is not None else Gate(settings.slots)
        self.pace = Pace()
        self.adopted = adopted
        self.last_used_at = time.monotonic()
        self._process = process
        self._went_silent = ""
        self._watcher: asyncio.Task[None] | None = None
        self._chat_template = ""
        self._client = JsonClient(self.base_url, api_key=process.key, read_timeout_s=SILENCE_LIMIT_S)
        self._keyless = JsonClient(self.base_url, read_timeout_s=5.0)

    def __repr__(self) -> str:
        state = "running" if self.is_running() else "ended"
        return f"<Coordinator of {self.settings.model} at {self.base_url}, {state}>"

    @property
    def model(self) -> str:
        """The model's name."""
        return self.settings.model

    @property
    def plan(self) -> LayerPlan | None:
        """The layer plan it was started with; None when nothing is sharded."""
        return self.settings.plan

    @property
    def rpc_backends(self) -> list[str]:
        """Endpoints of the workers it holds."""
        return list(self.plan.endpoints) if self.plan else []

    @property
    def uptime_s(self) -> float:
        """Seconds since its start."""
        return time.time() - self._process.started_at

    @property
    def pid(self) -> int:
        """Process id of the engine."""
        return self._process.pid

    @property
    def placement_differences(self) -> list[str]:
        """Where the engine placed layers other than planned, one line each; empty when as planned."""
        return self.placement.differences(self.plan) if self.placement and self.plan else []

    @property
    def is_idle(self) -> bool:
        """Whether no request of this process runs or waits here."""
        return not self.gate.running and not self.gate.waiting

    def is_running(self) -> bool:
        """Whether the process is alive."""
        return self._process.is_running()

    # --- its life -------------------------------------------------------------------------------

    @classmethod
    async def launch(
        cls,
        engine: Engine,
        settings: CoordinatorSettings,
        *,
        port: int,
        keep_alive_s: float | None,
        about: Mapping[str, Any] | None = None,
        gate: Gate | None = None,
        holds: Sequence[Entry] = (),
    ) -> Coordinator:
        """Start a llama-server on a port; it is not ready yet (see `until_ready`), but it holds its workers.

        Args:
            about: more for its registry entry.
            holds: local workers that must live as long as it does.

        Raises:
            EngineError: the binary cannot be run.
        """
        api_key = secrets.token_urlsafe(32) + "-key"  # the engine logs a key's last four characters
        process = await EngineProcess.start(
            [str(engine.server), *server_flags(settings, port, known_flags(engine.server))],
            kind=registry.COORDINATOR,
            about={**settings.as_dict(), "port": port, "url": f"http://{LOOPBACK}:{port}", **(about or {})},
            keep_alive_s=keep_alive_s,
            key=api_key,
            # Without the backtrace a debugger is not attached at an abort, which takes seconds.
            env={"LLAMA_API_KEY": api_key, "GGML_NO_BACKTRACE": "1"},
            log_path=registry.new_log_path(registry.COORDINATOR, port),
            debug_until=LISTENING,
            holds=holds,
        )
        await process.hold()  # while it loads
        return cls(settings, process, port, gate=gate)

    @classmethod
    async def adopt(cls, entry: Entry, *, gate: Gate | None = None) -> Coordinator | None:
        """The coordinator of a registry entry, which may still be loading (see `until_ready`).

        None if its supervisor does not answer, or the entry does not say what it runs.
        """
        try:
            settings = await asyncio.to_thread(CoordinatorSettings.from_dict, entry.about)
            port = int(entry.about["port"])
        except (KeyError, TypeError, ValueError, ModelFileError):
            return None
        process = await EngineProcess.adopt(entry)
        if process is None:
            return None
        if not await process.hold():
            process.detach()
            return None
        coordinator = cls(settings, process, port, gate=gate, adopted=True)
        coordinator.load_ms = float(entry.about.get("load_ms") or 0.0)
        coordinator.pace.calibrate(float(entry.about.get("seconds_per_token") or 0.0))
        return coordinator

    @classmethod
    async def glance(cls, entry: Entry) -> Coordinator | None:
        """The coordinator of a registry entry, only to be shown: no lease, and let go of at once."""
        coordinator = await cls.adopt(entry)
        if coordinator is None:
            return None
        coordinator.detach()
        with contextlib.suppress(OSError):
            log = await asyncio.to_thread(coordinator.log_path.read_text, "utf-8", "replace")
            coordinator.placement = read_placement(log)
        await coordinator._close()
        return coordinator

    async def until_ready(self, timeout_s: float) -> None:
        """Wait until it answers, and read where it placed the layers. It is stopped if that fails.

        Raises:
            CoordinatorStartError: it ended before it was ready; with the log's reason.
            PortTakenError: something else has its port.
            CoordinatorTimeoutError: it was not ready within `timeout_s`.
        """
        try:
            await self._until_ready(timeout_s)
        except BaseException as error:
            # What another process started is not ours to end, unless it is not what it says.
            if self.adopted and not isinstance(error, PortTakenError):
                self.detach()
            else:
                await self.stop(grace_s=0.0)
            raise
        finally:
            self.free()

    async def hold(self) -> bool:
        """Take a lease for a request; False if it has ended or is ending."""
        return await self._process.hold()

    def free(self) -> None:
        """End the lease of a request."""
        self._process.free()

    async def keep_alive(self, seconds: float | None) -> None:
        """How long it lives without a request from now on; None is for ever."""
        await self._process.keep_alive(seconds)

    async def stop(self, *, grace_s: float | None = None, why: str = "stopped") -> ExitReport:
        """End the process and close connections. Stopping twice is fine."""
        report = await self._process.stop(why=why, **({} if grace_s is None else {"grace_s": grace_s}))
        await self._close()
        return report

    async def stop_unless_shared(self) -> bool:
        """End the process, unless another process uses it; False if it goes on for them."""
        stopped = await self._process.stop_unless_shared()
        await self._close()
        return stopped

    def detach(self) -> None:
        """Let go of it; it lives on for its keep_alive."""
        self._process.detach()

    async def wait_ended(self) -> ExitReport:
        """Wait until the process ends."""
        return await self._process.wait()

    async def _close(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
        await self._client.aclose()
        await self._keyless.aclose()

    # --- asking ---------------------------------------------------------------------------------

    def answer(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> Answer:
        """A new answer, to be streamed here, and elsewhere if this coordinator is lost."""
        return answer_for(self.model, messages, options, chat_template=self._chat_template)

    async def stream(self, answer: Answer) -> AsyncGenerator[dict[str, Any], None]:
        """Stream an answer from where it stands; yields Ollama-shaped chunks, the last with `done`.

        Closing the generator cancels the work in the engine's slot. The caller brings the slot (see `gate`),
        the lease (`hold`) and the time limit.

        Raises:
            CoordinatorLostError: the process ended, the connection broke, or it went silent.
            RequestRejectedError: the engine refused the request.
        """
        self.last_used_at = time.monotonic()
        stream = self.pace.open(answer)
        self._watch()
        try:
            while (asked := await answer.request(self._client.post)) is not None:
                stream.sent()
                async with self._client.stream_lines(*asked) as lines:
                    async for event in self._events(lines):
                        stream.progress(event)
                        chunk = answer.translate(event)
                        if chunk is not None:
                            with stream.handing_on():
                                yield chunk
                        if answer.is_abandoned:
                            break
                if not answer.is_complete and not answer.is_abandoned:
                    raise ConnectionBrokenError(f"{self.base_url}: the answer ended without its last event")
            yield answer.final()
        except HttpStatusError as error:
            raise RequestRejectedError(f"{self.model} refused the request: {error.reason}") from error
        except (ConnectionBrokenError, ConnectFailedError, TransportTimeoutError) as error:
            raise await self._lost(error) from error
        finally:
            stream.close()
            self.last_used_at = time.monotonic()

    async def _events(self, lines: AsyncIterator[str]) -> AsyncIterator[dict[str, Any]]:
        async for line in lines:
            event = parse_event(line)
            if event is None:
                continue
            if "error" in event:
                raise RequestRejectedError(f"{self.model}: {event['error'].get('message', event['error'])}")
            yield event

    async def busy_slots(self) -> int:
        """How many of the engine's slots are processing, as the engine says."""
        return sum(1 for slot in await self._client.get("/slots", timeout_s=5.0) if slot["is_processing"])

    def broken_links(self) -> list[str]:
        """Workers to which it has no TCP connection any more, as the system says; asks nobody."""
        try:
            links = psutil.Process(self.pid).net_connections("tcp")
        except psutil.Error:
            return []
        linked = {(one.raddr.ip, one.raddr.port) for one in links if one.raddr and one.status == "ESTABLISHED"}
        return [one for one in self.rpc_backends if not linked & addresses_of(one)]

    # --- inside ---------------------------------------------------------------------------------

    def _watch(self) -> None:
        if self._watcher is None or self._watcher.done():
            self._watcher = asyncio.create_task(self._end_when_silent())

    async def _end_when_silent(self) -> None:
        """Kill the engine when all its streams have been silent for longer than it ever needs."""
        while self.is_running() and (left_s := self.pace.patience_s()) is not None:
            if left_s <= 0:
                self._went_silent = f"it went silent for {self.pace.silence_s():.1f} s"
                await self._process.stop(grace_s=0.0, why="silent")
                return
            await asyncio.sleep(left_s)

    async def _until_ready(self, timeout_s: float) -> None:
        started = time.monotonic()
        ended = asyncio.create_task(self._process.wait())
        busy = _BusyProcess(self.pid)
        try:
            while True:
                if ended.done():
                    raise self._start_error(ended.result())
                if await self._answers_healthy():
                    break
                waited_s = time.monotonic() - started
                if waited_s > timeout_s:
                    raise CoordinatorTimeoutError(
                        f"the coordinator of {self.model} was not ready within {timeout_s:g} s; give a larger "
                        f"coordinator_timeout, or see its log: {self.log_path}"
                    )
                if self.plan is not None and busy.idle_s() > LOAD_STALL_S:
                    raise CoordinatorStartError(
                        f"the coordinator of {self.model} stopped loading for {LOAD_STALL_S:g} s: a worker does "
                        f"not answer any more; see %sollol_cluster for which; log: {self.log_path}"
                    )
                await asyncio.wait({ended}, timeout=READY_POLL_S)
        finally:
            ended.cancel()
        if not await self._is_ours():
            raise self._port_taken()
        self.placement = read_placement(await self._start_log())
        if self.adopted and not self.load_ms:
            self.load_ms = await self._told_load_ms()
        if not self.load_ms:
            self.load_ms = self.uptime_s * 1000
            await self._process.tell_about(load_ms=self.load_ms)
        self.pace.loaded(self.load_ms / 1000)
        if not self.pace.is_calibrated:
            await self._calibrate()

    async def _told_load_ms(self) -> float:
        """What the process that started it says, a moment after it is ready; 0 if it says nothing."""
        deadline = time.monotonic() + TOLD_LIMIT_S
        while time.monotonic() < deadline:
            for entry in await asyncio.to_thread(registry.entries, registry.COORDINATOR):
                if entry.id == self._process.entry_id and (load_ms := entry.about.get("load_ms")):
                    return float(load_ms)
            await asyncio.sleep(READY_POLL_S)
        return 0.0

    async def _calibrate(self) -> None:
        """Measure a token, so that silence can be judged from the first request on."""
        body = {"prompt": [0], "n_predict": 3, "temperature": 0, "cache_prompt": False, "ignore_eos": True}
        try:
            answer = await self._client.post("/completion", body, timeout_s=CALIBRATION_LIMIT_S)
            seconds_per_token = float(answer["timings"]["predicted_per_token_ms"]) / 1000
        except (TransportError, KeyError, TypeError, ValueError):
            return  # the first request will tell
        self.pace.calibrate(seconds_per_token)
        await self._process.tell_about(seconds_per_token=seconds_per_token)

    async def _start_log(self) -> str:
        """The log up to where the engine listens; it may be drained a little later than the engine is ready."""
        deadline = time.monotonic() + LOG_DRAIN_LIMIT_S
        while True:
            log = await asyncio.to_thread(self.log_path.read_text, "utf-8", "replace")
            if LISTENING in log or time.monotonic() > deadline:
                return log
            await asyncio.sleep(READY_POLL_S)

    async def _answers_healthy(self) -> bool:
        try:
            await self._keyless.get("/health", timeout_s=1.0)
        except TransportError:  # not listening yet, or 503 while it loads
            return False
        return True

    async def _is_ours(self) -> bool:
        """Whether what answers on the port is our engine: it knows our key, wants it, and has our file."""
        if not self.is_running():
            return False
        try:
            await self._keyless.post("/tokenize", {"content": ""})
        except HttpStatusError as error:
            if error.status != 401:
                return False
        except TransportError:
            return False
        else:
            return False  # it works without a key: not ours
        try:
            props = await self._client.get("/props", timeout_s=10.0)
        except TransportError:
            return False
        if not isinstance(props, dict) or props.get("model_path") != str(self.settings.model_path):
            return False
        self._chat_template = str(props.get("chat_template") or "")
        return True

    def _port_taken(self) -> PortTakenError:
        return PortTakenError(
            f"port {self.port} is taken by another program; free it, or give another coordinator_port"
        )

    def _start_error(self, report: ExitReport) -> Exception:
        reason = exit_reason(report.tail)
        if reason is PORT_TAKEN:
            return self._port_taken()
        if report.why and report.code is not None:
            reason = report.why
        if reason is None:
            reason = "; ".join(report.tail[-2:]) or "it said nothing"
        kind = ModelFileError if reason is BAD_MODEL else CoordinatorStartError
        return kind(
            f"the coordinator of {self.model} ended while starting ({code_words(report.code)}): {reason}; "
            f"log: {self.log_path}"
        )

    async def _lost(self, error: Exception) -> CoordinatorLostError:
        # The broken connection is seen an instant before the exit of the process.
        try:
            async with asyncio.timeout(2.0):
                report = await self._process.wait()
        except TimeoutError:
            return CoordinatorLostError(
                f"the coordinator of {self.model} broke off: {error}; log: {self.log_path}"
            )
        reason = self._went_silent or report.why or exit_reason(report.tail)
        because = f": {reason}" if reason else ""
        return CoordinatorLostError(
            f"the coordinator of {self.model} ended ({code_words(report.code)}){because}; log: {self.log_path}"
        )


class _BusyProcess:
    """Whether a process does anything: its processor time, looked at now and then."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._seen = (-1.0, time.monotonic())
        self._looked_at = 0.0

    def idle_s(self) -> float:
        """Seconds for which it used no processor time; 0 where the system does not tell."""
        now = time.monotonic()
        if now - self._looked_at >= LOAD_CHECK_S:
            self._looked_at = now
            try:
                times = psutil.Process(self._pid).cpu_times()
            except psutil.Error:
                return 0.0
            used_s = times.user + times.system
            if used_s != self._seen[0]:
                self._seen = (used_s, now)
        return now - self._seen[1]


class PortTakenError(CoordinatorStartError):
    """Something else has the coordinator's port."""
