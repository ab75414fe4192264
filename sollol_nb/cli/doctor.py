"""Look at everything the package stands on, and name the one command that mends what is missing.

`diagnose` only looks (and lets the engine's two programs greet each other once); nothing is installed.
"""

from __future__ import annotations

import platform
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sollol_nb._version import __version__
from sollol_nb.errors import ConfigError, EngineError
from sollol_nb.llama_cpp.engine import build as engine_build
from sollol_nb.llama_cpp.engine import find as toolchain
from sollol_nb.llama_cpp.engine import tools as build_tools
from sollol_nb.settings import config
from sollol_nb.settings.endpoints import DEFAULT_OLLAMA_PORT

OLLAMA_PROBE_LIMIT_S = 1.0


@dataclass(frozen=True, slots=True)
class OllamaProbe:
    """An Ollama address as configured, and whether something accepts connections there."""

    host: str
    port: int
    reachable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What was found on this machine.

    Attributes:
        usable: an engine is there and works.
        engine: the engine, None if there is none that works.
        engine_record: what the build in our cache says of itself (backend, source, commit), else empty.
        missing: what is missing, one line each, the most important first.
        remedy: the one command to run next; empty if nothing has to be done.
    """

    usable: bool
    engine: toolchain.Engine | None
    engine_record: dict[str, Any]
    version: str
    python: str
    system: str
    tools: dict[str, str | None]
    gpu_toolkits: dict[str, str]
    backend: str
    demo_model: Path | None
    folders: dict[str, Path]
    ollama: tuple[OllamaProbe, ...]
    missing: tuple[str, ...]
    remedy: str

    def as_plain_data(self) -> dict[str, Any]:
        """For JSON: dicts, lists and strings only."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain


def diagnose() -> Diagnosis:
    """Look at engine, build tools, GPU toolkits, folders, demo model and Ollama. Blocking, about a second."""
    engine: toolchain.Engine | None = None
    missing: list[str] = []
    remedy = ""
    compiler = build_tools.find_compiler()
    tools = {name: _text(build_tools.find_tool(name)) for name in ("cmake", "ninja", "git")}
    tools["c++"] = compiler
    try:
        engine = toolchain.find_engine()
    except EngineError as error:
        missing.append(str(error))
        own = config.find("llama_cpp")
        if own.value is not None:
            is_variable = own.source == "SOLLOL_LLAMA_CPP"
            remedy = _forget_variable(own.source) if is_variable else f"take llama_cpp out of {own.source}"
        elif compiler is None:
            missing.append("a C++ compiler to build llama.cpp with")
            remedy = build_tools.compiler_command()
        elif tools["cmake"] is None:
            missing.append("cmake to build llama.cpp with")
            remedy = build_tools.INSTALL_CMAKE
        else:
            remedy = toolchain.INSTALL_COMMAND
    toolkits = build_tools.gpu_toolkits()
    return Diagnosis(
        usable=engine is not None,
        engine=engine,
        engine_record=engine_build.read_record(engine.server.parent) if engine else {},
        version=__version__,
        python=f"{platform.python_version()} ({sys.executable})",
        system=f"{platform.system()} {platform.machine()}",
        tools=tools,
        gpu_toolkits={str(name): found for name, found in toolkits.items()},
        backend=build_tools.choose_backend(None),
        demo_model=demo_model(),
        folders={"cache": config.cache_dir(), "state": config.state_dir()},
        ollama=tuple(_probe_ollama(entry) for entry in config.default("ollama_hosts") or ["localhost"]),
        missing=tuple(missing),
        remedy=remedy,
    )


def demo_model() -> Path | None:
    """The demo model that comes with the package, if this installation carries it."""
    return next(iter(sorted(Path(__file__).parents[1].rglob("*.gguf"))), None)


def describe(diagnosis: Diagnosis) -> str:
    """The diagnosis for a person: one fact a line, the verdict and the remedy last."""
    engine, record = diagnosis.engine, diagnosis.engine_record
    lines = [("sollol_nb", f"{diagnosis.version}, Python {diagnosis.python}, {diagnosis.system}")]
    if engine is None:
        lines.append(("engine", "none that works"))
    else:
        built = f", {record['backend']} backend, built from {record['source']}" if record else ""
        lines += [
            ("engine", f"llama.cpp {engine.version}{built}; found by: {engine.source}"),
            ("llama-server", str(engine.server)),
            ("RPC worker", f"{engine.worker} (RPC protocol {engine.protocol or 'not told'})"),
        ]
    lines += [(name, path or "none") for name, path in diagnosis.tools.items()]
    kits = ", ".join(f"{name} ({found})" for name, found in diagnosis.gpu_toolkits.items())
    lines.append(("GPU toolkits", f"{kits or 'none'}; a build here takes the {diagnosis.backend} backend"))
    lines.append(("demo model", str(diagnosis.demo_model or "not in this installation")))
    lines += [(f"{name} folder", str(path)) for name, path in diagnosis.folders.items()]
    lines += [
        ("Ollama", f"{node.host}:{node.port} {'answers' if node.reachable else 'does not answer'}")
        for node in diagnosis.ollama
    ]
    text = [f"{name:13} {value}" for name, value in lines]
    text += [f"{'missing':13} {what}" for what in diagnosis.missing]
    text.append("ready" if diagnosis.usable else f"not ready; run: {diagnosis.remedy}")
    return "\n".join(text)


def _probe_ollama(entry: str) -> OllamaProbe:
    """Try a plain connection to an `OLLAMA_HOST` entry (`host`, `host:port` or a URL)."""
    from sollol_nb.ollama.nodes import node_url

    try:
        parts = urlsplit(node_url(entry))
    except ConfigError:
        return OllamaProbe(entry, 0, False)
    host = parts.hostname or "localhost"
    port = parts.port or DEFAULT_OLLAMA_PORT
    try:
        socket.create_connection((host, port), timeout=OLLAMA_PROBE_LIMIT_S).close()
    except OSError:
        return OllamaProbe(host, port, False)
    return OllamaProbe(host, port, True)


def _forget_variable(name: str) -> str:
    return f"Remove-Item Env:{name}" if sys.platform == "win32" else f"unset {name}"


def _text(path: Path | None) -> str | None:
    return str(path) if path else None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
