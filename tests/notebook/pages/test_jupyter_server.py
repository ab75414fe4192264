"""The Jupyter server of a kernel: found by what it has written, and asked over its REST API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sollol_nb.errors import HttpStatusError, TransportError
from sollol_nb.notebook.pages import jupyter_server
from sollol_nb.notebook.pages.jupyter_server import JupyterServer, find_server
from tests.lab.bare_page import BarePage, write_notebook
from tests.lab.server import LabServer
from tests.support.engines import eventually

CONNECTION_FILE = "/run/kernel-0a1b.json"
SERVER = {"hostname": "127.0.0.1", "port": 8888, "secure": False, "base_url": "/", "token": "secret", "sock": ""}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabServer]:
    running = LabServer(tmp_path_factory.mktemp("jupyter"))
    running.start()
    yield running
    running.stop()


@pytest.fixture
def server_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the server that has started this kernel wrote about itself."""
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("JPY_PARENT_PID", "4711")
    path = tmp_path / "jpserver-4711.json"
    path.touch(0o600)
    path.write_text(json.dumps(SERVER))
    return path


def address(**changes: Any) -> str | None:
    path = Path(changes.pop("path"))
    path.write_text(json.dumps(SERVER | changes))
    found = find_server(CONNECTION_FILE)
    return None if found is None else found._client.base_url


def test_a_kernel_finds_the_server_that_has_started_it(server_file: Path) -> None:
    assert address(path=server_file) == "http://127.0.0.1:8888"
    assert address(path=server_file, hostname="0.0.0.0", base_url="/hub/ada/") == "http://127.0.0.1:8888/hub/ada"
    assert address(path=server_file, hostname="::1", secure=True) == "https://[::1]:8888"


@pytest.mark.parametrize("changes", [{"token": ""}, {"sock": "/run/jupyter.sock"}, {"port": "x"}, {"hostname": 1}])
def test_a_server_that_cannot_be_asked_is_none(server_file: Path, changes: dict[str, Any]) -> None:
    assert address(path=server_file, **changes) is None


def test_certificates_that_cannot_be_read_are_no_error_of_a_cell(
    server_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere/certificates.pem")
    assert address(path=server_file, secure=True) is None
    assert address(path=server_file, secure=False) is not None


def test_a_server_is_believed_only_if_it_has_started_the_kernel_and_its_file_is_private(
    server_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = find_server(CONNECTION_FILE)
    assert found is not None
    assert "secret" not in repr(found)
    assert find_server("/run/other.json") is None
    assert find_server(None) is None
    server_file.chmod(0o666)
    assert find_server(CONNECTION_FILE) is None, "others could have written it"
    server_file.chmod(0o600)
    server_file.write_text("[" * 100_000)
    assert find_server(CONNECTION_FILE) is None
    monkeypatch.setenv("JPY_PARENT_PID", "4712")
    assert find_server(CONNECTION_FILE) is None
    monkeypatch.delenv("JPY_PARENT_PID")
    assert find_server(CONNECTION_FILE) is None


def test_pages_are_counted_and_the_saved_notebook_is_read_and_written(
    server: LabServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "a notebook?ä.ipynb"
    write_notebook(server, name, ["1 + 1"])
    page = BarePage(server, name)
    page.run("1 + 1")  # what its kernel did later, as it starts, would be activity
    url, token = server.url.rstrip("/"), server.token

    async def count() -> int:
        api = JupyterServer(url, token, page.kernel_id)
        found = await api.page()
        await api.close()
        assert found is not None
        assert found.path == name
        return found.connections

    async def edit() -> None:
        api = JupyterServer(url, token, page.kernel_id)
        document = await api.read(name)
        document["cells"][0]["outputs"] = [
            {"output_type": "display_data", "data": {"text/plain": "the end"}, "metadata": {}}
        ]
        await api.write(name, document)
        text = await api.read_text(name)
        assert "the end" in text
        await api.write_text(name, text + "\r\n ")
        assert await api.read_text(name) == text + "\r\n ", "every byte"
        for read in (api.read, api.read_text):
            with pytest.raises(TransportError):
                await read("none.ipynb")
        monkeypatch.setattr(jupyter_server, "NOTEBOOK_LIMIT_BYTES", 10)
        with pytest.raises(TransportError, match="longer than"):
            await api.read_text(name)
        assert not await api.holds_notebooks()
        await api.close()

    assert asyncio.run(count()) == 1
    page.close()
    eventually(lambda: asyncio.run(count()) == 0, "the page is closed")
    asyncio.run(edit())
    assert page.saved().cells[0].outputs[0].data["text/plain"] == "the end"

    async def page_of_another_kernel() -> object:
        api = JupyterServer(url, token, "other")
        found = await api.page()
        await api.close()
        return found

    used_at = server.ask("GET", "api/status")["last_activity"]
    assert asyncio.run(page_of_another_kernel()) is None
    assert server.ask("GET", "api/status")["last_activity"] == used_at, "a server without users may end itself"
    server.end_kernel(name)


NOTEBOOK = {"type": "notebook", "path": "a.ipynb", "kernel": {"id": "0a1b", "connections": 1}}


@pytest.mark.parametrize(
    ("sessions", "connections"),
    [
        pytest.param([NOTEBOOK], 1, id="one"),
        pytest.param([{**NOTEBOOK, "type": "console"}, {}, None, {"type": "notebook"}, NOTEBOOK], 1, id="others"),
        pytest.param([NOTEBOOK, {**NOTEBOOK, "path": "b.ipynb"}], None, id="two notebooks share the kernel"),
        pytest.param([{**NOTEBOOK, "kernel": {"id": "0a1b"}}], None, id="pages are not counted"),
        pytest.param({"sessions": []}, None, id="not a list"),
    ],
)
def test_the_page_of_a_kernel(sessions: Any, connections: int | None) -> None:
    async def page() -> int | None:
        api = JupyterServer("http://127.0.0.1:1", "secret", "0a1b")

        async def get(path: str) -> Any:
            return sessions

        api._client.get = get  # type: ignore[assignment, method-assign]
        found = await api.page()
        await api.close()
        return found.connections if found is not None else None

    assert asyncio.run(page()) == connections


@pytest.mark.parametrize(("status", "is_held"), [(404, False), (400, True), (403, True)])
def test_a_server_with_jupyter_collaboration_is_known_by_its_websocket(status: int, is_held: bool) -> None:
    async def asked() -> bool:
        api = JupyterServer("http://127.0.0.1:1", "secret", "0a1b")

        async def get(path: str) -> Any:
            raise HttpStatusError(path, status=status, reason="x")

        api._client.get = get  # type: ignore[assignment, method-assign]
        holds = await api.holds_notebooks()
        await api.close()
        return holds

    assert asyncio.run(asked()) is is_held
