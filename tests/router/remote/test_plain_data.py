"""Data between gateways and notebooks survive the round trip through JSON."""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Any

import pytest

from sollol_nb import errors
from sollol_nb.cluster.coordinator_status import CoordinatorStatus, LayerSegment, LocalPart
from sollol_nb.cluster.status import ClusterStatus
from sollol_nb.errors import (
    AnswerInterruptedError,
    ContextOverflowError,
    CoordinatorStartError,
    GatewayBusyError,
    GatewayError,
    HttpStatusError,
    OllamaResponseError,
    SollolError,
    StructureError,
)
from sollol_nb.llama_cpp.processes.running import Ended
from sollol_nb.llama_cpp.workers.probe import Probe, ProbeOutcome
from sollol_nb.llama_cpp.workers.status import WorkerStatus
from sollol_nb.models.modelfile import Modelfile
from sollol_nb.models.profiles import profile_of
from sollol_nb.models.routing import Route
from sollol_nb.ollama.nodes import NodeStatus
from sollol_nb.router.finder import ModelSlots
from sollol_nb.router.remote.calls import CALLS
from sollol_nb.router.remote.plain_data import error_data, error_of, from_plain, to_plain

PROBE = Probe(
    endpoint="a:1",
    outcome=ProbeOutcome.FREE,
    detail="",
    protocol=(3, 1, 0),
    device_free_bytes=(5, 6),
    total_bytes=20,
    round_trip_ms=0.25,
)
WORKER = WorkerStatus(
    endpoint="a:1",
    state="free",
    detail="",
    held_by=None,
    probe=PROBE,
    is_local=True,
    name="gpu1/CUDA0",
    machine="3f",
    target="ssh://gpu1",
)
SEGMENT = LayerSegment(
    endpoint="a:1",
    layers="0-4",
    units=5,
    actual_units=None,
    weight_bytes=1,
    actual_weight_bytes=2,
    kv_bytes=3,
    share=0.5,
    color="#fff",
    name="gpu1/CUDA0",
)
COORDINATOR = CoordinatorStatus(
    model="demo",
    note="",
    url="http://a:2",
    log_path="/l",
    strategy="even",
    context_tokens=8,
    running=0,
    waiting=1,
    slots=4,
    uptime_s=1.5,
    load_ms=2.5,
    segments=(SEGMENT,),
    differences=("x",),
    local=(LocalPart(device="CPU", units=0, weight_bytes=1, kv_bytes=0),),
)
NODE = NodeStatus("http://a:3", "ready", ("m",), ("m", "n"), 0, 0, 1, 0.0, None, None, None)


@pytest.mark.parametrize(
    "value",
    [
        ClusterStatus((WORKER,), (COORDINATOR,), (NODE,)),
        Route(
            model="demo",
            backend="llama.cpp-local",
            reason="r",
            profile=profile_of("llama3.1:70b"),
            model_path=Path("/m.gguf"),
            modelfile=Modelfile(
                system="s", messages=({"role": "user"},), adapters=(Path("/a"),), options={"k": 1}
            ),
        ),
        ModelSlots(identity={"path": "p", "size": 3}, slots=4),
        Ended(kind="worker", name="a:1", users=("b",)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_survives_the_round_trip(value: Any) -> None:
    assert from_plain(type(value), json.loads(json.dumps(to_plain(value)))) == value


def test_a_status_is_sent_without_what_events_report() -> None:
    assert list(to_plain(ClusterStatus((), ()))) == ["workers", "coordinators", "nodes", "invitations"]


def test_fields_of_a_newer_version_are_ignored() -> None:
    assert from_plain(Ended, {"kind": "worker", "name": "a", "users": [], "new": 1}).users == ()


@pytest.mark.parametrize(
    ("hint", "data"),
    [
        (Ended, {"kind": "worker"}),
        (Ended, {"kind": 1, "name": "a", "users": []}),
        (Ended, {"kind": "worker", "name": "a", "users": [1]}),
        (Ended, "worker"),
        (list[str], {"a": 1}),
        (tuple[int, int, int], [1, 2]),
        (int, True),
        (float, 10**400),
        (bool, 1),
        (str | None, 3),
        (ProbeOutcome, "???"),
        (typing.Mapping[str, int], {"a": "b"}),
    ],
)
def test_data_of_another_type_are_refused(hint: Any, data: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        from_plain(hint, data)


def _made(kind: type[SollolError]) -> SollolError:
    if kind is HttpStatusError:
        return HttpStatusError("m", status=404, reason="r")
    if kind is ContextOverflowError:
        return ContextOverflowError("m", prompt_tokens=9, context_tokens=8)
    if kind is OllamaResponseError:
        return OllamaResponseError("m", status=400)
    error = kind("m")
    if isinstance(error, AnswerInterruptedError):
        error.state = {"kind": "raw"}
    if isinstance(error, CoordinatorStartError):
        error.may_pass = True
    if isinstance(error, GatewayBusyError):
        error.retry_after_s = 7
    return error


SAID = ("state", "may_pass", "is_crash", "prompt_tokens", "context_tokens", "status", "reason", "retry_after_s")
ALL = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, SollolError) and kind is not StructureError
]


@pytest.mark.parametrize("kind", ALL)
def test_an_error_becomes_the_same_exception(kind: type[SollolError]) -> None:
    error = _made(kind)
    again = error_of(json.loads(json.dumps(error_data(error))))
    assert (type(again), str(again)) == (kind, "m")
    for name in SAID:
        assert getattr(again, name, None) == getattr(error, name, None)


def test_an_unknown_error_is_a_gateway_error_in_one_line() -> None:
    error = error_of({"class": "ZeroDivisionError", "message": "a\nb\x1b[2J", "attributes": 3})
    assert type(error) is GatewayError
    assert str(error) == "a b [2J"


def test_an_error_that_says_something_of_another_type_is_one_of_the_gateway() -> None:
    error = error_of({"class": "GatewayBusyError", "message": "busy", "attributes": {"retry_after_s": "soon"}})
    assert (type(error), str(error)) == (GatewayError, "busy")


def test_the_types_of_all_calls_are_known() -> None:
    for call in CALLS.values():
        assert "return" in call._types
        with pytest.raises(ValueError, match="unknown is not an argument"):
            call.arguments({"unknown": 1})
        with pytest.raises(ValueError, match="return is not an argument"):
            call.arguments({"return": 1})
