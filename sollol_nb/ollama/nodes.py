"""Ollama nodes: address, gate and HTTP client, the models each has, how fast it is, and whether it can be used.

A node that fails is not used for a pause that doubles with every failure. After the pause it is asked again,
without waiting for a request, and it is used again as soon as it answers.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from sollol_nb.errors import ConfigError, ConnectFailedError, HttpStatusError, TransportError
from sollol_nb.models.names import ModelName
from sollol_nb.ollama.answers import listed_models
from sollol_nb.ollama.choice import NodeOffer, Residency
from sollol_nb.runtime.gate import Gate
from sollol_nb.runtime.http_client import JsonClient, one_line
from sollol_nb.settings.endpoints import DEFAULT_OLLAMA_PORT, LOOPBACK, format_endpoint, parse_endpoint

QUERY_TIMEOUT_S = 3.0  # of short requests, such as for the list of models
INVENTORY_FRESH_S = 10.0  # an older inventory is refreshed during the next request
INVENTORY_RECENT_S = 1.0  # a node that was asked within it is not asked again where none has the model
FIRST_RETRY_S = 1.0
LONGEST_RETRY_S = 60.0
LONGEST_VERSION = 40  # characters; a name such as 0.17.4-rc1

NEW_SAMPLE_WEIGHT = 0.3
ASSUMED_MS_PER_TOKEN = 50.0  # of a node that is busy but was never measured
ASSUMED_LOAD_MS = 10_000.0  # of a model that was never loaded there
ASSUMED_ANSWER_TOKENS = 100.0  # before the first answer


class NodeState(StrEnum):
    """Whether a node can be used."""

    UNKNOWN = "unknown"
    """Not asked yet."""
    READY = "ready"
    ABSENT = "absent"
    """Nothing listens there; asked again after growing pauses."""
    COOLING = "cooling"
    """It failed or went silent; not used for a while."""


_NO_LOGIN = "; this package sends no login: use an address that needs none"
_NO_OLLAMA = "; that server is not Ollama"
_NO_SERVER = "; the proxy there does not reach Ollama"
_ADVICE = dict.fromkeys((401, 403, 407), _NO_LOGIN)
_ADVICE |= dict.fromkeys((404, 405, 501), _NO_OLLAMA)
_ADVICE |= dict.fromkeys((502, 503, 504), _NO_SERVER)

_PAUSED = (NodeState.ABSENT, NodeState.COOLING)


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """The state of one node now.

    Attributes:
        url: where it is.
        state: "unknown", "ready", "absent" or "cooling".
        loaded_models: names as `ollama ps` shows them.
        models: names as `ollama list` shows them.
        running: requests of this pool that it is working on.
        waiting: requests of this pool waiting for it (some perhaps for other nodes too).
        slots: requests it serves at the same time (`OLLAMA_NUM_PARALLEL`).
        expected_wait_ms: how long a new request would wait to start, from what was measured; 0 with a free slot.
        ms_per_token: measured, averaged over its models; None before the first answer.
        last_error: its last failure, if there was one.
        retry_in_s: seconds until it is asked again, if it is absent or cooling.
        round_trip_ms: how long its last short answer took (`/api/ps`, which needs no disk); None before.
        loaded_bytes: memory of its loaded models, as it reports; None before it was asked.
        is_named: whether the user named it; False where this machine's Ollama is only looked for.
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
    is_named: bool = True

    @property
    def is_only_looked_for(self) -> bool:
        """Whether it is this machine's Ollama that nobody named, and none runs there: nothing to report."""
        return not self.is_named and self.state in (NodeState.ABSENT, NodeState.UNKNOWN)


def node_url(node: str | Mapping[str, Any]) -> str:
    """The base URL of a node given as `host`, `host:port`, a URL, or `{"host": ..., "port": ...}`.

    Read as Ollama itself reads `OLLAMA_HOST` (its envconfig/config.go): quotes do not count, the port is 11434, or
    with a scheme 80 or 443, an IPv6 address needs no brackets, `ollama.com` is https; 0.0.0.0 and `::`, on which
    servers listen, become loopback.

    Raises:
        ConfigError: it is none of these.
    """
    if isinstance(node, Mapping):
        if not node.get("host"):
            raise ConfigError(f"{dict(node)!r} is not an Ollama node; give host and port")
        host, port_text = str(node["host"]), str(node.get("port", DEFAULT_OLLAMA_PORT))
        text = f"[{host}]:{port_text}" if ":" in host else f"{host}:{port_text}"
    elif isinstance(node, str):
        text = node.strip().strip("\"'").strip()
    else:
        raise ConfigError(f"{node!r} is not an Ollama node; use host:port, or a URL with http or https")
    scheme, separator, rest = text.rpartition("://")
    scheme = scheme.lower() or "http"
    if scheme not in ("http", "https"):
        raise ConfigError(f"{text!r} is not an Ollama node; use host:port, or a URL with http or https")
    if "@" in rest:
        raise ConfigError("the URL of an Ollama node must not contain a password, since logs would show it")
    if "?" in rest or "#" in rest:
        raise ConfigError(f"{text!r} is not an Ollama node; use host:port, or a URL without ? and #")
    address, _, path = rest.partition("/")
    if address == "ollama.com" and not separator:
        scheme, separator = "https", "://"
    default_port = {"http": 80, "https": 443}[scheme] if separator else DEFAULT_OLLAMA_PORT
    if address.startswith(":") and not address.startswith("::"):
        address = LOOPBACK + address  # `:11435`
    elif not address and separator:
        address = LOOPBACK  # `http://`
    elif address.endswith(":") and not address.endswith("::"):
        address = address[:-1]  # `host:`
    host, port = parse_endpoint(address, default_port)
    host = {"0.0.0.0": LOOPBACK, "::": "::1"}.get(host, host)  # noqa: S104 - replaced, not bound
    path = f"/{path}".rstrip("/")
    return f"{scheme}://{format_endpoint(host, port)}{path}"


class NodeChanged(Protocol):
    """Called when a node's state or the models it holds have changed."""

    def __call__(self, node: OllamaNode, *, has_new_state: bool) -> None: ...


class OllamaNode:
    """One Ollama server, used from one event loop.

    Args:
        url: its base URL.
        slots: requests it serves at the same time.
        on_change: called on every change.
        is_named: whether the user named it.
    """

    def __init__(self, url: str, slots: int, on_change: NodeChanged, *, is_named: bool = True) -> None:
        self.url = url
        self.is_named = is_named
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
        self._refreshed_at_s = self._asked_at_s = float("-inf")
        self._retry_at_s = 0.0
        self._refreshing: asyncio.Task[None] | None = None
        self._recovering: asyncio.Task[None] | None = None

    @property
    def client(self) -> JsonClient:
        """Its HTTP client, without a limit on silence: callers set their own."""
        if self._client is None:
            self._client = JsonClient(self.url, read_timeout_s=None)
        return self._client

    @property
    def inventory_age_s(self) -> float:
        """Seconds since it last reported its models; infinite if it never did."""
        return time.monotonic() - self._refreshed_at_s

    @property
    def asked_age_s(self) -> float:
        """Seconds since the last request for its models, with or without an answer; infinite before the first."""
        return time.monotonic() - self._asked_at_s

    def residency(self, key: str) -> Residency:
        """Where it has a model (by `ModelName.key`)."""
        # Ollama loads a model with several names once, and shows one of the names.
        if key in self._loaded or self._digests.get(key) in self._loaded_digests:
            return Residency.LOADED
        return Residency.ON_DISK if key in self._on_disk else Residency.MISSING

    def offer(self, key: str, answer_tokens: float) -> NodeOffer:
        """What it can do for a request to a model, if a typical answer has `answer_tokens` tokens."""
        gate = self.gate
        request_count = gate.running + gate.waiting
        ms_per_token = self._ms_per_token.get(key)
        if ms_per_token is None:
            # An idle node without measurements is worth a try; a busy one must not draw every request.
            ms_per_token = ASSUMED_MS_PER_TOKEN if request_count else 0.0
        expected_ms = ms_per_token * answer_tokens * (1 + request_count / gate.slots)
        residency = self.residency(key)
        if residency is Residency.ON_DISK:
            expected_ms += self._load_ms.get(key, ASSUMED_LOAD_MS)
        return NodeOffer(self.url, residency, gate.has_free_slot, expected_ms)

    def status(self, answer_tokens: float) -> NodeStatus:
        """The node's state now."""
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
            retry_in_s=max(0.0, self._retry_at_s - time.monotonic()) if self.state in _PAUSED else None,
            round_trip_ms=self._round_trip_ms,
            loaded_bytes=self._loaded_bytes,
            is_named=self.is_named,
        )

    # --- questions to the node -------------------------------------------------------------------

    async def refresh(self) -> None:
        """Ask which models it has; the answer, or the failure, is in its state. Joins a refresh under way."""
        await asyncio.shield(self.start_refresh())

    def start_refresh(self) -> asyncio.Task[None]:
        """Start a refresh, or join the one under way, without waiting for it."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.get_running_loop().create_task(self._refresh())
        return self._refreshing

    async def is_alive(self, timeout_s: float) -> bool:
        """Whether the server itself answers, however busy its models are."""
        try:
            await self.client.get("/api/version", timeout_s=timeout_s)
        except TransportError:
            return False
        return True

    async def version(self) -> str:
        """The version of Ollama that it runs; "" if it does not say."""
        try:
            answer = await self.client.get("/api/version", timeout_s=QUERY_TIMEOUT_S)
        except TransportError:
            return ""
        version = answer.get("version") if isinstance(answer, Mapping) else None
        return one_line(version, LONGEST_VERSION) if isinstance(version, str) else ""

    async def entries(self, path: str) -> list[dict[str, Any]]:
        """The well-formed entries of `/api/tags` (on disk) or `/api/ps` (loaded).

        Raises:
            TransportError: none came; the message says why, and what to do.
        """
        try:
            return _models(await self.client.get(path, timeout_s=QUERY_TIMEOUT_S), self.url)
        except HttpStatusError as error:
            advice = _ADVICE.get(error.status, "")
            raise HttpStatusError(f"{error}{advice}", status=error.status, reason=error.reason) from None

    async def _refresh(self) -> None:
        try:
            stored = await self.entries("/api/tags")
            asked_at_s = time.monotonic()
            running = await self.entries("/api/ps")
            self._round_trip_ms = (time.monotonic() - asked_at_s) * 1e3
        except TransportError as error:
            self._asked_at_s = time.monotonic()
            self.record_failure(error)
            return
        self._refreshed_at_s = self._asked_at_s = time.monotonic()
        on_disk = {_keys(entry)[0]: entry["name"] for entry in stored}
        loaded = {_keys(entry)[0]: entry["name"] for entry in running}
        has_new_state = self.state is not NodeState.READY
        has_new_models = (self._on_disk.keys(), self._loaded.keys()) != (on_disk.keys(), loaded.keys())
        self.state, self._on_disk, self._loaded = NodeState.READY, on_disk, loaded
        self._digests = dict(map(_keys, stored))
        self._loaded_digests = frozenset(digest for _, digest in map(_keys, running))
        self._loaded_bytes = sum(entry.get("size", 0) for entry in running)
        if has_new_state or has_new_models:
            self._on_change(self, has_new_state=has_new_state)

    # --- what requests report -------------------------------------------------------------------

    def record_answer(self, key: str, name: str, final: Mapping[str, Any], *, had_to_load: bool) -> None:
        """Record a finished answer, with Ollama's own timings (nanoseconds) from its final chunk."""
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

    def record_unload(self, key: str) -> None:
        """Record that the model was unloaded (`keep_alive=0`)."""
        self._loaded.pop(key, None)
        self._loaded_digests -= {self._digests.get(key, "")}

    def record_missing(self, key: str) -> None:
        """Record its answer that it does not have the model after all."""
        self.record_unload(key)
        self._on_disk.pop(key, None)

    def record_failure(self, error: Exception) -> None:
        """It did not answer, went silent or ended the connection: do not use it for a while."""
        self.last_error = str(error)
        if self.state in _PAUSED and time.monotonic() < self._retry_at_s:
            return  # the same failure, reported by each request that ran there
        self._failures += 1
        state = NodeState.ABSENT if isinstance(error, ConnectFailedError) else NodeState.COOLING
        has_new_state, self.state = self.state is not state, state
        self._loaded, self._loaded_digests = {}, frozenset()
        self._round_trip_ms = self._loaded_bytes = None
        pause_s = min(LONGEST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(self._failures - 1, 10))
        # Not all nodes behind one switch should be asked again in the same instant.
        pause_s *= random.uniform(0.8, 1.2)  # noqa: S311
        self._retry_at_s = time.monotonic() + pause_s
        if self._recovering is None or self._recovering.done():
            self._recovering = asyncio.get_running_loop().create_task(self._recover())
        self._on_change(self, has_new_state=has_new_state)

    async def _recover(self) -> None:
        while self.state is not NodeState.READY:
            await asyncio.sleep(max(0.0, self._retry_at_s - time.monotonic()))
            await self.refresh()

    async def aclose(self) -> None:
        """Stop all refreshes and close all connections. Closing twice is fine."""
        tasks = [task for task in (self._recovering, self._refreshing) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._client is not None:
            await self._client.aclose()
            self._client = None
        self.state = NodeState.UNKNOWN


def _models(answer: Any, url: str) -> list[dict[str, Any]]:
    """The entries of an answer of `/api/tags` or `/api/ps`. Raises TransportError if it is not such an answer."""
    try:
        return listed_models(answer)
    except ValueError as error:
        reason = answer.get("error") if isinstance(answer, Mapping) else None
        said = f" (it answered: {one_line(reason, 100)})" if isinstance(reason, str) else f": {error}"
        raise TransportError(f"{url} is not an Ollama server{said}") from None


def _keys(entry: Mapping[str, Any]) -> tuple[str, str]:
    """Key and digest of an entry."""
    key = ModelName.parse(entry["name"]).key
    return key, entry.get("digest") or key
