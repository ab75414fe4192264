"""Check everything that the package needs, and name the one command that fixes what is missing.

`diagnose` reads files and asks ports. It runs none of the programs that it finds, unless `check` is set:
a diagnosis is wanted where something is wrong, and that may be a program. Nothing is installed.
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
from sollol_nb.cli import weights
from sollol_nb.cli.contexts import total
from sollol_nb.errors import ConfigError, EngineError
from sollol_nb.llama_cpp.contexts.store import ContextStore
from sollol_nb.llama_cpp.engine.build import read_record
from sollol_nb.llama_cpp.engine.check import Engine
from sollol_nb.llama_cpp.engine.find import INSTALL_COMMAND, find_engine, locate_engine
from sollol_nb.llama_cpp.engine.tools import (
    INSTALL_CMAKE,
    choose_backend,
    compiler_command,
    find_compiler,
    find_tool,
    gpu_toolkits,
)
from sollol_nb.models.files import DEMO_MODEL_PATH
from sollol_nb.ollama.nodes import node_url
from sollol_nb.settings import config
from sollol_nb.settings.endpoints import DEFAULT_OLLAMA_PORT
from sollol_nb.settings.trust import describe_files

OLLAMA_PROBE_LIMIT_S = 1.0


@dataclass(frozen=True, slots=True)
class OllamaProbe:
    """A configured Ollama address, and whether anything accepts connections there."""

    host: str
    port: int
    reachable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What was found on this machine.

    Attributes:
        usable: whether there is an engine, one that works if it was checked.
        engine: the engine that was found, or None.
        checked: whether its programs were run, to check them.
        engine_record: backend, source and commit of the engine if it was built by `sollol-nb install`, else empty.
        tools: paths of the build tools, None where missing.
        gpu_toolkits: the backends that can be built here, each with the program found for it.
        backend: the backend that `sollol-nb install` would build.
        settings: the settings files in use, and what does not count of them.
        demo_model: the demo model's file; None if this installation lacks it.
        saved_contexts: how much the saved contexts of conversations take, and may take.
        kept_weights: how much of models the workers of this machine keep, and may keep.
        missing: what is missing or broken, one line each, the most important first.
        remedy: the one command to run next; empty if there is nothing to do.
    """

    usable: bool
    engine: Engine | None
    checked: bool
    engine_record: dict[str, Any]
    version: str
    python: str
    system: str
    tools: dict[str, str | None]
    gpu_toolkits: dict[str, str]
    backend: str
    demo_model: Path | None
    folders: dict[str, Path]
    settings: tuple[str, ...]
    ollama: tuple[OllamaProbe, ...]
    saved_contexts: str
    kept_weights: str
    missing: tuple[str, ...]
    remedy: str

    def as_plain_data(self) -> dict[str, Any]:
        """As dicts, lists and strings, for JSON."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain


def diagnose(*, check: bool = False) -> Diagnosis:
    """Look for the engine, build tools, GPU toolkits, folders, settings, demo model and Ollama. Blocks for about a
    second.

    Args:
        check: run the engine's two programs once, to check that they work.
    """
    settings = tuple(describe_files("sollol-nb trust"))  # first: what it says is not logged again
    engine: Engine | None = None
    missing: list[str] = []
    remedy = ""
    compiler = find_compiler()
    tools = {name: _text(find_tool(name)) for name in ("cmake", "ninja", "git")}
    tools["c++"] = compiler
    try:
        engine = find_engine() if check else locate_engine()
    except EngineError as error:
        missing.append(str(error))
        own = config.find("llama_cpp")
        if own.value is not None:
            is_variable = own.source == "SOLLOL_LLAMA_CPP"
            remedy = _unset_command(own.source) if is_variable else f"remove llama_cpp from {own.source}"
        elif compiler is None:
            missing.append("no C++ compiler (needed to build llama.cpp)")
            remedy = compiler_command()
        elif tools["cmake"] is None:
            missing.append("cmake is missing (needed to build llama.cpp)")
            remedy = INSTALL_CMAKE
        else:
            remedy = INSTALL_COMMAND
    return Diagnosis(
        usable=engine is not None,
        engine=engine,
        checked=check,
        engine_record=read_record(engine.server.parent) if engine else {},
        version=__version__,
        python=f"{platform.python_version()} ({sys.executable})",
        system=f"{platform.system()} {platform.machine()}",
        tools=tools,
        gpu_toolkits={str(name): found for name, found in gpu_toolkits().items()},
        backend=choose_backend(None),
        demo_model=DEMO_MODEL_PATH if DEMO_MODEL_PATH.is_file() else None,
        folders={"cache": config.cache_dir(), "state": config.state_dir()},
        settings=settings,
        ollama=tuple(_probe_ollama(entry) for entry in config.default("ollama_hosts") or ["localhost"]),
        saved_contexts=total(ContextStore().list()),
        kept_weights=weights.describe(),
        missing=tuple(missing),
        remedy=remedy,
    )


def describe(diagnosis: Diagnosis) -> str:
    """The diagnosis as text: one fact per line, the verdict and the remedy last."""
    engine, record = diagnosis.engine, diagnosis.engine_record
    lines = [("sollol_nb", f"{diagnosis.version}, Python {diagnosis.python}, {diagnosis.system}")]
    if engine is None:
        lines.append(("engine", "not found"))
    else:
        built = f", {record['backend']} backend, built from {record['source']}" if record else ""
        lines += [
            ("engine", f"llama.cpp {engine.version or '(version unknown)'}{built}, found in: {engine.source}"),
            ("llama-server", str(engine.server)),
            ("RPC worker", f"{engine.worker} (RPC protocol {engine.protocol or 'unknown'})"),
        ]
    lines += [(name, path or "not found") for name, path in diagnosis.tools.items()]
    kits = ", ".join(f"{name} ({found})" for name, found in diagnosis.gpu_toolkits.items())
    lines.append(("GPU toolkits", f"{kits or 'none'}; `{INSTALL_COMMAND}` builds the {diagnosis.backend} backend"))
    lines.append(("demo model", str(diagnosis.demo_model or "missing from this installation")))
    lines += [(f"{name} folder", str(path)) for name, path in diagnosis.folders.items()]
    lines += [("contexts", diagnosis.saved_contexts), ("weights", diagnosis.kept_weights)]
    lines += [("settings", text) for text in diagnosis.settings]
    lines += [
        ("Ollama", f"{node.host}:{node.port} {'answers' if node.reachable else 'does not answer'}")
        for node in diagnosis.ollama
    ]
    lines += [("problem", problem) for problem in diagnosis.missing]
    text = [f"{name:13} {value}" for name, value in lines]
    note = "" if diagnosis.checked else " (nothing was run; `sollol-nb doctor --check` runs both programs)"
    text.append(f"ready{note}" if diagnosis.usable else f"not ready; to fix it: {diagnosis.remedy}")
    return "\n".join(text)


def _probe_ollama(entry: str) -> OllamaProbe:
    """Try to connect to an `OLLAMA_HOST` entry (`host`, `host:port` or a URL)."""
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


def _unset_command(variable: str) -> str:
    return f"Remove-Item Env:{variable}" if sys.platform == "win32" else f"unset {variable}"


def _text(path: Path | None) -> str | None:
    return str(path) if path else None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
