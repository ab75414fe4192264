"""From the start of a coordinator until it can be used: loaded, proven to be ours, measured; or why it failed.

The same steps serve a coordinator that this process started and one that it adopts, which another kernel may still
be loading.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

import psutil

from sollol_nb.errors import (
    CoordinatorStartError,
    CoordinatorTimeoutError,
    HttpStatusError,
    ModelFileError,
    TransportError,
)
from sollol_nb.llama_cpp.coordinators.cached_weights import count_sent
from sollol_nb.llama_cpp.coordinators.placement import Placement, read_placement
from sollol_nb.llama_cpp.coordinators.settings import CoordinatorSettings
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.exit_reasons import (
    BAD_MODEL,
    BAD_TEMPLATE,
    PORT_TAKEN,
    WORKER_LOST,
    crash_reason,
    describe_exit,
    exit_reason,
    last_lines,
    template_problem,
)
from sollol_nb.llama_cpp.processes.process import EngineProcess, ExitReport
from sollol_nb.runtime.http_client import JsonClient

READY_POLL_S, SLOWEST_READY_POLL_S = 0.02, 1.0
READY_POLL_SHARE = 0.05  # of the time waited so far, between these two
LISTENING = "listening on http"  # the engine logs this when it accepts requests
LOG_DRAIN_LIMIT_S = 2.0
LOAD_TIME_LIMIT_S = 10.0
LOAD_CHECK_S = 1.0
LOAD_STALL_S = 60.0
"""A loading coordinator that used no processor time for so long waits for a worker that is gone."""
STALL_ALLOWANCE_S = 0.05
"""Processor time that does not count: each of our checks whether it is ready takes a quarter of a millisecond."""
CALIBRATION_TOKENS = 3
CALIBRATION_MARGIN = 4.0
MIN_CALIBRATION_LIMIT_S, MAX_CALIBRATION_LIMIT_S = 15.0, 120.0
"""The first tokens may take a multiple of the load time: loading reads all weights once, as each token does."""


class PortTakenError(CoordinatorStartError):
    """Another program has the coordinator's port."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """What is known of a coordinator once it can be used.

    Attributes:
        placement: where the engine put the layers, according to its log.
        load_ms: from the start of the process until it was ready.
        bytes_sent: to its workers until then; None if there are none, or where the system does not count.
        seconds_per_token: measured, or estimated while requests of other processes keep it busy; 0 if the engine
            did not report it.
        is_measured: whether it was measured.
        chat_template: of the model.
    """

    placement: Placement
    load_ms: float
    bytes_sent: int | None
    seconds_per_token: float
    is_measured: bool
    chat_template: str


class StartingCoordinator:
    """A llama-server that is not ready yet.

    Args:
        client: sends requests with its key.
        keyless: sends requests without.
        is_adopted: another process started it, and publishes what it measured in the registry entry.
    """

    def __init__(
        self,
        settings: CoordinatorSettings,
        process: EngineProcess,
        client: JsonClient,
        keyless: JsonClient,
        *,
        is_adopted: bool,
    ) -> None:
        self._settings = settings
        self._process = process
        self._client = client
        self._keyless = keyless
        self._is_adopted = is_adopted

    async def until_ready(self, timeout_s: float) -> Ready:
        """Wait until it answers, check that it is ours, read where it placed the layers, and measure a token.

        Raises:
            CoordinatorStartError, ModelFileError: it ended before it was ready, or stopped loading.
            PortTakenError: another program has its port.
            CoordinatorTimeoutError: it was not ready within `timeout_s`.
        """
        started = time.monotonic()
        ended = asyncio.create_task(self._process.wait())
        busy = _BusyProcess(self._process.pid)
        try:
            while True:
                if ended.done():
                    raise self._start_error(ended.result())
                if await self._answers_healthy():
                    break
                waited_s = time.monotonic() - started
                if waited_s > timeout_s:
                    raise CoordinatorTimeoutError(
                        f"the coordinator of {self._settings.model} was not ready within {timeout_s:g} s; pass a "
                        f"larger coordinator_timeout, or see its log: {self._process.log_path}"
                    )
                if self._settings.plan is not None and busy.idle_s() > LOAD_STALL_S:
                    raise self._stalled_error(f"made no progress for {LOAD_STALL_S:g} s")
                pause_s = min(max(READY_POLL_S, READY_POLL_SHARE * waited_s), SLOWEST_READY_POLL_S)
                await asyncio.wait({ended}, timeout=pause_s)
        finally:
            ended.cancel()
        chat_template = await self.own_chat_template()
        if chat_template is None:
            report = await self._process.ended_within(0.5)
            raise self._port_taken_error() if report is None else self._start_error(report)
        placement = read_placement(await self._start_log())
        load_ms, sent = await self._published() if self._is_adopted else (0.0, None)
        if not load_ms:
            load_ms = (time.time() - self._process.entry.started_at) * 1000
            sent = await count_sent(self._settings, self._process.pid)
            await self._process.update_about(load_ms=load_ms, bytes_sent=sent)
        seconds_per_token = float(self._process.entry.about.get("seconds_per_token") or 0.0)
        is_measured = seconds_per_token > 0
        if not is_measured:
            seconds_per_token, is_measured = await self._seconds_per_token(load_ms / 1000)
        return Ready(
            placement=placement,
            load_ms=load_ms,
            bytes_sent=sent,
            seconds_per_token=seconds_per_token,
            is_measured=is_measured,
            chat_template=chat_template,
        )

    async def _published(self) -> tuple[float, int | None]:
        """The load time, and what was sent, which the process that started it publishes a moment later; 0 if it
        does not."""
        deadline = time.monotonic() + LOAD_TIME_LIMIT_S
        while time.monotonic() < deadline:
            entry = registry.find(self._process.entry.id)
            if entry is not None and (load_ms := entry.about.get("load_ms")):
                return float(load_ms), entry.about.get("bytes_sent")
            await asyncio.sleep(READY_POLL_S)
        return 0.0, None

    async def _seconds_per_token(self, load_s: float) -> tuple[float, bool]:
        """Measure a token, so that silence can be judged from the first request on; 0 if that is not reported.

        Returns:
            Seconds, and whether they were measured: what another process started may be too busy for that.

        Raises:
            CoordinatorStartError: no token was generated.
        """
        body = {"prompt": [0], "n_predict": CALIBRATION_TOKENS, "temperature": 0}
        body |= {"cache_prompt": False, "ignore_eos": True}
        limit_s = max(MIN_CALIBRATION_LIMIT_S, CALIBRATION_MARGIN * load_s)
        limit_s = min(limit_s, MAX_CALIBRATION_LIMIT_S)
        try:
            answer = await self._client.post("/completion", body, timeout_s=limit_s)
            seconds_per_token = float(answer["timings"]["predicted_per_token_ms"]) / 1000
        except (HttpStatusError, KeyError, TypeError, ValueError):
            return 0.0, False  # the first request will show it
        except TransportError as error:
            report = await self._process.ended_within(0.5)
            if report is not None:
                raise self._start_error(report) from error
            if not self._is_adopted:
                raise self._stalled_error(f"generated no token within {limit_s:.0f} s of loading") from error
            return limit_s / CALIBRATION_TOKENS, False
        await self._process.update_about(seconds_per_token=seconds_per_token)
        return seconds_per_token, True

    async def _start_log(self) -> str:
        """The log up to the line where the engine listens, which may be written a little after it is ready."""
        deadline = time.monotonic() + LOG_DRAIN_LIMIT_S
        while True:
            log = await asyncio.to_thread(self._process.log_path.read_text, "utf-8", "replace")
            if LISTENING in log or time.monotonic() > deadline:
                return log
            await asyncio.sleep(READY_POLL_S)

    async def _answers_healthy(self) -> bool:
        try:
            await self._keyless.get("/health", timeout_s=1.0)
        except TransportError:  # not listening yet, or 503 while it loads
            return False
        return True

    async def own_chat_template(self) -> str | None:
        """The model's chat template, if what answers on the port is our engine: it knows our key, requires it, and
        has our file. None for any other program.
        """
        if not self._process.is_running():
            return None
        try:
            await self._keyless.post("/tokenize", {"content": ""})
        except HttpStatusError as error:
            if error.status != 401:
                return None
        except TransportError:
            return None
        else:
            return None  # it works without a key: not ours
        try:
            props = await self._client.get("/props", timeout_s=10.0)
        except TransportError:
            return None
        if not isinstance(props, dict) or props.get("model_path") != str(self._settings.model_path):
            return None
        return str(props.get("chat_template") or "")

    def _port_taken_error(self) -> PortTakenError:
        port = self._process.entry.about["port"]
        return PortTakenError(f"port {port} is used by another program; free it, or pass another coordinator_port")

    def _start_error(self, report: ExitReport) -> Exception:
        reason = exit_reason(report.tail)
        if reason is PORT_TAKEN:
            return self._port_taken_error()
        if report.why and report.code is not None:
            reason = report.why
        crash = crash_reason(report.code) if reason is None else None
        if reason is None:
            reason = crash or last_lines(report.tail)
        if reason is BAD_TEMPLATE:
            problem = template_problem(report.tail)
            return ModelFileError(
                f"the coordinator of {self._settings.model} cannot start: {reason}"
                f"{f' ({problem})' if problem else ''}; log: {self._process.log_path}"
            )
        message = (
            f"the coordinator of {self._settings.model} ended while starting ({describe_exit(report.code)}): "
            f"{reason}; log: {self._process.log_path}"
        )
        if reason is BAD_MODEL:
            return ModelFileError(message)
        error = CoordinatorStartError(message)
        was_killed = report.code is None or report.code < 0
        error.is_crash = crash is not None
        error.may_pass = not report.why and not error.is_crash and (was_killed or reason is WORKER_LOST)
        return error

    def _stalled_error(self, what: str) -> CoordinatorStartError:
        error = CoordinatorStartError(
            f"the coordinator of {self._settings.model} {what}: a worker stopped answering; %sollol_cluster shows "
            f"which; log: {self._process.log_path}"
        )
        error.may_pass = True
        return error


class _BusyProcess:
    """Whether a process is working: its processor time, read from time to time."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._seen = (-STALL_ALLOWANCE_S, time.monotonic())
        self._checked_at = 0.0

    def idle_s(self) -> float:
        """Seconds for which it used next to no processor time; 0 where that is not known."""
        now = time.monotonic()
        if now - self._checked_at >= LOAD_CHECK_S:
            self._checked_at = now
            try:
                times = psutil.Process(self._pid).cpu_times()
            except psutil.Error:
                return 0.0
            used_s = times.user + times.system
            if used_s > self._seen[0] + STALL_ALLOWANCE_S:
                self._seen = (used_s, now)
        return now - self._seen[1]
