"""What the gateway adds to the same llama-server, beside LiteLLM's proxy: milliseconds to the first token, and
throughput with 50 streams at the same time.

    python benchmarks/gateway.py [--rounds 30] [--streams 50] [--models demo smollm2] [--without-litellm]

One local llama-server gets requests directly, through a gateway, and through LiteLLM's proxy, in turns (A B C,
C B A, ...), so that drift of the machine cancels. All processes share the machine's processors. With the
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
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from clusters import free_port, is_healthy
from common import Report, in_turns, isolated, paired_difference, paired_ratio, parser_of, run, smollm2_path

from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.sync_wrapper import HybridRouter

QUESTION = "Tell me everything about sharding."
TOKENS = 32
WARM_UP = 5
START_LIMIT_S = 300.0
ANSWER_LIMIT_S = 600.0
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


def main() -> Report:
    """Measure each model."""
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="answers one after the other, by each way")
    parser.add_argument("--streams", type=int, default=50, help="streams at the same time")
    parser.add_argument("--stream-rounds", type=int, default=3)
    parser.add_argument("--models", nargs="+", default=["demo"], choices=["demo", "smollm2"])
    parser.add_argument("--without-litellm", action="store_true")
    arguments = parser.parse_args()
    report = Report()
    table = report.table(
        f"Medians; {arguments.streams} streams together",
        *("model", "way", "first token, ms", "added, ms", "tokens/s of all streams", "of direct"),
    )
    with isolated():
        if "smollm2" in arguments.models:
            os.environ["SOLLOL_MODELS"] = f"smollm2={smollm2_path()}"
        for model in arguments.models:
            ways = asked_by_all_ways(model, arguments, report)
            direct = ways[0]
            for way in ways:
                first_ms, speed = median(way.first_s) * 1000, median(way.tokens_per_s)
                added_ms = paired_difference(way.first_s, direct.first_s) * 1000
                ratio = paired_ratio(way.tokens_per_s, direct.tokens_per_s)
                table.add(model, way.name, first_ms, added_ms if way is not direct else "", speed, ratio)
    return report


def asked_by_all_ways(model: str, arguments: argparse.Namespace, report: Report) -> list[Way]:
    """The ways to a server of this model, the direct one first, with what was measured."""
    with ExitStack() as stack:
        router = stack.enter_context(HybridRouter())
        router.route_request(model, QUESTION, max_tokens=1)
        (coordinator,) = router.coordinators
        assert isinstance(coordinator, Coordinator)
        direct = Way("llama-server directly", coordinator.port, coordinator._process.key)
        ways = [direct, Way("gateway", stack.enter_context(gateway()))]
        if not arguments.without_litellm:
            try:
                ways.append(stack.enter_context(litellm(model, direct)))
            except RuntimeError as error:
                report.notes.append(f"LiteLLM is left out: {error}.")
        asyncio.run(measure(ways, model, arguments))
    return ways


async def measure(ways: list[Way], model: str, arguments: argparse.Namespace) -> None:
    """Ask by all ways in turns: one answer after the other, then many at the same time."""
    for way in ways:
        for _ in range(WARM_UP):
            await way.ask(model)
    for way in in_turns(ways, arguments.rounds):
        first_s, _ = await way.ask(model)
        way.first_s.append(first_s)
    for way in in_turns(ways, arguments.stream_rounds):
        began = time.perf_counter()
        answers = await asyncio.gather(*[way.ask(model) for _ in range(arguments.streams)])
        way.tokens_per_s.append(sum(tokens for _, tokens in answers) / (time.perf_counter() - began))


@contextmanager
def gateway() -> Iterator[int]:
    """A gateway; yields its port. It uses the llama-server that runs already."""
    port = free_port()
    command = [sys.executable, "-m", "sollol_nb.gateway", "--port", str(port)]
    with serving(command, port, "/health"):
        yield port


@contextmanager
def litellm(model: str, direct: Way) -> Iterator[Way]:
    """LiteLLM's proxy before the llama-server. Raises RuntimeError if it cannot run."""
    uv = shutil.which("uv", path=Path(sys.executable).parent) or shutil.which("uv")
    if uv is None:
        raise RuntimeError(f"uv, which installs {LITELLM}, is not installed (`pip install uv`)")
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
        stack.enter_context(serving(command, proxy.port, "/health/liveliness"))
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


if __name__ == "__main__":
    sys.exit(run(main))
