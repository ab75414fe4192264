"""A machine that is reached through a shell, without the network: a folder is its HOME."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sollol_nb.llama_cpp.engine import build
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.engine.steps import BuildSteps
from sollol_nb.llama_cpp.links import remote_engine
from sollol_nb.llama_cpp.links.remote_engine import RemoteEngine, prepare
from sollol_nb.llama_cpp.links.ssh_shell import Shell
from tests.support.engines import run

_SSH = """\
#!/bin/sh
for last; do :; done
export HOME={home} PATH={path}
unset XDG_CACHE_HOME
{before}
exec {through} sh -c "$last"
"""
DEVICES = "  CPU: A processor (2048 MiB, 1024 MiB free)"


class ShellMachine:
    """One machine.

    Attributes:
        home: HOME of those who log in.
        own_path: programs that are found there before those of `path`.
        path: of its programs, by default this machine's.
        before: a shell command that its "sshd" runs before the script; may limit what the script gets.
        through: a program, such as `unshare`, that runs the shell.
        reports: what `prepare` has reported.
    """

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.own_path = folder / "bin"
        self.home.mkdir(parents=True)
        self.own_path.mkdir()
        self.path = os.environ["PATH"]
        self.before = ""
        self.through = ""
        self.reports: list[str] = []
        self._ssh = folder / "ssh"

    @property
    def engines(self) -> Path:
        """Folder of the engines there."""
        return self.home / ".cache" / "sollol_nb" / "engines"

    def installed(self) -> list[str]:
        """All that is in the folder of the engines."""
        return sorted(path.name for path in self.engines.iterdir()) if self.engines.is_dir() else []

    def shell(self) -> Shell:
        """A shell there."""
        path = f"{self.own_path}:{self.path}" if self.path else str(self.own_path)
        text = _SSH.format(home=self.home, path=path, before=self.before, through=self.through)
        if not self._ssh.exists() or self._ssh.read_text() != text:  # it may be running
            self._ssh.write_text(text)
            self._ssh.chmod(0o700)
        return Shell("ssh://gpu1", [str(self._ssh)], shares=False)

    def prepare(self, here: Engine, **options: Any) -> RemoteEngine:
        """`remote_engine.prepare` for this machine."""
        return run(self.preparing(here, **options))

    async def preparing(self, here: Engine, **options: Any) -> RemoteEngine:
        """The same on the I/O loop."""

        async def report(line: str) -> None:
            self.reports.append(line)

        return await prepare(self.shell(), here, report, **options)

    def add_program(self, name: str, text: str) -> None:
        """Add a shell script to its programs."""
        path = self.own_path / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def only_programs(self, names: Sequence[str]) -> None:
        """Let it have only these of this machine's programs."""
        for name in names:
            found = shutil.which(name)
            assert found is not None, name
            (self.own_path / name).symlink_to(found)
        self.path = ""


def engine_in(folder: Path, *, devices: str = DEVICES, record: bool = True, protocol: str = "7.0.0") -> Engine:
    """An engine whose worker program only lists its devices, with a library beside it."""
    bin_folder = folder / "bin"
    bin_folder.mkdir(parents=True)
    worker = bin_folder / "ggml-rpc-server"
    worker.write_text(f"#!/bin/sh\n. \"${{0%/*}}/libggml.so\"\necho '{devices}'\n")
    worker.chmod(0o755)
    (bin_folder / "libggml.so.0").write_bytes(b"# " + os.urandom(600_000).hex().encode() + b"\n")
    (bin_folder / "libggml.so").symlink_to("libggml.so.0")
    if record:
        text = {"version": build.VERSION, "commit": build.GIT_COMMIT, "backend": "cpu", "protocol": protocol}
        (folder / "engine.json").write_text(json.dumps(text))
    return Engine(server=bin_folder / "llama-server", worker=worker, version="1", source="test", protocol=protocol)


def let_this_cpu_have_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's CPU has instructions that no other has, so its programs do not run elsewhere."""
    found = remote_engine._local_facts

    async def with_more() -> Any:
        facts = await found()
        assert facts is not None
        return dataclasses.replace(facts, features=facts.features | {"avx1024"})

    monkeypatch.setattr(remote_engine, "_local_facts", with_more)


def tiny_source(rpc_lists: str = "") -> build.FetchSource:
    """A source that builds a worker program which only lists its devices, in seconds.

    Args:
        rpc_lists: added to the `CMakeLists.txt` of the program.
    """

    def fetch(into: Path, steps: BuildSteps) -> str:
        (into / "ggml").mkdir(parents=True)
        (into / "ggml" / "CMakeLists.txt").write_text('file(APPEND "$ENV{HOME}/configured" "once\\n")\n')
        rpc = into / "tools" / "rpc"
        rpc.mkdir(parents=True)
        (rpc / "CMakeLists.txt").write_text(
            "add_executable(ggml-rpc-server main.cpp)\n"
            'if(GGML_CUDA)\n target_compile_definitions(ggml-rpc-server PRIVATE "CUDA")\nendif()\n' + rpc_lists
        )
        (rpc / "main.cpp").write_text(
            "#include <cstdio>\nint main() {\n#ifdef CUDA\n"
            'puts("  CUDA0: A GPU (80 MiB, 79 MiB free)"); puts("  CUDA1: A GPU (80 MiB, 79 MiB free)");\n'
            f'#endif\nputs("{DEVICES}"); return 1; }}\n'
        )
        (into / "LICENSE").write_text("MIT\n")
        return "test"

    return fetch
