"""The files in `tools/deploy/`: valid, and the service's command joins as it is written."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.sync_wrapper import HybridRouter
from tests.support.engines import HANG_GUARD_S, eventually, posix_only

REPOSITORY = Path(__file__).parents[1]
DEPLOY = REPOSITORY / "tools/deploy"
UNIT = DEPLOY / "sollol-worker.service"


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A home folder with the command where `pipx` and `uv tool` put it."""
    program = tmp_path / ".local/bin/sollol-nb"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -P -m sollol_nb "$@"\n')
    program.chmod(0o755)
    return tmp_path


def service() -> dict[str, str]:
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(UNIT)
    return dict(unit["Service"])


def test_the_compose_file_publishes_no_port_and_takes_the_link_from_the_environment() -> None:
    (worker,) = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"].values()
    assert "ports" not in worker
    assert worker["environment"]["SOLLOL_JOIN"].startswith("${SOLLOL_JOIN:?")
    build: dict[str, Any] = worker["build"]
    root = (DEPLOY / build["context"]).resolve()
    assert root == REPOSITORY
    assert (root / build["dockerfile"]).is_file()


def test_the_container_file_copies_what_exists_and_installs_extras_that_exist() -> None:
    text = (DEPLOY / "Containerfile").read_text()
    for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE):
        *sources, _ = line.split()
        assert all((REPOSITORY / source).exists() for source in sources), line
    assert "'/src[build]'" in text
    assert text.rstrip().endswith('ENTRYPOINT ["sollol-nb", "worker"]')


@posix_only
def test_the_unit_is_valid(home: Path) -> None:
    assert service()["ExecStart"].startswith("%h/")
    if shutil.which("systemd-analyze") is None:
        return  # the parts that this package decides are checked above
    ended = subprocess.run(
        ["systemd-analyze", "verify", "--user", "--man=no", str(UNIT)],
        env={**os.environ, "HOME": str(home), "XDG_RUNTIME_DIR": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (0, "")


@posix_only
@pytest.mark.engine
@pytest.mark.usefixtures("alone")
def test_the_units_command_joins(engine: Engine, home: Path) -> None:
    settings = service()
    command = shlex.split(settings["ExecStart"].replace("%h", str(home)))
    link = Path(settings["StandardInput"].removeprefix("file:").replace("%E", str(home / ".config")))
    link.parent.mkdir(parents=True)
    with HybridRouter(rpc_backends=["invitations"]) as router:
        link.write_text(f"{router.invite(host='127.0.0.1').link}\n")
        others = {"SOLLOL_STATE_DIR": str(home / "state"), "SOLLOL_LLAMA_CPP": str(engine.server.parent)}
        with link.open() as stdin, subprocess.Popen(command, stdin=stdin, env={**os.environ, **others}) as process:
            try:
                eventually(
                    lambda: [worker.state for worker in router.check_workers()] == ["free"], "it has joined"
                )
            finally:
                process.terminate()
                process.wait(HANG_GUARD_S)
        eventually(lambda: not router.invitations().joined, "it has left")
