"""The gateway's process: how it starts, who gets in, and how it ends while answers stream."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import ssl
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from sollol_nb.cli.main import main as sollol_nb
from sollol_nb.gateway import server
from sollol_nb.gateway.access import DRAIN_RETRY_S
from sollol_nb.gateway.command import main
from sollol_nb.llama_cpp.engine.check import Engine
from tests.support.engines import HANG_GUARD_S, REPOSITORY, eventually, posix_only
from tests.support.fake_node import HEAD, MODEL, fake_node, reply
from tests.support.gateway import GatewayProcess, running_gateway

CERTIFICATE = Path(__file__).parents[1] / "support" / "tls" / "loopback.pem"
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "a secret question"}], "stream": True}
PATHS = {
    "/v1/chat/completions": CHAT,
    "/api/chat": CHAT,
    "/v1/messages": {**CHAT, "max_tokens": 100},
}


def line(text: str, **more: object) -> bytes:
    return json.dumps({"message": {"role": "assistant", "content": text}, **more}).encode() + b"\n"


class PausingNode:
    """An Ollama node that answers "one two", and waits before the "two"."""

    def __init__(self) -> None:
        self.may_continue = threading.Event()

    def pieces(self) -> Iterator[bytes]:
        yield HEAD + line("one ")
        self.may_continue.wait(HANG_GUARD_S)
        yield line("two", done=True, done_reason="stop", eval_count=2, prompt_eval_count=5)


@contextlib.contextmanager
def gateway_on_pausing_node(*arguments: str) -> Iterator[tuple[GatewayProcess, PausingNode]]:
    node = PausingNode()
    try:
        with (
            fake_node({"/api/chat": node.pieces}) as (url, _),
            running_gateway(*arguments, variables={"OLLAMA_HOST": url, "OLLAMA_NUM_PARALLEL": "3"}) as gateway,
        ):
            yield gateway, node
    finally:
        node.may_continue.set()


@contextlib.contextmanager
def streaming(client: httpx.Client, path: str) -> Iterator[Iterator[str]]:
    """The lines of an answer of which the first piece has arrived."""
    with client.stream("POST", path, json=PATHS[path]) as response:
        assert response.status_code == 200
        lines = response.iter_lines()
        while "one" not in next(lines):
            pass
        yield lines


@posix_only
def test_after_a_signal_running_answers_finish_and_new_requests_are_refused() -> None:
    kept_open = httpx.Limits(keepalive_expiry=None)
    with (
        gateway_on_pausing_node() as (gateway, node),
        gateway.client() as client,
        gateway.client(limits=kept_open) as idle,
    ):
        assert idle.get("/health").status_code == 200
        with streaming(client, "/v1/chat/completions") as lines:
            gateway.process.send_signal(signal.SIGTERM)
            eventually(lambda: "waits up to" in gateway.output, "the gateway drains")
            refused = idle.post("/api/chat", json=CHAT)  # on the connection that is open
            assert (refused.status_code, refused.headers["connection"]) == (503, "close")
            assert "stopped" in refused.json()["error"]
            assert refused.headers["retry-after"].isdecimal()
            with pytest.raises(httpx.ConnectError):
                idle.get("/ready")
            node.may_continue.set()
            rest = "\n".join(lines)
        assert "two" in rest
        assert "[DONE]" in rest
        assert gateway.wait() == 0
        assert "Traceback" not in gateway.output


@posix_only
def test_a_signal_lets_requests_without_an_engine_end_as_well() -> None:
    is_asked, may_end = threading.Event(), threading.Event()

    def details() -> Iterator[bytes]:
        is_asked.set()
        may_end.wait(HANG_GUARD_S)
        yield reply({"details": {"family": "llama"}, "model_info": {}})

    def ask() -> None:
        with gateway.client() as client:
            answers.append(client.post("/api/show", json={"model": MODEL}))

    answers: list[httpx.Response] = []
    asking = threading.Thread(target=ask)
    with (
        fake_node({"/api/show": details}) as (url, _),
        running_gateway(variables={"OLLAMA_HOST": url}) as gateway,
    ):
        asking.start()
        assert is_asked.wait(HANG_GUARD_S)
        gateway.process.send_signal(signal.SIGTERM)
        eventually(lambda: "for 1 request, then ends" in gateway.output, "the gateway drains")
        may_end.set()
        asking.join(HANG_GUARD_S)
        assert answers[0].status_code == 200
        assert gateway.wait() == 0
        assert "Traceback" not in gateway.output


@posix_only
@pytest.mark.parametrize("ending", ["the time is over", "a second signal"])
def test_answers_that_are_cut_off_end_with_an_error_of_their_api(ending: str) -> None:
    arguments = ["--drain", "0"] if ending == "the time is over" else []
    with gateway_on_pausing_node(*arguments) as (gateway, _), contextlib.ExitStack() as stack:
        streams = {
            path: stack.enter_context(streaming(stack.enter_context(gateway.client()), path)) for path in PATHS
        }
        client = stack.enter_context(gateway.client())
        queued = stack.enter_context(ThreadPoolExecutor(1)).submit(
            client.post, "/v1/chat/completions", json={**CHAT, "stream": False}
        )
        waits = re.compile(r'sollol_requests_waiting\{backend="ollama".*\} 1\.0')
        eventually(lambda: waits.search(httpx.get(f"{gateway.url}/metrics").text), "a request waits for a slot")
        gateway.process.send_signal(signal.SIGTERM)
        if not arguments:
            eventually(lambda: "waits up to" in gateway.output, "the gateway drains")
            gateway.process.send_signal(signal.SIGTERM)
        rests = {path: [line for line in lines if line] for path, lines in streams.items()}
        assert gateway.wait() == 0
    message = "the gateway was stopped; try again later"
    assert message in json.loads(rests["/api/chat"][-1])["error"]
    assert message in json.loads(rests["/v1/chat/completions"][-1].removeprefix("data: "))["error"]["message"]
    assert (queued.result().status_code, queued.result().json()["error"]["message"]) == (503, message)
    assert queued.result().headers["Retry-After"] == str(DRAIN_RETRY_S)
    assert rests["/v1/messages"][-2] == "event: error"
    assert message in json.loads(rests["/v1/messages"][-1].removeprefix("data: "))["error"]["message"]
    assert "Traceback" not in gateway.output


@posix_only
def test_keys_tls_and_the_log_of_a_running_gateway(
    own_state: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "requests.jsonl"
    tls = ["--tls-cert", str(CERTIFICATE), "--tls-key", str(CERTIFICATE)]
    with gateway_on_pausing_node("--require-key", "--log", str(log), *tls) as (gateway, node):
        node.may_continue.set()
        assert gateway.url.startswith("https://")
        verify = ssl.create_default_context(cafile=str(CERTIFICATE))
        with gateway.client(verify=verify) as client:
            assert client.post("/api/chat", json=CHAT).status_code == 401
            assert sollol_nb(["key", "add", "ada", "--per-minute", "1", "--priority", "high"]) == 0
            key = capsys.readouterr().out.strip()
            bearer = {"Authorization": f"Bearer {key}"}
            answered = client.post("/api/chat?q=hidden", json=CHAT, headers=bearer)
            assert "two" in answered.text
            refused = client.post("/api/chat", json=CHAT, headers=bearer)
            assert (refused.status_code, "ada" in refused.json()["error"]) == (429, True)
            assert sollol_nb(["key", "list"]) == 0
            shown = capsys.readouterr().out
            assert "ada: priority 7, 1 requests a minute" in shown
            assert key not in shown
            assert sollol_nb(["key", "remove", "ada"]) == 0
            assert client.get("/ready", headers=bearer).status_code == 401
        gateway.process.send_signal(signal.SIGINT)
        assert gateway.wait() == 0
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    text = log.read_text()
    assert not any(secret in text for secret in (key, "secret", "hidden", "one", "Bearer"))
    entries = [json.loads(entry) for entry in text.splitlines()]
    # A request has its line after its answer has ended, so that of the next one may come first.
    assert sorted((entry["path"], entry["status"], entry["key"]) for entry in entries) == [
        ("/api/chat", 200, "ada"),
        ("/api/chat", 401, ""),
        ("/api/chat", 429, "ada"),
        ("/ready", 401, ""),
    ]
    (answer,) = (entry for entry in entries if entry["status"] == 200)
    assert answer["api"] == "ollama"
    assert (answer["model"], answer["failovers"]) == (MODEL, 0)
    assert (answer["prompt_tokens"], answer["completion_tokens"]) == (5, 2)
    assert answer["route"].startswith("http://127.0.0.1:")
    assert {entry.get("error", "") for entry in entries} == {"", "unauthorized", "busy"}


@posix_only
@pytest.mark.engine
def test_the_next_gateway_uses_what_the_last_one_has_loaded(engine: Engine, tmp_path: Path) -> None:
    variables = {"SOLLOL_STATE_DIR": str(tmp_path), "SOLLOL_AUTO_SETUP": "1"}
    routes = []
    try:
        for _ in range(2):
            with running_gateway(variables=variables) as gateway, gateway.client() as client:
                response = client.post("/api/chat", json={**CHAT, "model": "demo", "stream": False})
                assert response.status_code == 200, response.text
                routes.append(response.headers["x-sollol-route"])
                gateway.process.send_signal(signal.SIGTERM)
                assert gateway.wait() == 0
            left = sollol_nb_command("ps", **variables)
            assert "coordinator" in left
        assert routes[0] == routes[1]
    finally:
        sollol_nb_command("stop", "--all", **variables)


def sollol_nb_command(*arguments: str, **variables: str) -> str:
    command = [sys.executable, "-m", "sollol_nb", *arguments]
    environment = {**os.environ, **variables, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the gateway says that does not start with these arguments."""
    assert main([*arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_gateway_that_cannot_start_says_why_in_one_line(
    capsys: pytest.CaptureFixture[str], own_state: Path, tmp_path: Path
) -> None:
    assert "`sollol-nb key add NAME`" in refusal(capsys, "--host", "0.0.0.0", "--port", "0")
    assert "give another --host" in refusal(capsys, "--host", "no.such.host.invalid")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "already listens there; give another --port" in refusal(capsys, "--port", port)
    assert "must be 0 to 65535" in refusal(capsys, "--port", "70000")
    assert "is not an origin" in refusal(capsys, "--port", "0", "--allow-origin", "*")
    assert "needs --tls-cert" in refusal(capsys, "--tls-key", "key.pem")
    assert "cannot read the TLS file" in refusal(capsys, "--tls-cert", str(tmp_path / "none.pem"))
    empty = tmp_path / "empty.pem"
    empty.write_text("nothing")
    assert "are not a certificate and its" in refusal(
        capsys, "--tls-cert", str(CERTIFICATE), "--tls-key", str(empty)
    )
    assert "cannot write the log" in refusal(capsys, "--log", str(tmp_path / "no" / "log"))
    damaged = own_state / "gateway_keys.json"
    damaged.write_text("{}")
    try:
        assert "is damaged" in refusal(capsys, "--port", "0")
    finally:
        damaged.unlink()


def test_a_log_in_the_state_folder_that_cannot_be_written_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOLLOL_STATE_DIR", str(tmp_path))
    log = tmp_path / "logs" / "gateway.jsonl"
    log.mkdir(parents=True)
    assert f"cannot write the log {log}: " in refusal(capsys, "--port", "0")


def test_an_interruption_of_the_start_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(server, "serve", interrupted)
    assert main([]) == 130
    assert capsys.readouterr().err == "gateway: interrupted\n"


def test_without_the_extra_one_line_says_how_to_install_it() -> None:
    code = "import sys; sys.modules['uvicorn'] = None; from sollol_nb.cli.main import main; main(['gateway'])"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG_GUARD_S)
    assert ended.stderr.splitlines() == [
        "sollol-nb: the gateway needs uvicorn, which is missing; run pip install 'sollol_nb[gateway]'"
    ]
