"""The tools that agents get: a real MCP client calls them in a real Jupyter server, as it is installed."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import zipfile
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastmcp import Client
from fastmcp.exceptions import ToolError

from sollol_nb import mcp_tools
from sollol_nb.errors import CoordinatorStartError
from sollol_nb.llama_cpp.processes import registry
from sollol_nb.llama_cpp.processes.running import stop_engines
from sollol_nb.mcp_tools import sollol_ask, sollol_route, sollol_status
from sollol_nb.runtime.io_loop import run_blocking
from sollol_nb.settings import config
from sollol_nb.settings.table import SETTINGS
from sollol_nb.sync_wrapper import HybridRouter
from tests.lab.server import LabServer
from tests.support.engines import REPOSITORY, eventually, unused_ports
from tests.support.gateway import running_gateway

QUESTION = "What is a worker?"
NAMES = {"sollol_status", "sollol_models", "sollol_route", "sollol_ask"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the metadata of this checkout's wheel, as pip installs it."""
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if ".dist-info/" in name])
    return folder


@pytest.fixture(scope="module")
def mcp_url(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The MCP server of a running Jupyter server."""
    port = unused_ports(1)
    server = LabServer(
        tmp_path_factory.mktemp("jupyter"),
        application="jupyter_server",
        extensions=["jupyter_server_mcp"],
        options=[f"--MCPExtensionApp.mcp_port={port}"],
        PYTHONPATH=os.pathsep.join(map(str, (installed, REPOSITORY))),
    )
    server.start()
    try:
        yield f"http://127.0.0.1:{port}/mcp"
    finally:
        server.stop()


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Client[Any]]:
    async def connect() -> Client[Any] | None:
        try:
            return await Client(url).__aenter__()
        except RuntimeError:  # an old one says that the server runs before it does
            return None

    for _ in range(100):
        client = await connect()
        if client is not None:
            break
        await asyncio.sleep(0.2)
    else:
        raise AssertionError("the MCP server does not answer")
    try:
        yield client
    finally:
        await client.close()


def call(url: str, tool: str, **arguments: Any) -> Any:
    """What a tool gives, as its client gets it."""

    async def called() -> Any:
        async with connected(url) as client:
            return (await client.call_tool(tool, arguments)).data

    return asyncio.run(called())


def engines() -> list[tuple[str, int]]:
    """What is registered of this user's engines."""
    return sorted((entry.name, entry.pid) for entry in registry.entries())


def error_of(answer: Awaitable[Any]) -> str:
    async def awaited() -> Any:
        return await answer

    with pytest.raises(ToolError) as raised:
        asyncio.run(awaited())
    return str(raised.value)


def test_a_client_finds_four_tools_that_describe_themselves(mcp_url: str) -> None:
    async def listed() -> dict[str, Any]:
        async with connected(mcp_url) as client:
            return {tool.name: tool for tool in await client.list_tools()}

    found = asyncio.run(listed())
    assert set(found) == NAMES
    assert "Starts nothing" in (found["sollol_route"].description or "")
    asked = found["sollol_ask"].model_dump(by_alias=True)["inputSchema"]
    assert set(asked["required"]) == {"model", "prompt"}
    assert set(asked["properties"]) == {"model", "prompt", "system", "max_tokens", "temperature"}


def test_what_only_shows_starts_nothing_and_an_error_is_one_line(mcp_url: str) -> None:
    before = engines()
    assert call(mcp_url, "sollol_route", model="demo").startswith("demo → local llama-server: ")
    assert "Ollama" in call(mcp_url, "sollol_status")
    demo = {row["model"]: row for row in call(mcp_url, "sollol_models", contains="DEMO")}
    assert demo["demo"]["where"] == "built in"
    with pytest.raises(ToolError) as missing:
        call(mcp_url, "sollol_route", model="no-such-model")
    assert str(missing.value).startswith("ModelNotFoundError: no-such-model is not available")
    assert "\n" not in str(missing.value)
    assert engines() == before


def test_a_web_page_of_another_origin_is_refused(mcp_url: str) -> None:
    call(mcp_url, "sollol_models", contains="demo")
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/list"}
    taken = {"Accept": "application/json, text/event-stream"}
    refused = httpx.post(mcp_url, json=body, headers={**taken, "Origin": "https://example.org"})
    assert refused.status_code == 403
    assert httpx.post(mcp_url, json=body, headers={**taken, "Host": "example.org"}).status_code == 421


@pytest.mark.usefixtures("alone")
def test_a_model_that_is_not_loaded_is_not_asked_and_a_file_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "ConfigError: demo is not loaded" in error_of(sollol_ask("demo", QUESTION))
    for tool in (sollol_route("/etc/passwd"), sollol_ask("/etc/passwd", QUESTION), sollol_ask("x.gguf", QUESTION)):
        assert error_of(tool) == "ConfigError: name a model as sollol_models lists it, not a file"
    assert "must be 1 to 4096" in error_of(sollol_ask("demo", QUESTION, max_tokens=5000))
    monkeypatch.setenv("SOLLOL_MCP_ASK", "off")
    assert "mcp_ask is off" in error_of(sollol_ask("demo", QUESTION))
    assert engines() == []


def test_a_gateway_called_local_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    without = mcp_tools._loads_nothing()
    monkeypatch.setenv("SOLLOL_GATEWAY", "local")
    assert mcp_tools._loads_nothing() == without != {}


@pytest.mark.usefixtures("alone", "engine")
@pytest.mark.engine
def test_a_router_that_only_adopts_starts_nothing() -> None:
    with HybridRouter(adopt_only=True, latency=None) as router, pytest.raises(CoordinatorStartError) as raised:
        router.route_request("demo", QUESTION)
    assert "demo is not loaded" in str(raised.value)
    assert engines() == []


@pytest.mark.engine
def test_an_agent_asks_a_loaded_model_and_nothing_is_started_or_stopped(
    mcp_url: str, router: HybridRouter
) -> None:
    own = router.route_request("demo:sharded", QUESTION, temperature=0)
    before = engines()
    answer = call(mcp_url, "sollol_ask", model="demo:sharded", prompt=QUESTION, temperature=0)
    assert answer["text"] == own.text
    assert (answer["backend"], answer["finish_reason"]) == ("llama.cpp-distributed", "stop")
    cut = call(mcp_url, "sollol_ask", model="demo:sharded", prompt=QUESTION, max_tokens=3)
    assert (cut["tokens"], cut["finish_reason"]) == (3, "length")
    assert engines() == before
    assert "\nloaded\n" in call(mcp_url, "sollol_route", model="demo:sharded")
    assert "held by demo:sharded" in call(mcp_url, "sollol_status")
    (row,) = (row for row in call(mcp_url, "sollol_models") if row["model"] == "demo:sharded")
    assert row["loaded"]
    assert router.route_request("demo:sharded", QUESTION, temperature=0).text == own.text, "it runs on"


@pytest.mark.usefixtures("alone", "engine")
@pytest.mark.engine
def test_where_the_user_allows_it_a_model_is_loaded_for_an_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOLLOL_MCP_ASK", "any")
    try:
        answer = asyncio.run(sollol_ask("demo", QUESTION, temperature=0))
        assert answer["text"].startswith("A worker is a small server")
        monkeypatch.setenv("SOLLOL_MCP_ASK", "loaded")
        again = asyncio.run(sollol_ask("demo", QUESTION, temperature=0))
        assert again["text"] == answer["text"]
        assert [name for name, _ in engines()] == ["demo"]
    finally:
        run_blocking(stop_engines(also_used=True))
    eventually(lambda: not engines(), "all engines have ended")


@pytest.mark.usefixtures("alone", "engine")
@pytest.mark.engine
def test_over_a_gateway_only_its_loaded_models_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_gateway() as gateway:
        monkeypatch.setenv("SOLLOL_GATEWAY", gateway.url)
        assert "ConfigError: demo is not loaded" in error_of(sollol_ask("demo", QUESTION))
        assert engines() == []
        with HybridRouter() as router:
            own = router.route_request("demo", QUESTION, temperature=0)
        assert asyncio.run(sollol_ask("demo", QUESTION, temperature=0))["text"] == own.text
        assert "demo  ● ready" in asyncio.run(sollol_status())
        assert asyncio.run(sollol_route("demo")).splitlines()[1] == "loaded"


def test_long_results_are_cut_with_a_note() -> None:
    text = mcp_tools._bounded("x" * (mcp_tools.MOST_CHARS + 5))
    assert text.endswith("x\n[5 characters more were left out]")
    assert mcp_tools._bounded("short") == "short"


def test_the_settings_of_a_folder_do_not_allow_more() -> None:
    assert SETTINGS["mcp_ask"].guarded
    assert config.default("mcp_ask") == "loaded"
