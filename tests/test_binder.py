"""The files for Binder: they name what exists, and the script that builds the engine runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from sollol_nb.llama_cpp.engine.check import Engine

REPOSITORY = Path(__file__).parents[1]
BINDER = REPOSITORY / "binder"


@pytest.fixture(scope="module")
def project() -> dict[str, object]:
    project: dict[str, object] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    return project


def test_the_requirements_are_this_package_with_extras_that_it_has(project: dict[str, dict[str, object]]) -> None:
    lines = (BINDER / "requirements.txt").read_text().split()
    extras = re.fullmatch(r"\.\[([\w,-]+)\]", " ".join(lines))
    assert extras is not None, lines
    assert set(extras[1].split(",")) <= set(project["optional-dependencies"])
    assert {"lab", "build"} <= set(extras[1].split(",")), "JupyterLab, and what the build of the engine needs"


def test_the_python_version_is_one_that_the_package_names(project: dict[str, list[str]]) -> None:
    version = (BINDER / "runtime.txt").read_text().strip().removeprefix("python-")
    assert f"Programming Language :: Python :: {version}" in project["classifiers"]


def test_the_system_packages_are_one_name_a_line_and_bring_a_compiler() -> None:
    names = (BINDER / "apt.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9+.-]+", name) for name in names), names
    assert "g++" in names


def test_the_address_opens_a_notebook_that_exists() -> None:
    addresses = re.findall(r"urlpath=lab/tree/(\S+)", (BINDER / "README.md").read_text())
    assert addresses
    for path in addresses:
        assert (REPOSITORY / path).is_file(), path


def test_every_file_is_told_of() -> None:
    told = set(re.findall(r"^\| `(\S+)` \|", (BINDER / "README.md").read_text(), re.MULTILINE))
    assert told == {path.name for path in BINDER.iterdir()} - {"README.md"}


@pytest.mark.engine
def test_the_build_script_ends_with_an_engine_that_is_ready(engine: Engine) -> None:
    script = BINDER / "postBuild"
    assert script.read_text().startswith("#!/bin/sh\n")
    assert os.access(script, os.X_OK)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    ended = subprocess.run(
        ["sh", script],
        cwd=REPOSITORY,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.rstrip().endswith("ready")
