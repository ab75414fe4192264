"""`%%sollol` in a real kernel, on real engines: its options, its display, its value."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.engines import eventually, write_endless
from tests.support.held_answers import holding
from tests.support.kernels import MAGICS, Kernel, notebook_kernel

pytestmark = pytest.mark.engine

GREEDY = "--temperature 0 --max-tokens 30"


@pytest.fixture(scope="module")
def notebook(engine: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """A kernel with the extension loaded; `demo` runs on a local llama-server."""
    with notebook_kernel(tmp_path_factory.mktemp("kernel")) as fresh:
        yield fresh


@pytest.fixture
def held(notebook: Kernel, tmp_path: Path) -> Iterator[Path]:
    """A file. Until it exists, the answers of the notebook wait after 100 characters."""
    may_continue = tmp_path / "may-continue"
    notebook.run("from sollol_nb.router.active_request import ActiveRequest\nunheld = ActiveRequest._answer")
    notebook.run(holding(100, until=may_continue))
    yield may_continue
    may_continue.touch()
    notebook.run("ActiveRequest._answer = unheld")


# --- values -------------------------------------------------------------------------------------


def test_the_value_of_a_cell_is_the_completion_and_it_is_shown_once(notebook: Kernel) -> None:
    shown = notebook.run(f"%%sollol demo {GREEDY}\nWhat is a worker?")
    assert shown.error == []
    assert len(shown.displays) == 1
    assert notebook.value("(type(_).__name__, _.text[:8], _.route[:15], _.timings['ttft_ms'] > 0)") == (
        "('Completion', 'A worker', 'llama.cpp-local', True)"
    )
    assert notebook.run("_").status == "ok"


def test_a_completion_is_shown_again_in_a_later_cell(notebook: Kernel) -> None:
    notebook.run(f"%%sollol demo {GREEDY} --out again\nWhat is a worker?")
    assert "<summary><small>demo" in notebook.run("again").markdown
    assert "<summary><small>demo" in notebook.run("again").markdown


def test_two_answers_of_one_cell_are_shown_in_later_cells(notebook: Kernel) -> None:
    notebook.run(f"one = %sollol demo {GREEDY} What is a worker\ntwo = %sollol demo {GREEDY} What is a plan")
    for name in ("one", "two"):
        assert "<summary><small>demo" in notebook.run(name).markdown


@pytest.mark.parametrize(
    "cell",
    [
        f"%%sollol demo {GREEDY} --out kept\nWhat is a worker?",
        f"%%sollol kept << demo {GREEDY}\nWhat is a worker?",
        f"%sollol kept << demo {GREEDY} What is a worker",
        f"kept = %sollol demo {GREEDY} What is a worker",
    ],
)
def test_an_answer_can_be_given_a_name(notebook: Kernel, cell: str) -> None:
    notebook.run("kept = None")
    shown = notebook.run(cell)
    assert shown.error == []
    assert len(shown.displays) == 1
    assert notebook.value("kept.text[:8]") == "'A worker'"


def test_two_variables_for_one_answer_are_refused(notebook: Kernel) -> None:
    shown = notebook.run("%%sollol a << demo --out b\nHi")
    assert shown.stream == "UsageError: %%sollol: two variables, a and b; name one of them\n"


def test_quiet_shows_nothing_and_raw_only_the_text(notebook: Kernel) -> None:
    shown = notebook.run(f"%%sollol demo {GREEDY} --quiet --out q\nWhat is a worker?")
    assert (shown.displays, shown.stream) == ([], "")
    shown = notebook.run(f"%%sollol demo {GREEDY} --raw\nWhat is a worker?")
    assert shown.displays == []
    assert repr(shown.stream) == notebook.value("q.text + '\\n'")


@pytest.mark.parametrize(
    ("format_", "kinds"),
    [
        ("markdown", {"text/plain", "text/markdown"}),
        ("text", {"text/plain"}),
        ("code", {"text/plain", "text/markdown"}),
        ("html", {"text/plain", "text/markdown", "text/html"}),
    ],
)
def test_an_answer_is_shown_in_the_requested_format(notebook: Kernel, format_: str, kinds: set[str]) -> None:
    shown = notebook.run(f"%%sollol demo {GREEDY} --format {format_}\nWhat is a worker?")
    assert shown.error == []
    assert set(shown.displays[-1]) == kinds


def test_json_is_requested_from_the_engine_too(notebook: Kernel) -> None:
    shown = notebook.run("%%sollol demo --temperature 0 --max-tokens 60 --format json --out j\nWhat is a worker?")
    assert shown.markdown.startswith("```json\n")
    assert notebook.value("j.text.lstrip()[0]") == "'{'", "a grammar enforces JSON"


# --- expansion ----------------------------------------------------------------------------------


def test_braces_are_expanded_in_the_cell_and_in_options(notebook: Kernel) -> None:
    notebook.run("thing, model, limit = 'worker', 'demo', 8")
    notebook.run(
        "%%sollol {{ model }} --temperature 0 --max-tokens {{ limit * 2 }} --out e --var what=a\n"
        "What is {{ what }} {{ thing }}?"
    )
    assert notebook.value("e.text[:8], e['eval_count']") == "('A worker', 16)"
    assert notebook.run("what").error[-1].startswith("NameError"), "it existed in that cell only"


def test_braces_see_the_variables_of_the_function_that_asks(notebook: Kernel) -> None:
    notebook.run(
        "import asyncio\n"
        "from typing import Literal\n"
        "topic, Kind = 'GLOBAL', int\n"
        "def ask(topic):\n"
        "    Kind = Literal['x', 'y']\n"
        "    shell = get_ipython()\n"
        f'    answer = %sollol demo {GREEDY} --quiet --chat scope --schema Kind "On the line: {{{{ topic }}}}?"\n'
        f"    shell.run_line_magic('sollol', 'demo {GREEDY} --quiet --chat scope A line: {{{{ topic }}}}?')\n"
        f"    shell.run_cell_magic('sollol', 'demo {GREEDY} --quiet --chat scope', 'A cell: {{{{ topic }}}}?')\n"
        "    async def inner():\n"
        f"        %sollol demo {GREEDY} --quiet --chat scope An inner function: {{{{ topic }}}}?\n"
        "    asyncio.run(inner())\n"
        "    return answer.value\n"
        "value = ask('LOCAL')\n"
        f"%sollol demo {GREEDY} --quiet --chat scope At the top: {{{{ topic }}}}?\n"
        "m = %sollol_chat scope --messages"
    )
    assert notebook.value("value in ('x', 'y')") == "True"
    assert notebook.value("[message['content'] for message in m if message['role'] == 'user']") == (
        "['On the line: LOCAL?', 'A line: LOCAL?', 'A cell: LOCAL?', 'An inner function: LOCAL?', "
        "'At the top: GLOBAL?']"
    )


def test_asking_a_magic_for_help_is_no_error(notebook: Kernel) -> None:
    for cell in ("%%sollol demo --help\nHi", *(f"%{magic} -h" for magic in MAGICS)):
        shown = notebook.run(cell)
        assert (shown.status, shown.error) == ("ok", [])
        assert "Example::" in shown.stream


def test_single_braces_and_unexpanded_cells_are_left_alone(notebook: Kernel) -> None:
    for line in ("demo", "demo --no-expand"):
        text = '{"a": {"b": 1}} {x}' + (" {{ nosuch }}" if "no-expand" in line else "")
        assert notebook.run(f"%%sollol {line} {GREEDY}\n{text}").error == []


def test_a_frame_goes_into_the_prompt_as_a_table(notebook: Kernel) -> None:
    notebook.run("import pandas as pd\nf = pd.DataFrame({'city': ['Rome', 'Oslo'], 'people': [2.8, 0.7]})")
    notebook.run("from sollol_nb.text.expansion import expand")
    assert "| Rome | 2.8 |" in notebook.value("expand('{{ f }}', globals())")
    assert notebook.run(f"%%sollol demo {GREEDY}\nDescribe {{{{ f }}}}").error == []


# --- structure ----------------------------------------------------------------------------------


def test_a_schema_constrains_the_answer_and_gives_its_value(notebook: Kernel) -> None:
    notebook.run(
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Part:\n"
        "    kind: __import__('typing').Literal['worker', 'coordinator']\n"
        "    count: int\n"
    )
    shown = notebook.run("%%sollol demo --temperature 0 --schema Part --out s\nWhat is a worker?")
    assert shown.error == []
    assert notebook.value("type(s.value).__name__, s.value.kind in ('worker', 'coordinator')") == "('Part', True)"
    assert shown.markdown.startswith("```json\n{\n  ")


def test_an_answer_becomes_a_frame(notebook: Kernel) -> None:
    notebook.run("import pandas as pd\nexample = pd.DataFrame({'ok': [True], 'side': pd.Categorical(['left'])})")
    notebook.run(
        "schema = {'type': 'object', 'properties': {'ok': {'type': 'boolean'}}, 'required': ['ok'],"
        " 'additionalProperties': False}"
    )
    shown = notebook.run("%%sollol demo --temperature 0 --schema schema --frame --out t\nIs it so?")
    assert shown.error == []
    assert notebook.value("(list(t.columns), len(t), str(t.dtypes['ok']), _ is t)") == "(['ok'], 1, 'bool', True)"
    assert notebook.value("bool(t.attrs['completion'].value['ok'] == t.ok[0])") == "True"
    assert [sorted(bundle) for bundle in shown.displays] == [
        ["text/html", "text/plain"],
        ["text/markdown", "text/plain"],
    ], "the table, then the footer"


def test_an_answer_that_does_not_match_its_schema_is_kept(notebook: Kernel) -> None:
    schema = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
    notebook.run(f"schema = {schema!r}")
    shown = notebook.run("%%sollol demo --temperature 0 --max-tokens 3 --schema schema --out cut\nWhat is it?")
    assert len(shown.error) == 1
    assert shown.error[0].startswith("StructureError: ")
    assert "max-tokens" in shown.error[0] or "max_tokens" in shown.error[0]
    assert notebook.value("len(cut.text) > 0, _ is cut") == "(True, True)"


def test_an_unknown_schema_names_the_nearest(notebook: Kernel) -> None:
    notebook.run("class Person: pass")
    shown = notebook.run("%%sollol demo --schema Persn\nHi")
    assert shown.error == ["ConfigError: --schema Persn: name 'Persn' is not defined; did you mean Person?"]


# --- defaults -----------------------------------------------------------------------------------


def test_defaults_come_from_config(notebook: Kernel) -> None:
    shown = notebook.run("%sollol 'What is a worker?'")
    assert shown.stream.startswith("UsageError: no model given; ")
    notebook.run("%config Sollol.model = 'demo'\n%config Sollol.max_tokens = 4\n%config Sollol.temperature = 0")
    try:
        assert notebook.run("%sollol 'What is a worker?'").error == []
        assert notebook.value("_['eval_count']") == "4"
        assert notebook.run("%%sollol\nWhat is a worker?").error == []
        notebook.run(
            "import pandas as pd, sollol_nb.notebook\n"
            "topics = pd.DataFrame({'topic': ['a worker']})\n"
            "mapped = topics.sollol.map('What is {{ topic }}?', max_tokens=4, temperature=0, progress=False)\n"
            "by_router = sollol_nb.notebook.router().map(['hi'], 'Say {{ item }}', max_tokens=4, progress=False)"
        )
        assert notebook.value("mapped.status[0], by_router.status[0]") == "('ok', 'ok')"
        assert notebook.run("%%sollol --max-tokens 5\nWhat is a worker?").error == []
        assert notebook.value("_['eval_count']") == "5", "the line overrides the setting"
    finally:
        for name in ("model", "max_tokens", "temperature"):
            notebook.run(f"%config Sollol.{name} = None")


def test_whole_tracebacks_can_be_switched_on(notebook: Kernel) -> None:
    assert len(notebook.run("%%sollol nosuch\nHi").error) == 1
    notebook.run("%config Sollol.short_errors = False")
    try:
        assert len(notebook.run("%%sollol nosuch\nHi").error) > 5
    finally:
        notebook.run("%config Sollol.short_errors = None")


# --- stopping -----------------------------------------------------------------------------------


def test_a_stopped_endless_answer_keeps_its_text(notebook: Kernel, held: Path, tmp_path: Path) -> None:
    endless = write_endless(tmp_path)
    message_id = notebook.client.execute(f"%%sollol {endless} --temperature 0 --max-tokens 30000 --out cut\nx")
    notebook.collect(message_id, until_shown=r"w\d+ w\d+")
    notebook.manager.interrupt_kernel()
    shown = notebook.collect(message_id)
    assert shown.error == [f"RequestCancelledError: {endless.stem}: stopped; the partial answer is kept"]
    assert notebook.value("cut.finish_reason, len(cut.text) > 0, _ is cut") == "('cancelled', True, True)"
    assert "stopped" in shown.markdown
    notebook.run("from sollol_nb.runtime.io_loop import run_blocking\nfrom sollol_nb.notebook import router")
    busy = "sum(slot['is_processing'] for slot in run_blocking(router().coordinators[-1]._client.get('/slots')))"
    eventually(lambda: notebook.value(busy) == "0", "the slot is free")


def test_a_long_answer_shows_its_end_while_it_streams_and_is_saved_whole(notebook: Kernel, tmp_path: Path) -> None:
    endless = write_endless(tmp_path)
    goes_on = tmp_path / "goes-on"
    notebook.run(holding(8000, until=goes_on))
    message_id = notebook.client.execute(f"%%sollol {endless} --temperature 0 --max-tokens 2500 --out long\nx")
    try:
        shown = notebook.collect(message_id, until_shown="characters above")
    finally:
        goes_on.touch()
    largest = len(shown.markdown)
    while not shown.status:
        largest = max(largest, len(shown.markdown))
        shown = notebook.collect(message_id, until_shown="characters above")
    assert largest < 7000, "while it streams"
    assert shown.error == []
    assert len(shown.markdown) > int(notebook.value("len(long.text)")), "at the end"


def test_answers_can_be_shown_again(notebook: Kernel) -> None:
    notebook.run(f"%sollol demo {GREEDY} --quiet 'What is a worker?'")
    notebook.run(f"%sollol demo {GREEDY} --quiet --background --out h 'What is a coordinator?'\nh.result(60);")
    shown = notebook.run("%sollol_last")
    assert [bundle["text/plain"][:13] for bundle in shown.displays] == ["> What is a c", "A coordinator"]
    assert "<details" in shown.markdown
    shown = notebook.run("%sollol_last 2")
    assert [bundle["text/plain"][:13] for bundle in shown.displays] == [
        *("> What is a w", "A worker is a"),
        *("> What is a c", "A coordinator"),
    ]
    assert notebook.value("[answer.text[:8] for answer in _]") == "['A worker', 'A coordi']"


# --- conversations ------------------------------------------------------------------------------


def test_a_conversation_continues(notebook: Kernel, tmp_path: Path) -> None:
    ask = f"%%sollol demo {GREEDY} --chat tour\n"
    assert notebook.run(ask + "What is a worker?").error == []
    assert notebook.run(ask + "What is a coordinator?").error == []
    assert notebook.run("m = %sollol_chat tour --messages").error == []
    assert notebook.value("[message['role'] for message in m]") == "['user', 'assistant', 'user', 'assistant']"
    assert "What is a coordinator?" in notebook.run("%sollol_chat tour").text
    assert "tour: 2 turns" in notebook.run("%sollol_chat").text
    saved = tmp_path / "tour.json"
    assert notebook.run(f"%sollol_chat tour --save {saved}").error == []
    assert "What is a worker?" in json.dumps(json.loads(saved.read_text()))
    assert notebook.run(f"%sollol_chat copy --load {saved}").error == []
    assert notebook.run(f"%%sollol demo {GREEDY} --chat tour --reset\nWhat is a layer plan?").error == []
    notebook.run("m = %sollol_chat tour --messages\nc = %sollol_chat copy --messages")
    assert notebook.value("len(m), len(c)") == "(2, 4)"
    assert notebook.run("%sollol_chat tour --clear").error == []
    shown = notebook.run("%sollol_chat tour")
    assert len(shown.error) == 1
    assert shown.error[0].startswith("ConfigError: ")


def test_a_conversation_keeps_its_system_message_whatever_the_default_is(notebook: Kernel) -> None:
    notebook.run("%config Sollol.system = 'Be brief.'")
    try:
        notebook.run(f"%%sollol demo {GREEDY} --chat one --system 'Be a pirate.' --quiet\nHi")
        notebook.run(f"%%sollol demo {GREEDY} --chat two --quiet\nHi")
        for name, system in (("one", "Be a pirate."), ("two", "Be brief.")):
            notebook.run(f"%%sollol demo {GREEDY} --chat {name} --quiet\nAnd?\n")
            notebook.run(f"m = %sollol_chat {name} --messages")
            assert notebook.value("m[0]['content'], len(m)") == f"('{system}', 5)"
    finally:
        notebook.run("%config Sollol.system = None")


# --- in the background --------------------------------------------------------------------------


def test_an_answer_can_run_in_the_background(notebook: Kernel) -> None:
    shown = notebook.run(f"%%sollol demo {GREEDY} --background --out handle\nWhat is a worker?")
    assert shown.error == []
    assert len(shown.displays) == 1
    assert notebook.value("handle.result(60).text[:8], handle.done, handle.state") == "('A worker', True, 'done')"
    assert notebook.run("(await handle).text[:8]").text == "'A worker'"
    assert "A worker" in notebook.run("handle").markdown


def test_a_background_answer_can_be_stopped(notebook: Kernel, held: Path, tmp_path: Path) -> None:
    endless = write_endless(tmp_path)
    notebook.run(f"%%sollol {endless} --temperature 0 --max-tokens 30000 --background --out handle\nx")
    assert notebook.run("import time\nwhile not handle.text: time.sleep(0.01)").error == []
    assert notebook.value("handle.done, handle.state") == "(False, 'writing')"
    shown = notebook.run("handle.result(0.2)")
    assert shown.error == [f"RequestTimeoutError: {endless.stem} has not answered within 0.2 s; it continues"]
    assert notebook.value("handle.cancel()") == "True"
    assert notebook.run("handle.result(30)").error == [
        f"RequestCancelledError: {endless.stem}: stopped; the partial answer is kept"
    ]
    assert notebook.value("handle.completion.finish_reason, handle.cancel(), handle.state") == (
        "('cancelled', False, 'cancelled')"
    )


def test_a_background_answer_is_shown_while_it_streams(notebook: Kernel, held: Path, endless: str) -> None:
    asked = f"%%sollol {endless} --temperature 0 --max-tokens 30000 --background --out handle\nx"
    shown = notebook.run(asked)
    begun = notebook.wait_shown(shown, " w")["text/plain"]
    assert notebook.value("handle.done, handle.state") == "(False, 'writing')"
    assert notebook.value(f"{begun[-40:]!r} in handle.text") == "True"
    assert notebook.value("handle.cancel()") == "True"
    stopped = notebook.wait_shown(shown, "the partial answer is kept")
    assert "</small>" in stopped["text/markdown"], "the footer"
    notebook.run("from sollol_nb.text.safe_markdown import printable")
    assert notebook.value(f"{stopped['text/plain']!r}.startswith(printable(handle.text).lstrip())") == "True"


def test_several_threads_may_ask_at_the_same_time(notebook: Kernel) -> None:
    shown = notebook.run(
        "from concurrent.futures import ThreadPoolExecutor\n"
        "def ask(n):\n"
        "    line = f'demo --temperature 0 --max-tokens {n} --quiet What is a worker?'\n"
        "    return get_ipython().run_line_magic('sollol', line)['eval_count']\n"
        "with ThreadPoolExecutor(4) as threads: counts = list(threads.map(ask, range(5, 13)))"
    )
    assert shown.error == []
    assert notebook.value("counts") == "[5, 6, 7, 8, 9, 10, 11, 12]"
