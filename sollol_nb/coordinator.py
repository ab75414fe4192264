"""The coordinator: one llama-server running one plan of one model, with its life in this process's hands.

Flags of llama-server live here. The coordinator listens on loopback, has an API key of its own (in its
environment, not in its arguments), and proves after the start that it is itself what answers on the port: it
refuses a request without the key and names our model file to one with it. A stranger on the port is never used.

The true layer placement is only in the engine's debug log, so it starts at that verbosity; the supervisor drops
debug lines from the log once the engine listens.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import subprocess
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from sollol_nb import config
from sollol_nb.engine_process import EngineProcess, ExitReport
from sollol_nb.errors import (
    ConnectFailedError,
    ConnectionBrokenError,
    CoordinatorLostError,
    CoordinatorStartError,
    CoordinatorTimeoutError,
    EngineError,
    HttpStatusError,
    ModelFileError,
    RequestRejectedError,
    TransportError,
    TransportTimeoutError,
)
from sollol_nb.gate import Gate
from sollol_nb.gguf_facts import ModelFacts
from sollol_nb.http_client import JsonClient
from sollol_nb.layer_plan import LayerPlan
from sollol_nb.llama_chat import ChunkTranslator, parse_event, request_body
from sollol_nb.placement import Placement, read_placement, split_over_devices
from sollol_nb.toolchain import Engine
from sollol_nb.workers import LOOPBACK, free_ports

DEFAULT_SLOTS = 4
READY_POLL_S = 0.02
LISTENING = "listening on http"  # the engine's words when it accepts requests
LOG_DRAIN_LIMIT_S = 2.0
PORT_TRIES = 5
# Requests in flight are judged by their own timeout; this only bounds a stream that went silent for good.
SILENCE_LIMIT_S = 3600.0


@dataclass(frozen=True, slots=True)
class CoordinatorSettings:
    """What one coordinator runs.

    Attributes:
        model: the name it was asked for by.
        model_path: the GGUF file.
        facts: the file's facts.
        plan: the layer plan; None runs everything on this machine.
        context_tokens: shared by all slots.
        slots: requests served at the same time.
        device_free_bytes: free bytes of each device, per endpoint, for workers with several devices.
    """

    model: str
    model_path: Path
    facts: ModelFacts
    plan: LayerPlan | None
    context_tokens: int
    slots: int = DEFAULT_SLOTS
    device_free_bytes: Mapping[str, Sequence[int]] = field(default_factory=dict)


class Coordinator:
    """A running (or ended) llama-server.

    Attributes:
        settings: what it runs.
        base_url: `http://127.0.0.1:<port>`.
        log_path: the engine's log, drained to a file.
        placement: where the engine says it put the layers; None until it is ready.
        load_ms: from the start of the process until it was ready.
        gate: waiting requests, in order of priority.
        last_used_at: `time.monotonic()` of the last request's begin or end.
    """

    def __init__(self, settings: CoordinatorSettings, process: EngineProcess, port: int, api_key: str) -> None:
        self.settings = settings
        self.base_url = f"http://{LOOPBACK}:{port}"
        self.log_path = process.log_path
        self.placement: Placement | None = None
        self.load_ms = 0.0
        self.gate = Gate(settings.slots)
        self.last_used_at = time.monotonic()
        self._process = process
        self._client = JsonClient(self.base_url, api_key=api_key, read_timeout_s=SILENCE_LIMIT_S)
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

    def is_running(self) -> bool:
        """Whether the process is alive."""
        return self._process.is_running()

    @classmethod
    async def start(
        cls,
        engine: Engine,
        settings: CoordinatorSettings,
        *,
        first_port: int = config.DEFAULT_COORDINATOR_PORT,
        timeout_s: float,
    ) -> Coordinator:
        """Start a llama-server and wait until it is ready.

        It listens on `first_port`, or on the next one that is free.

        Raises:
            CoordinatorStartError: it ended before it was ready; with the log's reason.
            CoordinatorTimeoutError: it was not ready within `timeout_s`; it is stopped.
        """
        port = first_port
        for _ in range(PORT_TRIES):
            (port,) = free_ports(port, 1)
            api_key = secrets.token_urlsafe(32) + "-key"  # the engine logs a key's last four characters
            process = await EngineProcess.start(
                [str(engine.server), *server_flags(settings, port, _known_flags(engine.server))],
                # Without the backtrace a debugger is not attached at an abort, which takes seconds.
                env={"LLAMA_API_KEY": api_key, "GGML_NO_BACKTRACE": "1"},
                log_path=config.log_dir() / f"coordinator-{port}-{os.getpid()}.log",
                debug_until=LISTENING,
            )
            coordinator = cls(settings, process, port, api_key)
            try:
                await coordinator._until_ready(timeout_s)
            except _PortTakenError:
                await coordinator.stop()
                port += 1
                continue
            except BaseException:
                await coordinator.stop()
                raise
            return coordinator
        raise CoordinatorStartError(
            f"ports {first_port} to {port - 1} are all taken; free one or give another port"
        )

    async def stream_chat(
        self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Ask for an answer; yields Ollama-shaped chunks, the last with `done`.

        Closing the generator cancels the work in the engine's slot. The caller brings the slot (see `gate`)
        and the time limit.

        Raises:
            CoordinatorLostError: the process ended or the connection broke.
            RequestRejectedError: the engine refused the request.
        """
        translator = ChunkTranslator(self.model)
        self.last_used_at = time.monotonic()
        try:
            async with self._client.stream_lines("/v1/chat/completions", request_body(messages, options)) as lines:
                async for line in lines:
                    event = parse_event(line)
                    if event is None:
                        continue
                    if "error" in event:
                        raise RequestRejectedError(
                            f"{self.model}: {event['error'].get('message', event['error'])}"
                        )
                    chunk = translator.translate(event)
                    if chunk is not None:
                        yield chunk
            yield translator.final()
        except HttpStatusError as error:
            raise RequestRejectedError(f"{self.model} refused the request: {error.reason}") from error
        except (ConnectionBrokenError, ConnectFailedError, TransportTimeoutError) as error:
            raise await self._lost(error) from error
        finally:
            self.last_used_at = time.monotonic()

    async def busy_slots(self) -> int:
        """How many of the engine's slots are processing, as the engine says."""
        return sum(1 for slot in await self._client.get("/slots", timeout_s=5.0) if slot["is_processing"])

    async def stop(self) -> ExitReport:
        """End the process and close connections. Stopping twice is fine."""
        report = await self._process.stop()
        await self._client.aclose()
        await self._keyless.aclose()
        return report

    async def wait_ended(self) -> ExitReport:
        """Wait until the process ends."""
        return await self._process.wait()

    async def _until_ready(self, timeout_s: float) -> None:
        started = time.monotonic()
        ended = asyncio.create_task(self._process.wait())
        try:
            while True:
                if ended.done():
                    raise self._start_error(ended.result())
                if await self._answers_healthy():
                    break
                if time.monotonic() - started > timeout_s:
                    raise CoordinatorTimeoutError(
                        f"the coordinator of {self.model} was not ready within {timeout_s:g} s; give a larger "
                        f"coordinator_timeout, or see its log: {self.log_path}"
                    )
                await asyncio.wait({ended}, timeout=READY_POLL_S)
        finally:
            ended.cancel()
        if not await self._is_ours():
            raise _PortTakenError
        self.load_ms = (time.monotonic() - started) * 1000
        self.placement = read_placement(await self._start_log())

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
        return isinstance(props, dict) and props.get("model_path") == str(self.settings.model_path)

    def _start_error(self, report: ExitReport) -> Exception:
        reason = exit_reason(report.tail)
        if reason is PORT_TAKEN:
            return _PortTakenError()
        if reason is None:
            reason = "; ".join(report.tail[-2:]) or "it said nothing"
        kind = ModelFileError if reason is BAD_MODEL else CoordinatorStartError
        return kind(
            f"the coordinator of {self.model} ended while starting ({_code_words(report.code)}): {reason}; "
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
        reason = exit_reason(report.tail) or "; ".join(report.tail[-1:])
        return CoordinatorLostError(
            f"the coordinator of {self.model} ended ({_code_words(report.code)}): {reason}; log: {self.log_path}"
        )


class _PortTakenError(Exception):
    """Something else has the port."""


def server_flags(settings: CoordinatorSettings, port: int, known: frozenset[str]) -> list[str]:
    """llama-server's arguments for these settings.

    Args:
        known: flags that this build knows; those that came or went with versions are only passed when known.
    """
    flags = ["-m", str(settings.model_path), "--host", LOOPBACK, "--port", str(port)]
    flags += ["-c", str(settings.context_tokens), "-np", str(settings.slots)]
    if settings.plan is not None:
        split = split_over_devices(settings.plan, settings.device_free_bytes)
        flags += [
            "--rpc",
            ",".join(settings.plan.endpoints),
            "-ngl",
            str(settings.plan.gpu_layers),
            "-sm",
            "layer",
            "-ts",
            split,
        ]
    optional = [
        ("--kv-unified", []),  # one pool of context for all slots, instead of an n-th for each
        ("--cache-ram", ["0"]),  # the prompt cache in memory aborts over RPC (llama.cpp issue 26529)
        ("--offline", []),
        ("--no-webui", []),
        ("--jinja", []),
    ]
    if settings.plan is not None:
        optional.append(("--fit", ["off"]))  # it would change the plan
    for flag, values in optional:
        if flag in known:
            flags += [flag, *values]
    return [*flags, "-lv", "5"]


@lru_cache
def _known_flags(server: Path) -> frozenset[str]:
    try:
        answer = subprocess.run([str(server), "--help"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"{server} does not run ({error}); run `sollol-nb doctor`") from error
    return frozenset(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", answer.stdout + answer.stderr))


# --- why an engine ended, in words --------------------------------------------------------------

PORT_TAKEN = "the port is taken by another program"
BAD_MODEL = "the model file is damaged or not one that llama.cpp loads"
_REASONS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), words)
    for pattern, words in (
        (r"couldn't bind|bind.*(failed|in use)", PORT_TAKEN),
        (
            r"RPC server version mismatch",
            "a worker speaks another RPC protocol; use one llama.cpp build everywhere",
        ),
        (  # an abort may come before the line that tells the version is written
            r"RPC handshake failed",
            "a worker was lost or speaks another RPC protocol; see %sollol_cluster for which",
        ),
        (
            r"Remote RPC server crashed|failed to connect to \S+:\d+|RPC transport",
            "a worker was lost; see %sollol_cluster for which, and start it again",
        ),
        (
            r"out of memory|failed to allocate|unable to allocate|bad_alloc|cannot allocate memory",
            "out of memory; add workers, use a smaller context, or a smaller model",
        ),
        (
            r"not within the file bounds|invalid magic|model is corrupted|unknown model architecture|"
            r"error loading model|failed to load model",
            BAD_MODEL,
        ),
        (r"error: (invalid argument|unknown argument)", "this llama.cpp build does not know one of our flags"),
    )
)


def exit_reason(tail: Sequence[str]) -> str | None:
    """Why an engine ended, from its last log lines, most telling first; None when they do not say."""
    text = "\n".join(tail)
    for pattern, words in _REASONS:
        if pattern.search(text):
            return words
    return None


def _code_words(code: int | None) -> str:
    if code is None:
        return "its supervisor was lost"
    return f"signal {-code}" if code < 0 else f"exit code {code}"
