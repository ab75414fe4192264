"""The paths of Ollama's API about models: lists, loaded models, details of a model, and pulling.

Models of Ollama nodes are shown as the nodes show them. Models that llama.cpp runs here are shown in the same
form, without the list of tensors: their facts are those of the file's header, and the digest stands for the file
(path, size, time of change), since that of its content would take minutes. Source of the shapes: Ollama's
`api/types.go` and `server/routes.go`.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from sollol_nb._version import __version__
from sollol_nb.chat.chat_templates import supports_thinking, takes_tools
from sollol_nb.chat.chunk import Chunk
from sollol_nb.chat.completion import Completion
from sollol_nb.errors import ModelError, ModelNotFoundError, OllamaUnavailableError
from sollol_nb.gateway.answers import AnswerWriter, json_bytes
from sollol_nb.gateway.bodies import read_json
from sollol_nb.gateway.calls import ChatCall, key_of, model_of
from sollol_nb.gateway.failures import ApiError, api_error
from sollol_nb.gateway.gateway import answer, gateway_of
from sollol_nb.gateway.ollama_parts import checked_fields, error_shape, model_error
from sollol_nb.gguf.facts import ModelFacts, model_keys, read_facts
from sollol_nb.hybrid_router import HybridRouter
from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.models.files import find_model_file
from sollol_nb.models.names import key_of as key_of_name
from sollol_nb.models.routing import Route as ModelRoute
from sollol_nb.ollama.pool import OllamaPool
from sollol_nb.settings import config
from sollol_nb.settings.kinds import CENTURY_S
from sollol_nb.text.short_names import is_file_name

API_VERSION = "0.32.1"
"""The version of Ollama whose API this is; tools compare it with the oldest version that they support."""
_MOST_ELEMENTS = 5  # of a list in `model_info`; Ollama also leaves out longer lists
_HIDDEN_KEYS = ("general.name", "tokenizer.chat_template")
_UNITS = ((10**9, "B", 1), (10**6, "M", 2), (10**3, "K", 0))
_NUMBER = re.compile(r"\d+")


# --- lists ----------------------------------------------------------------------------------------


async def _tags(request: Request) -> Response:
    gateway = gateway_of(request)
    in_ollama, available = await asyncio.gather(
        _of_nodes(gateway.ollama.list(), "nodes"), gateway.router.listed_models()
    )
    entries = {entry["name"]: entry for entry in reversed(in_ollama)}  # of several nodes, the first
    known = set(map(key_of_name, entries))
    named = [model.model for model in available if model.where and not is_file_name(model.model)]
    names = [name for name in named if key_of_name(name) not in known]
    ours = await asyncio.to_thread(lambda: [entry for name in names if (entry := _listed(name))])
    models = [*reversed(entries.values()), *ours]
    return _json({"models": [{"model": entry["name"], **entry} for entry in models]})


async def _of_nodes(asking: Awaitable[Mapping[str, Any]], where: str) -> list[dict[str, Any]]:
    """The entries of the Ollama nodes, without the field that names the node; none if no node runs."""
    try:
        return [_without(entry, where) for entry in (await asking)["models"]]
    except OllamaUnavailableError:
        return []


def _listed(name: str) -> dict[str, Any] | None:
    """The entry of a model that llama.cpp can run here; None if it cannot be requested by this name."""
    try:
        path = find_model_file(name)
        return None if path is None else {"name": name, **_file_facts(path)}
    except (ModelError, OSError):  # a damaged model must not hide the others
        return None


async def _ps(request: Request) -> Response:
    gateway = gateway_of(request)
    entries = await _of_nodes(gateway.ollama.ps(), "node")
    ours = await asyncio.to_thread(lambda: list(map(_loaded, gateway.router.own_coordinators)))
    models = [*entries, *(entry for entry in ours if entry)]
    return _json({"models": [{"model": entry["name"], **entry} for entry in models]})


def _loaded(coordinator: Coordinator) -> dict[str, Any] | None:
    """The entry of a model that llama.cpp has loaded; None if its file is gone."""
    settings = coordinator.settings
    keep_alive_s = CENTURY_S if coordinator.keep_alive_s is None else coordinator.keep_alive_s
    unused_s = time.monotonic() - coordinator.last_used_at if coordinator.is_idle else 0.0
    try:
        facts = _file_facts(settings.model_path)
    except (ModelError, OSError):
        return None
    kv_bytes = sum(settings.facts.kv_bytes(settings.context_tokens))
    return {
        "name": coordinator.model,
        **_without(facts, "modified_at"),
        "size": settings.facts.file_bytes + kv_bytes,
        "expires_at": _time(time.time() + keep_alive_s - unused_s),
        "size_vram": 0,  # the workers do not say which devices are graphics cards
        "context_length": settings.context_tokens,
    }


def _file_facts(path: Path) -> dict[str, Any]:
    about, facts = path.stat(), read_facts(path)
    identity = f"{path}\n{about.st_size}\n{about.st_mtime_ns}"
    return {
        "modified_at": _time(about.st_mtime),
        "size": facts.file_bytes,
        "digest": hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest(),
        "details": _details(facts),
    }


def _details(facts: ModelFacts) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "gguf",
        "family": facts.architecture,
        "families": [facts.architecture],
        "parameter_size": human_number(facts.parameter_count),
        "quantization_level": facts.quantization or "unknown",
    }


def human_number(count: int) -> str:
    """A number as Ollama writes it: `7.6B`, `134.52M`."""
    for unit, letter, digits in _UNITS:
        if count >= unit:
            return f"{count / unit:.{0 if count % unit == 0 else digits}f}{letter}"
    return str(count)


# --- one model ------------------------------------------------------------------------------------


async def _show(request: Request) -> Response:
    body = checked_fields("show", await read_json(request))
    model = model_of(request, {"model": body.get("model") or body.get("name")})
    gateway = gateway_of(request)
    try:
        route = await gateway.router.route(model)
        if route.model_path is None:
            return _json(await gateway.ollama.show(route.model, verbose=body.get("verbose")))
        return _json(await asyncio.to_thread(_shown, route))
    except ModelNotFoundError as error:
        raise model_error(api_error(error), model) from None


def _shown(route: ModelRoute) -> dict[str, Any]:
    """What `/api/show` says about a model that llama.cpp runs."""
    assert route.model_path is not None
    facts, saved = read_facts(route.model_path), config.saved_model(route.model)
    template = route.modelfile.chat_template or facts.chat_template
    system = saved.system or route.modelfile.system
    parameters = [
        f"{name:<30} {value}"
        for name, values in {**route.modelfile.options, **saved.options}.items()
        for value in (values if isinstance(values, list | tuple) else [values])
    ]
    has = {
        "completion": True,
        "tools": takes_tools(template) and not route.modelfile.refuses_tools,
        "thinking": supports_thinking(template),
        "vision": route.modelfile.projector is not None,
    }
    shown = {
        "modelfile": f"# {route.name} runs on llama.cpp: {route.reason}\nFROM {route.name}\n",
        "parameters": "\n".join(parameters),
        "template": template,
        "system": system,
        "details": _details(facts),
        "messages": [dict(message) for message in route.modelfile.messages],
        "model_info": _model_info(route.name, facts),
        "capabilities": [name for name, is_so in has.items() if is_so],
        "modified_at": _time(route.model_path.stat().st_mtime),
    }
    optional = ("parameters", "system", "messages")
    return {name: value for name, value in shown.items() if value or name not in optional}


def _model_info(name: str, facts: ModelFacts) -> dict[str, Any]:
    # Editors show the base name as the model's name; not every file has one.
    keys = {"general.basename": name, **model_keys(facts.path), "general.parameter_count": facts.parameter_count}
    return {name: _plain(value) for name, value in sorted(keys.items()) if name not in _HIDDEN_KEYS}


def _plain(value: Any) -> Any:
    """A value of a header as JSON can hold it."""
    if isinstance(value, list):
        return [_plain(element) for element in value] if len(value) <= _MOST_ELEMENTS else None
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- pulling --------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class _PullCall(ChatCall):
    """A model is pulled onto a node; its progress is the answer."""

    pool: OllamaPool
    insecure: bool | None = None

    @property
    def operation(self) -> str:
        """The kind of request; OpenTelemetry's conventions have no name for it."""
        return "pull_model"

    async def chunks(self, router: HybridRouter) -> AsyncGenerator[Chunk, None]:
        async with aclosing(self.pool.pull(self.model, insecure=self.insecure)) as steps:
            async for step in steps:
                yield cast(Chunk, step)


class _PullWriter(AnswerWriter):
    """Lines with the progress, the last with `success`."""

    media_type = "application/x-ndjson"

    def __init__(self) -> None:
        self._last: dict[str, Any] = {"status": "pulling manifest"}

    def chunk(self, chunk: Chunk) -> bytes:
        self._last = _without(chunk, "message")
        return json_bytes(self._last) + b"\n"

    def waiting(self) -> bytes:
        return json_bytes(self._last) + b"\n"

    def failed(self, error: ApiError) -> bytes:
        return json_bytes(error_shape(error)) + b"\n"

    def whole(self, completion: Completion) -> Any:
        return _without(completion, "message")

    def refusal(self, error: ApiError) -> Any:
        return error_shape(error)


async def _pull(request: Request) -> ASGIApp:
    body = checked_fields("pull", await read_json(request))
    if not key_of(request).may_control:
        raise ApiError(403, "forbidden", "this key may not pull models; use a key made with --control")
    call = _PullCall(
        model=model_of(request, {"model": body.get("model") or body.get("name")}),
        stream=body.get("stream", True),
        pool=gateway_of(request).ollama,
        insecure=body.get("insecure"),
    )
    return answer(request, call, _PullWriter(), api="ollama")


# --- the server -----------------------------------------------------------------------------------


async def _version(request: Request) -> Response:
    versions = await gateway_of(request).ollama.versions()
    newest = max(versions.values(), key=_version_order, default=API_VERSION)
    return _json({"version": newest, "server": f"sollol_nb {__version__}"})


def _version_order(version: str) -> list[int]:
    return [int(number) for number in _NUMBER.findall(version)[:4]]


async def _refused(request: Request) -> Response:
    raise ApiError(
        501,
        "invalid",
        f"{request.url.path} is not supported: of changes to models, the gateway supports only pulling; use the "
        "Ollama of the node",
    )


def _json(data: Any) -> Response:
    return Response(json_bytes(data), media_type="application/json")


def _without(entry: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name not in names}


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


ROUTES: list[BaseRoute] = [
    Route("/api/version", _version, methods=["GET"]),
    Route("/api/tags", _tags, methods=["GET"]),
    Route("/api/ps", _ps, methods=["GET"]),
    Route("/api/show", _show, methods=["POST"]),
    Route("/api/pull", _pull, methods=["POST"]),
    Route("/api/create", _refused, methods=["POST"]),
    Route("/api/copy", _refused, methods=["POST"]),
    Route("/api/push", _refused, methods=["POST"]),
    Route("/api/delete", _refused, methods=["DELETE"]),
    Route("/api/blobs/{digest}", _refused, methods=["HEAD", "POST"]),
]
