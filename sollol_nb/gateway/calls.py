"""The requests of all APIs in one form, with the facts from their headers."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, cast

from starlette.requests import Request

from sollol_nb.chat.chunk import Chunk
from sollol_nb.errors import ConfigError
from sollol_nb.gateway.failures import ApiError, invalid
from sollol_nb.gateway.keys import Key
from sollol_nb.hybrid_router import HybridRouter
from sollol_nb.models.routing import OLLAMA, checked_backend
from sollol_nb.runtime.amounts import shown
from sollol_nb.runtime.priority import priority_named
from sollol_nb.text.short_names import is_file_name

ROUTE_HEADER = "X-Sollol-Route"
FAILOVERS_HEADER = "X-Sollol-Failovers"
PRIORITY_HEADER = "X-Sollol-Priority"
TIMEOUT_HEADER = "X-Sollol-Timeout"
BACKEND_HEADER = "X-Sollol-Backend"
RECOVERY_HEADER = "X-Sollol-Recovery"


@dataclass(slots=True, kw_only=True)
class ChatCall:
    """One request for an answer.

    Attributes:
        model: its name.
        messages: in Ollama's shape.
        options: those of `Router.stream`, by name.
        stream: whether the answer is sent as it is generated.
        priority: 1 to 10.
        timeout_s: limit in seconds; None is the router's.
        backend: where it must run; None leaves that to the router.
        is_generate: whether `prompt` is completed as it is, without the model's chat template and `messages`.
        prompt: the text to complete then.
        extra: further arguments of `Router.stream_generate`.
    """

    model: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    stream: bool = False
    priority: int = 5
    timeout_s: float | None = None
    backend: str | None = None
    is_generate: bool = False
    prompt: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def operation(self) -> str:
        """The kind of request, as in OpenTelemetry's conventions."""
        return "text_completion" if self.is_generate else "chat"

    def chunks(self, router: HybridRouter) -> AsyncGenerator[Chunk, None]:
        """The router's answer; the last chunk has `done`."""
        where: dict[str, Any] = {"backend": self.backend, "priority": self.priority, "timeout": self.timeout_s}
        if self.is_generate:
            return router.stream_generate(self.model, self.prompt, **where, **self.extra, **self.options)
        return router.stream(self.model, self.messages, **where, **self.options)


@dataclass(slots=True, kw_only=True)
class EmbedCall(ChatCall):
    """Embeddings of texts. The only chunk has them: `embeddings`, a vector for each text, in their order.

    Attributes:
        inputs: the texts.
        options: those of `Router.embed`, by name.
    """

    inputs: str | list[str]

    @property
    def operation(self) -> str:
        """The kind of request, as in OpenTelemetry's conventions."""
        return "embeddings"

    async def chunks(self, router: HybridRouter) -> AsyncGenerator[Chunk, None]:
        """The router's answer.

        Raises:
            ApiError: a header does not apply to embeddings.
        """
        if checked_backend(self.backend) not in (None, OLLAMA):
            raise invalid(f"{BACKEND_HEADER}: embeddings come from Ollama only; leave the header out")
        if "recovery" in self.options:
            raise invalid(f"{RECOVERY_HEADER} does not apply to embeddings; leave the header out")
        found = await router.embed(
            self.model, self.inputs, priority=self.priority, timeout=self.timeout_s, **self.options
        )
        yield cast(Chunk, {"message": {}, "done": True, "done_reason": "stop", **found})


def model_of(request: Request, body: dict[str, Any]) -> str:
    """The model that a body names.

    Raises:
        ApiError: it names none, or a file without the right to do so.
    """
    model = body.get("model")
    if not isinstance(model, str) or not model.strip():
        raise invalid('give "model", the name of a model', "model")
    if is_file_name(model) and not key_of(request).may_control:
        raise ApiError(403, "forbidden", "this key may not name model files; give the name of a model")
    return model


def key_of(request: Request) -> Key:
    """The key with which a request came; where no key is required, one without limits."""
    key: Key = request.scope["sollol.key"]
    return key


def apply_headers(request: Request, call: ChatCall, body: dict[str, Any]) -> ChatCall:
    """Complete a call with the request's priority, and with what its `X-Sollol-` headers say; returns it.

    The priority is the header's, the body's `priority`, or the key's, and never above the key's.

    Raises:
        ApiError: one of them cannot be used.
    """
    headers, key = request.headers, key_of(request)
    given: Any = headers.get(PRIORITY_HEADER, body.get("priority"))
    label = PRIORITY_HEADER if PRIORITY_HEADER in headers else "priority"
    call.priority = key.priority if given is None else _priority(given, label)
    if key.limits_priority:
        call.priority = min(call.priority, key.priority)
    if (timeout := headers.get(TIMEOUT_HEADER)) is not None:
        try:
            call.timeout_s = float(timeout)
        except ValueError:
            raise invalid(f"{TIMEOUT_HEADER}: {shown(timeout)} must be a number of seconds") from None
    if (backend := headers.get(BACKEND_HEADER)) is not None:
        call.backend = backend
    if (recovery := headers.get(RECOVERY_HEADER)) is not None:
        call.options["recovery"] = recovery
    return call


def _named(name: str) -> int:
    priority = priority_named(name)
    if priority is None:
        raise ConfigError(f"there is no priority {shown(name)}; give 1 to 10, or a name such as high")
    return priority


def _priority(value: Any, label: str) -> int:
    try:
        if isinstance(value, str):
            return int(value) if value.isdecimal() else _named(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    except (ConfigError, ValueError) as error:
        raise invalid(f"{label}: {error}", "priority") from None
    raise invalid(f"{label}={shown(value)} must be 1 to 10, or a name such as high", "priority")
