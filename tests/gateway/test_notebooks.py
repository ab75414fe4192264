"""Kernels that use a gateway: the magics work as with own engines, and answers survive its restart."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil
import pytest

from sollol_nb.gateway.keys import Key, add_key
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.models.files import DEMO_MODEL_PATH
from tests.chaos.machines import Cluster
from tests.support.engines import engines_of, eventually
from tests.support.gateway import GatewayProcess, RestartableGateway, own_gateway
from tests.support.kernels import MAGICS, Kernel, kernel
from tests.support.magic_examples import run_examples

pytestmark = pytest.mark.engine
LENGTH = 500
"""In tokens: two such answers fit the context."""
HELD_AFTER = 200
"""Results of a worker, each of one token for each answer. They are enough for both notebooks to show some text."""
posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")


def loaded(fresh: Kernel, *cells: str) -> Kernel:
    """The kernel after it has loaded the extension and run these cells."""
    for cell in ("%load_ext sollol_nb", *cells):
        shown = fresh.run(cell)
        assert shown.status == "ok", shown.error
    return fresh


@pytest.fixture(scope="module")
def gateway(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[GatewayProcess]:
    """A gateway with its own state: the examples measure its workers and stop its models, which would decide the
    layouts of other modules' models."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("demo.gguf", "other.gguf"):
        shutil.copyfile(DEMO_MODEL_PATH, folder / name)
    settings = {"SOLLOL_AUTO_SETUP": "1", "SOLLOL_MODEL_DIRS": str(folder)}
    with own_gateway(tmp_path_factory.mktemp("gateway"), **settings) as running:
        yield running


@pytest.fixture(scope="module")
def notebook(gateway: GatewayProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """A kernel without an engine, in an empty folder, that uses the gateway by its setting."""
    folder = tmp_path_factory.mktemp("kernel")
    variables = {
        "SOLLOL_STATE_DIR": str(folder / "state"),
        "SOLLOL_GATEWAY": gateway.url,
        "SOLLOL_LLAMA_CPP": str(folder),  # there is none
    }
    with kernel(**variables) as fresh:
        yield loaded(fresh, f"%cd -q {folder}")


@pytest.mark.parametrize("magic", [magic for magic in MAGICS if magic not in ("sollol_connect", "sollol_bench")])
def test_the_examples_of_a_magic_run_over_a_gateway(notebook: Kernel, magic: str) -> None:
    run_examples(notebook, magic)
    assert engines_of(psutil.Process(notebook.pid)) == []


def test_a_benchmark_over_a_gateway_takes_no_layouts(notebook: Kernel) -> None:
    assert notebook.run("%sollol_bench demo --prompts 1 --repeat 1 --warmup 0 --max-tokens 4").status == "ok"
    refused = notebook.run("%sollol_bench demo:sharded --layouts 1,2")
    assert "models are measured as it runs them" in refused.error[0]


def test_files_that_the_gateway_finds_are_listed_by_name_and_pulled_there(
    notebook: Kernel, gateway: GatewayProcess
) -> None:
    assert notebook.run("frame = %sollol_models other").error == []
    assert notebook.value("list(frame['model'])") == "['other']"
    listed = [model["id"] for model in httpx.get(f"{gateway.url}/v1/models").json()["data"]]
    assert "other" in listed
    assert [name for name in listed if "/" in name] == []  # the file whose name is taken
    tags = [model["name"] for model in httpx.get(f"{gateway.url}/api/tags").json()["models"]]
    assert [name for name in tags if "/" in name] == []
    refused = notebook.run("%sollol_models pull hf.co/user/repo").stream
    assert f"uses the gateway {gateway.url}; on its machine, run: sollol-nb pull hf.co/user/repo" in refused


def test_a_connection_is_made_shown_and_ended(notebook: Kernel, gateway: GatewayProcess) -> None:
    shown = notebook.run("%sollol_connect")
    assert shown.stream.startswith(f"connected to {gateway.url} (sollol_nb ")
    assert notebook.run("%sollol_connect --off").stream == "this kernel uses its own engines\n"
    failed = notebook.run("%sollol demo Hello")
    assert "SOLLOL_LLAMA_CPP" in failed.error[0]
    assert notebook.run(f"%sollol_connect {gateway.url.removeprefix('http://')}").stream == shown.stream
    assert notebook.run('%sollol demo "Hello!" --max-tokens 2').status == "ok"
    wrong = notebook.run("%sollol_connect 127.0.0.1:9")
    assert wrong.error[0].startswith("GatewayUnavailableError: no gateway answers at http://127.0.0.1:9: cannot")
    assert notebook.run("%sollol_connect").stream == shown.stream  # nothing has changed
    assert "use a URL such as http://head:11440" in notebook.run("%sollol_connect http://a:b:c").error[0]


def test_two_notebooks_share_one_loaded_model(notebook: Kernel, gateway: GatewayProcess, tmp_path: Path) -> None:
    with kernel(SOLLOL_STATE_DIR=str(tmp_path)) as fresh:
        other = loaded(fresh, f"%sollol_connect {gateway.url}")
        first = notebook.run('%sollol demo:sharded "What is a worker?" --temperature 0')
        second = other.run('%sollol demo:sharded "What is a worker?" --temperature 0 --out answer')
        assert first.markdown.partition("\n\n")[0] == second.markdown.partition("\n\n")[0]
        assert other.value("answer.routing['load_ms'] is None") == "True"
        text = other.run("%sollol_cluster --text").stream
        assert text.count("demo:sharded  ● ready") == 1
        frame = other.value("(lambda frame: (len(frame), frame['model'][0]))(get_ipython().run_line_magic("
                            "'sollol_latency', ''))")  # fmt: skip
        assert frame == "(1, 'demo:sharded')"


def test_the_status_of_a_cell_follows_the_gateway(notebook: Kernel) -> None:
    notebook.run("%sollol_stop\nimport time\nstopped_at = time.time()")
    shown = notebook.run('%sollol demo "Hello!" --max-tokens 2')
    assert shown.updates > 0
    recent = "__import__('sollol_nb.notebook').notebook.router().events.recent()"
    kinds = f"[event.kind for event in {recent} if event.at >= stopped_at]"
    eventually(lambda: "coordinator.ready" in notebook.value(kinds), "the gateway's event is here")


def test_the_widget_shows_the_gateways_cluster(notebook: Kernel) -> None:
    notebook.run('%sollol demo:sharded "Hello!" --max-tokens 2')
    shown = notebook.run("widget = %sollol_cluster\nwidget")
    assert any("application/vnd.jupyter.widget-view+json" in display for display in shown.displays)
    is_on_map = "'demo:sharded' in str(widget.map.current()['coordinators'])"
    eventually(lambda: notebook.value(is_on_map) == "True", "the map shows the model")
    chosen = "widget.what_if.model.value"
    eventually(lambda: notebook.value(chosen) == "'demo:sharded'", "a layout can be tried for it")
    notebook.run("widget.close()")


def test_a_key_is_asked_for_and_never_shown(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as before:
        before.setenv("SOLLOL_STATE_DIR", str(tmp_path / "gateway"))
        key = add_key(Key(name="ana"))
    with (
        own_gateway(tmp_path / "gateway", "--require-key") as guarded,
        kernel(SOLLOL_STATE_DIR=str(tmp_path / "kernel")) as fresh,
    ):
        notebook = loaded(fresh)
        asking = f"from sollol_nb import HybridRouter\nHybridRouter(gateway={guarded.url!r}).profile('demo')"
        needs = f"the gateway {guarded.url} needs a key; give it as gateway_key, or as SOLLOL_GATEWAY_KEY"
        assert needs in notebook.run(asking).error[-1]
        message = notebook.client.execute(f"%sollol_connect {guarded.url}", allow_stdin=True)
        asked = notebook.client.get_stdin_msg(timeout=60)["content"]
        assert asked == {"prompt": f"Key of the gateway {guarded.url}: ", "password": True}
        notebook.client.input(key)
        shown = notebook.collect(message)
        assert ", as ana)" in shown.stream
        assert "not change the cluster" in shown.stream
        assert notebook.run('%sollol demo "Hello!" --max-tokens 2').status == "ok"
        refused = notebook.run("%sollol_cluster stop")
        assert refused.error[0].startswith(f"GatewayError: the gateway {guarded.url}: this key may ask, but not")
        outputs = [
            shown.stream,
            notebook.run("%config Sollol").stream,
            notebook.run("%config Sollol.gateway_key").stream + str(notebook.run("%config Sollol.gateway_key")),
            notebook.value("__import__('sollol_nb.notebook').notebook.router()"),
            notebook.value("__import__('sollol_nb.notebook').notebook.settings().gateway_key"),
        ]
        assert not [output for output in outputs if key in output]
        assert "(hidden)" in outputs[1]


@posix
def test_answers_of_two_notebooks_continue_after_the_gateway_was_killed(
    engine: Engine, endless: str, tmp_path: Path
) -> None:
    with Cluster(engine) as cluster, ExitStack() as stack:
        backends = ",".join(machine.wired_endpoint for machine in cluster.machines)
        sharded = {"RPC_BACKENDS": backends, "SOLLOL_THRESHOLD_PARAMS": "0.0001", "SOLLOL_SPECULATION": "off"}
        restartable = RestartableGateway(tmp_path / "gateway", **sharded)
        stack.callback(restartable.close)

        def both_run() -> bool:
            metrics = httpx.get(f"{restartable.url}/metrics").text
            return re.search(r'sollol_requests_running\{.*model="endless".*\} 2\.0', metrics) is not None

        with (
            kernel(SOLLOL_STATE_DIR=str(tmp_path / "a"), SOLLOL_GATEWAY=restartable.url) as first,
            kernel(SOLLOL_STATE_DIR=str(tmp_path / "b"), SOLLOL_GATEWAY=restartable.url) as second,
        ):
            kernels = [loaded(first), loaded(second)]
            for each in kernels:
                assert each.run(f"%sollol {endless} Hello --max-tokens 1").status == "ok"
            (loaded_one,) = httpx.get(f"{restartable.url}/cluster").json()["coordinators"].values()
            worker = cluster.machine(next(iter(loaded_one["segments"])))
            worker.swallow_after(0)
            cell = f"%sollol {endless} Hello --temperature 0 --max-tokens {LENGTH} --out answer"
            messages = [each.client.execute(cell) for each in kernels]
            eventually(both_run, "the engine has both requests")
            worker.swallow_after(HELD_AFTER)  # neither answer comes to an end, however quick the engine is
            for each, message in zip(kernels, messages, strict=True):
                each.collect(message, until_shown=r"w\d+ w\d+")
            restartable.kill()
            worker.pass_again()
            restartable.start()
            for each, message in zip(kernels, messages, strict=True):
                shown = each.collect(message)
                assert shown.status == "ok", shown.error
                assert each.value("answer['eval_count']") == str(LENGTH)
                assert each.value("[each['continued'] for each in answer.routing['failovers']]") == "[True]"
