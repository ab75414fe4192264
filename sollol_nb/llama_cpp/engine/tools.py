"""The tools of this machine for building llama.cpp: CMake, Ninja, a C++ compiler, GPU toolkits.

This module only searches; nothing is fetched or built. A missing tool is reported before any download, in one line
that says what to install on this system.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from sollol_nb.errors import ConfigError, EngineBuildError
from sollol_nb.settings import config

Backend = Literal["cpu", "cuda", "metal", "hip", "vulkan"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)

INSTALL_CMAKE = "pip install cmake ninja"

_GPU_OPTIONS: dict[Backend, str] = {
    "cuda": "GGML_CUDA",
    "metal": "GGML_METAL",
    "hip": "GGML_HIP",
    "vulkan": "GGML_VULKAN",
}
_TOOLKIT_WANTED: dict[Backend, str] = {
    "cuda": "nvcc of the CUDA toolkit",
    "metal": "a Mac with Apple silicon",
    "hip": "hipcc of ROCm",
    "vulkan": "glslc of the Vulkan SDK",
}
_PACKAGE_MANAGERS = {  # each with its command, and its name of the C++ compiler; the first one found is used
    "apt-get": ("sudo apt-get install", "g++"),
    "dnf": ("sudo dnf install", "gcc-c++"),
    "pacman": ("sudo pacman -S", "gcc"),
    "zypper": ("sudo zypper install", "gcc-c++"),
    "apk": ("sudo apk add", "build-base"),
}
COMPILER = "C++ compiler"
_VSWHERE = Path("C:/Program Files (x86)/Microsoft Visual Studio/Installer/vswhere.exe")


@dataclass(frozen=True, slots=True)
class BuildTools:
    """The tools one build uses."""

    cmake: Path
    ninja: Path | None
    compiler: str


def find_build_tools() -> BuildTools:
    """CMake, Ninja (if installed) and the C++ compiler.

    Raises:
        EngineBuildError: CMake or a C++ compiler is missing; the message says what to install.
    """
    compiler = find_compiler()
    if compiler is None:
        raise EngineBuildError(
            f"cannot build llama.cpp without a C++ compiler; to install one: {compiler_command()}"
        )
    cmake = find_tool("cmake")
    if cmake is None:
        raise EngineBuildError(f"cannot build llama.cpp without cmake; to install it: {INSTALL_CMAKE}")
    return BuildTools(cmake, find_tool("ninja"), compiler)


def find_tool(name: str) -> Path | None:
    """A program beside this Python (where pip puts `cmake` and `ninja`), else on PATH.

    The PATH of a kernel often lacks the folder of its environment.
    """
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    return Path(found) if found else None


def find_compiler() -> str | None:
    """The C++ compiler that CMake will use, as a path or as in `CXX`; None if there is none."""
    chosen = config.cxx_compiler()
    if chosen and shutil.which(chosen.split()[0]):
        return chosen
    if sys.platform == "darwin" and not _answers("/usr/bin/xcode-select", "-p"):
        return None  # every Mac has /usr/bin/c++, but without the tools it only opens a dialog
    names = ("cl", "clang-cl", "g++") if sys.platform == "win32" else ("c++", "g++", "clang++")
    for name in names:
        if found := shutil.which(name):
            return found
    if sys.platform == "win32" and _VSWHERE.is_file():
        return "Visual Studio"
    return None


def compiler_command() -> str:
    """The command that installs a C++ compiler on this system."""
    if sys.platform == "win32":
        return "winget install Microsoft.VisualStudio.2022.BuildTools (with 'Desktop development with C++')"
    managers = [manager for manager in _PACKAGE_MANAGERS if shutil.which(manager)]
    command = install_command([COMPILER], managers, on_mac=sys.platform == "darwin")
    return command or "install g++ with your system's package manager"


def install_command(missing: Sequence[str], managers: Collection[str], *, on_mac: bool) -> str:
    """The command that installs what is missing to build C++ programs on a POSIX machine; "" if none is known.

    Args:
        missing: `COMPILER`, `cmake`, `make`.
        managers: the package managers that the machine has.
    """
    if on_mac:
        commands = ["xcode-select --install"] if COMPILER in missing or "make" in missing else []
        return " && ".join([*commands, *(["brew install cmake"] if "cmake" in missing else [])])
    for manager, (command, compiler) in _PACKAGE_MANAGERS.items():
        if manager in managers:
            return f"{command} {' '.join(compiler if name == COMPILER else name for name in missing)}"
    return ""


def gpu_toolkits() -> dict[Backend, str]:
    """GPU backends that can be built here, best first, each with the program found for it."""
    found: dict[Backend, str] = {}
    if sys.platform == "darwin" and platform.machine() == "arm64":
        found["metal"] = "Apple silicon"
    if nvcc := _compiler_of_toolkit("nvcc", "/usr/local/cuda/bin"):
        found["cuda"] = nvcc
    if hipcc := _compiler_of_toolkit("hipcc", "/opt/rocm/bin"):
        found["hip"] = hipcc
    if (glslc := shutil.which("glslc")) and config.vulkan_sdk():
        found["vulkan"] = glslc
    return found


def choose_backend(requested: str | None) -> Backend:
    """The backend to build: the requested one, else that of the first GPU toolkit, else `cpu`.

    Raises:
        ConfigError: there is no such backend.
        EngineBuildError: its toolkit is not installed.
    """
    toolkits = gpu_toolkits()
    if requested is None:
        return next(iter(toolkits), "cpu")
    for backend in BACKENDS:
        if backend == requested:
            break
    else:
        raise ConfigError(f"there is no backend {requested!r}; choose one of {', '.join(BACKENDS)}")
    # Distributions ship glslc without the SDK's variable: enough if Vulkan is requested explicitly.
    if backend == "cpu" or backend in toolkits or (backend == "vulkan" and shutil.which("glslc")):
        return backend
    raise EngineBuildError(
        f"backend {backend} needs {_TOOLKIT_WANTED[backend]}, which was not found; "
        "install it, or choose the cpu backend"
    )


def cmake_options(backend: Backend, tools: BuildTools, *, commit: str) -> list[str]:
    """CMake's configure options for a build on this machine."""
    cuda_compiler = gpu_toolkits()["cuda"] if backend == "cuda" else ""
    flags = build_options(backend, commit=commit, on_mac=sys.platform == "darwin", cuda_compiler=cuda_compiler)
    # On Windows, Ninja works only if cl is on PATH; CMake finds Visual Studio itself.
    ninja = tools.ninja if tools.compiler != "Visual Studio" else None
    return flags + generator_options(str(ninja) if ninja else "")


def build_options(backend: Backend, *, commit: str, on_mac: bool, cuda_compiler: str) -> list[str]:
    """Options for any machine: Release, RPC on, the chosen GPU backend on, everything unused off.

    The run path makes programs search for their libraries beside themselves, so the folder can be moved.
    """
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
        "CMAKE_INSTALL_RPATH": "@loader_path" if on_mac else "$ORIGIN",
        "GGML_RPC": "ON",
        "LLAMA_BUILD_TESTS": "OFF",
        "LLAMA_BUILD_EXAMPLES": "OFF",
        "LLAMA_BUILD_APP": "OFF",
        "LLAMA_BUILD_UI": "OFF",
        "LLAMA_USE_PREBUILT_UI": "OFF",
        "LLAMA_OPENSSL": "OFF",
        # Without these, llama.cpp would read them from any git repository around the cache folder.
        "LLAMA_BUILD_NUMBER": "0",
        "LLAMA_BUILD_COMMIT": commit,
    }
    options |= {option: "ON" if name == backend else "OFF" for name, option in _GPU_OPTIONS.items()}
    if backend == "cuda":
        options["CMAKE_CUDA_COMPILER"] = cuda_compiler
    return [f"-D{name}={value}" for name, value in options.items()]


def generator_options(ninja: str) -> list[str]:
    """Options that choose Ninja, if its path is given."""
    return ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []


def _compiler_of_toolkit(name: str, usual_folder: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path=usual_folder)


def _answers(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=10, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
