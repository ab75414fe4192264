"""The wheel and the source archive hold what the package needs; the quickstart runs from an installed wheel."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import nbformat
import pytest

from sollol_nb.llama_cpp.engine.check import Engine
from tests.support.gateway import end_engines

REPOSITORY = Path(__file__).parents[1]
QUICKSTART = REPOSITORY / "notebooks" / "01_quickstart.ipynb"


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel and a source archive of this checkout."""
    folder = tmp_path_factory.mktemp("archives")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-t", "sdist", "-d", str(folder)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def wheel(archives: Path) -> Path:
    return next(archives.glob("*.whl"))


def package_files() -> set[str]:
    """The files of the package in this checkout, as paths from the repository's folder."""
    files = (path for path in (REPOSITORY / "sollol_nb").rglob("*") if path.is_file())
    # Python writes into `__pycache__` at any moment, under other names first.
    return {path.relative_to(REPOSITORY).as_posix() for path in files if "__pycache__" not in path.parts}


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == package_files()
    assert {Path(name).suffix for name in packed} >= {
        ".py",
        ".gguf",
        ".j2",
        ".js",
        ".css",
        ".html",
        ".sh",
        ".svg",
        ".typed",
    }
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "[jupyter_serverproxy_servers]" in archive.read(name).decode()


def test_the_source_archive_holds_the_package_and_the_texts_about_it(archives: Path) -> None:
    with tarfile.open(next(archives.glob("*.tar.gz"))) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    texts = {"README.md", "CHANGELOG.md", "SECURITY.md", "LICENSE", "pyproject.toml", ".gitignore", "PKG-INFO"}
    assert packed == package_files() | texts


@pytest.mark.engine
@pytest.mark.usefixtures("alone")  # the same model at another path is not shared
def test_the_quickstart_runs_from_an_installed_wheel(wheel: Path, tmp_path: Path, engine: Engine) -> None:
    installed = tmp_path / "installed"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*install, "--no-index", "--target", str(installed), str(wheel)], check=True)
    notebook = nbformat.read(QUICKSTART, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell("import sollol_nb; print(sollol_nb.__file__)"))
    copy = tmp_path / QUICKSTART.name
    nbformat.write(notebook, copy)
    state = tmp_path / "state"
    environment = {**os.environ, "PYTHONPATH": str(installed), "SOLLOL_LLAMA_CPP": str(engine.server.parent)}
    environment["SOLLOL_STATE_DIR"] = str(state)
    try:
        ran = subprocess.run(
            [sys.executable, str(REPOSITORY / "tools" / "run_notebook.py"), str(copy)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
    finally:
        end_engines(state)  # they live on for their keep_alive
    assert ran.returncode == 0, ran.stderr
    assert str(installed / "sollol_nb" / "__init__.py") in ran.stdout
    assert "Model sharding" in ran.stdout
    assert "<details>" not in ran.stdout, "a terminal shows text"
    assert ran.stderr == ""
