"""The table of settings: every default that a user can change, once.

A setting has one name: as a key of `sollol_nb.toml`, in `%config Sollol.NAME = ...`, and as an environment
variable (some with the name that another program uses, such as `OLLAMA_HOST`). Its value comes from the first of
these that has one:

1. an option of the call or of the magic's line,
2. `%config Sollol.NAME = ...`, or `c.Sollol.NAME = ...` in `ipython_config.py`,
3. the environment variable,
4. `sollol_nb.toml` in the working folder, or in the nearest folder above that has one,
5. `sollol_nb.toml` in the user's config folder (`config.user_settings_file()` says where),
6. the built-in default.

This module has only the table; `config.py` finds the values of 3 to 6,
`notebook/settings_traits.py` those of 2. `python -m sollol_nb.settings` prints the table as Markdown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from sollol_nb.errors import ConfigError
from sollol_nb.layers.strategies import DEFAULT_STRATEGY
from sollol_nb.runtime.priority import Priority
from sollol_nb.settings import kinds
from sollol_nb.settings.kinds import Kind
from sollol_nb.settings.models import MODELS
from sollol_nb.text.nearest import nearest
from sollol_nb.text.tables import markdown_table

FILE_NAME = "sollol_nb.toml"
FORMATS = ("markdown", "text", "json", "html", "code")
"""How an answer can be shown in a notebook."""

# Defaults that other modules use too.
DEFAULT_TIMEOUT_S = 600
DEFAULT_KEEP_ALIVE = "10m"
DEFAULT_SLOTS = 4
DEFAULT_WORKERS = 3
MAX_DEFAULT_CONTEXT_TOKENS = 8192
DEFAULT_THRESHOLD_PARAMS = 40.0
DEFAULT_KEEP_ROWS = 1_000_000
DEFAULT_CONTEXT_CACHE_GB = 8
DEFAULT_GATEWAY_PORT = 11440
"""Not that of Ollama (11434), of ollama-herd (11435) or of llama-server (8080)."""

Side = Literal["request", "router", "notebook", "machine"]


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting.

    Attributes:
        name: its name, as a key of the file and in `%config Sollol.NAME`.
        side: what it applies to: a `request` of a magic, the kernel's `router`, the `notebook` itself, or the
            `machine` (folders, and Ollama's own settings; these cannot be changed from a notebook).
        kind: which values are valid.
        help: what it does.
        variable: its environment variable.
        default: the built-in default; None where `default_description` says what happens without a value.
        default_description: the default for readers, where the value alone is not clear.
        option: its name as an argument of `HybridRouter` or an option of a request, if different.
        guarded: whether the file of a folder sets it only with the user's consent (see `consent.py`): it could run
            a program, send prompts elsewhere, add to what is asked, or move or delete the user's data.
    """

    name: str
    side: Side
    kind: Kind
    help: str
    variable: str
    default: Any = None
    default_description: str = ""
    option: str = ""
    guarded: bool = False

    @property
    def argument(self) -> str:
        """Its name as an argument of `HybridRouter`, or as an option of a request."""
        return self.option or self.name

    @property
    def default_text(self) -> str:
        """The built-in default for readers."""
        return self.default_description or str(self.default).lower()


_TABLE = (
    Setting(
        "model",
        "request",
        kinds.MODEL,
        "Model of cells that name none.",
        "SOLLOL_MODEL",
        default_description="none (name it in the cell)",
    ),
    Setting(
        "temperature",
        "request",
        kinds.TEMPERATURE,
        "Randomness of the sampling; 0 is greedy: the most likely token each time.",
        "SOLLOL_TEMPERATURE",
        default_description="the engine's",
    ),
    Setting(
        "top_p",
        "request",
        kinds.TOP_P,
        "Sample only from the most likely tokens, whose probabilities sum up to this.",
        "SOLLOL_TOP_P",
        default_description="the engine's",
    ),
    Setting(
        "max_tokens",
        "request",
        kinds.MAX_TOKENS,
        "Longest answer, in tokens.",
        "SOLLOL_MAX_TOKENS",
        default_description="the engine's",
    ),
    Setting(
        "seed",
        "request",
        kinds.SEED,
        "Seed of the sampling; with deterministic, the same seed gives the same answer.",
        "SOLLOL_SEED",
        default_description="random",
    ),
    Setting(
        "system",
        "request",
        kinds.SYSTEM,
        "System message of requests that have none.",
        "SOLLOL_SYSTEM",
        default_description="none",
        guarded=True,
    ),
    Setting(
        "priority",
        "request",
        kinds.PRIORITY,
        "Which of several waiting requests runs first: 1 (batch) to 10 (critical), or a name such as high.",
        "SOLLOL_PRIORITY",
        default=int(Priority.NORMAL),
        default_description="5 (normal)",
    ),
    Setting(
        "timeout",
        "request",
        kinds.number("a number of seconds above 0, such as 120", above=True),
        "Time limit of a request in seconds, from when its coordinator is ready; at Ollama, loading counts.",
        "SOLLOL_TIMEOUT",
        default=DEFAULT_TIMEOUT_S,
    ),
    Setting(
        "format",
        "request",
        kinds.one_of(*FORMATS),
        "How a notebook shows an answer: markdown, text, json, html or code.",
        "SOLLOL_FORMAT",
        default="markdown",
    ),
    Setting(
        "strategy",
        "router",
        kinds.STRATEGY,
        "How layers are spread over workers: auto, latency_aware (the shortest predicted token), throughput, "
        "memory_aware (by free memory) or even (by count).",
        "SOLLOL_STRATEGY",
        default=DEFAULT_STRATEGY,
        option="layer_strategy",
    ),
    Setting(
        "replan",
        "router",
        kinds.one_of("off", "say", "auto"),
        "What happens when another layout of a running model has become faster (a worker is slow, or a better one "
        "is free): say (it is shown), auto (the model also moves there between two requests) or off.",
        "SOLLOL_REPLAN",
        default="say",
    ),
    Setting(
        "standby",
        "router",
        kinds.YES_OR_NO,
        "Whether a second coordinator of a model over workers is kept ready on free workers, so that a death "
        "costs a switch and not a load; %sollol_route MODEL -v says what it would take.",
        "SOLLOL_STANDBY",
        default=False,
    ),
    Setting(
        "keep_alive",
        "router",
        kinds.KEEP_ALIVE,
        "How long an engine runs without a request: seconds, 10m, 0 (it ends with its request) or forever; in a "
        'file or in %config also a dict of these by model: {"llama3.1:70b": "forever", "*": "5m"}.',
        "SOLLOL_KEEP_ALIVE",
        default=DEFAULT_KEEP_ALIVE,
    ),
    Setting(
        "workers",
        "router",
        kinds.WORKERS,
        "RPC workers, each as host:port, or those of a machine as ssh://host; in a variable separated by commas.",
        "RPC_BACKENDS",
        default=[],
        default_description="your own on this machine",
        option="rpc_backends",
        guarded=True,
    ),
    Setting(
        "num_workers",
        "router",
        kinds.whole_number("a whole number of 1 or more, such as 3", least=1),
        "How many workers a model is spread over.",
        "SOLLOL_NUM_WORKERS",
        default_description=f"as the strategy chooses: by memory or count {DEFAULT_WORKERS}, or more if the model "
        "needs them",
        option="num_rpc_backends",
    ),
    Setting(
        "auto_setup",
        "router",
        kinds.YES_OR_NO,
        "Whether workers are started on this machine when a model needs more.",
        "SOLLOL_AUTO_SETUP",
        default=False,
        option="auto_setup_rpc",
    ),
    Setting(
        "context_tokens",
        "router",
        kinds.whole_number("a whole number of 1 or more, such as 4096", least=1),
        "Context of a coordinator in tokens, shared by its slots.",
        "SOLLOL_CONTEXT_TOKENS",
        default_description=f"the model's own, at most {MAX_DEFAULT_CONTEXT_TOKENS}",
    ),
    Setting(
        "slots",
        "router",
        kinds.whole_number("a whole number of 1 or more, such as 4", least=1),
        "Requests that a coordinator serves at the same time.",
        "SOLLOL_SLOTS",
        default=DEFAULT_SLOTS,
    ),
    Setting(
        "recovery",
        "router",
        kinds.one_of("fast", "exact"),
        "How an answer continues when its coordinator is lost: fast (at once; the text after that may differ) or "
        "exact (the known tokens are generated again first).",
        "SOLLOL_RECOVERY",
        default="fast",
    ),
    Setting(
        "deterministic",
        "router",
        kinds.YES_OR_NO,
        "Whether llama.cpp gives the same answer each time, at temperature 0 or with a seed: requests run alone, "
        "with all slots empty, and with exact recovery.",
        "SOLLOL_DETERMINISTIC",
        default=False,
    ),
    Setting(
        "speculation",
        "router",
        kinds.one_of("auto", "off", "ngram", "draft"),
        "Whether llama.cpp drafts several tokens and verifies them at once: auto (where it pays), off, ngram "
        "(copied from the text so far) or draft (by a small model).",
        "SOLLOL_SPECULATION",
        default="auto",
    ),
    Setting(
        "draft",
        "router",
        kinds.MODEL,
        "Draft model: name or path of a small model with the same vocabulary.",
        "SOLLOL_DRAFT",
        default_description="one found among the models at hand",
    ),
    Setting(
        "threshold_params",
        "router",
        kinds.number("billions of parameters above 0, such as 30", above=True),
        "Models with more parameters than this (in billions) are sharded.",
        "SOLLOL_THRESHOLD_PARAMS",
        default_description=f"{DEFAULT_THRESHOLD_PARAMS:g} for models that are not in `MODEL_PROFILES`",
        option="distributed_threshold_params",
    ),
    Setting(
        "ollama_hosts",
        "router",
        kinds.OLLAMA_HOSTS,
        "Ollama nodes, each as host, host:port or URL; in a variable separated by commas.",
        "OLLAMA_HOST",
        default=[],
        default_description="this machine's",
        option="ollama_pool",
        guarded=True,
    ),
    Setting(
        "llama_cpp",
        "router",
        kinds.FOLDER,
        "Folder with llama-server and the RPC worker.",
        "SOLLOL_LLAMA_CPP",
        default_description="the first one found, else built",
        guarded=True,
    ),
    Setting(
        "gateway",
        "router",
        kinds.GATEWAY,
        "Gateway whose engines are used, such as http://head:11440; local uses this process's own engines.",
        "SOLLOL_GATEWAY",
        default_description="none",
        guarded=True,
    ),
    Setting(
        "gateway_key",
        "router",
        kinds.SECRET,
        "Key of that gateway; it is never shown.",
        "SOLLOL_GATEWAY_KEY",
        default_description="none",
        guarded=True,
    ),
    Setting(
        "short_errors",
        "notebook",
        kinds.YES_OR_NO,
        "Whether a cell shows errors of this package as one line, without a traceback.",
        "SOLLOL_SHORT_ERRORS",
        default=True,
    ),
    Setting(
        "on_unload",
        "notebook",
        kinds.one_of("stop", "keep"),
        "What %unload_ext does with this notebook's engines: stop ends those that no other notebook uses, keep "
        "lets them run until their keep_alive ends.",
        "SOLLOL_ON_UNLOAD",
        default="stop",
    ),
    Setting(
        "nest_asyncio",
        "notebook",
        kinds.YES_OR_NO,
        "Whether %load_ext makes asyncio.run work in cells.",
        "SOLLOL_NEST_ASYNCIO",
        default=True,
    ),
    Setting(
        "keep_chats",
        "notebook",
        kinds.YES_OR_NO,
        "Whether conversations are kept for the next kernel of the same notebook, in the state folder.",
        "SOLLOL_KEEP_CHATS",
        default=True,
    ),
    Setting(
        "preload",
        "notebook",
        kinds.PRELOAD,
        "Whether %load_ext begins to load the model of the notebook: that of the setting model, or of the first "
        "%%sollol cell; typing: also that of a cell being typed, when the frontend asks for completions.",
        "SOLLOL_PRELOAD",
        default=False,
        guarded=True,
    ),
    Setting(
        "journal",
        "notebook",
        kinds.YES_OR_NO,
        "Whether answers are journaled in the state folder while they stream, so that they outlive their tab and "
        "their kernel (%sollol_answers); also those of scripts and of a gateway.",
        "SOLLOL_JOURNAL",
        default=True,
    ),
    Setting(
        "confirm_tools",
        "notebook",
        kinds.YES_OR_NO,
        "Whether you are asked before a model calls one of the Python functions that you gave it (`--tools`, "
        "`tools=`); `--confirm` and `confirm=` decide it for one answer.",
        "SOLLOL_CONFIRM_TOOLS",
        default=False,
        guarded=True,
    ),
    Setting(
        "models",
        "machine",
        MODELS,
        "Names for GGUF files, and what is known of models: a path, or a table of gguf, mmproj (the projector of "
        "a model that reads images), parameters (billions), memory_gb, sharded, temperature, top_p, max_tokens, "
        "seed and system; in a variable name=path, separated by commas. %sollol_profile and %sollol_models pull "
        "write it.",
        "SOLLOL_MODELS",
        default={},
        default_description="none",
    ),
    Setting(
        "model_dirs",
        "machine",
        kinds.FOLDERS,
        "Folders that are searched for .gguf files, besides those of LM Studio, llama.cpp and the Hugging Face "
        "Hub; in a variable separated by commas. %sollol_models lists what is found.",
        "SOLLOL_MODEL_DIRS",
        default=[],
        default_description="none",
        guarded=True,
    ),
    Setting(
        "cache_dir",
        "machine",
        kinds.FOLDER,
        "Folder for engine builds, saved contexts and the workers' caches of weights; safe to delete.",
        "SOLLOL_CACHE_DIR",
        default_description="the user's cache folder",
        guarded=True,
    ),
    Setting(
        "context_cache_gb",
        "machine",
        kinds.number("a number of gigabytes, such as 8, or 0 for none", least=0),
        "Size of the folder with saved contexts of conversations, which are not processed again after a reload; "
        "the least recently used are deleted. 0 saves none.",
        "SOLLOL_CONTEXT_CACHE_GB",
        default=DEFAULT_CONTEXT_CACHE_GB,
        guarded=True,
    ),
    Setting(
        "tensor_cache_gb",
        "machine",
        kinds.number("a number of GB, such as 50, or 0 for none"),
        "Disk in GB that workers may use on each machine to keep weights, so that a model that is loaded again is "
        "not sent again; at most half of the free disk. 0 keeps none.",
        "SOLLOL_TENSOR_CACHE_GB",
        default=50,
        guarded=True,
    ),
    Setting(
        "state_dir",
        "machine",
        kinds.FOLDER,
        "Folder for the latency log, engine logs, and the registry of running engines.",
        "SOLLOL_STATE_DIR",
        default_description="the user's state folder",
        guarded=True,
    ),
    Setting(
        "latency_keep_days",
        "machine",
        kinds.number("a number of days above 0, such as 90", above=True),
        "Days after which rows of the latency log are deleted.",
        "SOLLOL_LATENCY_KEEP_DAYS",
        default_description="rows are kept forever",
        guarded=True,
    ),
    Setting(
        "latency_keep_rows",
        "machine",
        kinds.whole_number("a whole number, such as 100000, or 0 for all", least=0),
        "How many of the newest rows the latency log keeps; 0 keeps all.",
        "SOLLOL_LATENCY_KEEP_ROWS",
        default=DEFAULT_KEEP_ROWS,
        guarded=True,
    ),
    Setting(
        "ssh",
        "machine",
        kinds.COMMAND,
        "Program, with options, that connects to machines with workers (ssh://host).",
        "SOLLOL_SSH",
        default="ssh",
        guarded=True,
    ),
    Setting(
        "ollama_models",
        "machine",
        kinds.FOLDER,
        "Ollama's model storage on this machine.",
        "OLLAMA_MODELS",
        default_description="Ollama's usual folder",
        guarded=True,
    ),
    Setting(
        "ollama_num_parallel",
        "machine",
        kinds.whole_number("a whole number of 0 or more, such as 4", least=0),
        "Requests that an Ollama node serves at the same time.",
        "OLLAMA_NUM_PARALLEL",
        default=1,
    ),
    Setting(
        "gateway_host",
        "machine",
        kinds.text("an address of this machine, or 0.0.0.0 for all of them"),
        "Address on which the gateway listens; beyond this machine it requires a key.",
        "SOLLOL_GATEWAY_HOST",
        default="127.0.0.1",
        guarded=True,
    ),
    Setting(
        "gateway_port",
        "machine",
        kinds.PORT,
        "Port on which the gateway listens.",
        "SOLLOL_GATEWAY_PORT",
        default=DEFAULT_GATEWAY_PORT,
        guarded=True,
    ),
    Setting(
        "mcp_ask",
        "machine",
        kinds.one_of("off", "loaded", "any"),
        "Which models agents may ask through Jupyter's MCP server (sollol_ask): loaded (only those that are "
        "loaded already, so nothing is started), any (others are loaded for it) or off.",
        "SOLLOL_MCP_ASK",
        default="loaded",
        guarded=True,
    ),
)

SETTINGS: Mapping[str, Setting] = MappingProxyType({setting.name: setting for setting in _TABLE})
"""All settings by name, in the order in which they are shown."""


def setting_of(name: str, label: str) -> Setting:
    """The setting of this name. `label` says in the error where the name is written.

    Raises:
        ConfigError: there is no such setting; the message has the nearest known one.
    """
    setting = SETTINGS.get(name)
    if setting is None:
        # The name of HybridRouter's argument or of the variable is a better hint than a similar name.
        aliases = {
            alias.lower(): setting.name for setting in _TABLE for alias in (setting.argument, setting.variable)
        }
        near = nearest(name, SETTINGS)
        meant = aliases.get(name.lower()) or near
        hint = f"did you mean {meant}?" if meant else f"known settings: {', '.join(SETTINGS)}"
        raise ConfigError(f"{label}: there is no setting {name!r}; {hint}")
    return setting


def as_markdown() -> str:
    """The table as Markdown: key of the file, name in `%config`, variable, default, meaning."""
    return markdown_table(
        ("`sollol_nb.toml`", "`%config`", "variable", "default", "meaning"),
        [
            (
                f"`{setting.name}`",
                "" if setting.side == "machine" else f"`Sollol.{setting.name}`",
                f"`{setting.variable}`",
                setting.default_text,
                setting.help,
            )
            for setting in _TABLE
        ],
    )
