"""What a machine has, as `engine.sh probe` reports it, and which engines fit it. No side effects.

What another machine prints is bounded, and not trusted.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sollol_nb.llama_cpp.engine import build
from sollol_nb.llama_cpp.engine.tools import COMPILER, Backend, install_command

MIB = 1024 * 1024
_ENGINES_LIMIT = 64
_DEVICES_LIMIT = 64
_VALUE_LIMIT = 4096
_BOOT_LIMIT = 64
_TOO_OLD_CMAKE = (3, 14)  # llama.cpp needs this one
_COMPILERS = ("c++", "g++", "clang++")
_TOOLKITS: dict[Backend, str] = {"cuda": "nvcc", "hip": "hipcc"}
_TOOLKIT_NAMES: dict[Backend, str] = {"cuda": "the CUDA toolkit", "hip": "ROCm"}
_GPU_LIBRARIES: dict[str, Backend] = {
    "libggml-cuda": "cuda",
    "libggml-hip": "hip",
    "libggml-metal": "metal",
    "libggml-vulkan": "vulkan",
}
_NOT_GPUS = ("CPU", "BLAS", "ZenDNN", "zDNN")
_DEVICE = re.compile(r"([\w.-]{1,32}): (.*) \((\d{1,9}) MiB, (\d{1,9}) MiB free\)", re.ASCII)
# Those instruction sets of x86 CPUs that a compiler may use by itself, or ggml uses, as /proc/cpuinfo calls them.
_X86_FEATURES = re.compile(
    r"sse\w*|pni|ssse3|sse4\w*|avx\w*|fma\w*|f16c|bmi[12]|abm|popcnt|movbe|adx|aes|vaes|v?pclmulqdq|sha\w*|gfni|amx_\w+"
    r"|xop|tbm|3dnow\w*|lahf_lm|cx16"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteDevice:
    """A device that a worker can serve.

    Attributes:
        name: as llama.cpp calls it: `CPU`, `CUDA0`.
        description: of the hardware.
    """

    name: str
    description: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class FoundEngine:
    """An engine in the cache folder of a machine: the path of its worker program, and its record."""

    worker: str
    record: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a machine has.

    Attributes:
        system, architecture: as `uname` prints them.
        libc: `glibc 2.36`, `musl`, the version of macOS, or "".
        user: who is logged in.
        boot: identity of the machine since it was started; "" if unknown.
        network: identity of the network that its processes see; "" if unknown.
        features: of its CPU, as far as programs are compiled for them.
        cores: that may be used.
        gpus: how many there are, by the backend that uses them.
        tools: paths of programs by name.
        cmake: its version.
        missing_compiler: whether the compilers in `tools` do not work.
        folder: of its engines.
        folder_trouble: why nothing can be put there; "" if it can.
        noexec: why no program can be started there; "" if it can.
        free_bytes: of the file system there; None if unknown.
        engines: found there.
    """

    system: str
    architecture: str
    libc: str
    user: str
    boot: str
    network: str
    features: frozenset[str]
    cores: int
    gpus: Mapping[Backend, int]
    tools: Mapping[str, str]
    cmake: str
    missing_compiler: bool
    folder: str
    folder_trouble: str
    noexec: str
    free_bytes: int | None
    engines: tuple[FoundEngine, ...]

    @classmethod
    def parse(cls, output: str) -> Facts:
        """The facts in the output of `engine.sh probe`.

        Raises:
            ValueError: it is not complete.
        """
        values: dict[str, str] = {}
        engines: list[FoundEngine] = []
        for line in output.splitlines():
            key, equals, value = line.partition("=")
            if key == "record" and "engine" in values and len(engines) < _ENGINES_LIMIT:
                engines.append(FoundEngine(values["engine"], _record(value)))
            elif equals:
                values[key] = "".join(filter(str.isprintable, value[:_VALUE_LIMIT]))
        if values.get("end") != "probe":
            raise ValueError("its report is not complete")
        tools = {key.removeprefix("tool."): path for key, path in values.items() if key.startswith("tool.")}
        free_kib = values.get("free.kib", "")
        return cls(
            system=values["system"],
            architecture=values["architecture"],
            libc=values.get("libc", ""),
            user=values.get("user", ""),
            boot=values.get("boot", "")[:_BOOT_LIMIT],
            network=values.get("network", ""),
            features=cpu_features(values.get("flags", "")),
            cores=max(1, _number(values.get("cores", ""))),
            gpus={"cuda": _number(values.get("gpus.cuda", "")), "hip": _number(values.get("gpus.hip", ""))},
            tools=tools,
            cmake=values.get("cmake", ""),
            missing_compiler=values.get("missing") == "compiler",
            folder=values["folder"],
            folder_trouble=values.get("folder.trouble", ""),
            noexec=values.get("folder.noexec", ""),
            free_bytes=int(free_kib) * 1024 if free_kib.isdecimal() and len(free_kib) < 16 else None,
            engines=tuple(engines),
        )

    @property
    def name(self) -> str:
        """Its system as text: `Linux x86_64 (glibc 2.36)`."""
        return f"{self.system} {self.architecture}" + (f" ({self.libc})" if self.libc else "")

    @property
    def place(self) -> str:
        """Equal for the same user of the same machine, under whichever name; "" if unknown.

        Containers of one machine have networks of their own, and users have folders of their own.
        """
        facts = "\n".join((self.boot, self.network, self.user, self.folder))
        return hashlib.sha256(facts.encode()).hexdigest()[:32] if self.boot else ""

    @property
    def backends(self) -> list[Backend]:
        """Those that its hardware can use, best first."""
        if self.system == "Darwin" and self.architecture == "arm64":
            return ["metal"]
        return [*(backend for backend, count in self.gpus.items() if count), "cpu"]

    def can_build(self, backend: Backend) -> bool:
        """Whether it has the toolkit of a backend; CMake and a compiler are another question."""
        return backend not in _TOOLKITS or _TOOLKITS[backend] in self.tools

    def toolkit_advice(self, backend: Backend) -> str:
        """What people can do to use its GPUs, where the toolkit is missing."""
        count, program, toolkit = self.gpus[backend], _TOOLKITS[backend], _TOOLKIT_NAMES[backend]
        gpus = "a GPU" if count == 1 else f"{count} GPUs"
        return (
            f"it has {gpus}, but its CPU is used, since it has no {program}; install {toolkit} there to use them"
        )

    def build_trouble(self) -> str:
        """What is missing to build C++ programs there and the command that installs it; "" if nothing is."""
        missing = []
        if self.missing_compiler or not any(name in self.tools for name in _COMPILERS):
            missing.append(COMPILER)
        if "cmake" not in self.tools:
            missing.append("cmake")
        if not {"ninja", "make"} & self.tools.keys():
            missing.append("make")
        if missing:
            command = install_command(missing, self.tools, on_mac=self.system == "Darwin")
            advice = f"run `{command}` there" if command else "install them there"
            listed = " or ".join(filter(None, [", ".join(missing[:-1]), missing[-1]]))
            return f"it has no {listed}; {advice}"
        version = tuple(map(int, re.findall(r"\d+", self.cmake)[:2]))
        if version and version < _TOO_OLD_CMAKE:
            return f"its cmake {self.cmake} is older than 3.14; run `pip install --user cmake` there"
        return ""


def cpu_features(flags: str) -> frozenset[str]:
    """Those flags of a CPU that programs may be compiled for."""
    found = flags.split()
    if "fpu" in found and "sse2" in found:  # x86 has others that no program depends on
        return frozenset(flag for flag in found if _X86_FEATURES.fullmatch(flag))
    return frozenset(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnBuild:
    """This machine's build, as another machine sees it.

    Attributes:
        commit: of its llama.cpp; "" if it is a build of the user's own.
        content: hash of its programs, if there is no commit.
        backend: that it was built for.
        features: that its programs may need of a CPU; empty if they work on any.
        protocol: RPC protocol of its worker; "" if unknown.
    """

    commit: str
    content: str
    backend: Backend
    features: frozenset[str]
    protocol: str

    @property
    def identity(self) -> str:
        """Short, and equal for equal builds."""
        return build.VERSION if self.commit else f"own-{self.content[:12]}"

    @property
    def accepts_pinned(self) -> bool:
        """Whether its llama-server works with the worker of the pinned commit."""
        return bool(self.commit) or self.protocol in ("", build.PROTOCOL)

    def key(self) -> str:
        """Name of its folder on another machine."""
        return engine_key(self.identity, self.backend, self.features)


def engine_key(identity: str, backend: str, features: frozenset[str]) -> str:
    """Name of the folder of a worker; machines with other CPUs may share the folder above it."""
    cpu = hashlib.sha256(" ".join(sorted(features)).encode()).hexdigest()[:8]
    return f"worker-{identity}-{backend}-{cpu}"


def backend_of(files: Sequence[str]) -> Backend:
    """The backend of a build by the names of its files."""
    for library, backend in _GPU_LIBRARIES.items():
        if any(name.startswith(library) for name in files):
            return backend
    return "cpu"


def has_variants(files: Sequence[str]) -> bool:
    """Whether a build has one CPU library for each kind of CPU, and chooses when it starts."""
    return sum(name.startswith("libggml-cpu-") for name in files) > 1


def misfit(own: OwnBuild, here: Facts, there: Facts) -> str:
    """Why this machine's worker program cannot run there, as far as facts show; "" if they show nothing."""
    if (here.system, here.architecture) != (there.system, there.architecture):
        return f"it is {there.system} {there.architecture}, not {here.system} {here.architecture}"
    if here.system == "Linux" and here.libc and there.libc and here.libc.split()[0] != there.libc.split()[0]:
        return f"it has {there.libc}, not {here.libc}"
    lacking = sorted(own.features - there.features)
    if lacking:
        return f"its CPU lacks {', '.join(lacking[:3])}"
    return ""


def usable_engines(own: OwnBuild, there: Facts, backend: Backend) -> Iterator[tuple[FoundEngine, str]]:
    """Engines there that may be used for this build with a backend, best first, each with its commit."""
    for found in there.engines:
        record = found.record
        needs = record.get("features")
        fits = not isinstance(needs, list) or there.features >= {str(flag) for flag in needs}
        same = record.get("content") == own.content if own.content else record.get("commit") == own.commit
        pinned = own.accepts_pinned and record.get("commit") == build.GIT_COMMIT
        if record.get("backend") == backend and fits and (same or pinned):
            yield found, str(record.get("commit") or own.content)


def devices(lines: Sequence[str]) -> tuple[RemoteDevice, ...]:
    """The devices that a worker program lists, one worker each: its GPUs; its CPU only where there is none.

    Beside GPUs, layers on the CPU would slow down each token by more than they add memory for.
    """
    found = []
    for line in lines[:_DEVICES_LIMIT]:
        if match := _DEVICE.fullmatch(line.strip()):
            name, description, total, free = match.groups()
            text = "".join(filter(str.isprintable, description))[:100]
            size, unused = int(total) * MIB, int(free) * MIB
            found.append(RemoteDevice(name=name, description=text, total_bytes=size, free_bytes=unused))
    gpus = tuple(device for device in found if device.name not in _NOT_GPUS)
    return gpus or tuple(device for device in found if device.name == "CPU")


def _record(text: str) -> Mapping[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _number(text: str) -> int:
    return int(text) if text.isdecimal() and len(text) < 6 else 0
