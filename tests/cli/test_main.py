"""The `sollol-nb` command and its diagnosis."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sollol_nb import __version__
from sollol_nb.cli import doctor
from sollol_nb.cli import main as cli
from sollol_nb.errors import EngineBuildError
from sollol_nb.llama_cpp.engine import find
from sollol_nb.llama_cpp.engine.check import Engine, Pair
from tests.support.engines import posix_only


@pytest.fixture(autouse=True)
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No engine anywhere, and nothing on Ollama's port."""
    for name in ("HOME", "USERPROFILE", "SOLLOL_CACHE_DIR", "SOLLOL_STATE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.delenv("SOLLOL_LLAMA_CPP", raising=False)
    monkeypatch.setattr(find, "_pair_on_path", lambda: Pair(None, None))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{free.getsockname()[1]}")


def report_of(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    report = json.loads(capsys.readouterr().out)
    assert isinstance(report, dict)
    return report


@pytest.mark.parametrize(
    ("lacking", "remedy"),
    [
        ((), "sollol-nb install"),
        (("cmake",), "pip install cmake ninja"),
        (("compiler", "cmake"), "install a compiler"),
    ],
)
def test_doctor_names_the_one_command_that_fixes_it(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    lacking: tuple[str, ...],
    remedy: str,
) -> None:
    monkeypatch.setattr(doctor, "find_tool", lambda name: None if name in lacking else Path(f"/bin/{name}"))
    monkeypatch.setattr(doctor, "find_compiler", lambda: None if "compiler" in lacking else "/bin/c++")
    monkeypatch.setattr(doctor, "compiler_command", lambda: "install a compiler")
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == f"not ready; to fix it: {remedy}"
    assert cli.main(["doctor", "--json"]) == 1
    report = report_of(capsys)
    assert (report["usable"], report["remedy"]) == (False, remedy)


def test_doctor_says_that_the_users_own_folder_is_the_problem(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SOLLOL_LLAMA_CPP", str(tmp_path))
    assert cli.main(["doctor", "--json"]) == 1
    report = report_of(capsys)
    assert "SOLLOL_LLAMA_CPP" in str(report["missing"])
    assert str(report["remedy"]).endswith("SOLLOL_LLAMA_CPP")


@pytest.mark.engine
def test_doctor_accepts_a_real_engine(
    engine: Engine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOLLOL_LLAMA_CPP", str(engine.server.parent))
    assert cli.main(["doctor", "--check"]) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[-1] == "ready"
    assert "RPC protocol 7." in text
    assert cli.main(["doctor", "--check", "--json"]) == 0
    report = report_of(capsys)
    assert report["missing"] == []
    assert report["engine"] == {
        "server": str(engine.server),
        "worker": str(engine.worker),
        "version": engine.version,
        "source": "SOLLOL_LLAMA_CPP",
        "protocol": engine.protocol,
    }


@posix_only
def test_doctor_runs_a_program_only_if_it_is_told_to(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("llama-server", "ggml-rpc-server"):
        (tmp_path / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("SOLLOL_LLAMA_CPP", str(tmp_path))
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"llama-server  {tmp_path / 'llama-server'}\n" in text
    assert text.endswith("ready (nothing was run; `sollol-nb doctor --check` runs both programs)\n")
    assert not (tmp_path / "ran").exists()
    assert cli.main(["doctor", "--check"]) == 1
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("entry", "host", "port"),
    [
        ("10.0.0.1", "10.0.0.1", 11434),
        ("10.0.0.1:8080", "10.0.0.1", 8080),
        ("http://node", "node", 80),
        ("https://node/path", "node", 443),
        ("http://[::1]:9", "::1", 9),
        ("0.0.0.0", "127.0.0.1", 11434),
        (":9", "127.0.0.1", 9),
        ("node:port", "node:port", 0),
    ],
)
def test_ollama_is_probed_where_its_variable_says(
    monkeypatch: pytest.MonkeyPatch, entry: str, host: str, port: int
) -> None:
    def refuse(address: tuple[str, int], timeout: float) -> socket.socket:
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", refuse)
    assert doctor._probe_ollama(entry) == doctor.OllamaProbe(host, port, False)


def test_an_ollama_that_listens_is_seen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        monkeypatch.setenv("OLLAMA_HOST", f"http://0.0.0.0:{port}")
        cli.main(["doctor", "--json"])
    assert report_of(capsys)["ollama"] == [{"host": "127.0.0.1", "port": port, "reachable": True}]


def test_install_passes_its_options_and_says_where_the_engine_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    requested: list[dict[str, object]] = []

    def install_engine(**options: object) -> Engine:
        requested.append(options)
        return Engine(
            server=Path("/cache/bin/llama-server"),
            worker=Path("/cache/bin/ggml-rpc-server"),
            version="1",
            source="cache",
        )

    monkeypatch.setattr(find, "install_engine", install_engine)
    assert cli.main(["install"]) == 0
    assert cli.main(["install", "--backend", "cuda", "--force"]) == 0
    assert requested == [{"backend": None, "force": False}, {"backend": "cuda", "force": True}]
    assert str(Path("/cache/bin")) in capsys.readouterr().out
    monkeypatch.setenv("SOLLOL_LLAMA_CPP", "/elsewhere")
    cli.main(["install"])
    assert "/elsewhere is used instead" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (EngineBuildError("no cmake; do this"), 1, "sollol-nb: no cmake; do this\n"),
        (KeyboardInterrupt(), 130, "sollol-nb: interrupted\n"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    raised: BaseException,
    code: int,
    message: str,
) -> None:
    def install_engine(**_: object) -> Engine:
        raise raised

    monkeypatch.setattr(find, "install_engine", install_engine)
    assert cli.main(["install"]) == code
    assert capsys.readouterr().err == message


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["install", "--backend", "opencl"]])
def test_a_wrong_command_line_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "sollol_nb", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"sollol_nb {__version__}\n"


COMMAND_ON_A_MACHINE_WITH_ENGINES = """
import sys
from pathlib import Path
from types import SimpleNamespace
from sollol_nb.cli import main
from sollol_nb.llama_cpp.engine import find
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.processes import running

async def engines(*_, **__):
    return [SimpleNamespace(kind="worker", name="127.0.0.1:9", pid=1, state="free", as_dict=dict)]

find.install_engine = lambda **_: Engine(server=Path("server"), worker=Path("worker"), version="1", source="cache")
running.running_engines = running.stop_engines = engines
running.as_table = str
sys.exit(main.main())
"""


@posix_only
@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("arguments", ["--help", "install", "doctor", "doctor --json", "ps", "status", "stop"])
def test_a_command_whose_output_nobody_reads_ends_in_silence(unbuffered: str, arguments: str) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-c", COMMAND_ON_A_MACHINE_WITH_ENGINES, *arguments.split()],
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        os.close(write)
    # argparse ignores that it cannot write its help.
    assert (done.stderr, done.returncode) == ("", 0 if arguments == "--help" and unbuffered else 1)


@posix_only
def test_a_command_without_any_output_file_runs() -> None:
    command = ["sh", "-c", '"$0" -m sollol_nb ps >&-', sys.executable]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert (done.stderr, done.returncode) == ("", 0)
