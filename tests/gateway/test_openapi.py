"""The OpenAPI document says what the gateway takes and answers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from starlette.routing import Route

from sollol_nb.gateway import openai_api
from sollol_nb.gateway.app import APIS
from sollol_nb.gateway.failures import ApiError
from sollol_nb.gateway.openapi import OPERATIONS, document
from tests.support.gateway import GatewayProcess

MESSAGES = [{"role": "user", "content": "What is a worker?"}]
ASKED: dict[str, dict[str, Any]] = {
    "/api/chat": {"model": "demo", "messages": MESSAGES, "stream": False, "options": {"num_predict": 5}},
    "/api/generate": {"model": "demo", "prompt": "A worker", "stream": False, "options": {"num_predict": 5}},
    "/api/show": {"model": "demo"},
    "/v1/chat/completions": {"model": "demo", "messages": MESSAGES, "max_tokens": 5},
    "/v1/completions": {"model": "demo", "prompt": "A worker", "max_tokens": 5},
    "/v1/responses": {"model": "demo", "input": "What is a worker?", "max_output_tokens": 5},
    "/v1/responses/input_tokens": {"model": "demo", "input": "What is a worker?"},
    "/v1/messages": {"model": "demo", "messages": MESSAGES, "max_tokens": 5},
    "/v1/messages/count_tokens": {"model": "demo", "messages": MESSAGES},
}
STREAMED = {
    "/api/chat",
    "/api/generate",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
}


def body_of(path: str, method: str = "post") -> Any:
    return document()["paths"][path][method]["requestBody"]["content"]["application/json"]["schema"]


def check(path: str, method: str, status: int, media_type: str, content: Any) -> None:
    """Whether an answer is one of those that the document has."""
    whole = document()
    responses = whole["paths"][path][method]["responses"]
    answers = responses.get(str(status), responses["default"])["content"]
    assert media_type in answers, f"{method} {path}: {media_type}"
    schema = {**answers[media_type]["schema"], "components": whole["components"]}
    Draft202012Validator(schema).validate(content)


def test_every_route_is_in_the_document() -> None:
    routes = {
        (method, route.path.replace(":path", ""))
        for api in APIS
        for route in api.routes
        if isinstance(route, Route)
        for method in route.methods or ()
    }
    heads = {("HEAD", path) for method, path in routes if method == "GET"}
    assert routes - heads <= OPERATIONS.keys()


def test_its_schemas_are_schemas() -> None:
    for (method, path), operation in OPERATIONS.items():
        if operation.body is not None:
            Draft202012Validator.check_schema(body_of(path, method.lower()))
        if operation.answer is not None:
            Draft202012Validator.check_schema(operation.answer)


@pytest.mark.parametrize(
    "field",
    [
        {"temperature": 0.5},
        {"temperature": -1},
        {"temperature": "warm"},
        {"top_p": 2},
        {"stop": ["a"]},
        {"stop": 3},
        {"stream": None},
        {"stream": "yes"},
        {"reasoning_effort": "high"},
        {"reasoning_effort": "much"},
        {"top_logprobs": 21},
        {"user": {"any": "thing"}},
        {"functions": []},
        {"no_such_field": 1},
    ],
    ids=str,
)
def test_a_body_fits_the_document_exactly_if_the_gateway_takes_its_fields(field: dict[str, Any]) -> None:
    body = {"model": "demo", "messages": MESSAGES, **field}
    try:
        openai_api.FIELDS.checked(body)
        is_taken = True
    except ApiError:
        is_taken = False
    assert Draft202012Validator(body_of("/v1/chat/completions")).is_valid(body) == is_taken


@pytest.mark.engine
def test_answers_are_those_of_the_document(gateway: GatewayProcess) -> None:
    with gateway.client() as client:
        for method, path in OPERATIONS:
            if method == "GET" and "{" not in path:
                with client.stream("GET", path) as answer:
                    media_type = answer.headers["Content-Type"].partition(";")[0]
                    # Events would not end.
                    content = json.loads(answer.read()) if media_type == "application/json" else ""
                    check(path, "get", answer.status_code, media_type, content)
        for path, body in ASKED.items():
            Draft202012Validator(body_of(path)).validate(body)
            answer = client.post(path, json=body)
            assert answer.status_code == 200, answer.text
            check(path, "post", 200, "application/json", answer.json())
        for path in STREAMED:
            answer = client.post(path, json={**ASKED[path], "stream": True})
            check(path, "post", 200, answer.headers["Content-Type"].partition(";")[0], answer.text)
        for (method, path), operation in OPERATIONS.items():
            if operation.body is not None and "{" not in path:
                answer = client.post(path, json={"model": 7})
                assert 400 <= answer.status_code < 500, path
                check(path, method.lower(), answer.status_code, "application/json", answer.json())
