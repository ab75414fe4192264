"""Tab completion: what is expected in a line, a cache for slow sources, and completions in a real kernel."""

from __future__ import annotations

import argparse
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sollol_nb.models.profiles import MODEL_PROFILES
from sollol_nb.notebook.tab_completion import NameCache
from sollol_nb.notebook.tab_line import Expected, MagicLine, expected, line_at_cursor
from tests.support.engines import HANG_GUARD_S, eventually
from tests.support.kernels import Kernel, kernel
from tests.support.ollama_server import OllamaServer

# --- the line ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("%%sollol ", MagicLine("sollol", (), "")),
        ("%%sollol llama3.1:7", MagicLine("sollol", (), "llama3.1:7")),
        ("%sollol_route demo --ba", MagicLine("sollol_route", ("demo",), "--ba")),
        ("%sollol_latency --model demo ", MagicLine("sollol_latency", ("--model", "demo"), "")),
        ("    %sollol_stop d", MagicLine("sollol_stop", (), "d")),
        ("frame = %sollol_latency --la", MagicLine("sollol_latency", (), "--la")),
        ("a['x'], b = %sollol demo ", MagicLine("sollol", ("demo",), "")),
        ("%%sollol answer << lla", MagicLine("sollol", (), "lla")),
        ("%%sollol answer << demo --t", MagicLine("sollol", ("demo",), "--t")),
        ("%%sollol demo --system 'be short' --s", MagicLine("sollol", ("demo", "--system", "'be short'"), "--s")),
        ('%%sollol "my models/a', MagicLine("sollol", (), '"my models/a')),
        ('%%sollol demo --stop="a b" --t', MagicLine("sollol", ("demo", '--stop="a b"'), "--t")),
        ("%sollol demo What's a wor", MagicLine("sollol", ("demo", "What's", "a"), "wor")),
        ("%sollol_rou", None),
        ("%%sollol", None),
        ("%matplotlib inl", None),
        ("sollol demo", None),
        ("if x == %sollol", None),
        ("", None),
    ],
)
def test_a_line_is_a_magic_and_its_words(text: str, line: MagicLine | None) -> None:
    assert line_at_cursor(text) == line


def parser() -> argparse.ArgumentParser:
    magic = argparse.ArgumentParser(add_help=False)
    magic.add_argument("action", nargs="?", choices=("start", "stop"))
    magic.add_argument("what", nargs="*")
    magic.add_argument("--temperature", type=float)
    magic.add_argument("--top-p", type=float)
    magic.add_argument("--stop", action="append")
    magic.add_argument("--backend", choices=("auto", "local"))
    magic.add_argument("--out")
    magic.add_argument("--raw", "-r", action="store_true")
    return magic


OPTIONS = ("--temperature", "--top-p", "--stop", "--backend", "--out", "--raw")
ACTION = ("cluster.action", "action")
WHAT = ("cluster.what", "what")


def without(*names: str) -> tuple[str, ...]:
    return tuple(option for option in OPTIONS if option not in names)


@pytest.mark.parametrize(
    ("words", "fragment", "at_cursor"),
    [
        pytest.param("", "", Expected("", ACTION, ("start", "stop"), OPTIONS), id="first argument, or an option"),
        pytest.param("", "st", Expected("st", ACTION, ("start", "stop")), id="first argument"),
        pytest.param("stop", "d", Expected("d", ("cluster.stop", *WHAT)), id="argument of a choice"),
        pytest.param("stop demo", "d", Expected("d", ("cluster.stop", *WHAT)), id="second argument of a choice"),
        pytest.param("--raw stop", "d", Expected("d", ("cluster.stop", *WHAT)), id="after a switch"),
        pytest.param("", "--t", Expected("--t", options=OPTIONS), id="option"),
        pytest.param("", "-", Expected("-", options=OPTIONS), id="first dash of an option"),
        pytest.param("--raw", "--", Expected("--", options=without("--raw")), id="each option once"),
        pytest.param(
            "-r", "--", Expected("--", options=without("--raw")), id="each option once, by its short name too"
        ),
        pytest.param("--stop x", "--", Expected("--", options=OPTIONS), id="collecting options again"),
        pytest.param("--temp 1", "--", Expected("--", options=without("--temperature")), id="abbreviated"),
        pytest.param("--out", "a", Expected("a", ("cluster.out", "out")), id="value"),
        pytest.param("--out=x", "st", Expected("st", ACTION, ("start", "stop")), id="value in the same word"),
        pytest.param(
            "", "--out=a", Expected("a", ("cluster.out", "out")), id="value in the same word, unfinished"
        ),
        pytest.param(
            "--backend",
            "",
            Expected("", ("cluster.backend", "backend"), ("auto", "local")),
            id="value with choices",
        ),
        pytest.param("--temperature", "-1", Expected("-1", ("cluster.temperature", "temperature")), id="negative"),
        pytest.param("--out", "--", Expected("--", options=without("--out")), id="missing value"),
        pytest.param("--nosuch", "st", Expected("st", ACTION, ("start", "stop")), id="unknown option"),
        pytest.param("", "--nosuch=x", Expected("--nosuch=x", options=OPTIONS), id="unknown option with a value"),
    ],
)
def test_the_magics_own_parser_says_what_is_expected(words: str, fragment: str, at_cursor: Expected) -> None:
    assert expected(MagicLine("cluster", tuple(words.split()), fragment), parser()) == at_cursor


def test_the_parts_of_an_argument_are_named_by_its_metavar() -> None:
    ask = argparse.ArgumentParser(add_help=False)
    ask.add_argument("words", nargs="*", metavar="MODEL [PROMPT]")

    names = [expected(MagicLine("sollol", ("x",) * count, "y"), ask).names for count in range(3)]

    assert names == [("sollol.model", "model"), ("sollol.prompt", "prompt"), ("sollol.prompt", "prompt")]


def test_nothing_is_expected_after_the_last_argument() -> None:
    route = argparse.ArgumentParser(add_help=False)
    route.add_argument("model")

    assert expected(MagicLine("sollol_route", ("demo",), "x"), route) == Expected("x")


# --- the cache --------------------------------------------------------------------------------


@pytest.fixture
def cache() -> Iterator[NameCache]:
    opened = NameCache()
    yield opened
    opened.close()


def test_a_source_that_hangs_delays_neither_completion_nor_other_sources(cache: NameCache) -> None:
    may_answer = threading.Event()
    asked = []

    def hanging() -> list[str]:
        asked.append("hanging")
        assert may_answer.wait(HANG_GUARD_S)
        return ["late"]

    sources = {"hanging": hanging, "quick": lambda: ["here"]}
    try:
        eventually(
            lambda: cache.names(sources) == {"hanging": (), "quick": ("here",)}, "the quick source is known"
        )
        eventually(lambda: asked, "the other one is asked, in its own thread")
        assert cache.names(sources) == {"hanging": (), "quick": ("here",)}
        assert not may_answer.is_set()
        assert asked == ["hanging"], "it is not asked again before it has answered"
    finally:
        may_answer.set()
    eventually(lambda: cache.names(sources)["hanging"] == ("late",), "the late names are known")


def test_a_broken_source_keeps_its_last_names(cache: NameCache) -> None:
    answers = iter([["one"]])

    def breaking() -> list[str]:
        return next(answers)  # StopIteration from the second time on

    eventually(lambda: cache.names({"source": breaking}) == {"source": ("one",)}, "its names are known")
    for _ in range(20):
        assert cache.names({"source": breaking}) == {"source": ("one",)}


def test_changes_in_a_quick_source_are_seen(cache: NameCache) -> None:
    now = ["one"]
    eventually(lambda: cache.names({"source": lambda: list(now)}) == {"source": ("one",)}, "its names are known")
    now.append("two")
    eventually(
        lambda: cache.names({"source": lambda: list(now)}) == {"source": ("one", "two")}, "the change is known"
    )


def test_a_closed_cache_reads_nothing_and_leaves_no_thread() -> None:
    cache = NameCache()
    may_answer = threading.Event()
    cache.refresh({"slow": lambda: [str(may_answer.wait(HANG_GUARD_S))]})
    may_answer.set()
    cache.close()
    asked: list[str] = []

    assert cache.names({"other": lambda: asked}) == {"other": ()}
    assert cache.refresh({"other": lambda: asked}) == []
    eventually(lambda: not completion_threads(), "its threads have ended")


def completion_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if "completion" in thread.name]


# --- in a kernel ------------------------------------------------------------------------------

STORED = "installed-here:7b"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GGUF files (by name), other files, and a folder with a space."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("tiny.gguf", "big-00001-of-00002.gguf", "big-00002-of-00002.gguf", "notes.txt", ".hidden.gguf"):
        (folder / name).touch()
    (folder / "my models").mkdir()
    (folder / "my models" / "one.gguf").touch()
    return folder


@pytest.fixture(scope="module")
def notebook(folder: Path) -> Iterator[Kernel]:
    """A kernel with the extension loaded, some variables, and one model in Ollama's storage."""
    manifest = Path(os.environ["OLLAMA_MODELS"], "manifests/registry.ollama.ai/library/installed-here/7b")
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text("{}")
    code = f"""\
%load_ext sollol_nb
%cd -q {folder}
import dataclasses, enum
import pandas as pd
import sollol_nb.chat.completion
from sollol_nb.notebook import tab_completion
@dataclasses.dataclass
class Town:
    name: str
class Color(enum.Enum):
    RED = 1
townsfolk, townlist, towns = {{"type": "object"}}, [1], pd.DataFrame()
answered = sollol_nb.chat.completion.Completion.__new__(sollol_nb.chat.completion.Completion)
tab_completion.install(
    get_ipython(),
    lambda: ["running-model:1b"],
    chats=lambda: ["tour", "trip"],
    workers=lambda: ["127.0.0.1:50052"],
    ollama_models=lambda: ["on-a-node:3b"],
)
"""
    with kernel(SOLLOL_MODEL_DIRS=str(folder / "my models")) as fresh:
        assert fresh.run(code).error == []
        yield fresh


def completed(notebook: Kernel, typed: str) -> list[str]:
    """The whole line after each completion that the kernel offers."""
    content = notebook.reply(notebook.client.complete(typed))
    assert content["cursor_end"] == len(typed)
    return [typed[: content["cursor_start"]] + match for match in content["matches"]]


@pytest.mark.parametrize(
    ("typed", "ends"),
    [
        ("%%sollol llama3.1:", ["llama3.1:405b", "llama3.1:70b", "llama3.1:8b"]),
        ("%%sollol llama3.1:7", ["llama3.1:70b"]),
        ("%%sollol answer << mix", ["mixtral:8x7b"]),
        ("x = %sollol dem", ["demo", "demo:sharded"]),
        ("print(1)\n%sollol_route mix", ["mixtral:8x7b"]),
        ("%sollol_latency --model mix", ["mixtral:8x7b"]),
        ("%sollol_profile Mix", ["mixtral:8x7b"]),
        ("%%sollol inst", [STORED]),
        ("%%sollol on-a", ["on-a-node:3b"]),
        ("%%sollol one", ["one"]),
        ("%sollol_models on", ["on-a-node:3b", "one"]),
        ("%%sollol runn", ["running-model:1b"]),
        ("%sollol_stop runn", ["running-model:1b"]),
        ("%sollol_stop 127.0.0.1:5", ["127.0.0.1:50052"]),
        ("%sollol_cluster stop runn", ["running-model:1b"]),
        ("%sollol_cluster remove 127", ["127.0.0.1:50052"]),
        ("%sollol_cluster sta", ["start"]),
        ("%sollol_bench demo --strategies even,me", ["even,memory_aware"]),
        ("%%sollol demo --temp", ["--temperature"]),
        ("%%sollol demo --priority be", ["below-normal"]),
        ("%%sollol demo --backend sh", ["sharded"]),
        ("%%sollol demo --chat t", ["tour", "trip"]),
        ("%sollol_chat to", ["tour"]),
        ("%%sollol demo --schema ", ["Color", "Town", "towns", "townsfolk"]),
        ("%%sollol demo --out ans", ["answered"]),
        ("%%sollol tin", ["tiny.gguf"]),
        ("%%sollol ./b", ["./big-00001-of-00002.gguf"]),
        ("%%sollol ./.h", ["./.hidden.gguf"]),
        ("%%sollol my", ['"my models/']),
        ('%%sollol "my models/', ['"my models/one.gguf"']),
        ("%sollol_chat tour --load no", ["notes.txt"]),
    ],
)
def test_tab_completes_what_is_expected(notebook: Kernel, typed: str, ends: list[str]) -> None:
    line_start = typed[: typed.rfind(" ", 0, typed.find('"') if '"' in typed else None) + 1]
    lines = sorted((line_start + end for end in ends), key=str.casefold)
    eventually(lambda: completed(notebook, typed) == lines, f"{typed!r} is completed as {lines}")


def test_an_empty_word_is_completed_by_all_models(notebook: Kernel) -> None:
    expected = {
        *MODEL_PROFILES,
        STORED,
        "on-a-node:3b",
        "one",
        "running-model:1b",
        "tiny.gguf",
        "big-00001-of-00002.gguf",
    }
    eventually(
        lambda: {line.removeprefix("%%sollol ") for line in completed(notebook, "%%sollol ")} == expected,
        f"all of {expected}",
    )


def test_each_option_of_the_magic_is_offered_once(notebook: Kernel) -> None:
    options = {line.split()[-1] for line in completed(notebook, "%%sollol demo --seed 1 ")}
    assert {"--temperature", "--top-p", "--stop", "--out"} <= options
    assert "--seed" not in options
    assert all(option.startswith("--") for option in options)


def test_the_line_oriented_api_of_terminals_gives_whole_names_too(notebook: Kernel) -> None:
    line = "%%sollol llama3.1:"
    assert notebook.value(f"get_ipython().complete(None, {line!r}, {len(line)})") == (
        "('llama3.1:', ['llama3.1:405b', 'llama3.1:70b', 'llama3.1:8b'])"
    )


@pytest.mark.parametrize(
    "typed", ["%%sollol ~nobody-of-that-name/x", "%%sollol /no/such/folder/x", "%%sollol '\0/x"]
)
def test_an_impossible_path_has_no_completions(notebook: Kernel, typed: str) -> None:
    assert completed(notebook, typed) == []
    assert completed(notebook, "%%sollol llama3.1:7") == ["%%sollol llama3.1:70b"]


def test_other_lines_are_completed_as_usual(notebook: Kernel) -> None:
    assert "townsfolk.keys" in completed(notebook, "townsfolk.ke")
    assert "%%sollol demo\ntownlist" in completed(notebook, "%%sollol demo\ntownl")


def test_machines_are_completed_by_the_configuration_of_ssh(tmp_path: Path) -> None:
    (tmp_path / ".ssh").mkdir()
    (tmp_path / ".ssh/config").write_text("Host gpu1 gpu2\n  User me\nHost *.lab !gpu9\nInclude more\n")
    (tmp_path / ".ssh/more").write_text("Host = box\n")
    with kernel(HOME=str(tmp_path)) as fresh:
        fresh.run("%load_ext sollol_nb")
        begun = "%sollol_cluster --ssh "
        hosts = [f"{begun}{host}" for host in ("box", "gpu1", "gpu2")]
        eventually(lambda: completed(fresh, begun) == hosts, f"{begun!r} is completed as {hosts}")
        assert completed(fresh, f"{begun}box,g") == [f"{begun}box,gpu1", f"{begun}box,gpu2"]
        assert completed(fresh, "%sollol_cluster add ssh://b") == ["%sollol_cluster add ssh://box"]


def test_a_broken_or_hanging_node_delays_nothing_and_removal_is_complete(folder: Path) -> None:
    hanging = """\
%load_ext sollol_nb
import threading
from sollol_nb.notebook import tab_completion
before = [*get_ipython().Completer.custom_matchers]
may_answer = threading.Event()
def hanging():
    may_answer.wait(HANG_GUARD_S)
    return ["unhurried:1b"]
def broken():
    raise OSError("gone")
tab_completion.install(get_ipython(), broken, chats=broken, workers=broken, ollama_models=hanging)
""".replace("HANG_GUARD_S", str(HANG_GUARD_S))
    with kernel() as fresh:
        assert fresh.run(hanging).error == []
        assert completed(fresh, "%%sollol mix") == ["%%sollol mixtral:8x7b"]
        assert completed(fresh, "%sollol_chat tour") == []
        assert completed(fresh, "%%sollol unhu") == []
        assert fresh.value("may_answer.is_set()") == "False"
        fresh.run("may_answer.set()")
        eventually(
            lambda: completed(fresh, "%%sollol unhu") == ["%%sollol unhurried:1b"], "the late names are known"
        )
        fresh.run("tab_completion.remove(get_ipython())")
        assert "%%sollol mixtral:8x7b" not in completed(fresh, "%%sollol mix")
        assert fresh.value("[m for m in get_ipython().Completer.custom_matchers if m not in before]") == "[]"
        eventually(
            lambda: fresh.value("[t.name for t in threading.enumerate() if 'completion' in t.name]") == "[]",
            "its threads have ended",
        )
        assert fresh.run("tab_completion.remove(get_ipython())").error == [], "removing twice is fine"


# --- a real Ollama ----------------------------------------------------------------------------


@pytest.mark.ollama
@pytest.mark.parametrize("by_magic", [False, True])
def test_models_of_an_ollama_node_are_completed_right_after_loading(
    ollama: OllamaServer, tmp_path: Path, by_magic: bool
) -> None:
    """By the node's names, while this machine's storage is empty."""
    node = f"127.0.0.1:{ollama.port}"
    with kernel(OLLAMA_HOST="127.0.0.1:9" if by_magic else node, OLLAMA_MODELS=str(tmp_path)) as fresh:
        assert fresh.run("%load_ext sollol_nb").error == []
        if by_magic:
            assert "%%sollol someone/special:7b" not in completed(fresh, "%%sollol someone/")
            fresh.run(f"%config Sollol.ollama_hosts = ['{node}']")
        lines = ["%%sollol someone/special:7b"]
        eventually(lambda: completed(fresh, "%%sollol someone/") == lines, "the node's model is known")
        expected = ["llama3.2", "llama3.2:latest"]  # the profile, and what the node has
        assert completed(fresh, "%%sollol llama3.2") == [f"%%sollol {name}" for name in expected]
