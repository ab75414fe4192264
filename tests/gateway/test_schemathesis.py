"""Requests generated from the gateway's own OpenAPI document: none makes it fail, responses are as described."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import APIOperation, Case, GenerationMode
from schemathesis.checks import CHECKS, load_all_checks

from sollol_nb.llama_cpp.engine.check import Engine
from tests.support.engines import HANG_GUARD_S
from tests.support.gateway import GatewayProcess, running_gateway

pytestmark = pytest.mark.engine

EXAMPLES = 30
"""For each operation and mode."""
WITHOUT_END = ("/cluster", "/sollol/events", "/sollol/state")
"""Streams of events, which last as long as their reader; other tests read them."""
load_all_checks()
CONFORMANCE = CHECKS.get_by_names(
    ["status_code_conformance", "content_type_conformance", "response_schema_conformance"]
)


@pytest.fixture(scope="module")
def fuzzed(engine: Engine) -> Iterator[GatewayProcess]:
    """A gateway for itself: what is generated may stop what others use."""
    with running_gateway() as running:
        yield running


def operations(gateway: GatewayProcess) -> list[APIOperation[Any, Any, Any]]:
    schema = schemathesis.openapi.from_url(f"{gateway.url}/openapi.json")
    found = [result.ok() for result in schema.get_all_operations()]
    return [operation for operation in found if operation.path not in WITHOUT_END]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=lambda mode: mode.value)
def test_generated_requests_are_answered_as_described(fuzzed: GatewayProcess, mode: GenerationMode) -> None:
    found = operations(fuzzed)
    assert len(found) > 15
    failures = [failure for operation in found if (failure := failure_of(operation, mode))]
    assert not failures, "\n\n".join(failures) + fuzzed.output[-3000:]
    with fuzzed.client() as client:
        assert client.get("/health").status_code == 200
    assert "Traceback" not in fuzzed.output


def failure_of(operation: APIOperation[Any, Any, Any], mode: GenerationMode) -> str:
    """What is wrong with the responses of one operation; "" if nothing is."""
    try:
        check(operation, mode)
    except Unsatisfiable:
        assert mode == GenerationMode.NEGATIVE, operation.label  # where nothing can be wrong
    except Exception as error:  # of the checks, of the client, or of Hypothesis
        return f"{operation.label}: {error}"
    return ""


def check(operation: APIOperation[Any, Any, Any], mode: GenerationMode) -> None:
    """Send requests for one operation; most with a model that exists, or nothing else of them would be read."""
    number = 0

    @seed(7)
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def sent(case: Case) -> None:
        nonlocal number
        number += 1
        if isinstance(case.body, dict) and "model" in case.body and number % 4:
            case.body["model"] = "demo"
        try:
            response = case.call(timeout=HANG_GUARD_S)
        except UnicodeEncodeError:  # the client cannot send half a surrogate pair
            return
        assert response.status_code != httpx.codes.INTERNAL_SERVER_ERROR, (
            f"{case.as_curl_command()}: {response.text}"
        )
        case.validate_response(response, checks=CONFORMANCE)

    sent()
