"""The router on real engines: answers, options, who goes first, and what each end leaves behind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, aclosing
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from sollol_nb import hybrid_router
from sollol_nb.errors import (
    ConfigError,
    ModelFileError,
    ModelNotFoundError,
    OllamaResponseError,
    RequestTimeoutError,
    SollolError,
    WorkersUnavailableError,
)
from sollol_nb.hybrid_router import MODEL_PROFILES
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.workers import workers
from sollol_nb.llama_cpp.workers.probe import discover
from sollol_nb.llama_cpp.workers.workers import Workers
from sollol_nb.models.files import DEMO_MODEL_PATH
from sollol_nb.models.routing import DISTRIBUTED, OLLAMA
from sollol_nb.runtime.events import EventBus
from sollol_nb.runtime.io_loop import submit
from sollol_nb.sync_wrapper import HybridRouter, OllamaPool
from tests.support.engines import (
    QUESTION,
    busy_slots,
    eventually,
    eventually_async,
    read_and_do,
    run,
    suspended,
    unused_ports,
)
from tests.support.gguf_files import write_llama
from tests.support.ollama_server import CHATML, OllamaServer
from tests.support.own_folders import NO_OLLAMA

pytestmark = pytest.mark.engine

SHARDED, LOCAL = "llama.cpp-distributed", "llama.cpp-local"


@pytest.fixture(scope="module")
def one_slot(engine: Engine) -> Iterator[HybridRouter]:
    """A router whose coordinators serve one request at a time."""
    with HybridRouter(auto_discover_rpc=False, slots=1) as mine:
        yield mine


@pytest.fixture(scope="module")
def greedy(router: HybridRouter) -> str:
    """The demo model's greedy answer, which ends by itself."""
    answer = router.route_request("demo:sharded", QUESTION, temperature=0, max_tokens=500)
    assert answer.finish_reason == "stop"
    assert len(answer.text) > 40
    return answer.text


def last_row(router: HybridRouter, model: str) -> Any:
    return router.latency.frame(model=model, last=1).iloc[0]


def slots_idle(router: HybridRouter) -> None:
    """Wait until no slot of any coordinator works."""

    def busy() -> int:
        return sum(run(busy_slots(coordinator)) + coordinator.gate.running for coordinator in router.coordinators)

    eventually(lambda: busy() == 0, "all slots are idle")


# --- an answer --------------------------------------------------------------------------------


def test_an_answer_has_ollamas_shape_and_its_route(router: HybridRouter) -> None:
    answer = router.route_request("demo:sharded", QUESTION, temperature=0, max_tokens=30)
    coordinator = router.coordinator
    assert coordinator is not None
    assert coordinator.plan is not None

    assert answer["model"] == "demo:sharded"
    assert answer["done"] is True
    assert answer["message"]["role"] == "assistant"
    assert answer["message"]["content"] == answer.text != ""
    assert 0 < answer["eval_count"] <= 30
    assert answer["prompt_eval_count"] > 0
    for name in ("total_duration", "eval_duration", "prompt_eval_duration"):
        assert isinstance(answer[name], int)
        assert answer[name] > 0
    assert answer["total_duration"] >= answer["eval_duration"]
    routing = answer["_routing"]
    assert routing["backend"] == SHARDED
    assert routing["coordinator_url"] == coordinator.base_url
    assert routing["duration_ms"] > 0
    assert routing["plan"] == coordinator.plan.as_dict()
    assert routing["placement_differences"] == []
    assert routing["layout"] == "/".join(map(str, coordinator.plan.unit_counts))
    assert "MODEL_PROFILES" in routing["reason"]
    json.dumps(answer)


@pytest.mark.parametrize("question", [QUESTION, "Tell me everything about sharding.", "zzz 123 \N{SNOWMAN}"])
def test_the_sharded_greedy_answer_is_the_local_one(router: HybridRouter, question: str) -> None:
    sharded = router.route_request("demo:sharded", question, temperature=0, max_tokens=120)
    local = router.route_request("demo", question, temperature=0, max_tokens=120)
    assert (sharded.routing["backend"], local.routing["backend"]) == (SHARDED, LOCAL)
    assert (sharded.text, sharded["eval_count"]) == (local.text, local["eval_count"])
    assert local.routing["plan"] is None
    assert local.routing["coordinator_url"] != sharded.routing["coordinator_url"]


def test_streamed_chunks_join_to_the_whole_answer(router: HybridRouter, greedy: str) -> None:
    *chunks, last = router.stream("demo:sharded", QUESTION, temperature=0, max_tokens=500)
    assert len(chunks) > 10
    assert all(chunk["done"] is False for chunk in chunks)
    assert ["_routing" in chunk for chunk in chunks].count(True) == 1
    assert chunks[0]["_routing"]["backend"] == SHARDED, "an answer that is cut short says where it ran"
    assert "".join(chunk["message"]["content"] for chunk in [*chunks, last]) == greedy
    assert last["done"] is True
    assert last["_routing"]["backend"] == SHARDED
    assert last["done_reason"] == "stop"


def test_a_string_is_one_user_message(router: HybridRouter, greedy: str) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    assert router.route_request("demo:sharded", messages, temperature=0, max_tokens=500).text == greedy


# --- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"max_tokens": 7}, {"num_predict": 7}, {"options": {"num_predict": 7}}])
def test_max_tokens_cuts_the_answer_and_says_so(
    router: HybridRouter, greedy: str, options: dict[str, Any]
) -> None:
    answer = router.route_request("demo:sharded", QUESTION, temperature=0, **options)
    assert (answer["done_reason"], answer["eval_count"]) == ("length", 7)
    assert greedy.startswith(answer.text)


@pytest.mark.parametrize("as_list", [False, True])
def test_the_answer_ends_before_a_stop_text(router: HybridRouter, greedy: str, as_list: bool) -> None:
    stop = greedy.split()[5]
    answer = router.route_request(
        "demo:sharded", QUESTION, temperature=0, max_tokens=500, stop=[stop] if as_list else stop
    )
    assert answer.text == greedy[: greedy.index(stop)]
    assert answer["done_reason"] == "stop"


def test_the_same_seed_gives_the_same_answer_and_others_another(router: HybridRouter) -> None:
    anything_goes: dict[str, Any] = {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    texts = [
        router.route_request("demo:sharded", QUESTION, max_tokens=40, seed=seed, **anything_goes).text
        for seed in (1, 1, 2, 3)
    ]
    assert texts[0] == texts[1]
    assert len(set(texts)) > 1


def test_an_answer_matches_its_json_schema(router: HybridRouter) -> None:
    schema = {
        "type": "object",
        "properties": {"answer": {"enum": ["left", "right"]}, "sure": {"type": "boolean"}},
        "required": ["answer", "sure"],
        "additionalProperties": False,
    }
    answer = router.route_request("demo:sharded", QUESTION, temperature=0, max_tokens=300, format=schema)
    value = json.loads(answer.text)
    assert value.keys() == {"answer", "sure"}
    assert value["answer"] in ("left", "right")
    assert isinstance(value["sure"], bool)


# --- where it goes ----------------------------------------------------------------------------


def test_the_users_profile_table_is_read_at_each_decision(
    router: HybridRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert router.route("demo").backend == LOCAL
    assert router.should_use_distributed("demo") is False

    monkeypatch.setitem(MODEL_PROFILES, "demo", {**MODEL_PROFILES["demo"], "requires_distributed": True})

    assert router.route("demo").backend == SHARDED
    assert router.should_use_distributed("demo") is True
    assert router.route_request("demo", QUESTION, max_tokens=1).routing["backend"] == SHARDED


@pytest.mark.parametrize(
    ("model", "asked", "backend"),
    [("demo", "sharded", SHARDED), ("demo:sharded", "local", LOCAL), ("demo:sharded", "auto", SHARDED)],
)
def test_a_requested_backend_is_used(router: HybridRouter, model: str, asked: str, backend: str) -> None:
    route = router.route(model, backend=asked)
    assert route.backend == backend
    assert route.reason.startswith("chosen with" if asked != "auto" else "listed in MODEL_PROFILES")
    answer = router.route_request(model, QUESTION, backend=asked, max_tokens=2)
    assert (answer["model"], answer.routing["backend"]) == (model, backend)
    *_, last = router.stream(model, QUESTION, backend=backend, max_tokens=2)
    assert last["_routing"]["backend"] == backend


@pytest.mark.ollama
def test_a_model_that_ollama_has_runs_on_any_backend(
    ollama: OllamaServer, monkeypatch: pytest.MonkeyPatch, router: HybridRouter
) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(ollama.models_folder))
    pool = OllamaPool([f"127.0.0.1:{ollama.port}"])
    with HybridRouter(pool, auto_discover_rpc=False) as mine:
        for asked, model, backend in [
            ("ollama", "llama3.1:70b", OLLAMA),
            ("local", "llama3.2", LOCAL),
            ("sharded", "llama3.2", SHARDED),
        ]:
            assert mine.route(model, backend=asked).backend == backend
        answer = mine.route_request("llama3.1:70b", QUESTION, backend="ollama", max_tokens=2)
        assert answer.routing["backend"] == OLLAMA
        assert answer.routing["reason"] == "chosen with backend=ollama; an Ollama node has it"
        with pytest.raises(ModelNotFoundError, match="Ollama cannot run nosuch: no Ollama"):
            mine.route("nosuch", backend="ollama")


@pytest.mark.ollama
def test_a_stream_from_ollama_that_is_left_early_says_where_it_ran_and_frees_its_slot(
    ollama: OllamaServer,
) -> None:
    pool = OllamaPool([ollama.base_url])
    with HybridRouter(pool, auto_discover_rpc=False) as mine:

        async def first_chunk() -> dict[str, Any]:
            async with aclosing(mine.stream_async("llama3.2", "Tell me a long story.")) as chunks:
                return await anext(chunks)

        first = run(first_chunk())
        assert pool.nodes[0].running == 0
        assert (first["_routing"]["backend"], first["_routing"]["node_url"]) == (OLLAMA, ollama.base_url)
        row = last_row(mine, "llama3.2")
        assert (row.status, row.place) == ("cancelled", ollama.base_url)


@pytest.mark.ollama
def test_a_model_is_kept_for_ever_by_ollama_too(ollama: OllamaServer) -> None:
    with HybridRouter(OllamaPool([ollama.base_url]), auto_discover_rpc=False) as mine:
        mine.route_request("llama3.2", QUESTION, max_tokens=1, keep_alive="forever")
        digests = {model["name"]: model["digest"] for model in ollama.ask("/api/tags")["models"]}
        # Other tests may have left other models there.
        (loaded,) = (
            model for model in ollama.ask("/api/ps")["models"] if model["digest"] == digests["llama3.2:latest"]
        )
        assert int(loaded["expires_at"][:4]) > 2200
        mine.route_request("llama3.2", QUESTION, max_tokens=1, keep_alive="5m")


@pytest.mark.parametrize(
    ("settings", "model", "sharded"),
    [
        ({}, "llama3.2", False),
        ({}, "llama3.1:8b", False),
        ({}, "llama3.1:70b", True),
        ({}, "mixtral:8x7b", True),
        ({}, "qwen3:235b", True),
        ({}, "nothing-known", False),
        ({"distributed_threshold_params": 10}, "codellama:13b", True),
        ({"distributed_threshold_params": 20}, "codellama:13b", False),
        ({"distributed_threshold_params": 300}, "qwen3:235b", False),
        ({"enable_distributed": False}, "llama3.1:70b", False),
        ({"model_filter": ["llama3.1:70b"]}, "llama3.1:70b", True),
        ({"model_filter": ["llama3.1:70b"]}, "mixtral:8x7b", False),
        ({"model_filter": "mixtral:8x7b"}, "mixtral:8x7b", True),
    ],
)
def test_profile_threshold_and_filter_decide_what_is_sharded(
    settings: dict[str, Any], model: str, sharded: bool
) -> None:
    assert HybridRouter(auto_discover_rpc=False, **settings).should_use_distributed(model) is sharded


@pytest.mark.parametrize(
    ("model", "settings", "backend"),
    [
        ("llama3.1:70b", {"gguf_path": DEMO_MODEL_PATH}, SHARDED),
        ("llama3.2", {"gguf_path": str(DEMO_MODEL_PATH)}, LOCAL),
        (str(DEMO_MODEL_PATH), {}, LOCAL),
        (str(DEMO_MODEL_PATH), {"gguf_path": "/no/such/file.gguf"}, LOCAL),
        (str(DEMO_MODEL_PATH), {"distributed_threshold_params": 1e-4}, SHARDED),
    ],
)
def test_a_model_file_is_named_by_gguf_path_or_as_the_model(
    engine: Engine, model: str, settings: dict[str, Any], backend: str
) -> None:
    route = HybridRouter(auto_discover_rpc=False, **settings).route(model)
    assert (route.backend, route.model_path) == (backend, DEMO_MODEL_PATH)


def test_a_model_file_named_as_the_model_answers(one_slot: HybridRouter, router: HybridRouter) -> None:
    named = one_slot.route_request(str(DEMO_MODEL_PATH), QUESTION, temperature=0, max_tokens=30)
    assert named.text == router.route_request("demo", QUESTION, temperature=0, max_tokens=30).text
    assert named.routing["backend"] == LOCAL


def test_workers_of_others_are_found_and_used_and_left_running(
    engine: Engine, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = Workers([], EventBus())
    try:
        endpoints = run(others.local.start(engine, 2))
        ports = [int(endpoint.rpartition(":")[2]) for endpoint in endpoints]
        monkeypatch.setattr(workers, "discover", partial(discover, ports=ports))
        with HybridRouter() as mine:
            answer = mine.route_request("demo:sharded", QUESTION, max_tokens=1)
            assert [shard["endpoint"] for shard in answer.routing["plan"]["shards"]] == endpoints
            assert mine.discover_workers() == []
        free = ["free"] * 2
        eventually(lambda: [worker.state for worker in run(others.refresh())] == free, "they are free again")
    finally:
        run(others.local.stop())


# --- bad input --------------------------------------------------------------------------------

HELLO = [{"role": "user", "content": "Hello!"}]


@pytest.mark.parametrize(
    ("model", "messages", "options", "kind", "message"),
    [
        ("demo", [], {}, ConfigError, "messages must be a list such as"),
        ("demo", 7, {}, ConfigError, "messages must be a list such as"),
        ("demo", ["Hello!"], {}, ConfigError, 'messages[0] must be a dict with "role" and "content", not str'),
        ("demo", [{"content": "Hello!"}], {}, ConfigError, 'messages[0] must be a dict with "role"'),
        ("demo", [*HELLO, {"role": "robot", "content": "x"}], {}, ConfigError, "messages[1] has role 'robot'"),
        ("demo", [{"role": "user"}], {}, ConfigError, 'messages[0] needs "content" as text'),
        ("demo", [{"role": "user", "content": None}], {}, ConfigError, 'messages[0] needs "content" as text'),
        ("demo", HELLO, {"temprature": 1}, ConfigError, "unknown option 'temprature'; did you mean temperature?"),
        (
            "demo",
            HELLO,
            {"max_tokens": "many"},
            ConfigError,
            "option max_tokens='many' must be a whole number from 1 to 2147483647",
        ),
        (
            "demo",
            HELLO,
            {"temperature": True},
            ConfigError,
            "option temperature=True must be a number of 0 or more",
        ),
        ("demo", HELLO, {"stream": True}, ConfigError, "iterate over router.stream(...)"),
        ("demo", HELLO, {"format": "xml"}, ConfigError, "format='xml' must be \"json\" or a JSON schema"),
        ("demo", HELLO, {"priority": 11}, ConfigError, "priority=11 must be a number from 1 (BATCH) to 10"),
        ("demo", HELLO, {"priority": 0}, ConfigError, "priority=0 must be a number from 1 (BATCH) to 10"),
        ("demo", HELLO, {"priority": "high"}, ConfigError, "priority='high' must be a number from 1"),
        ("demo", HELLO, {"timeout": 0}, ConfigError, "timeout=0 must be more than 0 seconds"),
        ("demo", HELLO, {"timeout": "long"}, ConfigError, "timeout='long' must be"),
        ("demo", HELLO, {"timeout": float("nan")}, ConfigError, "timeout=nan must be"),
        ("demo", HELLO, {"backend": "olama"}, ConfigError, "backend='olama' is unknown; did you mean 'ollama'?"),
        (
            "demo",
            HELLO,
            {"backend": "ollama"},
            ModelNotFoundError,
            "Ollama cannot run demo: no",
        ),
        ("demo", HELLO, {"schema": 7}, ConfigError, "a schema is a pydantic model class, a dataclass"),
        ("demo", HELLO, {"schema": {}}, ConfigError, "a dict with the keys (none) is not a JSON schema"),
        ("demo", HELLO, {"schema": int, "format": "json"}, ConfigError, "give either schema or format, not both"),
        ("nosuch", HELLO, {"keep_alive": "soon"}, ConfigError, "keep_alive='soon' is not a time"),
        ("nosuch", HELLO, {"format": "xml"}, ConfigError, "format='xml' must be"),
        ("", HELLO, {}, ConfigError, "model='' is not a model name; try demo"),
        (None, HELLO, {}, ConfigError, "model=None is not a model name; try demo"),
        ("nosuch", HELLO, {}, ModelNotFoundError, "nosuch is not available: no Ollama node is running"),
        (
            "llama3.1:70b",
            HELLO,
            {},
            ModelNotFoundError,
            "Run `ollama pull llama3.1:70b` here, or use the path of a .gguf file",
        ),
        ("/no/such.gguf", HELLO, {}, ModelFileError, "/no/such.gguf does not exist; give the path of a GGUF file"),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_do(
    router: HybridRouter, model: Any, messages: Any, options: dict[str, Any], kind: type[SollolError], message: str
) -> None:
    with pytest.raises(SollolError) as caught:
        router.route_request(model, messages, **options)
    assert type(caught.value) is kind
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_rpc_backends": 0}, "num_rpc_backends=0 must be more than 0"),
        ({"coordinator_timeout": -1}, "coordinator_timeout=-1 must be more than 0"),
        ({"slots": 0}, "slots=0 must be more than 0"),
        ({"slots": 2.5}, "slots=2.5 must be a whole number"),
        ({"timeout": "long"}, "timeout='long' must be more than 0"),
        ({"timeout": 0}, "timeout=0 must be more than 0"),
        ({"layer_strategy": "evn"}, "there is no strategy 'evn'; did you mean 'even'?"),
        ({"rpc_backends": ["here:now"]}, "'here:now' is not an endpoint"),
        ({"rpc_backends": [{"port": 50052}]}, "is not an RPC backend; write"),
        ({"rpc_backends": [{"host": "10.1.2.3", "port": 0}]}, "'10.1.2.3:0' is not an endpoint"),
    ],
)
def test_an_unusable_setting_is_refused_by_the_constructor(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        HybridRouter(**settings)
    assert message in str(caught.value)


def test_workers_can_be_named_as_text_as_dicts_and_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    named = HybridRouter(rpc_backends=["10.1.2.3", {"host": "10.1.2.4"}, {"host": "10.1.2.5", "port": 50055}])
    assert named.get_stats()["known_rpc_backends"] == 3
    monkeypatch.setenv("RPC_BACKENDS", "10.1.2.3:50052, 10.1.2.4:50053")
    assert HybridRouter().get_stats()["known_rpc_backends"] == 2
    assert HybridRouter(rpc_backends=[]).get_stats()["known_rpc_backends"] == 0


# --- limits and cancelling --------------------------------------------------------------------


def test_a_request_over_its_time_is_cancelled_on_the_engine(
    one_slot: HybridRouter, endless: str, patient: None
) -> None:
    engine = engine_of(one_slot, endless)
    stream = one_slot.stream_async(endless, "Go on", temperature=0, timeout=10)  # its first token comes within it
    try:
        with pytest.raises(RequestTimeoutError) as caught:
            read_and_do(stream, 0, lambda _: engine.suspend())  # however quick it is, the answer does not end
    finally:
        engine.resume()

    assert isinstance(caught.value, TimeoutError)
    assert "endless did not finish within 10 s and was cancelled after " in str(caught.value)
    assert "give a larger timeout or a smaller max_tokens" in str(caught.value)
    slots_idle(one_slot)
    row = last_row(one_slot, endless)
    assert (row.status, row.error) == ("timeout", str(caught.value))
    assert 0 < row.ttft_ms <= row.total_ms


def test_waiting_for_a_slot_counts_against_the_time(one_slot: HybridRouter, endless: str, patient: None) -> None:
    engine, gate = engine_of(one_slot, endless), gate_of(one_slot, endless)
    holder = one_slot.stream(endless, "Go on", temperature=0)
    next(holder)
    with suspended(engine):
        assert gate.running == 1, "the holder has the slot"
        with pytest.raises(RequestTimeoutError, match="cancelled after 0 characters"):
            one_slot.route_request(endless, "Go on", timeout=0.3)
    assert next(holder)["done"] is False, "the request that has the slot continues"
    holder.close()
    slots_idle(one_slot)


def test_leaving_a_stream_early_frees_the_slot(one_slot: HybridRouter, endless: str) -> None:
    for position, _ in enumerate(one_slot.stream(endless, "Go on", temperature=0)):
        if position == 5:
            break
    slots_idle(one_slot)
    row = last_row(one_slot, endless)
    assert (row.status, row.error) == ("cancelled", "")
    assert 0 < row.ttft_ms <= row.total_ms


@pytest.mark.parametrize("phase", ["at the engine", "waiting for a slot"])
def test_cancelling_a_task_frees_the_slot(one_slot: HybridRouter, endless: str, phase: str, patient: None) -> None:
    engine, gate = engine_of(one_slot, endless), gate_of(one_slot, endless)

    async def cancelled() -> None:
        ask = partial(one_slot._async.route_request, endless, "Go on", temperature=0)
        holder = asyncio.create_task(ask())
        await eventually_async(lambda: gate.running == 1, "it has the slot")
        tasks = [holder]
        if phase == "waiting for a slot":
            tasks.insert(0, asyncio.create_task(ask()))
            await eventually_async(lambda: gate.waiting == 1, "the other waits")
        for task in tasks:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    with suspended(engine):  # however quick it is, no answer ends before it is cancelled
        asyncio.run(cancelled())
    slots_idle(one_slot)
    assert last_row(one_slot, endless).status == "cancelled"


def engine_of(router: HybridRouter, model: str) -> psutil.Process:
    """The engine of a model, which is started if none runs."""
    router.route_request(model, "Go on", max_tokens=1)
    return next(psutil.Process(found.pid) for found in router.coordinators if found.model == Path(model).stem)


def gate_of(router: HybridRouter, model: str) -> Any:
    return next((found.gate for found in router.coordinators if found.model == Path(model).stem), None)


# --- many at once -----------------------------------------------------------------------------


def test_waiting_requests_are_served_in_order_of_priority(
    one_slot: HybridRouter, endless: str, patient: None
) -> None:
    engine = engine_of(one_slot, endless)

    async def ask_all() -> list[int]:
        router = one_slot._async
        holder = router.stream(endless, "Go on", temperature=0)
        await anext(holder)
        gate = gate_of(one_slot, endless)
        served: list[int] = []

        async def ask(priority: int) -> None:
            async for _ in router.stream(endless, "Go on", max_tokens=2, priority=priority):
                if not served or served[-1] != priority:
                    served.append(priority)

        asking = []
        with suspended(engine):  # however quick it is, the holder has the slot until all wait
            for priority in (3, 8, 1, 10, 5):
                asking.append(asyncio.create_task(ask(priority)))
                await eventually_async(lambda: gate.waiting == len(asking), "the request waits")
        await holder.aclose()
        await asyncio.gather(*asking)
        return served

    assert asyncio.run(ask_all()) == [10, 8, 5, 3, 1]


def test_forty_requests_at_the_same_time_are_all_answered(router: HybridRouter) -> None:
    router.route_request("demo:sharded", QUESTION, max_tokens=1)
    counted = router.get_stats()["distributed_requests"]
    gate = gate_of(router, "demo:sharded")

    async def all_slots() -> AsyncExitStack:
        slots = AsyncExitStack()
        for _ in range(gate.slots):
            await slots.enter_async_context(gate.slot())
        return slots

    held = run(all_slots())

    async def ask_all() -> list[Any]:
        ask = router._async.route_request
        try:
            asking = asyncio.gather(
                *(ask("demo:sharded", f"{QUESTION} {number}", max_tokens=8) for number in range(40))
            )
            await eventually_async(lambda: gate.waiting == 40, "all wait, however quick the engine is")
        finally:
            submit(held.aclose())
        return await asking

    answers = asyncio.run(ask_all())

    assert all(answer["done"] and 0 < answer["eval_count"] <= 8 for answer in answers)
    assert router.get_stats()["distributed_requests"] == counted + 40
    rows = router.latency.frame(model="demo:sharded", last=40)
    assert set(rows.status) == {"ok"}
    assert (rows.queue_ms > 0).all(), "they waited"
    slots_idle(router)


# --- what is written down ---------------------------------------------------------------------


def test_an_answered_request_leaves_a_row_of_its_timings(router: HybridRouter) -> None:
    router.route_request("demo:sharded", QUESTION, max_tokens=1)
    answer = router.route_request("demo:sharded", QUESTION, max_tokens=20)
    row = last_row(router, "demo:sharded")

    assert (row.model, row.backend, row.status, row.error) == ("demo:sharded", SHARDED, "ok", "")
    assert row.layout == answer.routing["layout"]
    assert row.place == answer.routing["coordinator_url"]
    assert row.completion_tokens == answer["eval_count"]
    assert row.prompt_tokens == answer["prompt_eval_count"]
    assert row.load_ms != row.load_ms, "it was running: no load"
    assert 0 <= row.queue_ms <= row.ttft_ms <= row.total_ms
    assert 0 <= row.router_overhead_ms <= row.ttft_ms
    assert row.tokens_per_s > 0
    assert row.failovers == 0


def test_a_request_that_waits_for_a_start_has_the_load_in_its_time_to_first_token(router: HybridRouter) -> None:
    router.stop_coordinator("demo:sharded")
    answer = router.route_request("demo:sharded", QUESTION, max_tokens=2)
    row = last_row(router, "demo:sharded")
    assert 0 < row.load_ms <= row.ttft_ms <= row.total_ms
    assert row.router_overhead_ms <= row.ttft_ms - row.load_ms
    assert answer["load_duration"] == pytest.approx(row.load_ms * 1e6, rel=0.01)


def test_a_failed_request_leaves_a_row_with_its_error(router: HybridRouter) -> None:
    failed = router.get_stats()["failed_requests"]
    with pytest.raises(ModelNotFoundError) as caught:
        router.route_request("nosuch", QUESTION)
    row = last_row(router, "nosuch")
    assert (row.status, row.error, row.backend, row.place) == ("error", str(caught.value), "", "")
    assert row.ttft_ms != row.ttft_ms
    assert row.total_ms > 0
    assert router.get_stats()["failed_requests"] == failed + 1


def test_events_report_the_life_of_requests_workers_and_coordinators(engine: Engine, alone: None) -> None:
    seen: list[Any] = []
    # A start has its events again where another process takes its port.
    with HybridRouter(
        auto_setup_rpc=True, auto_discover_rpc=False, num_rpc_backends=1, coordinator_port=unused_ports(1)
    ) as mine:
        unsubscribe = mine.events.subscribe(seen.append)
        mine.route_request("demo:sharded", QUESTION, max_tokens=1)
        with pytest.raises(ModelNotFoundError):
            mine.route_request("nosuch", QUESTION)
        (endpoint,) = (worker.endpoint for worker in mine.cluster().workers)
    unsubscribe()
    steps_between = ("probe.done", "coordinator.loading")
    assert [(event.kind, event.subject) for event in seen if event.kind not in steps_between] == [
        ("request.started", "demo:sharded"),
        ("worker.started", endpoint),
        ("coordinator.starting", "demo:sharded"),
        ("coordinator.ready", "demo:sharded"),
        ("request.finished", "demo:sharded"),
        ("request.started", "nosuch"),
        ("node.absent", f"http://{NO_OLLAMA}"),
        ("request.finished", "nosuch"),
        ("coordinator.stopped", "demo:sharded"),
        ("worker.stopped", endpoint),
    ]
    assert [event.data["status"] for event in seen if event.kind == "request.finished"] == ["ok", "error"]


def test_the_statistics_count_requests_and_show_what_runs(engine: Engine, alone: None) -> None:
    # Over workers that no other test uses: one that others have stopped twice would be avoided for a while.
    with HybridRouter(
        auto_setup_rpc=True, auto_discover_rpc=False, num_rpc_backends=3, context_tokens=1920, rpc_port=51152
    ) as mine:
        before = mine.get_stats()
        mine.route_request("demo:sharded", QUESTION, max_tokens=1)
        mine.route_request("demo", QUESTION, max_tokens=1)
        stats = mine.get_stats()
        model = mine.coordinator_model
    assert stats.keys() == {
        "distributed_requests",
        "ollama_requests",
        "local_requests",
        "failed_requests",
        "coordinator_uptime_seconds",
        "active_rpc_backends",
        "known_rpc_backends",
        "coordinators",
    }
    assert stats["distributed_requests"] == before["distributed_requests"] + 1
    assert stats["local_requests"] == before["local_requests"] + 1
    assert stats["coordinator_uptime_seconds"] > 0
    assert (stats["active_rpc_backends"], stats["known_rpc_backends"]) == (3, 3)
    assert stats["coordinators"].keys() >= {"demo", "demo:sharded"}
    assert model == "demo:sharded"


def test_the_async_router_can_be_used_from_several_event_loops_in_turn(router: HybridRouter) -> None:
    async def ask() -> str:
        answer = await router._async.route_request("demo:sharded", QUESTION, temperature=0, max_tokens=20)
        return answer.text

    assert len({asyncio.run(ask()) for _ in range(3)}) == 1


def test_a_router_may_be_closed_twice_and_without_having_been_used(engine: Engine, tmp_path: Path) -> None:
    async def life() -> None:
        async with hybrid_router.HybridRouter(auto_discover_rpc=False) as mine:
            await mine.route_request("demo", QUESTION, max_tokens=1)
            assert len(mine.coordinators) == 1
        await mine.close()
        assert mine.coordinators == []

    asyncio.run(life())


@pytest.mark.ollama
@pytest.mark.parametrize("workers", [0, 2])
def test_a_small_model_that_ollama_has_no_memory_for_is_sharded(
    start_ollamas: Callable[..., OllamaServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Ollama itself says so: a context of 2^30 tokens takes more memory than any machine of ours has."""
    server = start_ollamas()
    hungry = write_llama(tmp_path / "hungry.gguf", context=2**30)
    server.create("hungry:1b", hungry, CHATML, f"PARAMETER num_ctx {2**30}")
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{server.port}")
    monkeypatch.setenv("OLLAMA_MODELS", str(server.models_folder))
    with HybridRouter(auto_discover_rpc=False, context_tokens=512) as mine:
        assert mine.route("hungry:1b").backend == OLLAMA
        if workers:
            mine.start_workers(workers)
            answer = mine.route_request("hungry:1b", "Hello!", max_tokens=4)
            assert answer.routing["backend"] == DISTRIBUTED
            assert "Ollama has too little memory for it, so it is sharded" in answer.routing["reason"]
            assert "memory" in answer.routing["failovers"][0]["what"]
            assert mine.latency.frame(last=1).failovers[0] == 1
        else:
            with pytest.raises(WorkersUnavailableError, match=r"memory.*needs RPC workers, but none is known"):
                mine.route_request("hungry:1b", "Hello!", max_tokens=4)
    with (
        HybridRouter(auto_discover_rpc=False, enable_distributed=False) as not_sharding,
        pytest.raises(OllamaResponseError, match="memory"),
    ):
        not_sharding.route_request("hungry:1b", "Hello!", max_tokens=4)


def test_an_answer_has_the_name_that_was_requested(router: HybridRouter) -> None:
    by_name = router.route_request("demo", QUESTION, max_tokens=2)
    by_path = router.route_request(str(DEMO_MODEL_PATH), QUESTION, max_tokens=2)
    assert by_path.routing["coordinator_url"] == by_name.routing["coordinator_url"]
    assert (by_name["model"], by_path["model"]) == ("demo", str(DEMO_MODEL_PATH))


def test_a_worker_that_a_coordinator_holds_cannot_be_removed(alone: None) -> None:
    with HybridRouter(auto_discover_rpc=False, rpc_port=52052) as mine:
        (worker,) = mine.start_workers(1)
        mine.route_request("demo:sharded", QUESTION, max_tokens=2)
        with pytest.raises(
            ConfigError,
            match="held by the coordinator of demo:sharded, started by this kernel; stop that coordinator first",
        ):
            mine.remove_worker(worker)
        mine.stop_coordinator()
        mine.remove_worker(worker)
        assert mine.cluster().workers == ()
        with pytest.raises(ConfigError, match="is not a known worker"):
            mine.remove_worker(worker)
