"""The path /openapi.json: an OpenAPI 3.1 document of all routes.

What bodies may have is derived from the tables that check them (`Fields`), so that the document and the gateway
cannot differ. Rules that a table has only as text are descriptions in the schema.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from sollol_nb._version import __version__
from sollol_nb.chat.option_checks import Values
from sollol_nb.gateway import (
    anthropic_parts,
    ollama_parts,
    openai_api,
    openai_completions,
    openai_embeddings,
    responses_parts,
)
from sollol_nb.gateway.calls import (
    BACKEND_HEADER,
    FAILOVERS_HEADER,
    PRIORITY_HEADER,
    RECOVERY_HEADER,
    ROUTE_HEADER,
    TIMEOUT_HEADER,
)
from sollol_nb.gateway.openai_parts import Fields

Schema = dict[str, Any]

_OBJECT: Schema = {"type": "object"}
_TEXT: Schema = {"type": "string"}
_NDJSON = "application/x-ndjson"
_EVENTS = "text/event-stream"
_SAMPLES: Mapping[str, tuple[Any, ...]] = {
    "boolean": (True, False),
    "integer": (1, 0, 5, -1),
    "number": (0.5, 1.5),
    "string": ("x", "high", "json", "auto", "float", "medium", "fast", "5m", "error"),
    "array": ([], ["text"], [{}]),
    "object": ({}, {"x": 1}),
}
"""Values of each JSON type; a field takes the types of which it takes one."""


def _object(required: Iterable[str] = (), **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required)}


def _list_in(name: str, entry: Schema) -> Schema:
    return _object([name], **{name: {"type": "array", "items": entry}})


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """What one route does with one method.

    Attributes:
        summary: one line.
        body: the schema of a JSON body; None for methods without one.
        answer: the schema of the JSON answer; None where it has none.
        others: further media types of an answer, such as that of a stream.
        asks: whether an engine answers, so that the gateway's request headers apply.
        always_refused: whether it exists only to say by name that it is not supported.
    """

    summary: str
    body: Schema | None = None
    answer: Schema | None = field(default_factory=lambda: _OBJECT)
    others: tuple[str, ...] = ()
    asks: bool = False
    always_refused: bool = False


# --- bodies ---------------------------------------------------------------------------------------


def body_schema(fields: Fields, *required: str) -> Schema:
    """The schema of a body that a table of fields checks; None (null) counts as "not given" everywhere."""
    needed = sorted({*required, *fields.required})
    properties = {name: _field_schema(values, name in needed) for name, values in fields.known.items()}
    if "messages" in properties:
        properties["messages"]["items"] = _MESSAGE
    if "model" in properties:
        properties["model"]["examples"] = ["demo"]
    properties |= {name: {"description": "changes no answer"} for name in sorted(fields.ignored)}
    return {**_object(needed, **properties), "additionalProperties": False}


_MESSAGE = _object(
    ["role"],
    role={**_TEXT, "examples": ["user", "assistant", "system", "tool"]},
    content={"type": ["string", "array", "null"], "examples": ["What is a worker?"]},
)


def _field_schema(values: Values, is_required: bool) -> Schema:
    types = [name for name, samples in _SAMPLES.items() if any(map(values.is_valid, samples))]
    if "number" in types and "integer" in types:
        types.remove("integer")
    schema: Schema = {"description": values.description}
    if "string" in types and not values.is_valid(""):
        schema["minLength"] = 1
    if types == ["array"] and not values.is_valid([]):
        schema["minItems"] = 1
    if {"number", "integer"} & set(types):
        schema |= _limits(values)
    if values.description.startswith("one of "):
        schema["enum"] = [
            *values.description.removeprefix("one of ").split(", "),
            *([] if is_required else [None]),
        ]
    elif types:
        schema["type"] = types if is_required else [*types, "null"]
    return schema


def _limits(values: Values) -> Schema:
    limits: Schema = {}
    for below, least in pairwise((-2, -1, 0, 1)):
        if values.is_valid(least) and not values.is_valid(below):
            limits["minimum"] = least
    for most, above in ((1, 2), (2, 3), (10, 11), (20, 21)):
        if values.is_valid(most) and not values.is_valid(above):
            limits["maximum"] = most
    return limits


def _tables() -> dict[str, Schema]:
    ollama = ollama_parts.FIELDS
    return {
        "/api/chat": body_schema(ollama["chat"], "model"),
        "/api/generate": body_schema(ollama["generate"], "model"),
        "/api/embed": body_schema(ollama["embed"], "model"),
        "/api/embeddings": body_schema(ollama["embeddings"], "model"),
        "/api/show": body_schema(ollama["show"]),
        "/api/pull": body_schema(ollama["pull"]),
        "/v1/chat/completions": body_schema(openai_api.FIELDS, "model"),
        "/v1/completions": body_schema(openai_completions.FIELDS, "model"),
        "/v1/embeddings": body_schema(openai_embeddings.FIELDS, "model"),
        "/v1/responses": body_schema(responses_parts.FIELDS, "model"),
        "/v1/responses/input_tokens": body_schema(responses_parts.COUNTED_FIELDS, "model"),
        "/v1/messages": body_schema(anthropic_parts.FIELDS, "model", "messages", "max_tokens"),
        "/v1/messages/count_tokens": body_schema(anthropic_parts.FIELDS, "model", "messages"),
    }


# --- routes ---------------------------------------------------------------------------------------

_CHOICES = {"choices": {"type": "array", "items": _OBJECT}, "model": _TEXT, "usage": {"type": ["object", "null"]}}
_WHOLE_NUMBER: Schema = {"type": "integer", "minimum": 0}
_READY = _object(
    ["ready", "reason", "workers", "nodes", "coordinators", "engine"],
    ready={"type": "boolean"},
    reason=_TEXT,
    workers=_OBJECT,
    nodes=_OBJECT,
    coordinators=_WHOLE_NUMBER,
    engine={"type": "boolean"},
)
_NOT_SUPPORTED = Operation(summary="Not supported; the error says so.", answer=None, always_refused=True)


def _asking(summary: str, answer: Schema, *others: str) -> Operation:
    return Operation(summary=summary, body=_OBJECT, answer=answer, others=others, asks=True)


OPERATIONS: Mapping[tuple[str, str], Operation] = {
    ("POST", "/api/chat"): _asking(
        "Chat, as Ollama does.", _object(["message", "done"], message=_OBJECT, done={"type": "boolean"}), _NDJSON
    ),
    ("POST", "/api/generate"): _asking(
        "Continue or answer a prompt, as Ollama does.",
        _object(["response", "done"], response=_TEXT, done={"type": "boolean"}),
        _NDJSON,
    ),
    ("POST", "/api/embed"): _asking("Vectors of texts.", _list_in("embeddings", {"type": "array"})),
    ("POST", "/api/embeddings"): _asking("The vector of a text.", _list_in("embedding", {"type": "number"})),
    ("GET", "/api/version"): Operation(
        summary="The version of Ollama's API that the gateway serves.", answer=_object(["version"], version=_TEXT)
    ),
    ("GET", "/api/tags"): Operation(summary="All models.", answer=_list_in("models", _OBJECT)),
    ("GET", "/api/ps"): Operation(summary="The models that are loaded.", answer=_list_in("models", _OBJECT)),
    ("POST", "/api/show"): Operation(summary="Details of a model.", body=_OBJECT),
    ("POST", "/api/pull"): Operation(summary="Pull a model onto an Ollama node.", body=_OBJECT, others=(_NDJSON,)),
    **{("POST", f"/api/{name}"): _NOT_SUPPORTED for name in ("create", "copy", "push")},
    ("DELETE", "/api/delete"): _NOT_SUPPORTED,
    ("HEAD", "/api/blobs/{digest}"): _NOT_SUPPORTED,
    ("POST", "/api/blobs/{digest}"): _NOT_SUPPORTED,
    ("POST", "/v1/chat/completions"): _asking("Chat, as OpenAI does.", _object(_CHOICES, **_CHOICES), _EVENTS),
    ("POST", "/v1/completions"): _asking(
        "Continue a text, as OpenAI does.", _object(_CHOICES, **_CHOICES), _EVENTS
    ),
    ("POST", "/v1/embeddings"): _asking("Vectors of texts, as OpenAI gives them.", _list_in("data", _OBJECT)),
    ("GET", "/v1/models"): Operation(
        summary="All models; with the header anthropic-version in Anthropic's shape.",
        answer=_list_in("data", _object(["id"], id=_TEXT)),
    ),
    ("GET", "/v1/models/{model}"): Operation(summary="One model.", answer=_object(["id"], id=_TEXT)),
    ("POST", "/v1/responses"): _asking(
        "A response, as OpenAI's Responses API gives it.", _list_in("output", _OBJECT), _EVENTS
    ),
    ("POST", "/v1/responses/input_tokens"): _asking(
        "The number of tokens of an input.", _object(["input_tokens"], input_tokens=_WHOLE_NUMBER)
    ),
    **{(method, "/v1/responses/{path}"): _NOT_SUPPORTED for method in ("GET", "POST", "DELETE")},
    ("POST", "/v1/messages"): _asking("Messages, as Anthropic does.", _list_in("content", _OBJECT), _EVENTS),
    ("POST", "/v1/messages/count_tokens"): _asking(
        "The number of tokens of messages.", _object(["input_tokens"], input_tokens=_WHOLE_NUMBER)
    ),
    ("GET", "/sollol/hello"): Operation(summary="For notebooks of the same version: what the router is."),
    ("POST", "/sollol/chat"): Operation(
        summary="For notebooks of the same version: an answer.", body=_OBJECT, answer=None, others=(_NDJSON,)
    ),
    ("POST", "/sollol/call/{method}"): Operation(
        summary="For notebooks of the same version: a method of the router.", body=_OBJECT
    ),
    ("GET", "/sollol/events"): Operation(
        summary="For notebooks of the same version: events.", answer=None, others=(_NDJSON,)
    ),
    ("GET", "/sollol/state"): Operation(
        summary="For notebooks of the same version: the state's changes.", answer=None, others=(_NDJSON,)
    ),
    ("GET", "/health"): Operation(
        summary="Whether the gateway is alive.",
        answer=_object(["status", "version"], status={"const": "ok"}, version=_TEXT),
    ),
    ("GET", "/ready"): Operation(summary="Whether it can answer; else 503, and why.", answer=_READY),
    ("GET", "/metrics"): Operation(
        summary="Metrics for Prometheus.", answer=None, others=("text/plain", "application/openmetrics-text")
    ),
    ("GET", "/cluster"): Operation(summary="The cluster's state, or its changes as events.", others=(_EVENTS,)),
    ("GET", "/openapi.json"): Operation(summary="This document."),
    ("GET", "/"): Operation(summary="The status page.", answer=None, others=("text/html", "text/plain")),
    ("GET", "/assets/{name}"): Operation(
        summary="A file of the status page.", answer=None, others=("text/javascript", "text/css", "image/svg+xml")
    ),
}

_ERRORS: Mapping[str, Schema] = {
    "OllamaError": _object(["error"], error=_TEXT),
    "AnthropicError": _object(
        ["type", "error"],
        type={"const": "error"},
        error=_object(["type", "message"], type=_TEXT, message=_TEXT),
    ),
    "OpenAIError": _object(
        ["error"],
        error=_object(
            ["message", "type", "param", "code"],
            message=_TEXT,
            type=_TEXT,
            param={"type": ["string", "null"]},
            code={"type": ["string", "null"]},
        ),
    ),
    "NotebookError": _object(["error"], error=_object(["class", "message"], **{"class": _TEXT, "message": _TEXT})),
}
_ERROR_OF: Mapping[str, str] = {
    "/api/": "OllamaError",
    "/v1/messages": "AnthropicError",
    "/sollol/": "NotebookError",
    "/": "OpenAIError",
}
"""By the beginning of the path; the first match counts."""
_REQUEST_HEADERS: Mapping[str, Schema] = {
    PRIORITY_HEADER: {"type": "string", "description": "1 to 10, or a name such as high"},
    TIMEOUT_HEADER: {"type": "number", "exclusiveMinimum": 0, "description": "seconds"},
    BACKEND_HEADER: {"enum": ["auto", "ollama", "sharded", "local"]},
    RECOVERY_HEADER: {"enum": ["fast", "exact"]},
}
_ANSWER_HEADERS: Mapping[str, Schema] = {
    ROUTE_HEADER: {"description": "the backend and the place that answered", "schema": _TEXT},
    FAILOVERS_HEADER: {"description": "how many servers were lost meanwhile", "schema": _WHOLE_NUMBER},
}


@cache
def document() -> Schema:
    """The whole document."""
    bodies = _tables()
    paths: dict[str, Schema] = {}
    for (method, path), operation in OPERATIONS.items():
        body = bodies.get(path, operation.body) if operation.body is not None else None
        paths.setdefault(path, {})[method.lower()] = _described(path, operation, body)
    return {
        "openapi": "3.1.0",
        "info": {"title": "sollol_nb gateway", "version": __version__, "license": {"name": "MIT"}},
        "servers": [{"url": "./"}],
        "security": [{}, {"bearer": []}, {"x-api-key": []}, {"basic": []}],
        "paths": paths,
        "components": {
            "schemas": dict(_ERRORS),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
                "basic": {"type": "http", "scheme": "basic", "description": "the password is the key"},
            },
        },
    }


def _described(path: str, operation: Operation, body: Schema | None) -> Schema:
    error = next(name for beginning, name in _ERROR_OF.items() if path.startswith(beginning))
    refusal = {
        "description": "an error in the API's own shape",
        "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{error}"}}},
    }
    content: dict[str, Schema] = (
        {} if operation.answer is None else {"application/json": {"schema": operation.answer}}
    )
    content |= {media_type: {"schema": _TEXT} for media_type in operation.others}
    answer: Schema = {"description": "the answer", "content": content}
    if operation.asks:
        answer["headers"] = dict(_ANSWER_HEADERS)
    responses = {} if operation.always_refused else {"200": answer}
    if operation.always_refused and path.startswith("/api/"):
        responses["501"] = refusal
    if path == "/ready":
        responses["503"] = {"description": "it cannot answer now", "content": content}
    described: Schema = {"summary": operation.summary, "responses": {**responses, "default": refusal}}
    if body is not None:
        described["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    parameters = [
        {"name": part.strip("{}"), "in": "path", "required": True, "schema": {**_TEXT, "minLength": 1}}
        for part in path.split("/")
        if part.startswith("{")
    ]
    if operation.asks:
        parameters += [
            {"name": name, "in": "header", "required": False, "schema": schema}
            for name, schema in _REQUEST_HEADERS.items()
        ]
    if parameters:
        described["parameters"] = parameters
    return described


async def _answer(request: Request) -> Response:
    return JSONResponse(document())


ROUTES: list[BaseRoute] = [Route("/openapi.json", _answer, methods=["GET"])]
