"""Settings: the only room that reads environment variables and knows folders.

Every setting is read when it is asked for, so a change in a notebook (`%env`, `os.environ`) takes effect at
once. The folders follow the platform's conventions (platformdirs) and can be moved with `SOLLOL_CACHE_DIR`
and `SOLLOL_STATE_DIR`.

| variable | meaning |
|---|---|
| `SOLLOL_LLAMA_CPP` | folder with `llama-server` and the RPC worker |
| `SOLLOL_CACHE_DIR` | engine builds (safe to delete) |
| `SOLLOL_STATE_DIR` | latency log, engine logs, and the registry of what runs |
| `SOLLOL_KEEP_ALIVE` | how long an engine lives without a request: `600`, `10m` (default), `0`, `forever` |
| `SOLLOL_NEST_ASYNCIO` | `0`: `%load_ext` does not make the kernel's event loop reentrant |
| `RPC_BACKENDS` | RPC workers, `host:port,host:port` |
| `OLLAMA_HOST` | Ollama nodes, comma-separated, with or without scheme and port |
| `OLLAMA_MODELS` | Ollama's model storage |
| `OLLAMA_NUM_PARALLEL` | requests an Ollama node serves at once (Ollama's own default is 1) |
| `VULKAN_SDK`, `CXX` | as every C++ build reads them: the Vulkan SDK's folder, the C++ compiler |
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
from pathlib import Path

import platformdirs

from sollol_nb.errors import ConfigError

APP_NAME = "sollol_nb"
DEFAULT_RPC_PORT = 50052
DEFAULT_COORDINATOR_PORT = 18080
DEFAULT_OLLAMA_PORT = 11434
DEFAULT_CONTEXT_TOKENS = 4096
DEFAULT_KEEP_ALIVE = "10m"

_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}


def _variable(name: str) -> str | None:
    value = os.environ.get(name, "").strip()
    return value or None


def _folder(variable: str, default: str) -> Path:
    return Path(_variable(variable) or default).expanduser()


def cache_dir() -> Path:
    """Folder for engine builds; safe to delete. Not created here."""
    return _folder("SOLLOL_CACHE_DIR", platformdirs.user_cache_dir(APP_NAME, appauthor=False))


def state_dir() -> Path:
    """Folder for the latency log, engine logs and the registry, created with mode 0700."""
    path = _folder("SOLLOL_STATE_DIR", platformdirs.user_state_dir(APP_NAME, appauthor=False))
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    return path


def log_dir() -> Path:
    """Folder for the logs of engine processes, created with mode 0700 (debug logs may hold prompts)."""
    path = state_dir() / "logs"
    path.mkdir(exist_ok=True, mode=0o700)
    return path


def registry_dir() -> Path:
    """Folder for the entries and keys of running engines, created with mode 0700."""
    path = state_dir() / "registry"
    path.mkdir(exist_ok=True, mode=0o700)
    return path


def default_keep_alive_s() -> float | None:
    """How long an engine lives without a request (`SOLLOL_KEEP_ALIVE`), in seconds; None is for ever."""
    return keep_alive_seconds(_variable("SOLLOL_KEEP_ALIVE") or DEFAULT_KEEP_ALIVE)


def keep_alive_seconds(value: object) -> float | None:
    """Seconds of a keep_alive as Ollama writes it: `300`, `"10m"`, `"1h30m"`; 0 ends an engine right after its
    request. Negative numbers and `"forever"` give None: for ever.

    Raises:
        ConfigError: it is none of these.
    """
    seconds: float | None = None
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            seconds = float(value)
    elif isinstance(value, str):
        text = value.strip().lower()
        if text in ("forever", "inf"):
            return None
        parts = re.findall(r"([\d.]+)(ms|h|m|s)", text)
        with contextlib.suppress(ValueError):
            if parts and "".join(map("".join, parts)) == text.lstrip("-"):
                seconds = sum(float(number) * _SECONDS[unit] for number, unit in parts)
                seconds = -seconds if text.startswith("-") else seconds
            else:
                seconds = float(text)
    if seconds is None or seconds != seconds:
        raise ConfigError(f'keep_alive={value!r} is no time; write seconds, "10m", 0, or "forever"')
    return None if seconds < 0 or seconds == float("inf") else seconds


def llama_cpp_folder() -> Path | None:
    """The user's own llama.cpp folder (`SOLLOL_LLAMA_CPP`), if set."""
    value = _variable("SOLLOL_LLAMA_CPP")
    return Path(value).expanduser() if value else None


def vulkan_sdk() -> Path | None:
    """Folder of the Vulkan SDK (`VULKAN_SDK`), if set."""
    value = _variable("VULKAN_SDK")
    return Path(value) if value else None


def cxx_compiler() -> str | None:
    """The C++ compiler the user chose (`CXX`), if set; CMake reads the same variable."""
    return _variable("CXX")


def child_environment(**extra: str) -> dict[str, str]:
    """The environment for programs this package starts: ours, plus `extra`.

    llama.cpp reads every option from `LLAMA_ARG_*` too; a variable left over from other work must not change
    what an engine of ours does. Its crash handler would run a debugger: switched off.
    """
    ours = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_ARG_")}
    return ours | {"GGML_NO_BACKTRACE": "1"} | extra


def nested_loop_wanted() -> bool:
    """Whether `asyncio.run` should work in cells (`SOLLOL_NEST_ASYNCIO`, on by default)."""
    return (_variable("SOLLOL_NEST_ASYNCIO") or "1").lower() not in ("0", "false", "no", "off")


def ollama_hosts() -> list[str]:
    """Entries of `OLLAMA_HOST` as written, or an empty list."""
    return [part.strip() for part in (_variable("OLLAMA_HOST") or "").split(",") if part.strip()]


def ollama_models_folder() -> Path | None:
    """Ollama's storage as the user moved it (`OLLAMA_MODELS`), if set."""
    value = _variable("OLLAMA_MODELS")
    return Path(value).expanduser() if value else None


def ollama_num_parallel() -> int:
    """Requests an Ollama node serves at once: `OLLAMA_NUM_PARALLEL`, else 1, Ollama's own default.

    Raises:
        ConfigError: the variable is not a whole number.
    """
    value = _variable("OLLAMA_NUM_PARALLEL") or "1"
    if not value.isdecimal():
        raise ConfigError(f"OLLAMA_NUM_PARALLEL is {value!r}; set it to a whole number, such as 4")
    return max(1, int(value))


def rpc_backends() -> list[str]:
    """Entries of `RPC_BACKENDS` as `host:port` strings, or an empty list."""
    entries = [part.strip() for part in (_variable("RPC_BACKENDS") or "").split(",") if part.strip()]
    return [format_endpoint(*parse_endpoint(entry)) for entry in entries]


def parse_endpoint(text: str, default_port: int = DEFAULT_RPC_PORT) -> tuple[str, int]:
    """Split `host:port`, `host`, `[v6]:port` into host and port.

    Raises:
        ConfigError: the text is not an endpoint.
    """
    host, port = text.strip(), str(default_port)
    if host.startswith("["):
        host, closed, rest = host[1:].partition("]")
        if not closed or not host or rest[:1] not in ("", ":"):
            host = ""
        port = rest.removeprefix(":") or port
    elif host.count(":") == 1:
        host, port = host.split(":")
    if (
        not host
        or any(c.isspace() or not c.isprintable() or c in "/@,;" for c in host)
        or (":" in host and not _is_address(host))
        or not port.isdecimal()
        or not 0 < int(port) < 65536
    ):
        raise ConfigError(f"{text!r} is not an endpoint; write host:port, such as 192.168.1.10:{default_port}")
    return host, int(port)


def format_endpoint(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(endpoint: str) -> bool:
    """Whether a `host:port` endpoint is on this machine by its address (127.0.0.0/8, ::1, localhost)."""
    host, _ = parse_endpoint(endpoint)
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
