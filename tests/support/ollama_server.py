"""A real Ollama for tests: a server on a free port, with its own storage, stopped with all its processes.

Loaded as a pytest plugin (`pytest_plugins` in conftest.py). The program is `SOLLOL_TEST_OLLAMA`, else `ollama` on
PATH, else the one that `make ollama` builds. Newer versions run models in a llama-server and have other errors; of
these, `newer_ollama_program` is the one that `make ollama` builds. Without them, the tests that need them are
skipped, and the end of the run says how many; if `CI` is set, that is a failure.
"""

from __future__ import annotations

import asyncio
import http.server
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest

from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.settings import config

BUILT_VERSION = "0.17.4"  # of tools/build_ollama.py
NEWER_VERSION = "0.32.1"  # of tools/build_ollama.py
DEMO_MODEL = Path(__file__).parents[2] / "sollol_nb" / "models" / "demo.gguf"
NO_OLLAMA = "no Ollama to test with: run `make ollama`, or set SOLLOL_TEST_OLLAMA to the program"
START_LIMIT_S = 30.0

# ChatML. An assistant's message that comes last is left open, so that the model continues it.
CHATML = """{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 -}}
<|im_start|>{{ .Role }}
{{ .Content }}{{ if or (ne .Role "assistant") (not $last) }}<|im_end|>
{{ end }}{{ if and $last (ne .Role "assistant") }}<|im_start|>assistant
{{ end }}{{ end }}"""


class OllamaServer:
    """One `ollama serve` with its runners, in a session of their own.

    Args:
        program: the `ollama` program.
        folder: for its storage and log.
        environment: more of Ollama's settings.
    """

    def __init__(self, program: Path, folder: Path, **environment: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.models_folder = folder / "models"
        self.log_path = folder / "ollama.log"
        self._program = program
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        own = {
            "OLLAMA_HOST": f"127.0.0.1:{self.port}",
            "OLLAMA_MODELS": str(self.models_folder),
            "HOME": str(folder),
            "USERPROFILE": str(folder),
        }
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("OLLAMA_")}
        self._environment = inherited | own | environment
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> OllamaServer:
        """Start, or start again on the same port, and wait until it answers."""
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                [str(self._program), "serve"],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        end_s = time.monotonic() + START_LIMIT_S
        while time.monotonic() < end_s and self._process.poll() is None:
            with suppress(OSError):
                self.ask("/api/version")
                return self
            time.sleep(0.05)
        self.kill()
        pytest.fail(f"Ollama did not start:\n{self.log_path.read_text()[-2000:]}")

    def create(self, name: str, gguf: Path = DEMO_MODEL, template: str = CHATML, *lines: str) -> None:
        """Make a model from a GGUF file; `lines` are more of the Modelfile (`SYSTEM ...`, `PARAMETER ...`)."""
        modelfile = self.folder / "Modelfile"
        # One thread: a small model is quicker so, and threads that wait for each other crawl on a busy machine.
        settings = ['PARAMETER stop "<|im_end|>"', "PARAMETER num_thread 1", *lines]
        modelfile.write_text("\n".join([f"FROM {gguf}", f'TEMPLATE """{template}"""', *settings]))
        subprocess.run(
            [str(self._program), "create", name, "-f", str(modelfile)],
            env=self._environment,
            check=True,
            capture_output=True,
            timeout=120,
        )

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON of a GET, or of a POST with a body, without the package under test."""
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(self.base_url + path, data), timeout=60) as answer:
            return json.load(answer)

    def kill(self) -> None:
        """Kill the server and its runners, as a power cut would. A second call does nothing."""
        if self._process is not None:
            self._signal_all("kill")
            self._process.wait(30)
            self._process = None

    def suspend(self) -> None:
        """Keep the server and its runners from doing anything; the system still accepts connections for them."""
        self._signal_all("suspend")

    def resume(self) -> None:
        """Let them continue."""
        self._signal_all("resume")

    def suspend_runners(self) -> None:
        """Keep the models from doing anything, while the server itself answers."""
        assert self._process is not None
        for runner in psutil.Process(self._process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):  # it may end at any moment
                runner.suspend()

    def _signal_all(self, verb: Literal["kill", "suspend", "resume"]) -> None:
        assert self._process is not None
        if sys.platform != "win32":
            signals = {"kill": signal.SIGKILL, "suspend": signal.SIGSTOP, "resume": signal.SIGCONT}
            # The group outlives a server that died alone, and so do its runners.
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signals[verb])
            return
        server = psutil.Process(self._process.pid)
        for process in (server, *server.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                getattr(process, verb)()


class AnswerWire:
    """A proxy to an Ollama server that can halt an answer after so many of its chunks. All else passes, also then.

    Without it, a server that is killed in mid-answer may have sent all of the answer before.

    Attributes:
        server: the server that it leads to.
        base_url: where it listens.
    """

    def __init__(self, server: OllamaServer) -> None:
        self.server = server
        self._chunks_left = math.inf
        self._links: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> AnswerWire:
        self._listener = await asyncio.start_server(self._link, "127.0.0.1", 0)
        self.base_url = f"http://127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._close()

    def halt_after(self, chunks: float) -> None:
        """Pass so many more chunks of answers, and none after them. An answer that is halted stays halted."""
        self._chunks_left = chunks

    async def kill(self) -> None:
        """Kill the server. Nothing listens here any more, and what has not passed is lost."""
        await asyncio.to_thread(self.server.kill)
        await self._close()

    async def _close(self) -> None:
        self._listener.close()
        for link in self._links:
            link.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = asyncio.current_task()
        assert link is not None
        self._links.add(link)
        try:
            with suppress(OSError):  # nothing listens there
                server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self.server.port)
                try:
                    await asyncio.gather(
                        self._pass_requests(reader, server_writer), self._pass_answers(server_reader, writer)
                    )
                finally:
                    server_writer.close()
        finally:
            writer.close()
            self._links.discard(link)

    async def _pass_requests(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                sink.write(data)
                await sink.drain()
        sink.close()

    async def _pass_answers(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        line = b""
        with suppress(OSError):
            while data := await source.read(65536):
                for piece in data.splitlines(keepends=True):
                    sink.write(piece)
                    line += piece
                    if line.endswith(b"\n"):
                        await self._count(line)
                        line = b""
                await sink.drain()
        sink.close()

    async def _count(self, line: bytes) -> None:
        """Count a line that has passed. After the last chunk that may pass, this waits until it is cancelled."""
        if b'"done":false' in line:
            self._chunks_left -= 1
            if self._chunks_left <= 0:
                await asyncio.Event().wait()


def find_ollama() -> Path | None:
    """The Ollama program for tests, if there is one."""
    chosen = os.environ.get("SOLLOL_TEST_OLLAMA")
    if chosen:
        return Path(chosen)
    if on_path := shutil.which("ollama"):
        return Path(on_path)
    return built_ollama(BUILT_VERSION)


def built_ollama(version: str) -> Path | None:
    """The Ollama of this version that `make ollama` has built."""
    name = "ollama.exe" if sys.platform == "win32" else "ollama"
    built = config.cache_dir() / "ollama" / version / name
    return built if built.exists() else None


def required(program: Path | None) -> Path:
    """The program; without it the test is skipped, or fails in CI."""
    if program is None:
        if os.environ.get("CI"):
            pytest.fail(NO_OLLAMA)
        pytest.skip(NO_OLLAMA)
    return program


@pytest.fixture(scope="session")
def ollama_program() -> Path:
    """The real Ollama program."""
    return required(find_ollama())


@pytest.fixture(scope="session")
def newer_ollama_program(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real Ollama that runs models in a llama-server: in ours, which it looks for in `../lib/ollama`."""
    program = required(built_ollama(NEWER_VERSION))
    folder = tmp_path_factory.mktemp("newer_ollama")
    for name, script in {
        # Our llama-server has `--load-mode none` for its `--no-mmap`.
        "llama-server": f"""
            for argument do
                shift
                case "$argument" in --no-mmap) set -- "$@" --load-mode none ;; *) set -- "$@" "$argument" ;; esac
            done
            exec '{engine.server}' "$@"
        """,
        # `ollama create` calls it with the arguments ... IN OUT COPY.
        "llama-quantize": """
            while [ $# -gt 3 ]; do shift; done
            exec cp "$1" "$2"
        """,
    }.items():
        path = folder / "lib" / "ollama" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{textwrap.dedent(script)}")
        path.chmod(0o755)
    (folder / "bin").mkdir()
    return Path(shutil.copy(program, folder / "bin" / "ollama"))


@pytest.fixture(scope="session")
def start_ollamas(
    ollama_program: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., OllamaServer]]:
    """Starts servers that run until the end of the session; models are the caller's to create."""
    servers: list[OllamaServer] = []

    def start(**environment: str) -> OllamaServer:
        servers.append(OllamaServer(ollama_program, tmp_path_factory.mktemp("ollama"), **environment))
        return servers[-1].start()

    yield start
    for server in servers:
        server.kill()


@pytest.fixture(scope="session")
def ollama(start_ollamas: Callable[..., OllamaServer]) -> OllamaServer:
    """A server with the demo model under names of the guide, shared by tests that only ask."""
    server = start_ollamas()
    for name in ("llama3.2", "llama3.1:70b", "hf.co/someone/some-model-GGUF:Q4_K_M", "someone/special:7b"):
        server.create(name)
    return server


@pytest.fixture(scope="session")
def scratch_ollama(start_ollamas: Callable[..., OllamaServer]) -> OllamaServer:
    """A server for tests that make models and leave them loaded."""
    return start_ollamas()


@pytest.fixture
def ollama_pair(ollama_program: Path, tmp_path: Path) -> Iterator[tuple[OllamaServer, OllamaServer]]:
    """Two servers with `llama3.2`, for tests that do them harm."""
    pair = OllamaServer(ollama_program, tmp_path / "a"), OllamaServer(ollama_program, tmp_path / "b")
    try:
        for server in pair:
            server.start().create("llama3.2")
        yield pair
    finally:
        for server in pair:
            server.kill()


class Registry(http.server.BaseHTTPRequestHandler):
    """The two requests of Ollama's registry protocol, answered from another Ollama's storage."""

    storage: Path

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        match = re.fullmatch(r"/v2/someone/tiny/(manifests|blobs)/(.+)", self.path)
        file = None
        if match and match[1] == "manifests":
            file = self.storage / "manifests/registry.ollama.ai/library/llama3.2" / match[2]
        elif match:
            file = self.storage / "blobs" / match[2].replace(":", "-")
        if file is None or not file.exists():
            self.send_error(404)
            return
        content = file.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked:
            content = content[int(asked[1]) : int(asked[2]) + 1]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def registry(ollama: OllamaServer) -> Iterator[str]:
    """A registry with one model, from which Ollama can pull; its address with the model's name."""
    handler = type("Handler", (Registry,), {"storage": ollama.models_folder})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/someone/tiny"
        server.shutdown()
        thread.join()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say loudly how many tests wanted an Ollama and had none."""
    skipped = sum(NO_OLLAMA in str(report.longrepr) for report in terminalreporter.stats.get("skipped", ()))
    if skipped:
        terminalreporter.write_line(f"{skipped} TESTS WERE SKIPPED: {NO_OLLAMA}", yellow=True, bold=True)
