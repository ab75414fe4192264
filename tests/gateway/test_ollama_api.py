"""Ollama's official client on the gateway, for models on llama.cpp and in Ollama."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import ollama as ollama_client
import pytest

from sollol_nb.gateway.keys import Key, Keys, add_key
from tests.support.engines import ENDLESS_CONTEXT_TOKENS, HANG_GUARD_S, QUESTION, eventually, run, suspended
from tests.support.gateway import GatewayProcess, engine_at, gateway_without_engines, own_gateway, running_gateway
from tests.support.gguf_files import write_llama
from tests.support.ollama_server import OllamaServer
from tests.support.scripted_model import CHATML, write_scripted
from tests.support.tool_model import TEMPLATE

MESSAGES = [{"role": "user", "content": QUESTION}]
GREEDY = {"temperature": 0, "seed": 1}
SPECIALS = ("<|im_start|>", "<|im_end|>")
CLOCK = {
    "type": "function",
    "function": {
        "name": "clock",
        "description": "The time.",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}, "required": ["zone"]},
    },
}
SCHEMA = {"type": "object", "properties": {"right": {"type": "boolean"}}, "required": ["right"]}


@pytest.fixture(scope="module")
def client(gateway: GatewayProcess) -> ollama_client.Client:
    return ollama_client.Client(gateway.url)


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that calls a tool, and writes text after it."""
    script = ["I look. ", "<tool_call>\n", '{"name": "clock", "arguments": {"zone": "UTC"}}', "\n</tool_call>"]
    folder = tmp_path_factory.mktemp("models")
    return str(write_scripted(folder / "caller.gguf", script, template=TEMPLATE, specials=SPECIALS))


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model that thinks before it answers."""
    template = CHATML + "{% if enable_thinking %}<think>{% endif %}"
    script = [" Let me see.", "</think>", " It is noon."]
    folder = tmp_path_factory.mktemp("models")
    return str(write_scripted(folder / "thinker.gguf", script, template=template, specials=SPECIALS))


@pytest.fixture(scope="module")
def with_node(ollama: OllamaServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """A gateway with an Ollama node, and engines that no other test uses."""
    variables = {"OLLAMA_HOST": ollama.base_url, "SOLLOL_STATE_DIR": str(tmp_path_factory.mktemp("state"))}
    with running_gateway(variables=variables) as running:
        yield running


# --- answers of models on llama.cpp ---------------------------------------------------------------


@pytest.mark.engine
def test_a_streamed_chat_equals_the_whole_answer(client: ollama_client.Client) -> None:
    whole = client.chat("demo", MESSAGES, options=GREEDY)
    parts = [*client.chat("demo", MESSAGES, options=GREEDY, stream=True)]
    assert whole.message.content == "".join(part.message.content or "" for part in parts)
    assert "memory" in (whole.message.content or "")
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    for last in (whole, parts[-1]):
        assert (last.model, last.done_reason, last.done) == ("demo", "stop", True)
        counts = (last.eval_count, last.prompt_eval_count, last.total_duration, last.eval_duration)
        assert all(isinstance(count, int) and count > 5 for count in counts)
    assert not any(name.startswith("_") for name in whole.model_dump())


@pytest.mark.engine
def test_the_async_client_streams_and_generates(gateway: GatewayProcess) -> None:
    async def ask() -> tuple[str, str]:
        client = ollama_client.AsyncClient(gateway.url)
        texts = [part.message.content async for part in await client.chat("demo", MESSAGES, stream=True)]
        generated = await client.generate("demo", QUESTION, options=GREEDY)
        return "".join(text or "" for text in texts), str(generated.response)

    streamed, generated = asyncio.run(ask())
    assert len(streamed) > 20
    assert "memory" in generated


@pytest.mark.engine
def test_generate_is_a_chat_with_one_question(client: ollama_client.Client) -> None:
    chat = client.chat("demo", MESSAGES, options=GREEDY)
    parts = [*client.generate("demo", QUESTION, options=GREEDY, stream=True)]
    assert "".join(part.response or "" for part in parts) == chat.message.content
    assert parts[-1].eval_count == chat.eval_count


@pytest.mark.engine
def test_a_raw_prompt_is_continued_as_it_is(client: ollama_client.Client) -> None:
    chat = client.chat("demo", MESSAGES, options=GREEDY)
    prompt = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    parts = [*client.generate("demo", prompt, raw=True, options=GREEDY, stream=True)]
    assert "".join(part.response or "" for part in parts) == chat.message.content
    assert parts[-1].prompt_eval_count == chat.prompt_eval_count


@pytest.mark.engine
def test_the_probabilities_of_tokens_come_with_them(client: ollama_client.Client) -> None:
    short = {**GREEDY, "num_predict": 5}
    chat = client.chat("demo", MESSAGES, options=short, logprobs=True, top_logprobs=2)
    tokens = list(chat.logprobs or ())
    assert "".join(token.token for token in tokens) == chat.message.content
    assert all(token.logprob <= 0 and len(token.top_logprobs or ()) == 2 for token in tokens)
    generated = client.generate("demo", QUESTION, options=short, logprobs=True)
    assert [token.token for token in generated.logprobs or ()] == [token.token for token in tokens]


@pytest.mark.engine
@pytest.mark.parametrize("wanted", [SCHEMA, "json"])
def test_a_format_holds_the_answer(client: ollama_client.Client, wanted: Any) -> None:
    limit = {**GREEDY, "num_predict": 60}
    text = client.chat("demo", MESSAGES, format=wanted, options=limit).message.content or ""
    assert text.startswith("{")
    if wanted is SCHEMA:
        assert isinstance(json.loads(text)["right"], bool)


@pytest.mark.engine
@pytest.mark.parametrize("stream", [True, False])
def test_tools_are_called_and_their_results_read(client: ollama_client.Client, caller: str, stream: bool) -> None:
    answer: Any = client.chat(caller, MESSAGES, tools=[CLOCK], stream=stream)
    parts = [*answer] if stream else [answer]
    (call,) = [call for part in parts for call in part.message.tool_calls or ()]
    assert (call.function.name, call.function.arguments) == ("clock", {"zone": "UTC"})
    assert parts[-1].done_reason == "stop"
    if stream:  # the last line has nothing of the answer, as Ollama's
        assert (parts[-1].message.content, parts[-1].message.tool_calls) == ("", None)
    assert "".join(part.message.content or "" for part in parts).strip() == "I look."
    result = {"role": "tool", "content": "12:00", "tool_name": "clock"}
    spoken = parts[0].message if not stream else {"role": "assistant", "content": "", "tool_calls": [call]}
    after = client.chat(caller, [*MESSAGES, spoken, result], tools=[CLOCK], options={"num_predict": 3})
    before = client.chat(caller, MESSAGES, tools=[CLOCK], options={"num_predict": 3})
    assert (after.prompt_eval_count or 0) > (before.prompt_eval_count or 0) + len("12:00")  # a token each


@pytest.mark.engine
def test_thoughts_come_apart_from_the_answer(client: ollama_client.Client, thinker: str) -> None:
    chat = client.chat(thinker, MESSAGES, think=True)
    assert ((chat.message.thinking or "").strip(), (chat.message.content or "").strip()) == (
        "Let me see.",
        "It is noon.",
    )
    generated = client.generate(thinker, QUESTION, think=True)
    assert (generated.thinking, generated.response) == (chat.message.thinking, chat.message.content)


@pytest.mark.engine
def test_headers_name_the_backend_and_a_request_header_adds_the_routing(gateway: GatewayProcess) -> None:
    body = {"model": "demo", "messages": MESSAGES, "stream": False, "options": {"num_predict": 2}}
    with gateway.client() as http:
        plain = http.post("/api/chat", json=body)
        marked = http.post("/api/chat", json=body, headers={"X-Sollol-Routing": "1"})
    assert plain.headers["X-Sollol-Route"].startswith("llama.cpp-local http://127.0.0.1:")
    assert plain.headers["X-Sollol-Failovers"] == "0"
    assert "_routing" not in plain.json()
    assert marked.json()["_routing"]["backend"] == "llama.cpp-local"


@pytest.mark.engine
def test_turns_that_do_not_fit_are_dropped_only_on_request(gateway: GatewayProcess) -> None:
    turns = [{"role": role, "content": "a b c d " * 60} for role in ("user", "assistant") * 6]
    body = {"model": "demo", "messages": [*turns, *MESSAGES], "stream": False, "options": {"num_predict": 3}}
    with gateway.client(headers={"X-Sollol-Routing": "1"}) as http:
        kept = http.post("/api/chat", json=body)
        dropped = http.post("/api/chat", json={**body, "truncate": True})
    assert kept.status_code == 400
    assert "context of 2,048" in kept.json()["error"]
    assert "oldest" in dropped.json()["_dropped"]
    assert dropped.json()["message"]["content"]


@pytest.mark.engine
def test_a_client_that_disconnects_frees_its_slot(
    engine: object, alone: None, tmp_path: Path, endless: str
) -> None:
    body = {"model": endless, "prompt": "Begin.", "options": {"num_predict": -1, "temperature": 0}}
    # A large context, so that the answer does not fill it before the client disconnects.
    variables = {"SOLLOL_CONTEXT_TOKENS": str(ENDLESS_CONTEXT_TOKENS)}
    with own_gateway(tmp_path / "state", **variables) as gateway, gateway.client() as http:
        with http.stream("POST", "/api/generate", json=body) as response:
            lines = response.iter_lines()
            assert json.loads(next(lines))["response"]

        def has_ended() -> bool:
            metrics = http.get("/metrics").text.splitlines()
            durations = [line for line in metrics if "request_duration_seconds_count" in line]
            return any('model="endless"' in line and '"cancelled"' in line for line in durations)

        def running() -> list[int]:
            coordinators = http.get("/cluster").json()["coordinators"].values()
            return [each["running"] for each in coordinators if each["path"] == endless]

        eventually(has_ended, "the answer is cancelled")
        eventually(lambda: running() == [0], "its slot is free")


@pytest.mark.engine
def test_an_empty_prompt_loads_a_model_and_keep_alive_0_unloads_it(
    client: ollama_client.Client, thinker: str
) -> None:
    def loaded() -> dict[str | None, Any]:
        return {model.name: model for model in client.ps().models}

    assert client.generate(thinker, keep_alive="forever").done_reason == "load"
    model = loaded()["thinker"]
    assert model.details.format == "gguf"
    assert model.context_length == 4096
    assert model.expires_at > datetime(2100, 1, 1, tzinfo=UTC)
    assert client.chat(thinker, [], keep_alive=600).done_reason == "load"
    assert loaded()["thinker"].expires_at < datetime(2100, 1, 1, tzinfo=UTC)
    assert client.generate(thinker, keep_alive="99999999h").done_reason == "load"  # longer than there are dates
    assert loaded()["thinker"].expires_at > datetime(2100, 1, 1, tzinfo=UTC)
    assert client.generate(thinker, keep_alive=0).done_reason == "unload"
    assert "thinker" not in loaded()


@pytest.mark.engine
def test_a_model_is_shown_by_the_header_of_its_file(
    client: ollama_client.Client, thinker: str, caller: str
) -> None:
    demo: Any = client.show("demo")
    details = (demo.details.family, demo.details.parameter_size, demo.details.quantization_level)
    assert details == ("llama", "2.74M", "F16")
    assert demo.modelinfo["llama.context_length"] == 2048
    assert demo.modelinfo["general.basename"] == "demo"  # editors show it as the name
    assert demo.capabilities == ["completion"]
    assert "<|im_start|>" in (demo.template or "")
    assert client.show(caller).capabilities == ["completion", "tools"]
    assert client.show(thinker).capabilities == ["completion", "thinking"]


# Requests that llama.cpp cannot follow, the status, and a part of the message.
REFUSED: list[tuple[Callable[[ollama_client.Client], Any], int, str]] = [
    (lambda client: client.chat("nope", MESSAGES), 404, "model 'nope' not found"),
    (lambda client: [*client.chat("nope", MESSAGES, stream=True)], 404, "model 'nope' not found"),
    (lambda client: client.generate("nope", "hi"), 404, "model 'nope' not found"),
    (lambda client: client.show("nope"), 404, "model 'nope' not found"),
    (lambda client: client.chat("demo", MESSAGES, think=True), 400, "demo does not know think=True"),
    (lambda client: client.chat("demo", MESSAGES, tools=[CLOCK]), 400, "demo does not support tools"),
    (lambda client: client.generate("demo", "hi", images=[b"png"]), 400, "demo does not read images"),
    (lambda client: client.chat("demo", MESSAGES, options={"num_ctx": 9999}), 400, "num_ctx=9999 is more than"),
    (lambda client: client.chat("demo", MESSAGES, options={"mirostat": 2}), 400, "the option mirostat"),
    (lambda client: client.chat("demo", [{"role": "user", "content": "a b " * 9000}]), 400, "context of 2,048"),
    (lambda client: client.generate("demo", "a", suffix="b"), 400, "suffix"),
    (lambda client: client.embed("demo", "hi"), 400, "demo"),
    (lambda client: client.embeddings("nope", "hi"), 404, "model 'nope' not found"),
    (lambda client: client.create("mine", from_="demo"), 501, "/api/create is not supported"),
    (lambda client: client.copy("demo", "mine"), 501, "/api/copy is not supported"),
    (lambda client: client.delete("demo"), 501, "/api/delete is not supported"),
    (lambda client: client.push("demo"), 501, "/api/push is not supported"),
    (lambda client: client.pull("llama3.2"), 503, "no Ollama node is running"),
]


@pytest.mark.engine
@pytest.mark.parametrize(("ask", "status", "message"), REFUSED)
def test_what_cannot_be_done_is_refused_with_ollamas_error(
    client: ollama_client.Client, ask: Callable[[ollama_client.Client], Any], status: int, message: str
) -> None:
    with pytest.raises(ollama_client.ResponseError) as refused:
        ask(client)
    assert refused.value.status_code == status
    assert message in refused.value.error
    assert "\n" not in refused.value.error


@pytest.mark.engine
def test_an_error_within_a_stream_is_a_line(gateway: GatewayProcess, tmp_path: Path) -> None:
    """Two answers fill the context that they share, so llama-server ends both."""
    narrow = write_llama(tmp_path / "narrow.gguf", blocks=2, embedding=64, vocabulary=1000, context=512)
    body = {"model": str(narrow), "prompt": "Begin.", "options": {"num_predict": -1, "temperature": 0}}

    def asked_both(http: httpx.Client) -> bool:
        running = [line for line in http.get("/metrics").text.splitlines() if "sollol_requests_running{" in line]
        return any('model="narrow"' in line and line.endswith(" 2.0") for line in running)

    with gateway.client() as http, ThreadPoolExecutor(2) as pool:
        http.post("/api/generate", json={"model": str(narrow)}).raise_for_status()  # loads it
        coordinators = http.get("/cluster").json()["coordinators"]
        (url,) = (url for url, each in coordinators.items() if each["path"] == str(narrow))
        with suspended(engine_at(url)):  # so that both answers begin together
            asking = [pool.submit(http.post, "/api/generate", json=body) for _ in range(2)]
            eventually(lambda: asked_both(http), "both requests are with the engine")
        answers = [each.result() for each in asking]
    for answer in answers:
        assert answer.status_code == 200
        *lines, last = map(json.loads, answer.text.splitlines())
        assert [line["done"] for line in lines] == [False] * max(1, len(lines))
        assert "requests that ran at the same time filled" in last["error"]


# --- fields ---------------------------------------------------------------------------------------

WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("chat", {"model": None}, "model"),
    ("chat", {"messages": "hi"}, "messages"),
    ("chat", {"messages": ["hi"]}, "messages[0]"),
    ("chat", {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}, "messages[0]"),
    ("chat", {"messages": [{"role": "user", "images": ["http://127.0.0.1:9/secret.png"]}]}, "not base64"),
    ("chat", {"messages": [{"role": "user", "images": "aGVsbG8="}]}, "images"),
    ("chat", {"messages": [{"role": "judge", "content": "hi"}]}, "judge"),
    ("chat", {"stream": "yes"}, "stream"),
    ("chat", {"format": "xml"}, "xml"),
    ("chat", {"format": 7}, "format"),
    ("chat", {"keep_alive": "soon"}, "keep_alive"),
    ("chat", {"options": []}, "options"),
    ("chat", {"options": {"temprature": 1}}, "did you mean temperature?"),
    ("chat", {"options": {"top_p": 2}}, "top_p"),
    ("chat", {"temperature": 1}, "temperature is not supported: give it in options"),
    ("chat", {"num_ctx": 1}, "num_ctx is not supported: give it in options"),
    ("chat", {"max_tokens": 1}, "num_predict"),
    ("chat", {"think": "hard"}, "think"),
    ("chat", {"tools": {}}, "tools"),
    ("chat", {"tools": ["clock"]}, "tools[0]"),
    ("chat", {"shift": True}, "shift"),
    ("chat", {"truncate": 1}, "truncate"),
    ("chat", {"top_logprobs": 21}, "top_logprobs"),
    ("chat", {"priority": "soonest"}, "priority"),
    ("chat", {"_debug_render_only": True}, "_debug_render_only"),
    ("chat", {"steam": True}, "did you mean stream?"),
    ("generate", {"prompt": ["hi"]}, "prompt"),
    ("generate", {"prompt": "hi", "context": [1, 2]}, "context is not supported"),
    ("generate", {"prompt": "hi", "template": "{{ .Prompt }}"}, "template is not supported"),
    ("generate", {"prompt": "hi", "images": ["file:///etc/passwd"]}, "not base64"),
    ("generate", {"prompt": "hi", "steps": 3}, "steps"),
    ("generate", {"prompt": "hi", "raw": True, "system": "Be brief."}, "system cannot be used with raw"),
    ("generate", {"prompt": "hi", "suffix": "ho", "system": "Be brief."}, "system cannot be used with suffix"),
    ("generate", {"prompt": "hi", "raw": True, "suffix": "ho"}, "suffix cannot be used with raw"),
    ("generate", {"prompt": "hi", "raw": True, "think": True}, "think"),
    ("embed", {"input": [7]}, "input"),
    ("embed", {"input": {"text": "hi"}}, "input"),
    ("embed", {"input": "hi", "dimensions": -1}, "dimensions"),
    ("embeddings", {"prompt": ["hi"]}, "prompt"),
    ("show", {"model": 7}, "model"),
    ("show", {"options": {"seed": 1}}, "options"),
    ("pull", {"stream": 1}, "stream"),
]


def test_every_field_is_followed_or_refused_by_name() -> None:
    async def ask() -> None:
        async with gateway_without_engines() as http:
            for path, fields, message in WRONG:
                given: dict[str, Any] = {"model": "nowhere", **fields}
                if path == "chat":
                    given = {"messages": MESSAGES, **given}
                answer = await http.post(f"/api/{path}", json=given)
                assert (answer.status_code, [*answer.json()]) == (400, ["error"]), (fields, answer.text)
                assert message in answer.json()["error"], (fields, answer.text)

    run(ask())


def test_a_key_without_control_changes_no_models_and_names_no_files(tmp_path: Path) -> None:
    refused: list[tuple[str, dict[str, Any], str]] = [
        ("pull", {"model": "llama3.2"}, "may not pull models"),
        ("generate", {"model": "demo", "keep_alive": 0}, "may not unload models"),
        ("chat", {"model": "demo", "messages": [], "keep_alive": "0s"}, "may not unload models"),
        ("chat", {"model": "/root/secret.gguf", "messages": MESSAGES}, "may not name model files"),
        ("show", {"model": "/root/secret.gguf"}, "may not name model files"),
        ("embed", {"model": "/root/secret.gguf", "input": "hi"}, "may not name model files"),
    ]
    file = tmp_path / "keys.json"
    headers = {"Authorization": f"Bearer {add_key(Key(name='ada'), file)}"}

    async def ask() -> None:
        async with gateway_without_engines(keys=Keys(file)) as http:
            for path, body, message in refused:
                answer = await http.post(f"/api/{path}", json=body, headers=headers)
                assert (answer.status_code, [*answer.json()]) == (403, ["error"]), (path, answer.text)
                assert message in answer.json()["error"]

    run(ask())


def test_0_dimensions_are_those_of_the_model() -> None:
    async def ask() -> None:
        async with gateway_without_engines() as http:
            answer = await http.post("/api/embed", json={"model": "nowhere", "input": "hi", "dimensions": 0})
            assert answer.status_code == 404, answer.text  # only the model is missing

    run(ask())


def test_a_gateway_without_ollama_looks_like_ollama_to_its_clients() -> None:
    async def ask() -> None:
        async with gateway_without_engines() as http:
            found = await http.head("/")
            version, tags, loaded = [(await http.get(f"/api/{path}")).json() for path in ("version", "tags", "ps")]
            missing = await http.post("/api/me")
        assert found.status_code == 200
        assert tuple(map(int, version["version"].split("."))) >= (0, 6, 4)
        assert version["server"].startswith("sollol_nb ")
        assert {"demo", "demo:sharded"} <= {model["name"] for model in tags["models"]}
        assert loaded == {"models": []}
        assert (missing.status_code, [*missing.json()]) == (404, ["error"])

    run(ask())


# --- models in Ollama -----------------------------------------------------------------------------


def shape(value: Any) -> Any:
    """Names and types of JSON data; of a list those of its first element."""
    if isinstance(value, dict):
        return {name: shape(part) for name, part in value.items()}
    if isinstance(value, list):
        return [shape(part) for part in value[:1]]
    return "number" if isinstance(value, int | float) and not isinstance(value, bool) else type(value).__name__


def asked(url: str, method: str, path: str, body: Any = None) -> tuple[int, str, list[Any]]:
    """Status, media type and all lines of an answer."""
    answer = httpx.request(method, url + path, json=body, timeout=HANG_GUARD_S)
    media_type = answer.headers["Content-Type"].partition(";")[0]
    return answer.status_code, media_type, [json.loads(line) for line in answer.text.splitlines()]


SHORT = {**GREEDY, "num_predict": 5}
SAME: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", "/api/chat", {"messages": MESSAGES, "options": SHORT}),
    ("POST", "/api/chat", {"messages": MESSAGES, "options": SHORT, "stream": False}),
    ("POST", "/api/chat", {"messages": MESSAGES, "options": GREEDY, "stream": False, "format": SCHEMA}),
    ("POST", "/api/chat", {"messages": MESSAGES, "options": SHORT, "logprobs": True, "top_logprobs": 2}),
    ("POST", "/api/chat", {"messages": []}),
    ("POST", "/api/generate", {"prompt": QUESTION, "options": SHORT}),
    ("POST", "/api/generate", {"prompt": QUESTION, "system": "Be brief.", "options": SHORT, "stream": False}),
    ("POST", "/api/generate", {}),
    ("POST", "/api/show", {}),
]


@pytest.mark.ollama
@pytest.mark.engine
@pytest.mark.parametrize(("method", "path", "body"), SAME)
def test_answers_have_the_shape_of_ollamas_own(
    with_node: GatewayProcess, ollama: OllamaServer, method: str, path: str, body: dict[str, Any]
) -> None:
    def shown(url: str, model: str) -> tuple[int, str, list[Any]]:
        status, media_type, lines = asked(url, method, path, {"model": model, **body})
        for line in lines:
            line.pop("context", None)  # of /api/generate, which Ollama gives up
            # What is written in the file of a model is its own.
            line.get("model_info", {}).clear()
            for name in ("license", "parameters", "modified_at", "tensors"):
                line.pop(name, None)
        return status, media_type, [shape(line) for line in (lines[0], lines[-1])]

    own = shown(ollama.base_url, "llama3.2")
    assert shown(with_node.url, "llama3.2") == own
    assert shown(with_node.url, "demo") == own


@pytest.mark.ollama
@pytest.mark.engine
def test_lists_have_the_models_of_nodes_and_of_llama_cpp(with_node: GatewayProcess, ollama: OllamaServer) -> None:
    for model in ("demo", "llama3.2"):
        assert asked(with_node.url, "POST", "/api/generate", {"model": model, "prompt": ""})[0] == 200
    for path in ("/api/tags", "/api/ps"):

        def lists(path: str = path) -> tuple[list[Any], list[Any]] | None:
            """The node's list and the gateway's, once none of the node's models changes in between."""
            first, ours, own = (
                asked(url, "GET", path)[2][0]["models"]
                for url in (ollama.base_url, with_node.url, ollama.base_url)
            )
            return (own, ours) if first == own else None

        own, ours = eventually(lists, "the node has noted when its models expire")
        by_name = {model["name"]: model for model in ours}
        assert len(by_name) == len(ours)
        for model in own:
            assert by_name[model["name"]] == model
        assert shape(by_name["demo"]) == shape(own[0])
    [version] = asked(ollama.base_url, "GET", "/api/version")[2]
    assert asked(with_node.url, "GET", "/api/version")[2][0]["version"] == version["version"]


@pytest.mark.ollama
@pytest.mark.engine
def test_ollamas_own_program_uses_the_gateway_as_its_server(
    with_node: GatewayProcess, ollama_program: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "OLLAMA_HOST": with_node.url, "HOME": str(tmp_path)}

    def done(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(ollama_program), *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=HANG_GUARD_S,
            check=False,
        )

    def said(*arguments: str) -> str:
        ended = done(*arguments)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    listed = {line.split()[0] for line in said("list").splitlines()}
    assert {"demo", "demo:sharded", "llama3.2:latest"} <= listed
    for model in ("demo", "llama3.2"):
        assert said("run", model, QUESTION).strip()
        assert model in said("ps")
        assert "2.74M" in said("show", model)
    said("stop", "demo")
    assert "demo" not in said("ps")
    assert "/api/delete is not supported" in done("rm", "demo").stderr


@pytest.mark.ollama
@pytest.mark.engine
def test_texts_are_embedded_as_by_the_node_itself(with_node: GatewayProcess, ollama: OllamaServer) -> None:
    for body in ({"input": ["worker", "layer"]}, {"input": "worker"}, {"input": []}):
        own, ours = (
            asked(url, "POST", "/api/embed", {"model": "llama3.2", **body})[2][0]
            for url in (ollama.base_url, with_node.url)
        )
        assert ours["embeddings"] == own["embeddings"]
        assert shape(ours) == shape(own) or not own["embeddings"]
    client = ollama_client.Client(with_node.url)
    old = client.embeddings("llama3.2", "worker").embedding
    assert list(old) == list(client.embed("llama3.2", "worker").embeddings[0])


@pytest.mark.ollama
@pytest.mark.engine
def test_a_model_of_a_node_is_loaded_and_unloaded(with_node: GatewayProcess, ollama: OllamaServer) -> None:
    def loaded() -> list[str]:
        return [model["name"] for model in ollama.ask("/api/ps")["models"]]

    client = ollama_client.Client(with_node.url)
    assert client.generate("someone/special:7b", keep_alive="10m").done_reason == "load"
    assert loaded()
    assert client.generate("someone/special:7b", keep_alive=0).done_reason == "unload"
    eventually(lambda: not loaded(), "the node has unloaded the model")


@pytest.mark.ollama
@pytest.mark.engine
def test_what_ollama_refuses_keeps_its_status(with_node: GatewayProcess) -> None:
    body = {"model": "llama3.2", "messages": MESSAGES, "think": True, "stream": False}
    status, _, [answer] = asked(with_node.url, "POST", "/api/chat", body)
    assert status == 400
    assert 'llama3.2" does not support thinking' in answer["error"]
    body = {"model": "llama3.2", "prompt": "a", "suffix": "b", "stream": False}
    status, _, [answer] = asked(with_node.url, "POST", "/api/generate", body)
    assert status == 400
    assert "does not support insert" in answer["error"]


@pytest.mark.ollama
@pytest.mark.engine
def test_a_pulled_model_can_be_used(scratch_ollama: OllamaServer, registry: str, tmp_path: Path) -> None:
    scratch_ollama.create("llama3.2")  # its files need not be downloaded
    variables = {"OLLAMA_HOST": scratch_ollama.base_url, "SOLLOL_STATE_DIR": str(tmp_path)}
    with running_gateway(variables=variables) as gateway:
        client = ollama_client.Client(gateway.url)
        steps = [*client.pull(f"{registry}:latest", insecure=True, stream=True)]
        assert any(step.total == step.completed and (step.total or 0) > 1_000_000 for step in steps)
        assert steps[-1].status == "success"
        assert client.pull(f"{registry}:latest", insecure=True).status == "success"
        name = registry.removeprefix("http://")
        assert f"{name}:latest" in [model.model for model in client.list().models]
        assert client.generate(name, QUESTION, options={"num_predict": 3}).response
        with pytest.raises(ollama_client.ResponseError, match="pull"):
            list(client.pull(f"{registry}:no-such-tag", insecure=True, stream=True))


@pytest.mark.ollama
@pytest.mark.engine
def test_a_failed_pull_is_reported_in_its_progress(with_node: GatewayProcess) -> None:
    body = {"model": "http://127.0.0.1:9/someone/tiny:latest", "insecure": True}
    status, media_type, lines = asked(with_node.url, "POST", "/api/pull", body)
    assert (status, media_type) == (200, "application/x-ndjson")
    assert lines[0] == {"status": "pulling manifest"}
    assert "pull" in lines[-1]["error"]
