"""Build the Ollamas that the tests talk to: `make ollama`, or `python tools/build_ollama.py`.

The tests use real Ollamas of two pinned versions: one with runners of its own, and a newer one that runs models in
a llama-server beside it (the tests put ours there). They are built with Go, which verifies every module against
its checksum database. The zip that Go fetches for the first lacks Ollama's C++ headers (such zips leave out
folders named `vendor`); they are taken from the pinned llama.cpp source that the engines are built from. The
results are `<cache>/ollama/<version>/ollama`, moved there by one rename; their paths are printed.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import filelock

from sollol_nb.errors import EngineBuildError, SollolError
from sollol_nb.llama_cpp.engine.build import fetch_source, remove_tree
from sollol_nb.llama_cpp.engine.steps import BuildSteps, shown_progress
from sollol_nb.llama_cpp.engine.tools import compiler_command, find_compiler, find_tool
from sollol_nb.settings import config

OWN_RUNNERS = "0.17.4"
WITH_LLAMA_SERVER = "0.32.1"
MODULE = "github.com/ollama/ollama"
BUILD_LIMIT_S = 3600.0
CHECK_LIMIT_S = 60.0


def ollama_path(version: str) -> Path:
    """Path of the built Ollama."""
    name = "ollama.exe" if sys.platform == "win32" else "ollama"
    return config.cache_dir() / "ollama" / version / name


def build_ollama(version: str) -> Path:
    """Build Ollama unless it is built already; returns the path of the program.

    Raises:
        EngineBuildError: go or a C++ compiler is missing, or a step failed.
    """
    final = ollama_path(version)
    go = find_tool("go")
    final.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(final.parent / ".lock", timeout=BUILD_LIMIT_S), shown_progress(None) as report:
        if final.exists():
            return final
        if go is None:
            raise EngineBuildError(
                "cannot build Ollama without Go; install Go 1.24 or newer from https://go.dev/dl"
            )
        if find_compiler() is None:
            raise EngineBuildError(
                f"cannot build Ollama without a C++ compiler; to install one: {compiler_command()}"
            )
        work = Path(tempfile.mkdtemp(prefix=".build-", dir=final.parent))
        try:
            steps = BuildSteps(config.log_dir() / "build-ollama.log", report)
            # BuildSteps passes our environment on.
            os.environ |= {"CGO_ENABLED": "1", "GOBIN": str(work / "bin"), "GOFLAGS": "-buildvcs=false"}
            if version == OWN_RUNNERS:
                fetch_source(work / "source", steps)
                headers = work / "source" / "vendor"
                # -O2, because Go's default for C++ makes slower code.
                os.environ |= {"CGO_CPPFLAGS": f"-I{headers}", "CGO_CXXFLAGS": f"-O2 -I{headers}"}
            report("building Ollama (some minutes)", 0.1)
            steps.must_run(
                "building Ollama",
                *(go, "install", "-ldflags", f"-X {MODULE}/version.Version={version}", f"{MODULE}@v{version}"),
                limit_s=BUILD_LIMIT_S,
            )
            built = work / "bin" / final.name
            steps.must_run("starting the built Ollama", built, "--version", limit_s=CHECK_LIMIT_S)
            built.replace(final)
        finally:
            remove_tree(work)
        report(f"Ollama {version} installed", 1.0)
    return final


def main() -> int:
    """Build both, and print their paths."""
    try:
        for version in (OWN_RUNNERS, WITH_LLAMA_SERVER):
            print(build_ollama(version))
    except SollolError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
