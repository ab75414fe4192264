"""The coordinator: one llama-server running one plan of one model.

The coordinator listens on loopback and has its own API key (in its environment, not in its arguments). Before it
is used, it must prove that it is what answers on the port (see `readiness.py`): it refuses a request without the
key, and names our model file in the answer to one with it. Another program on the port is never used.

It does not depend on the process that started it: its registry entry says what it runs, and `adopt` connects to it
from a restarted kernel or a second notebook, with its plan, log and layer map.

Where the engine placed the layers is only in its debug log, so it starts at that verbosity; the supervisor drops
debug lines from the log once the engine listens.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil

from sollol_nb.chat.chunk import Chunk
from sollol_nb.errors import ModelFileError, TransportError
from sollol_nb.layers.plan import LayerPlan
from sollol_nb.llama_cpp.answers.base import Answer
from sollol_nb.llama_cpp.contexts.store import ContextStore
from sollol_nb.llama_cpp.contexts.visit import Identity
from sollol_nb.llama_cpp.coordinators.cached_weights import describe_sent, weight_bytes
from sollol_nb.llama_cpp.coordinators.pace import Pace
from sollol_nb.llama_cpp.coordinators.placement import Placement, read_placement
from sollol_nb.llama_cpp.coordinators.readiness import LISTENING, PortTakenError, StartingCoordinator
from sollol_nb.llama_cpp.coordinators.settings import (
    CoordinatorSettings,
    known_flags,
    server_flags,
    server_variables,
)
from sollol_nb.llama_cpp.coordinators.speculation import DRAFT
from sollol_nb.llama_cpp.coordinators.streams import AnswerStreams
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.process import EngineProcess, ExitReport, Lease
from sollol_nb.llama_cpp.processes.registry import Entry
from sollol_nb.runtime.events import EventBus, EventKind
from sollol_nb.runtime.exchange import Exchange
from sollol_nb.runtime.gate import Gate
from sollol_nb.runtime.http_client import JsonClient
from sollol_nb.settings.endpoints import LOOPBACK, addresses_of

# A stream that went silent is ended by the watch over all streams (see `pace.py`), long before this.
SILENCE_LIMIT_S = 3600.0

_CONTEXT_EVENTS = {
    "saved": EventKind.CONTEXT_SAVED,
    "restored": EventKind.CONTEXT_RESTORED,
    "refused": EventKind.CONTEXT_REFUSED,
}


@dataclass(frozen=True, slots=True)
class Timings:
    """What the engine measured: for a whole prompt, and for each generated token."""

    prompt_ms: float
    token_ms: float


class Coordinator:
    """A running (or ended) llama-server.

    Attributes:
        settings: what it runs.
        base_url: `http://127.0.0.1:<port>`.
        log_path: the engine's log, drained to a file.
        placement: where the engine says it put the layers; None until it is ready.
        load_ms: from the start of the process until it was ready.
        bytes_sent: to its workers until then; None if there are none, or where the system does not count.
        first_seconds_per_token: as measured when it became ready; None if it was not.
        gate: waiting requests, in order of priority.
        keep_alive_s: seconds that it lives without a request, as last set from here; None is forever.
        is_adopted: whether another process (or router) started it.
        loaded_by: who had loaded its model before this router adopted it; "" if it was not loaded by then.
        compromise: how it differs from what was requested, where nothing better was free; "" otherwise.
        standby_of: the registry id of the coordinator that it may have to replace; "" for one that is used.
    """

    def __init__(
        self,
        settings: CoordinatorSettings,
        process: EngineProcess,
        port: int,
        *,
        gate: Gate | None = None,
        is_adopted: bool = False,
    ) -> None:
        self.settings = settings
        self.port = port
        self.base_url = f"http://{LOOPBACK}:{port}"
        self.log_path = process.log_path
        self.placement: Placement | None = None
        self.load_ms = 0.0
        self.bytes_sent: int | None = None
        self.first_seconds_per_token: float | None = None
        self.gate = gate if gate is not None else Gate(settings.slots)
        self.keep_alive_s = process.entry.keep_alive_s
        self.is_adopted = is_adopted
        self.loaded_by = ""
        self.compromise = ""
        self.standby_of = process.entry.standby_of
        self._process = process
        self._client = JsonClient(self.base_url, api_key=process.key, read_timeout_s=SILENCE_LIMIT_S)
        self._keyless = JsonClient(self.base_url, read_timeout_s=5.0)
        self._streams = AnswerStreams(
            settings.model,
            process,
            self._client,
            partial(Exchange, self.base_url, api_key=process.key, read_timeout_s=SILENCE_LIMIT_S),
            context_tokens=settings.context_tokens,
            slots=settings.slots,
        )

    def __repr__(self) -> str:
        state = "running" if self.is_running() else "ended"
        return f"<Coordinator of {self.settings.model} at {self.base_url}, {state}>"

    @property
    def id(self) -> str:
        """The id of its registry entry."""
        return self._process.entry.id

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
    def pace(self) -> Pace:
        """The time that it usually needs for a token."""
        return self._streams.pace

    @property
    def last_used_at(self) -> float:
        """`time.monotonic()` of the last request's begin or end."""
        return self._streams.last_used_at

    @property
    def uptime_s(self) -> float:
        """Seconds since its start."""
        return time.time() - self._process.entry.started_at

    @property
    def pid(self) -> int:
        """Process id of the engine."""
        return self._process.pid

    @property
    def placement_differences(self) -> list[str]:
        """Where the engine placed other layers than planned, one line each; empty if there are none."""
        return self.placement.differences(self.plan) if self.placement and self.plan else []

    @property
    def sent_description(self) -> str:
        """How much of its weights was sent to its workers; "" where all was, or that is unknown."""
        return describe_sent(self.bytes_sent, weight_bytes(self.settings))

    @property
    def is_idle(self) -> bool:
        """Whether no request of this process runs or waits at it."""
        return not self.gate.running and not self.gate.waiting

    def is_running(self) -> bool:
        """Whether the process is alive."""
        return self._process.is_running()

    # --- start and end --------------------------------------------------------------------------

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
        """Start a llama-server on a port; it holds its workers, but is not ready yet (see `until_ready`).

        Args:
            about: additions to its registry entry.
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
            env={"LLAMA_API_KEY": api_key, **server_variables(settings)},
            log_path=registry.new_log_path(registry.COORDINATOR, port),
            debug_until=LISTENING,
            holds=holds,
        )
        await process.hold()  # while it loads
        return cls(settings, process, port, gate=gate)

    @classmethod
    async def attach(cls, entry: Entry, *, gate: Gate | None = None) -> Coordinator | None:
        """The coordinator of a registry entry, without a lease on it.

        None if its supervisor does not answer, or the entry does not say what it runs.
        """
        try:
            settings = await asyncio.to_thread(CoordinatorSettings.from_dict, entry.about)
            port = int(entry.about["port"])
        except (KeyError, TypeError, ValueError, ModelFileError):
            return None
        process = await EngineProcess.adopt(entry)
        return cls(settings, process, port, gate=gate, is_adopted=True) if process is not None else None

    @classmethod
    async def adopt(cls, entry: Entry, *, gate: Gate | None = None) -> Coordinator | None:
        """The coordinator of a registry entry, with a lease; it may still be loading (see `until_ready`).

        None where `attach` returns None, and if it is ending.
        """
        coordinator = await cls.attach(entry, gate=gate)
        if coordinator is None or await coordinator.hold():
            return coordinator
        await coordinator.detach()
        return None

    @classmethod
    async def snapshot(cls, entry: Entry) -> Coordinator | None:
        """The coordinator of a registry entry as it is now, only to be shown: no connection to it is kept."""
        coordinator = await cls.attach(entry)
        if coordinator is None:
            return None
        await coordinator.detach()
        coordinator.load_ms = float(entry.about.get("load_ms") or 0.0)
        coordinator.bytes_sent = entry.about.get("bytes_sent")
        with contextlib.suppress(OSError):
            log = await asyncio.to_thread(coordinator.log_path.read_text, "utf-8", "replace")
            coordinator.placement = read_placement(log)
        return coordinator

    async def until_ready(self, timeout_s: float) -> None:
        """Wait until it can be used. If that fails, it is stopped, or only detached if another process started it.

        Raises:
            CoordinatorError, ModelFileError: as in `StartingCoordinator.until_ready`.
        """
        try:
            starting = StartingCoordinator(
                self.settings, self._process, self._client, self._keyless, is_adopted=self.is_adopted
            )
            ready = await starting.until_ready(timeout_s)
        except BaseException as error:
            # What another process started is not ours to end, unless something else has its port.
            if self.is_adopted and not isinstance(error, PortTakenError):
                await self.detach()
            else:
                await self.stop(grace_s=0.0)
            raise
        finally:
            self.free()
        self.placement, self.load_ms, self.bytes_sent = ready.placement, ready.load_ms, ready.bytes_sent
        self._streams.chat_template = ready.chat_template
        self.pace.set_load_time(ready.load_ms / 1000)
        self.first_seconds_per_token = ready.seconds_per_token if ready.is_measured else None
        self.pace.calibrate(ready.seconds_per_token)
        # If the engine does not say, the limit is assumed to be what was requested.
        with contextlib.suppress(TransportError, KeyError, TypeError):
            props = await self._client.get("/props", timeout_s=10.0)
            self._streams.context_tokens = int(props["default_generation_settings"]["n_ctx"])

    async def hold(self) -> bool:
        """Take a lease for a request; False if it has ended or is ending."""
        return await self._process.hold()

    def ask_lease(self) -> Lease:
        """Take a lease for a request, without waiting for the answer."""
        return self._process.ask_lease()

    def free(self) -> None:
        """End the lease of a request."""
        self._process.free()

    async def keep_alive(self, seconds: float | None) -> None:
        """Set how long it lives without a request; None is forever."""
        await self._process.keep_alive(seconds)
        self.keep_alive_s = seconds

    async def set_standby_of(self, coordinator_id: str) -> None:
        """Note for all kernels which coordinator it may have to replace; "" where it is used from now on."""
        self.standby_of = coordinator_id
        await self._process.update_about(standby_of=coordinator_id)

    def keep_contexts(self, store: ContextStore, events: EventBus) -> None:
        """Save the contexts of its slots in the background from now on, and restore saved ones before requests.
        Without this, and where it was not started for that folder, it does neither."""
        about, settings = self._process.entry.about, self.settings
        if not store.is_on or settings.contexts != store.folder or settings.speculation.kind == DRAFT:
            return  # a draft model would not know what was restored

        def report(what: str, message: str, **data: Any) -> None:
            events.publish(_CONTEXT_EVENTS[what], settings.model, message, **data)

        modelfile = about.get("modelfile") or {}
        identity = Identity(
            model=settings.model,
            title=registry.own_name(),
            made_of={
                "model_file": about.get("model_file"),
                "engine": about.get("engine_version"),
                "adapters": [modelfile.get("adapters"), modelfile.get("projector")],
                "kv": about.get("kv"),
            },
            bytes_per_token=sum(settings.facts.layer_kv_bytes_per_token),
            context_tokens=self._streams.context_tokens,
            brings=settings.facts.keeps_whole_context,
        )
        self._streams.contexts.use(store, identity, report)

    async def save_contexts(self) -> int:
        """Save now what is in its slots and not saved yet, where that is worth it; nothing while a slot is busy.

        Returns:
            How many contexts were saved. Never raises because of the engine or the disk.
        """
        return await self._streams.contexts.save() if self.is_running() else 0

    async def forget_contexts(self, contents: Sequence[str] = ()) -> None:
        """Empty idle slots that hold a conversation with these messages; without messages all idle slots."""
        with contextlib.suppress(TransportError):
            await self._streams.contexts.forget(contents)

    async def stop(self, *, grace_s: float | None = None, why: str = "stopped") -> ExitReport:
        """End the process and close connections. Stopping twice is fine."""
        report = await self._process.stop(why=why, **({} if grace_s is None else {"grace_s": grace_s}))
        await self._close()
        return report

    async def stop_unless_shared(self) -> bool:
        """End the process, unless another process uses it; False if it keeps running for that one."""
        stopped = await self._process.stop_unless_shared()
        await self._close()
        return stopped

    async def stop_unless_used(self, *, leave: bool = False) -> list[str]:
        """End the process, unless another process is connected or anybody else has a lease.

        Args:
            leave: disconnect from it if it keeps running.

        Returns:
            Who keeps it running; empty if it has ended.
        """
        users = await self._process.stop_unless_used(leave=leave)
        if leave or not users:
            await self._close()
        return users

    async def detach(self) -> None:
        """End this process's connections to it; it lives on for its keep_alive."""
        self._process.detach()
        await self._close()

    async def wait_ended(self) -> ExitReport:
        """Wait until the process ends."""
        return await self._process.wait()

    async def _close(self) -> None:
        self._streams.close()
        await self._client.aclose()
        await self._keyless.aclose()

    # --- answers --------------------------------------------------------------------------------

    def answer(
        self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any], *, model: str | None = None
    ) -> Answer:
        """A new answer, to be streamed from this coordinator, and from another if this one is lost.

        With the option `overflow="drop_oldest"` the oldest turns that do not fit the context are dropped.

        Args:
            model: the name in the request, by which the answer can be continued.
        """
        return self._streams.new_answer(messages, options, model)

    def raw_answer(self, prompt: str, options: Mapping[str, Any], *, model: str | None = None) -> Answer:
        """As `answer`, to a text that the model continues without a chat template."""
        return self._streams.new_raw_answer(prompt, options, model)

    async def timings(self, prompt: Sequence[int], tokens: int, *, timeout_s: float, anew: bool = True) -> Timings:
        """Have a prompt of these token ids processed, and so many tokens generated after it.

        Args:
            anew: also what the engine still knows of it.

        Raises:
            TransportError: the engine does not answer, or not within the time.
        """
        body = {"prompt": list(prompt), "n_predict": tokens, "temperature": 0}
        body |= {"cache_prompt": not anew, "ignore_eos": True}
        answer = await self._client.post("/completion", body, timeout_s=timeout_s)
        try:
            measured = answer["timings"]
            return Timings(float(measured["prompt_ms"]), float(measured["predicted_per_token_ms"]))
        except (KeyError, TypeError, ValueError) as error:
            raise TransportError(f"{self.base_url} reports no times: {error!r}") from error

    async def count_tokens(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> int:
        """Tokens of the prompt of a request; those of images are not counted. Errors are those of `stream`."""
        return await self._streams.count_tokens(messages, options)

    def stream(self, answer: Answer, lease: Lease | None = None) -> AsyncGenerator[Chunk, None]:
        """Stream the rest of an answer; yields Ollama-shaped chunks, the last with `done`.

        Where turns were dropped to fit the context, the first chunk and the last have `_dropped`: which. Where the
        answer ended because the context was full, the last has `_context_full`: its size in tokens.

        Closing the generator cancels the work in the engine's slot. The caller provides the slot (see `gate`), the
        lease and the time limit.

        Args:
            lease: just requested; nothing is sent before it is granted. None where the caller has one.

        Raises:
            CoordinatorLostError: the process ended or is ending, the connection broke, or it went silent.
            ContextOverflowError: the messages do not fit the context.
            RequestRejectedError: the engine refused the request.
        """
        return self._streams.stream(answer, lease)

    def broken_links(self) -> list[str]:
        """Workers to which it has no TCP connection any more, according to the operating system."""
        try:
            process = psutil.Process(self.pid)
            links = process.net_connections("tcp")
            if process.status() == psutil.STATUS_ZOMBIE:  # it has ended, with all its connections
                return []
        except psutil.Error:
            return []
        linked = {
            (link.raddr.ip, link.raddr.port) for link in links if link.raddr and link.status == "ESTABLISHED"
        }
        # Addresses are empty where a name cannot be resolved now.
        known = {endpoint: addresses_of(endpoint) for endpoint in self.rpc_backends}
        return [endpoint for endpoint, addresses in known.items() if addresses and not linked & addresses]
