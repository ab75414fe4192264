"""What the gateway adds to the same llama-server, beside LiteLLM's proxy: milliseconds to the first token, and
throughput with 50 streams at the same time.

    python benchmarks/gateway.py [--rounds 60] [--streams 50] [--models demo smollm2] [--without-litellm]

One local llama-server gets requests directly, through a gateway, and through LiteLLM's proxy, in turns (A B C,
B C A, C A B, ...), so that drift of the machine cancels. All processes share the machine's processors. With the
tiny demo model, forwarding a token takes longer than generating it, and limits the throughput; with a real model,
the engine limits it. The client is a plain socket, so that it uses little processor time. Each question is sent
once, so that no prompt cache helps. uv installs LiteLLM in a separate environment.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.sync_wrapper import HybridRouter

QUESTION = "Tell me everything about sharding."
TOKENS = 32
WARM_UP = 5
START_LIMIT_S = 300.0
ANSWER_LIMIT_S = 600.0
REPOSITORY = Path(__file__).parents[1]
LITELLM = "litellm[proxy]"
_TEXT = re.compile(rb'"content":\s*"[^"]')
_TOKENS = re.compile(rb'"completion_tokens":\s*(\d+)')
_END = b"data: [DONE]"
_numbers = itertools.count(1)


@dataclass
class Way:
    """One way to the llama-server.

    Attributes:
        name: for the table.
        port: on this machine.
        key: sent as a bearer token; "" sends none.
        first_s: seconds to the first token of each answer that ran alone.
        tokens_per_s: of all streams together, in each round of streams at the same time.
    """

    name: str
    port: int
    key: str = ""
    first_s: list[float] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)

    async def ask(self, model: str) -> tuple[float, int]:
        """Stream one answer over a separate connection.

        Returns:
            The seconds to its first token, and how many tokens it has.
        """
        messages = [{"role": "user", "content": f"{next(_numbers)}. {QUESTION}"}]
        body = json.dumps(
            {
                "model": model,
                "messages": messages,
                "stream": True,
                "stream_options": {"include_usage": True},
                "max_tokens": TOKENS,
                "temperature": 0,
            }
        ).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{self.port}\r\n"
            f"Authorization: Bearer {self.key or 'none'}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        began, first_s, received = time.perf_counter(), None, bytearray()
        async with asyncio.timeout(ANSWER_LIMIT_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            try:
                writer.write(head.encode() + body)
                while _END not in received[-64:]:
                    piece = await reader.read(65536)
                    if not piece:
                        raise RuntimeError(f"{self.name} ended an answer too early: {received.decode()[-500:]}")
                    received += piece
                    if first_s is None and _TEXT.search(received):
                        first_s = time.perf_counter() - began
            finally:
                writer.close()
        tokens = _TOKENS.search(received)
        if first_s is None or tokens is None:
            raise RuntimeError(f"{self.name} gave no text, or no usage: {received.decode()[-500:]}")
        return first_s, int(tokens[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60, help="answers one after the other, by each way")
    parser.add_argument("--streams", type=int, default=50, help="streams at the same time")
    parser.add_argument("--stream-rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", default=["demo", "smollm2"], choices=["demo", "smollm2"])
    parser.add_argument("--without-litellm", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"SOLLOL_STATE_DIR": folder, "SOLLOL_CONFIG": "0", "OLLAMA_HOST": "127.0.0.1:9"}
        if "smollm2" in arguments.models:
            os.environ["SOLLOL_MODELS"] = f"smollm2={smollm2_path()}"
        rows = [
            "| model | way | first token, p50 | added | streams together | of direct |",
            "|---|---|---|---|---|---|",
        ]
        for model in arguments.models:
            rows += measured(model, arguments)
        print("\n".join(rows))


def measured(model: str, arguments: argparse.Namespace) -> list[str]:
    """The rows of the table for one model."""
    with ExitStack() as stack:
        router = stack.enter_context(HybridRouter())
        router.route_request(model, QUESTION, max_tokens=1)
        (coordinator,) = router.coordinators
        assert isinstance(coordinator, Coordinator)
        direct = Way("llama-server directly", coordinator.port, coordinator._process.key)
        ways = [direct, Way("gateway", stack.enter_context(gateway()))]
        if not arguments.without_litellm:
            proxy = stack.enter_context(litellm(model, direct))
            ways += [proxy] if proxy is not None else []
        asyncio.run(measure(ways, model, arguments))
    direct_ms, direct_speed = median(direct.first_s) * 1000, median(direct.tokens_per_s)
    rows = []
    for way in ways:
        first_ms, speed = median(way.first_s) * 1000, median(way.tokens_per_s)
        added = "" if way is direct else f"{first_ms - direct_ms:.2f} ms"
        ratio = "" if way is direct else f"{speed / direct_speed:.2f}"
        rows.append(f"| {model} | {way.name} | {first_ms:.2f} ms | {added} | {speed:.0f} tokens/s | {ratio} |")
    return rows


async def measure(ways: list[Way], model: str, arguments: argparse.Namespace) -> None:
    """Ask by all ways in turns: one answer after the other, then many at the same time."""
    for way in ways:
        for _ in range(WARM_UP):
            await way.ask(model)
    for number in range(arguments.rounds):
        for way in in_turn(ways, number):
            first_s, _ = await way.ask(model)
            way.first_s.append(first_s)
    for number in range(arguments.stream_rounds):
        for way in in_turn(ways, number):
            began = time.perf_counter()
            answers = await asyncio.gather(*[way.ask(model) for _ in range(arguments.streams)])
            way.tokens_per_s.append(sum(tokens for _, tokens in answers) / (time.perf_counter() - began))


def in_turn(ways: list[Way], number: int) -> list[Way]:
    """The ways in the order of a round, each first as often as the others."""
    begin = number % len(ways)
    return [*ways[begin:], *ways[:begin]]


@contextmanager
def gateway() -> Iterator[int]:
    """A gateway; yields its port. It uses the llama-server that runs already."""
    port = free_port()
    command = [sys.executable, "-m", "sollol_nb.gateway", "--port", str(port)]
    with serving(command, port, "/health"):
        yield port


@contextmanager
def litellm(model: str, direct: Way) -> Iterator[Way | None]:
    """LiteLLM's proxy before the llama-server. Yields None, and says why, if it cannot run."""
    uv = shutil.which("uv", path=Path(sys.executable).parent) or shutil.which("uv")
    if uv is None:
        print(f"LiteLLM is left out: uv, which installs {LITELLM}, is not installed (`pip install uv`)")
        yield None
        return
    entry = {
        "model_name": model,
        "litellm_params": {
            "model": f"openai/{model}",
            "api_base": f"http://127.0.0.1:{direct.port}/v1",
            "api_key": direct.key,
        },
    }
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        proxy = Way("LiteLLM proxy", free_port(), f"sk-{secrets.token_urlsafe(32)}")
        config = Path(folder) / "litellm.yaml"
        config.touch(0o600)  # it has the keys
        settings = {"model_list": [entry], "general_settings": {"master_key": proxy.key}}
        config.write_text(json.dumps(settings))  # which is YAML, too
        command = [uv, "tool", "run", "--from", LITELLM, "litellm", "--config", str(config)]
        command += ["--host", "127.0.0.1", "--port", str(proxy.port)]
        try:
            stack.enter_context(serving(command, proxy.port, "/health/liveliness"))
        except RuntimeError as error:
            print(f"LiteLLM is left out: {error}")
            yield None
            return
        yield proxy


@contextmanager
def serving(command: list[str], port: int, health: str) -> Iterator[None]:
    """A server that runs meanwhile, from when it answers. Raises RuntimeError if it does not start."""
    variables = {"LITELLM_TELEMETRY": "False", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=os.environ | variables,
    ) as process:
        lines: list[str] = []
        threading.Thread(target=lambda: lines.extend(process.stdout or ()), daemon=True).start()
        try:
            deadline = time.monotonic() + START_LIMIT_S
            while not is_healthy(f"http://127.0.0.1:{port}{health}"):
                if process.poll() is not None or time.monotonic() > deadline:
                    last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
                    raise RuntimeError(f"it did not start: {last}")
                time.sleep(0.1)
            yield
        finally:
            process.terminate()
            try:
                process.wait(30)
            finally:
                process.kill()


def is_healthy(url: str) -> bool:
    """Whether a server answers there."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


def smollm2_path() -> str:
    """The file of a real instruct model, which is fetched once, as for the tests."""
    command = [sys.executable, "-m", "tests.support.smollm2"]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
