"""Models that load in the background: which one, when, and what a cell that needs it meanwhile sees."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.notebook.preloading import NOTEBOOK_LIMIT_BYTES, may_load, model_of_cell, model_of_notebook
from sollol_nb.runtime.io_loop import run_blocking
from sollol_nb.settings import config, consent
from sollol_nb.settings.file import read_settings
from sollol_nb.settings.table import FILE_NAME
from tests.support.engines import MeteredWire, engines_of, eventually, unused_port, worker_on
from tests.support.kernels import Kernel, kernel

# --- which model ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "model"),
    [
        ("%%sollol demo\nWhat is a worker?", "demo"),
        ("\n%%sollol llama3.1:70b --temperature 0\nHello", "llama3.1:70b"),
        ("%%sollol reply << demo:sharded --chat tour\nHello", "demo:sharded"),
        ("%%sollol hf.co/user/repo:Q4_K_M", "hf.co/user/repo:Q4_K_M"),
        ("%%sollol\nHello", None),
        ("%%sollol --temperature 0 demo\nHello", None),
        ("%%sollol {{ model }}\nHello", None),
        ("%%sollol /etc/model.gguf\nHello", None),
        ("%%sollol ../model\nHello", None),
        ("%%sollol ~/model\nHello", None),
        ("%%sollol model.gguf\nHello", None),
        ("%%sollol \x1b[31mred\nHello", None),
        (f"%%sollol {'a' * 201}\nHello", None),
        ("%%sollol_route demo", None),
        ("print(1)\n%%sollol demo", None),
        ("", None),
    ],
)
def test_a_cell_names_its_model(cell: str, model: str | None) -> None:
    assert model_of_cell(cell) == model


def write_notebook(path: Path, *sources: object) -> str:
    cells = [{"cell_type": "code", "source": source} for source in sources]
    path.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": "%%sollol no"}, *cells]}))
    return str(path)


def test_a_notebook_names_the_model_of_its_first_cell_that_asks(tmp_path: Path) -> None:
    path = write_notebook(
        tmp_path / "a.ipynb", "import this", ["%%sollol demo\n", "Hello"], "%%sollol other\nHello"
    )

    assert model_of_notebook(path) == "demo"


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        "{",
        "[" * 100_000,
        json.dumps({"cells": {"a": 1}}),
        json.dumps({"cells": [1, {"cell_type": "code"}, {"cell_type": "code", "source": {"a": 1}}]}),
        json.dumps({"cells": [{"cell_type": "code", "source": "%%sollol demo\nHello"}]})
        + " " * NOTEBOOK_LIMIT_BYTES,
    ],
    ids=["no cells", "a list", "cut", "deep", "no list", "no text", "too long"],
)
def test_a_file_that_is_no_proper_notebook_names_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.ipynb"
    path.write_text(text)

    assert model_of_notebook(str(path)) is None


def test_no_other_file_is_read(tmp_path: Path) -> None:
    assert model_of_notebook(write_notebook(tmp_path / "a.txt", "%%sollol demo\nHello")) is None
    assert model_of_notebook(str(tmp_path / "missing.ipynb")) is None
    assert model_of_notebook(None) is None


def test_a_file_that_a_folder_names_is_loaded_after_its_settings_were_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SOLLOL_CONFIG", raising=False)
    monkeypatch.setattr(config, "user_settings_file", lambda: tmp_path / "user" / FILE_NAME)
    monkeypatch.setenv("SOLLOL_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    settings = tmp_path / FILE_NAME
    settings.write_text('preload = true\nmodel = "own.gguf"\n[models]\nsent = "sent.gguf"\n')

    def may_load_each() -> list[bool]:
        model = config.find("model")
        named = may_load("sent"), may_load("sent", model.source), may_load(model.value, model.source)
        return [*named, config.default("preload")]

    assert may_load_each() == [False, False, False, False]
    assert may_load("demo", str(settings)), "a name may be loaded whoever names it"
    assert not may_load("/a/model.gguf"), "of a notebook's cell"
    assert may_load("/a/model.gguf", config.IN_NOTEBOOK)
    assert may_load("/a/model.gguf", "SOLLOL_MODEL")

    consent.give(read_settings(settings), config.consent_folder())
    assert may_load_each() == [True, True, True, True]


# --- in a kernel ------------------------------------------------------------------------------

ASK = "%%sollol demo:sharded --temperature 0 --max-tokens 8\nWhat is a worker?"


@pytest.fixture
def proxy(engine: Engine) -> Iterator[MeteredWire]:
    """A proxy to a worker, which stops in the middle of the demo model."""
    port = unused_port()
    with worker_on(engine, "127.0.0.1", port):
        wire = MeteredWire(port, allowed_bytes=2_000_000)
        run_blocking(wire.__aenter__())
        try:
            yield wire
        finally:
            run_blocking(wire.__aexit__())


def servers_of(notebook: Kernel) -> list[int]:
    """Process ids of the coordinators below a kernel."""
    return [server.pid for server in engines_of(psutil.Process(notebook.pid), "llama-server")]


@pytest.mark.engine
def test_a_cell_waits_for_the_rest_and_its_interrupt_ends_only_the_cell(
    proxy: MeteredWire, tmp_path: Path
) -> None:
    path = write_notebook(tmp_path / "sent.ipynb", "%load_ext sollol_nb", ASK)
    variables = {"SOLLOL_STATE_DIR": str(tmp_path / "state"), "RPC_BACKENDS": proxy.endpoint}
    with kernel(**variables, SOLLOL_PRELOAD="true", JPY_SESSION_NAME=path, SOLLOL_KEEP_ALIVE="5s") as notebook:
        loading = notebook.run("%load_ext sollol_nb")
        assert loading.status == "ok"
        notebook.wait_shown(loading, "loading demo:sharded")
        eventually(proxy.halted.is_set, "the model is loading")
        assert (servers := servers_of(notebook))

        asked = notebook.client.execute(ASK)
        notebook.collect(asked, until_shown="loading demo:sharded: ")
        notebook.manager.interrupt_kernel()
        assert notebook.collect(asked).error == [
            "RequestCancelledError: demo:sharded: stopped before any text arrived"
        ]
        assert servers_of(notebook) == servers, "it still loads"

        again = notebook.client.execute(ASK)
        notebook.collect(again, until_shown="loading demo:sharded: ")
        run_blocking(proxy.let_through(2**40))
        notebook.wait_shown(loading, "demo:sharded is ready after ")
        assert notebook.collect(again).status == "ok"
        assert servers_of(notebook) == servers, "one coordinator, started once"
        assert notebook.run("%sollol_stop --all").status == "ok"


@pytest.mark.engine
def test_unloading_the_extension_ends_what_is_loading(proxy: MeteredWire, tmp_path: Path) -> None:
    variables = {"SOLLOL_STATE_DIR": str(tmp_path), "RPC_BACKENDS": proxy.endpoint}
    with kernel(**variables, SOLLOL_PRELOAD="1", SOLLOL_MODEL="demo:sharded") as notebook:
        notebook.run("%load_ext sollol_nb")
        eventually(proxy.halted.is_set, "the model is loading")
        assert len(servers_of(notebook)) == 1

        assert notebook.run("%unload_ext sollol_nb").status == "ok"
        eventually(lambda: not servers_of(notebook), "the engine has ended")
        assert notebook.run("import threading").status == "ok"
        assert "preload" not in notebook.value("[thread.name for thread in threading.enumerate()]")


@pytest.mark.engine
def test_what_is_typed_loads_once_and_what_is_set_or_requested_shows_its_line(
    engine: Engine, tmp_path: Path
) -> None:
    def complete(text: str) -> None:
        assert notebook.reply(notebook.client.complete(text, len(text)))["status"] == "ok"

    variables = {"SOLLOL_STATE_DIR": str(tmp_path), "SOLLOL_KEEP_ALIVE": "30s"}
    with kernel(**variables) as notebook:
        notebook.run("%load_ext sollol_nb\nfrom sollol_nb.notebook import router")
        complete("%%sollol demo\nWhat is ")
        assert servers_of(notebook) == [], "nothing is loaded unless the settings say so"

        shown = notebook.run('%config Sollol.preload = "typing"')
        assert (shown.status, shown.displays) == ("ok", []), "this notebook names no model"
        complete("%%sollol de")
        for typed in ("What", "What is", "What is a "):
            complete(f"%%sollol demo\n{typed}")
        eventually(lambda: len(servers_of(notebook)) == 1, "the model of the typed cell loads")
        eventually(
            lambda: notebook.value("[each.model for each in router().coordinators]") == "['demo']", "it is ready"
        )
        # A start is tried again where another process takes its port.
        loads = "sum(event.kind == 'coordinator.ready' for event in router().events.recent())"
        assert notebook.value(loads) == "1"

        notebook.wait_shown(notebook.run("%sollol_cluster preload nosuch"), "nosuch was not loaded: ")
        assert notebook.run("%config Sollol.model = 'demo'\n%config Sollol.preload = True").displays == []
        notebook.wait_shown(notebook.run("%sollol_cluster preload demo"), "demo is ready after ")
        assert notebook.run("%sollol_stop demo").stream == "stopped coordinator demo\n"
        # Another router, whose model is not loaded.
        notebook.wait_shown(notebook.run("%config Sollol.slots = 2"), "demo is ready after ")
        assert len(servers_of(notebook)) == 1
        assert notebook.run("%sollol_stop --all").status == "ok"
