"""Finding the engine: the order of the search, and the errors about unusable programs."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import psutil
import pytest

from sollol_nb.errors import EngineBuildError, EngineIncompatibleError, EngineNotFoundError
from sollol_nb.llama_cpp.engine import build, check
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.engine.find import ensure_engine, find_engine
from tests.support.engines import engines_of, is_alive

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in programs are scripts")

SERVER = """#!/bin/sh
case "$1" in
  --version) echo "version: {version}" >&2 ;;
  --rpc) echo "Available devices:"; echo "  RPC0: $2 (1 MiB, 1 MiB free)" ;;
esac
"""

REFUSES = """#!/bin/sh
[ $1 = --version ] || {{ echo "{reason}"; exit 1; }}
"""

# Answers HELLO with its version, as a worker of that protocol would, and then closes.
WORKER = """#!{python}
import socket, sys
print("Starting RPC server v{protocol}", flush=True)
with socket.create_server(("127.0.0.1", int(sys.argv[sys.argv.index("-p") + 1]))) as listener:
    while True:
        client, _ = listener.accept()
        with client:
            if client.recv(1):
                {answer}
"""
ANSWERS = "client.sendall(bytes([4, 0, 0, 0, 0, 0, 0, 0, {major}, 0, 0, 0]))"
SILENT = "import time; time.sleep(60)"


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def worker_text(protocol: str = "7.0.0", answer: str = ANSWERS) -> str:
    answer = answer.format(major=protocol.split(".")[0])
    return WORKER.format(python=sys.executable, protocol=protocol, answer=answer)


def pair(folder: Path, version: str = "1", worker_name: str = "ggml-rpc-server") -> Path:
    program(folder / "llama-server", SERVER.format(version=version))
    program(folder / worker_name, worker_text())
    return folder


@pytest.fixture(autouse=True)
def places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Path]:
    """Every folder of the search, empty, in the test's folder."""
    found = {name: tmp_path / name for name in ("PATH", "home", "cache")}
    for folder in found.values():
        folder.mkdir()
    monkeypatch.setenv("PATH", f"{found['PATH']}:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(found["home"]))
    monkeypatch.setenv("SOLLOL_CACHE_DIR", str(found["cache"]))
    monkeypatch.delenv("SOLLOL_LLAMA_CPP", raising=False)
    return found


def cached_engine(cache: Path, version: str, backend: str = "cpu") -> Path:
    folder = cache / "engines" / f"llama.cpp-{build.VERSION}-{backend}"
    pair(folder / "bin", version)
    (folder / "engine.json").write_text("{}")
    return folder


def test_folders_are_searched_in_order(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached_engine(places["cache"], "from cache")
    assert find_engine().source == "cache"
    pair(places["home"] / "llama.cpp/build/bin", "from home")
    assert find_engine().source == "~/llama.cpp"
    pair(places["PATH"], "from PATH")
    assert find_engine().source == "PATH"
    monkeypatch.setenv("SOLLOL_LLAMA_CPP", str(pair(tmp_path / "own", "from variable")))
    assert find_engine().source == "SOLLOL_LLAMA_CPP"
    given = find_engine(pair(tmp_path / "given", "from argument"))
    assert (given.source, given.version, given.protocol) == ("given folder", "from argument", "7.0.0")


@pytest.mark.parametrize("inside", ["", "build/bin", "build/bin/Release"])
@pytest.mark.parametrize("worker_name", ["ggml-rpc-server", "rpc-server"])
def test_a_named_folder_is_a_bin_folder_or_a_checkout(tmp_path: Path, inside: str, worker_name: str) -> None:
    folder = pair(tmp_path / "own" / inside, worker_name=worker_name)
    assert find_engine(str(tmp_path / "own")).worker == folder / worker_name


def test_a_worker_beside_the_target_of_a_linked_server_is_found(places: dict[str, Path]) -> None:
    folder = pair(places["home"] / "libexec")
    (places["PATH"] / "llama-server").symlink_to(folder / "llama-server")
    assert find_engine().worker == folder / "ggml-rpc-server"


def test_the_backend_chosen_last_is_found_first(places: dict[str, Path]) -> None:
    backends = {"one": "cpu", "two": "cuda"}
    folders = {version: cached_engine(places["cache"], version, backend) for version, backend in backends.items()}
    for chosen_at_s, version in enumerate(("two", "one", "two"), 2_000_000_000):
        # Later than all before: `touch` may give the same time twice, since systems count it in milliseconds.
        os.utime(folders[version] / "engine.json", (chosen_at_s, chosen_at_s))
        assert find_engine().version == version


def test_without_an_engine_the_error_says_where_was_searched_and_what_to_run(places: dict[str, Path]) -> None:
    with pytest.raises(EngineNotFoundError) as caught:
        find_engine()
    message = str(caught.value)
    for text in ("PATH", "~/llama.cpp/build/bin", str(places["cache"]), "sollol-nb install"):
        assert text in message
    assert "\n" not in message


def test_an_unusable_pair_on_path_is_skipped_and_named(places: dict[str, Path]) -> None:
    program(pair(places["PATH"]) / "llama-server", "#!/bin/sh\nexit 3\n")
    with pytest.raises(EngineNotFoundError, match=r"PATH: .*llama-server does not run here: exit code 3"):
        find_engine()
    cached_engine(places["cache"], "from cache")
    assert find_engine().source == "cache"


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        (None, EngineNotFoundError, "is not a folder"),
        ({}, EngineNotFoundError, "no llama-server and no RPC worker"),
        ({"llama-server": SERVER}, EngineNotFoundError, "no RPC worker"),
        ({"rpc-server": worker_text()}, EngineNotFoundError, "no llama-server"),
        (
            {"llama-server": "no program", "rpc-server": worker_text()},
            EngineIncompatibleError,
            "llama-server does not run here: Exec format error",
        ),
        (
            {"llama-server": "#!/bin/sh\nkill -ILL $$\n", "rpc-server": worker_text()},
            EngineIncompatibleError,
            "llama-server does not run here: ended by SIGILL",
        ),
        (
            {"llama-server": SERVER, "rpc-server": "#!/bin/sh\necho error: libx.so: cannot open\nexit 127\n"},
            EngineIncompatibleError,
            "rpc-server does not run here: error: libx.so: cannot open",
        ),
        (
            {
                "llama-server": REFUSES.format(reason="error: invalid argument: $1"),
                "rpc-server": worker_text(),
            },
            EngineIncompatibleError,
            "built without GGML_RPC",
        ),
        (
            {
                "llama-server": REFUSES.format(reason="version mismatch: 6.0.0"),
                "rpc-server": worker_text("6.0.0"),
            },
            EngineIncompatibleError,
            r"\(RPC protocol 6.0.0\) does not work with .*version mismatch",
        ),
    ],
    ids=[
        "no folder",
        "empty",
        "no worker",
        "no server",
        "no program",
        "wrong CPU",
        "no library",
        "no RPC",
        "pair",
    ],
)
@pytest.mark.parametrize("named_by", ["argument", "variable"])
def test_an_unusable_named_folder_is_an_error_and_no_other_folder_is_used(
    places: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    named_by: str,
    files: dict[str, str] | None,
    error: type[Exception],
    message: str,
) -> None:
    pair(places["PATH"])  # usable, and not to be used
    own = tmp_path / "own"
    for name, text in (files or {}).items():
        program(own / name, text)
    if files is not None:
        own.mkdir(exist_ok=True)
    if named_by == "variable":
        monkeypatch.setenv("SOLLOL_LLAMA_CPP", str(own))
    for search in (find_engine, ensure_engine):
        with pytest.raises(error, match=message) as caught:
            search(own if named_by == "argument" else None)
        assert str(own) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_silent_program_is_ended_at_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "CHECK_LIMIT_S", 0.2)
    folder = pair(tmp_path / "own")
    program(folder / "llama-server", "#!/bin/sh\nexec sleep 60\n")
    with pytest.raises(EngineIncompatibleError, match="no answer within"):
        find_engine(folder)


def test_a_changed_file_is_checked_again(tmp_path: Path) -> None:
    folder = pair(tmp_path / "own")
    assert find_engine(folder).version == "1"
    program(folder / "llama-server", SERVER.format(version="22"))
    assert find_engine(folder).version == "22"
    program(folder / "libggml-rpc.so", "another library")
    program(folder / "ggml-rpc-server", "#!/bin/sh\nexit 1\n")
    with pytest.raises(EngineIncompatibleError):
        find_engine(folder)


def test_options_left_in_the_environment_do_not_reach_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_ARG_RPC", "192.0.2.1:1")
    folder = pair(tmp_path / "own")
    text = SERVER.format(version="1").replace("case", '[ -z "$LLAMA_ARG_RPC" ] || exit 1\ncase', 1)
    program(folder / "llama-server", text)
    assert find_engine(folder).version == "1"


def test_an_engine_is_built_if_there_is_none(places: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    requested: list[str | None] = []

    def build_engine(backend: str | None, **_: object) -> Path:
        requested.append(backend)
        return cached_engine(places["cache"], "built") / "bin"

    monkeypatch.setattr(build, "build_engine", build_engine)
    assert ensure_engine().version == "built"
    assert ensure_engine().source == "cache"
    assert requested == [None]


def test_a_failed_build_is_raised_to_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    def build_engine(*_: object, **__: object) -> Path:
        raise EngineBuildError("no cmake")

    monkeypatch.setattr(build, "build_engine", build_engine)
    with pytest.raises(EngineBuildError, match="no cmake"):
        ensure_engine()


@pytest.mark.engine
def test_the_real_pair_is_usable_and_leaves_no_worker_running(engine: Engine) -> None:
    check._checked.cache_clear()
    before = set(engines_of(psutil.Process(), "rpc-server"))
    found = find_engine(engine.server.parent)
    assert found.protocol.split(".")[0] == "7"
    assert "commit" in found.version
    assert not list(filter(is_alive, set(engines_of(psutil.Process(), "rpc-server")) - before))


@pytest.mark.engine
@pytest.mark.parametrize("protocol", ["3.0.0", "6.0.0", "8.0.0"])
def test_the_real_server_refuses_a_worker_of_another_protocol(
    engine: Engine, tmp_path: Path, protocol: str
) -> None:
    folder = copy_of(engine, tmp_path / "bin")
    program(folder / engine.worker.name, worker_text(protocol))
    with pytest.raises(EngineIncompatibleError, match=rf"\(RPC protocol {protocol}\) does not work with"):
        find_engine(folder)


@pytest.mark.engine
def test_the_real_server_facing_a_silent_worker_is_ended_at_the_limit(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = check._run

    def limited(program: Path, *arguments: str) -> tuple[int | None, str]:
        with monkeypatch.context() as patch:
            if "--rpc" in arguments:  # all else may take its time
                patch.setattr(check, "CHECK_LIMIT_S", 1.0)
            return start(program, *arguments)

    monkeypatch.setattr(check, "_run", limited)
    folder = copy_of(engine, tmp_path / "bin")
    program(folder / engine.worker.name, worker_text(answer=SILENT))
    with pytest.raises(EngineIncompatibleError, match=r"does not work with .*no answer within"):
        find_engine(folder)


def copy_of(engine: Engine, folder: Path) -> Path:
    """A folder with the real engine's files as links, except for the worker."""
    folder.mkdir()
    for path in engine.server.parent.iterdir():
        if path.name not in (engine.worker.name, engine.server.name):
            (folder / path.name).symlink_to(path)
    shutil.copy2(engine.server, folder)
    return folder
