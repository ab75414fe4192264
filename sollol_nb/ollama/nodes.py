"""Ollama nodes: their address, gate and HTTP client, what each holds, how fast it is, and whether it can be used.

A node that fails is left alone for a while that doubles with every failure, is looked at again by itself after
that, and is used again as soon as it answers.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol
from urllib.parse import urlsplit

from sollol_nb.errors import ConfigError, ConnectFailedError, ModelNotFoundError, TransportError
from sollol_nb.models.names import ModelName
from sollol_nb.ollama.choice import Holding, NodeOffer
from sollol_nb.runtime.gate import Gate
from sollol_nb.runtime.http_client import JsonClient
from sollol_nb.settings import config
from sollol_nb.settings.endpoints import LOOPBACK

LOOK_TIMEOUT_S = 3.0
INVENTORY_FRESH_S = 10.0  # older than this, it is asked again beside the next request
INVENTORY_RECENT_S = 1.0  # younger than this, it is believed when it says that a model is missing
FIRST_RETRY_S = 1.0
LONGEST_RETRY_S = 60.0

NEW_SAMPLE_WEIGHT = 0.3
ASSUMED_MS_PER_TOKEN = 50.0  # of a node that has work but was never measured
ASSUMED_LOAD_MS = 10_000.0  # of a model that was never loaded there
ASSUMED_ANSWER_TOKENS = 100.0  # before the first answer


class NodeState(StrEnum):
    """Whether a node can be used."""

    UNKNOWN = "unknown"
    """Not looked at yet."""
    READY = "ready"
    ABSENT = "absent"
    """Nothing listens there; looked at again with growing pauses."""
    COOLING = "cooling"
    """It failed or went silent; left alone for a while."""


_LEFT_ALONE = (NodeState.ABSENT, NodeState.COOLING)


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """One node as seen now.

    Attributes:
        url: where it is.
        state: "unknown", "ready", "absent" or "cooling".
        loaded_models: names as `ollama ps` shows them.
        models: names as `ollama list` shows them.
        running: requests of this pool it works on.
        waiting: requests of this pool waiting for it (some perhaps for other nodes too).
        slots: requests it serves at once (`OLLAMA_NUM_PARALLEL`).
        expected_wait_ms: how long a new request would wait to start, from what was measured; 0 with a free slot.
        ms_per_token: measured, averaged over its models; None before the first answer.
        last_error: why it was last left, if it ever was.
        retry_in_s: seconds until it is looked at again, if it is absent or cooling.
        round_trip_ms: how long its last short answer took (`/api/ps`, which needs no disk); None before.
        loaded_bytes: memory of the models that it has loaded, as it says; None before it was looked at.
    """

    url: str
    state: str
    loaded_models: tuple[str, ...]
    models: tuple[str, ...]
    running: int
    waiting: int
    slots: int
    expected_wait_ms: float
    ms_per_token: float | None
    last_error: str | None
    retry_in_s: float | None
    round_trip_ms: float | None = None
    loaded_bytes: int | None = None


def node_url(node: str | Mapping[str, Any]) -> str:
    """The base URL of a node given as `host`, `host:port`, a URL, or `{"host": ..., "port": ...}`.

    As with Ollama's own `OLLAMA_HOST`, the port is 11434, or with a scheme 80 or 443; 0.0.0.0 and `::`, which
    servers listen on, become loopback.

    Raises:
        ConfigError: it is none of these.
    """
    if isinstance(node, Mapping):
        if not node.get("host"):
            raise ConfigError(f"{dict(node)!r} is not an Ollama node; give host and port")
        host, port_text = str(node["host"]), str(node.get("port", config.DEFAULT_OLLAMA_PORT))
        text = f"[{host}]:{port_text}" if ":" in host else f"{host}:{port_text}"
    else:
        text = node.strip()
    scheme, separator, rest = text.rpartition("://")
    scheme = scheme.lower() or "http"
    if scheme not in ("http", "https"):
        raise ConfigError(f"{text!r} is not an Ollama node; write host:port, or a URL with http or https")
    if "@" in rest:
        raise ConfigError("the URL of an Ollama node must not carry a password; it would show in logs")
    try:
        parts = urlsplit(f"//{rest}")
    except ValueError:
        raise ConfigError(f"{text!r} is not an Ollama node; an IPv6 address is written [::1]:11434") from None
    endpoint = f"{LOOPBACK}{parts.netloc}" if parts.netloc.startswith(":") else parts.netloc
    default_port = {"http": 80, "https": 443}[scheme] if separator else config.DEFAULT_OLLAMA_PORT
    host, port = config.parse_endpoint(endpoint, default_port)
    host = {"0.0.0.0": LOOPBACK, "::": "::1"}.get(host, host)  # noqa: S104 - told apart, not bound
    return f"{scheme}://{config.format_endpoint(host, port)}{parts.path.rstrip('/')}"


class NodeChanged(Protocol):
    """Called when a node's state or the models it holds have changed."""

    def __call__(self, node: OllamaNode, *, has_new_state: bool) -> None: ...


class OllamaNode:
    """One Ollama server, used from one event loop.

    Args:
        url: its base URL.
        slots: requests it serves at once.
        on_change: told of every change.
    """

    def __init__(self, url: str, slots: int, on_change: NodeChanged) -> None:
        self.url = url
        self.gate = Gate(slots)
        self.state = NodeState.UNKNOWN
        self.last_error: str | None = None
        self._on_change = on_change
        self._client: JsonClient | None = None
        self._loaded: dict[str, str] = {}  # key -> name as shown
        self._on_disk: dict[str, str] = {}
        self._digests: dict[str, str] = {}  # key -> what is on disk under that name
        self._loaded_digests: frozenset[str] = frozenset()
        self._ms_per_token: dict[str, float] = {}
        self._load_ms: dict[str, float] = {}
        self._round_trip_ms: float | None = None
        self._loaded_bytes: int | None = None
        self._failures = 0
        self._looked_at_s = float("-inf")
        self._retry_at_s = 0.0
        self._looking: asyncio.Task[None] | None = None
        self._coming_back: asyncio.Task[None] | None = None

    @property
    def client(self) -> JsonClient:
        """Its HTTP client, without a limit on silence: callers bring their own."""
        if self._client is None:
            self._client = JsonClient(self.url, read_timeout_s=None)
        return self._client

    @property
    def inventory_age_s(self) -> float:
        """Seconds since it last said what it has; infinite if it never did."""
        return time.monotonic() - self._looked_at_s

    def holding(self, key: str) -> Holding:
        """What it has of a model (by `ModelName.key`)."""
        # Ollama loads what several names share once, and shows it under one of them.
        if key in self._loaded or self._digests.get(key) in self._loaded_digests:
            return Holding.LOADED
        return Holding.ON_DISK if key in self._on_disk else Holding.NOTHING

    def offer(self, key: str, answer_tokens: float) -> NodeOffer:
        """What it can do for a request to a model, if a typical answer has so many tokens."""
        gate = self.gate
        there = gate.running + gate.waiting
        ms_per_token = self._ms_per_token.get(key)
        if ms_per_token is None:
            # Unmeasured and idle is worth a try; unmeasured with work must not draw everything.
            ms_per_token = ASSUMED_MS_PER_TOKEN if there else 0.0
        expected_ms = ms_per_token * answer_tokens * (1 + there / gate.slots)
        holding = self.holding(key)
        if holding is Holding.ON_DISK:
            expected_ms += self._load_ms.get(key, ASSUMED_LOAD_MS)
        return NodeOffer(self.url, holding, gate.has_free_slot, expected_ms)

    def status(self, answer_tokens: float) -> NodeStatus:
        """The node as seen now."""
        gate = self.gate
        measured = self._ms_per_token.values()
        ms_per_token = sum(measured) / len(measured) if measured else None
        answer_ms = (ASSUMED_MS_PER_TOKEN if ms_per_token is None else ms_per_token) * answer_tokens
        return NodeStatus(
            url=self.url,
            state=self.state.value,
            loaded_models=tuple(sorted(self._loaded.values())),
            models=tuple(sorted(self._on_disk.values())),
            running=gate.running,
            waiting=gate.waiting,
            slots=gate.slots,
            expected_wait_ms=0.0 if gate.has_free_slot else answer_ms * (gate.waiting + 1) / gate.slots,
            ms_per_token=ms_per_token,
            last_error=self.last_error,
            retry_in_s=max(0.0, self._retry_at_s - time.monotonic()) if self.state in _LEFT_ALONE else None,
            round_trip_ms=self._round_trip_ms,
            loaded_bytes=self._loaded_bytes,
        )

    # --- looking ------------------------------------------------------------------------------

    async def look(self) -> None:
        """Ask what it has; the answer, or why there is none, is in its state. Joins a look under way."""
        await asyncio.shield(self.look_soon())

    def look_soon(self) -> asyncio.Task[None]:
        """Start a look, or join the one under way, without waiting for it."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.get_running_loop().create_task(self._look())
        return self._looking

    async def answers(self, timeout_s: float) -> bool:
        """Whether the server itself answers, however busy its models are."""
        try:
            await self.client.get("/api/version", timeout_s=timeout_s)
        except TransportError:
            return False
        return True

    async def _look(self) -> None:
        try:
            on_disk, digests = _models(await self.client.get("/api/tags", timeout_s=LOOK_TIMEOUT_S))
            asked_at_s = time.monotonic()
            running = await self.client.get("/api/ps", timeout_s=LOOK_TIMEOUT_S)
            self._round_trip_ms = (time.monotonic() - asked_at_s) * 1e3
            loaded, loaded_digests = _models(running)
        except TransportError as error:
            self.failed(error)
            return
        self._looked_at_s = time.monotonic()
        has_new_state = self.state is not NodeState.READY
        has_new_models = (self._on_disk.keys(), self._loaded.keys()) != (on_disk.keys(), loaded.keys())
        self.state, self._on_disk, self._loaded = NodeState.READY, on_disk, loaded
        self._digests, self._loaded_digests = digests, frozenset(loaded_digests.values())
        self._loaded_bytes = sum(int(model.get("size") or 0) for model in running["models"])
        if has_new_state or has_new_models:
            self._on_change(self, has_new_state=has_new_state)

    # --- what requests teach --------------------------------------------------------------------

    def served(self, key: str, name: str, final: Mapping[str, Any], *, had_to_load: bool) -> None:
        """A request was answered: take Ollama's own timings of it (nanoseconds), from the final chunk."""
        self._failures = 0
        tokens, eval_ns = final.get("eval_count"), final.get("eval_duration")
        if isinstance(tokens, int) and isinstance(eval_ns, int) and tokens > 0:
            sample = eval_ns / 1e6 / tokens
            before = self._ms_per_token.get(key, sample)
            self._ms_per_token[key] = before + NEW_SAMPLE_WEIGHT * (sample - before)
        load_ns = final.get("load_duration")
        if had_to_load and isinstance(load_ns, int):
            self._load_ms[key] = load_ns / 1e6
        if key not in self._loaded:
            self._loaded[key] = name
            self._on_change(self, has_new_state=False)

    def unloaded(self, key: str) -> None:
        """The model was sent away (`keep_alive=0`)."""
        self._loaded.pop(key, None)
        self._loaded_digests -= {self._digests.get(key, "")}

    def lacks(self, key: str) -> None:
        """It says that it does not have the model after all."""
        self.unloaded(key)
        self._on_disk.pop(key, None)

    def failed(self, error: Exception) -> None:
        """It did not answer, went silent or broke off: leave it alone for a while."""
        self.last_error = str(error)
        if self.state in _LEFT_ALONE and time.monotonic() < self._retry_at_s:
            return  # one failure, told by each request that was there
        self._failures += 1
        state = NodeState.ABSENT if isinstance(error, ConnectFailedError) else NodeState.COOLING
        has_new_state, self.state = self.state is not state, state
        self._loaded, self._loaded_digests = {}, frozenset()
        self._round_trip_ms = self._loaded_bytes = None
        pause_s = min(LONGEST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(self._failures - 1, 10))
        # Not all nodes behind one switch should be asked again in the same instant.
        pause_s *= random.uniform(0.8, 1.2)  # noqa: S311
        self._retry_at_s = time.monotonic() + pause_s
        if self._coming_back is None or self._coming_back.done():
            self._coming_back = asyncio.get_running_loop().create_task(self._come_back())
        self._on_change(self, has_new_state=has_new_state)

    async def _come_back(self) -> None:
        while self.state is not NodeState.READY:
            await asyncio.sleep(max(0.0, self._retry_at_s - time.monotonic()))
            await self.look()

    async def aclose(self) -> None:
        """Stop looking and close all connections. Closing twice is fine."""
        tasks = [task for task in (self._coming_back, self._looking) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._client is not None:
            await self._client.aclose()
            self._client = None
        self.state = NodeState.UNKNOWN


def _models(answer: Any) -> tuple[dict[str, str], dict[str, str]]:
    """By key, shown name and digest of each model in an answer of `/api/tags` or `/api/ps`."""
    models = answer.get("models") if isinstance(answer, Mapping) else None
    if not isinstance(models, list) or not all(isinstance(model, Mapping) for model in models):
        raise TransportError("what answers there is not Ollama")
    names, digests = {}, {}
    for model in models:
        name = str(model.get("name") or model.get("model"))
        with suppress(ModelNotFoundError):
            key = ModelName.parse(name).key
            names[key] = name
            digests[key] = str(model.get("digest") or key)
    return names, digests
