"""The magics in a real Jupyter kernel, on real engines."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from sollol_nb.models.profiles import MODEL_PROFILES
from tests.support.engines import all_end, engines_of, eventually
from tests.support.held_answers import holding
from tests.support.kernels import MAGICS, Kernel, kernel, notebook_kernel

pytestmark = pytest.mark.engine

LEFT_BEHIND = """{
    name: found
    for name, found in {
        "configurables": [c for c in get_ipython().configurables if "sollol" in type(c).__module__],
        "matchers": [m for m in get_ipython().Completer.custom_matchers if "sollol" in m.__module__],
        "events": [
            f for fs in get_ipython().events.callbacks.values() for f in fs if "sollol" in f.__module__
        ],
        "printers": [
            f
            for f in get_ipython().display_formatter.ipython_display_formatter.type_printers.values()
            if "sollol" in f.__module__
        ],
        "threads": [t.name for t in __import__("threading").enumerate() if "sollol" in t.name],
        "accessors": [pd.DataFrame.sollol] if hasattr(pd.DataFrame, "sollol") else [],
    }.items()
    if found
}"""
LONG_QUESTION = "Tell me everything about sharding."


@pytest.fixture(scope="module")
def notebook(engine: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """A kernel with the extension loaded and three workers started."""
    with notebook_kernel(tmp_path_factory.mktemp("kernel"), "%sollol_cluster start 3") as fresh:
        yield fresh


def test_an_answer_streams_into_the_cell_and_ends_as_markdown(notebook: Kernel, tmp_path: Path) -> None:
    goes_on = tmp_path / "goes-on"
    notebook.run(holding(len("Once there was a model"), until=goes_on))
    message_id = notebook.client.execute(f"%%sollol demo:sharded --temperature 0 --out answer\n{LONG_QUESTION}")
    try:
        notebook.collect(message_id, until_shown="Once there was a model")
    finally:
        goes_on.touch()
    shown = notebook.collect(message_id)
    assert shown.status == "ok"
    assert len(shown.displays) == 1, "one display, updated in place"
    assert shown.updates >= 2
    text = notebook.run("print(answer.text)").stream.removesuffix("\n")
    assert shown.markdown.startswith(text)
    assert "llama.cpp-distributed" in shown.markdown
    assert "demo model" in shown.markdown, "it says that it is a demo"
    assert shown.text.startswith(text)


def test_the_sharded_answer_is_the_answer_of_the_unsharded_model(notebook: Kernel) -> None:
    for model in ("demo", "demo:sharded"):
        variable = model.replace(":", "_")
        notebook.run(f"%%sollol {model} --temperature 0 --max-tokens 60 --out {variable}\nWhat is a worker?")
    assert notebook.value("demo.text == demo_sharded.text, len(demo.text) > 20") == "(True, True)"
    assert notebook.value("demo.routing['backend']") == "'llama.cpp-local'"
    assert notebook.value("demo_sharded.routing['backend']") == "'llama.cpp-distributed'"


def test_asking_again_does_not_load_again(notebook: Kernel) -> None:
    notebook.run("%%sollol demo:sharded --max-tokens 5\nHello!")
    notebook.run("%%sollol demo:sharded --max-tokens 5 --out again\nHello!")
    assert notebook.value("again.routing['load_ms'], again is _") == "(None, True)"


def test_the_line_form_takes_the_prompt_on_the_line(notebook: Kernel) -> None:
    for prompt in ("'What is a worker?'", "What's a worker"):
        shown = notebook.run(f"%sollol demo:sharded --temperature 0 --max-tokens 20 {prompt}")
        assert "worker" in shown.markdown


def test_the_cluster_shows_workers_and_the_layer_map(notebook: Kernel) -> None:
    notebook.run("%%sollol demo:sharded --max-tokens 5\nHello!")
    shown = notebook.run("%sollol_cluster")
    assert shown.displays[-1]["text/html"].count("bgcolor") == 3
    as_text = notebook.run("%sollol_cluster --text").stream
    for text in (shown.text, as_text):
        assert "  0-3            127.0.0.1:" in text
        assert text.count("  4 units  ") == 2
        assert text.count("  5 units  ") == 1
        assert text.count("held by demo:sharded") == 3


def test_the_latency_magic_gives_the_frame(notebook: Kernel) -> None:
    notebook.run("%%sollol demo:sharded --max-tokens 5\nHello!")
    assert notebook.run("frame = %sollol_latency --model demo:sharded --last 1").status == "ok"
    assert notebook.value("(len(frame), frame.status[0], frame.layout[0], frame.completion_tokens[0] <= 5)") == (
        "(1, 'ok', '4/4/5', np.True_)"
    )


def test_the_route_magic_shows_the_route_its_reason_and_the_plan(notebook: Kernel) -> None:
    route, plan, *_ = notebook.run("%sollol_route demo:sharded").stream.splitlines()
    assert route == (
        "demo:sharded → sharded llama-server: listed in MODEL_PROFILES as needing sharding"
        " (a tiny demo model, not a general one)"
    )
    assert plan.startswith("plan: 12 layers over ")
    assert "standby" not in notebook.run("%sollol_route demo:sharded").stream, "the setting is off"
    assert "demo → local llama-server" in notebook.run("%sollol_route demo").stream


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("%%sollol nosuchmodel\nHello", "ModelNotFoundError: nosuchmodel is not available"),
        ("%%sollol /no/such/file.gguf\nHello", "ModelFileError: /no/such/file.gguf does not exist"),
        ("%%sollol demo --top-p 7\nHello", "ConfigError: option top_p=7.0 must be a number from 0 to 1"),
        ("%sollol_cluster add nonsense:port", "ConfigError: 'nonsense:port' is not an endpoint"),
        ("%sollol_route", "UsageError: %sollol_route: model is missing; see %sollol_route? for the options"),
        (
            "%%sollol demo --max-tokens many\nHello",
            "UsageError: %%sollol: --max-tokens takes a whole number such as",
        ),
        (
            "%%sollol demo --tempratur 1\nHello",
            "UsageError: %%sollol: unknown option --tempratur; did you mean --temp",
        ),
        ("%%sollol demo\n  ", "UsageError: the prompt is empty"),
        ("%%sollol demo --out 1x\nHello", "UsageError: '1x' (--out) is not a valid variable name"),
        ("%sollol_cluster start many", "UsageError: start takes one number of workers, not 'many'"),
        ("%sollol_cluster --scan 10.0.0.0/24", "UsageError: --scan is an option of discover: "),
        ("%sollol_cluster revoke --uses 2", "UsageError: --uses is an option of invite: "),
        ("%sollol_cluster discover gpu1", "UsageError: discover takes no names, but 'gpu1' was given; "),
        ("%sollol_cluster stop nosuch", "UsageError: this notebook runs no coordinator or worker called nosuch"),
    ],
)
def test_errors_are_one_line(notebook: Kernel, cell: str, message: str) -> None:
    shown = notebook.run(cell)
    lines = shown.error or shown.stream.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(message)


def test_the_stop_button_cancels_on_the_engine_and_keeps_the_text(notebook: Kernel, endless: str) -> None:
    ask = f"%%sollol {endless} --backend sharded --temperature 0"
    message_id = notebook.client.execute(f"{ask} --max-tokens 30000 --out cut\nGo on.")
    notebook.collect(message_id, until_shown=r"w\d+ w\d+")
    notebook.manager.interrupt_kernel()
    shown = notebook.collect(message_id)
    assert shown.error == ["RequestCancelledError: endless: stopped; the partial answer is kept"]
    assert notebook.value("cut.finish_reason, len(cut.text) > 0") == "('cancelled', True)"
    notebook.run("from sollol_nb.runtime.io_loop import run_blocking\nfrom sollol_nb.notebook import router")
    busy = "sum(slot['is_processing'] for slot in run_blocking(router().coordinators[-1]._client.get('/slots')))"
    eventually(lambda: notebook.value(busy) == "0", "the slot is free")
    status = "router().latency.frame().status.iloc[-1]"
    eventually(lambda: notebook.value(status) == "'cancelled'", "its row is written")
    assert notebook.run(f"{ask} --max-tokens 5 --out again\nHello!").status == "ok"
    assert notebook.value("cut.routing['backend'], again.routing['load_ms']") == "('llama.cpp-distributed', None)"
    assert notebook.run("%sollol_stop endless").stream == "stopped coordinator endless\n"


def test_asyncio_run_works_in_cells_including_queued_ones(notebook: Kernel) -> None:
    """The guide's Example 4 as it stands, two cells sent together."""
    code = (
        "import asyncio\n"
        "from sollol_nb import HybridRouter, OllamaPool\n"
        "async def ask():\n"
        "    pool = await OllamaPool.auto_configure()\n"
        "    async with HybridRouter(ollama_pool=pool, num_rpc_backends=2, auto_setup_rpc=True,"
        " auto_discover_rpc=False) as router:\n"
        "        response = await router.route_request(model='demo:sharded',"
        " messages=[{'role': 'user', 'content': 'What is a worker?'}], max_tokens=10)\n"
        "    print(response['_routing']['backend'], bool(response['message']['content']))\n"
        "asyncio.run(ask())"
    )
    first = notebook.client.execute(code)
    second = notebook.client.execute("print('second cell')")
    assert notebook.collect(first).stream == "llama.cpp-distributed True\n"
    assert notebook.collect(second).stream == "second cell\n"
    assert notebook.run("await ask()").stream == "llama.cpp-distributed True\n"


def test_the_blocking_api_works_in_the_running_loop_of_a_kernel(notebook: Kernel) -> None:
    code = (
        "from sollol_nb.notebook import router\n"
        "chunks = list(router().stream('demo:sharded', 'Hello!', max_tokens=5))\n"
        "print(len(chunks) > 1, chunks[-1]['done'])"
    )
    assert notebook.run(code).stream == "True True\n"


def test_unloading_leaves_nothing_behind(engine: object, tmp_path: Path) -> None:
    with kernel(SOLLOL_STATE_DIR=str(tmp_path)) as fresh:
        fresh.run("import asyncio, asyncio.events, asyncio.tasks, asyncio.futures")
        fresh.run("loop = type(asyncio.get_running_loop())")
        snapshot = (
            "{**{('asyncio', k): v for k, v in vars(asyncio).items()},"
            " **{('loop', k): v for c in loop.__mro__ for k, v in vars(c).items()}}"
        )
        fresh.run(f"before = {snapshot}")
        for command in ("%load_ext sollol_nb", "%reload_ext sollol_nb"):
            assert fresh.run(command).error == []
            assert (
                fresh.value(f"all(m in get_ipython().magics_manager.magics['line'] for m in {MAGICS})") == "True"
            )
            assert fresh.run("asyncio.run(asyncio.sleep(0, 'nested'))").text == "'nested'"
        fresh.run("%sollol_cluster start 2\nimport pandas as pd")
        fresh.run("%sollol demo:sharded --max-tokens 5 --chat tour Hello\n%sollol demo --background Hello")
        fresh.run("%config Sollol.max_tokens = 7")
        assert fresh.value("[*" + LEFT_BEHIND + "]") == (
            "['configurables', 'matchers', 'events', 'threads', 'accessors']"
        )
        assert len(engines_below(fresh.pid)) >= 3
        assert fresh.run("%unload_ext sollol_nb").error == []
        assert fresh.run(f"after = {snapshot}").error == []
        assert fresh.value(LEFT_BEHIND) in ("{}", "{'threads': ['sollol_nb journal']}")
        eventually(lambda: fresh.value(LEFT_BEHIND) == "{}", "the journal's thread has ended, too")
        assert (
            fresh.value("[k for k in before.keys() | after.keys() if before.get(k) is not after.get(k)]") == "[]"
        )
        assert engines_below(fresh.pid) == []
        for magic in MAGICS:
            assert "not found" in fresh.run(f"%{magic}").stream
        assert "cannot be called from a running event loop" in fresh.run("asyncio.run(asyncio.sleep(0))").error[-1]
        fresh.run("from sollol_nb.errors import ConfigError")
        assert len(fresh.run("raise ConfigError('long again')").error) > 1


def test_unloading_keeps_engines_running_if_so_configured(engine: object, tmp_path: Path) -> None:
    with kernel(SOLLOL_STATE_DIR=str(tmp_path), SOLLOL_KEEP_ALIVE="60s") as fresh:
        fresh.run("%load_ext sollol_nb\n%sollol_cluster start 1\n%sollol demo:sharded --max-tokens 5 Hello")
        fresh.run("%config Sollol.on_unload = 'keep'")
        before = engines_below(fresh.pid)
        assert len(before) == 2
        assert fresh.run("%unload_ext sollol_nb").error == []
        assert engines_below(fresh.pid) == before
        assert fresh.run("%load_ext sollol_nb").error == []
        assert fresh.run("%sollol demo:sharded --max-tokens 5 --out again Hello").error == []
        assert engines_below(fresh.pid) == before, "the new router adopts them"
        assert fresh.run("%sollol_stop --all").error == []


def test_a_changed_router_setting_applies_to_the_next_request(engine: object, tmp_path: Path) -> None:
    with kernel(SOLLOL_STATE_DIR=str(tmp_path), SOLLOL_KEEP_ALIVE="60s") as fresh:
        fresh.run("%load_ext sollol_nb\n%sollol_cluster start 2")
        workers = set(engines_below(fresh.pid))
        assert fresh.run("%config Sollol.num_workers = 1").error == []
        assert fresh.run("%sollol demo:sharded --max-tokens 5 --out a Hello").error == []
        assert fresh.value("a.routing['layout']") == "'13'"
        assert fresh.run("%config Sollol.num_workers = 2").error == []
        assert fresh.run("%config Sollol.strategy = 'even'").error == []
        assert workers <= set(engines_below(fresh.pid))
        assert fresh.run("%sollol_stop demo:sharded").error == []
        assert fresh.run("%sollol demo:sharded --max-tokens 5 --out a Hello").error == []
        assert fresh.value("a.routing['layout'], a.routing['plan']['strategy']") == "('7/6', 'even')"
        assert workers <= set(engines_below(fresh.pid)), "the new router took over the workers"
        assert fresh.run("%sollol_stop --all").error == []


def test_nested_loops_can_be_switched_off() -> None:
    with kernel(SOLLOL_NEST_ASYNCIO="0") as fresh:
        fresh.run("%load_ext sollol_nb\nimport asyncio")
        assert "cannot be called from a running event loop" in fresh.run("asyncio.run(asyncio.sleep(0))").error[-1]


def test_an_invalid_setting_of_nested_loops_is_an_error_but_all_else_is_loaded() -> None:
    with kernel(SOLLOL_NEST_ASYNCIO="perhaps") as fresh:
        shown = fresh.run("%load_ext sollol_nb")
        assert len(shown.error) == 1
        assert shown.error[0].startswith("ConfigError: SOLLOL_NEST_ASYNCIO")
        fresh.run("import pandas as pd\nfrom sollol_nb.runtime.progress_bars import progress_bar")
        bar = "type(progress_bar(total=1)).__name__"
        assert fresh.value(f"hasattr(pd.DataFrame, 'sollol'), {bar}") == "(True, 'TextBar')"


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("%%sollol llama3.1:", {"llama3.1:8b", "llama3.1:70b", "llama3.1:405b"}),
        ("%%sollol demo", {"demo", "demo:sharded"}),
        ("%sollol_route mix", {"mixtral:8x7b"}),
        ("%%sollol installed", {"installed-here:7b"}),
        ("%%sollol demo Hel", set()),
    ],
)
def test_model_names_complete_from_profiles_and_installed_models(
    notebook: Kernel, typed: str, completed: set[str]
) -> None:
    manifest = Path(os.environ["OLLAMA_MODELS"], "manifests/registry.ollama.ai/library/installed-here/7b")
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text("{}")

    def offered() -> set[str]:
        content = notebook.reply(notebook.client.complete(typed))
        typed_up_to_there = typed[: content["cursor_start"]]
        model = typed_up_to_there.split()[-1] if not typed_up_to_there.endswith(" ") else ""
        names = {f"{model}{match}" for match in content["matches"]}
        # After a colon IPython offers its own completions too.
        return names & {*MODEL_PROFILES, "installed-here:7b"}

    eventually(lambda: offered() == completed, f"{typed!r} is completed by {completed}")


def test_two_kernels_share_a_coordinator_and_no_engine_is_left_after_them(engine: object, tmp_path: Path) -> None:
    variables = {"SOLLOL_STATE_DIR": str(tmp_path), "SOLLOL_KEEP_ALIVE": "20s"}
    with kernel(**variables) as first, kernel(**variables) as second:
        for each in (first, second):
            assert each.run("%load_ext sollol_nb").status == "ok"
        assert first.run("%sollol_cluster start 2").status == "ok"
        ask = "%%sollol demo:sharded --temperature 0 --max-tokens 30 --out answer\nWhat is a worker?"
        for each in (first, second):
            assert each.run(ask).status == "ok"
        assert first.value("answer.text") == second.value("answer.text")
        url = "answer.routing['coordinator_url']"
        assert first.value(url) == second.value(url)
        footers = [kernel_.value("answer.footer()") for kernel_ in (first, second)]
        assert [("already loaded" in footer, "loaded in" in footer) for footer in footers] == [
            (False, True),
            (True, False),
        ]
        assert f"the model had been loaded by a notebook (process {first.pid})" in second.run("answer").markdown
        assert second.run("from sollol_nb.notebook import router\nc = router().cluster()").status == "ok"
        engines = engines_below(first.pid)
        assert len(engines) == 3
        assert engines_below(second.pid) == [], "it adopted the engines of the first kernel"
        assert "held by demo:sharded" in second.run("%sollol_cluster --text").stream

        psutil.Process(first.pid).kill()
        assert second.run(ask).status == "ok", "the first kernel is not needed any more"
        listed = subprocess.run(
            [Path(sys.executable).with_name("sollol-nb"), "ps"],
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert [line.split()[:2] for line in listed.splitlines()[1:]] == [
            ["coordinator", "demo:sharded"],
            *(["worker", worker] for worker in eval(second.value("[w.endpoint for w in c.workers]"))),
        ]
        second.manager.shutdown_kernel(now=False)
        all_end(engines)


def test_stop_ends_this_kernels_coordinators_or_everything(notebook: Kernel) -> None:
    notebook.run("%%sollol demo:sharded --max-tokens 5\nHello!")
    assert "no coordinator" not in notebook.run("%sollol_cluster --text").stream
    assert "coordinator demo:sharded" in notebook.run("%sollol_stop").stream
    assert notebook.run("%sollol_stop").stream == "nothing is running\n"
    notebook.run("%%sollol demo:sharded --max-tokens 5\nHello!")
    assert notebook.run("%sollol_stop demo:sharded").stream == "stopped coordinator demo:sharded\n"
    assert (
        notebook.run("%sollol_stop nosuch").error[-1].startswith("ConfigError: nothing named 'nosuch' is running ")
    )
    assert notebook.run("%sollol_stop --all").stream.count("worker 127.0.0.1:") == 3
    assert notebook.run("%sollol_cluster start 3").status == "ok"


def test_in_a_terminal_the_answer_is_printed_while_it_streams(engine: object, tmp_path: Path) -> None:
    code = (
        "%load_ext sollol_nb\n"
        "%sollol_cluster start 2\n"
        "%sollol demo:sharded --temperature 0 --max-tokens 60 'What is a worker?'\n"
        "%sollol_cluster --text\n"
        "%sollol_stop --all\n"
        "exit()\n"
    )
    ended = subprocess.run(
        [sys.executable, "-m", "IPython", "--simple-prompt", "--colors=nocolor", "--no-banner"],
        input=code,
        capture_output=True,
        text=True,
        timeout=120,
        # A separate state folder, in which there are only the two workers that it starts.
        env={**os.environ, "IPYTHONDIR": str(tmp_path), "SOLLOL_STATE_DIR": str(tmp_path / "state")},
        check=True,
    )
    assert "worker" in ended.stdout
    assert "llama.cpp-distributed" in ended.stdout
    assert ended.stdout.count("held by demo:sharded") == 2


def engines_below(pid: int) -> list[psutil.Process]:
    """Engine processes among the descendants of a process."""
    return engines_of(psutil.Process(pid))
