"""The profile of a model before it runs: its size, its memory, and whether it needs sharding.

Each fact comes from the first of these that has it: the user's table (`MODEL_PROFILES`, read at each decision, so
an edit in a cell takes effect immediately), the setting `models`, the built-in entries of the table, the header of
the model's file, and the size in the model's name. The size of a model in none of them stays unknown; nothing is
assumed silently.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sollol_nb.errors import ConfigError
from sollol_nb.gguf.facts import ModelFacts, read_facts
from sollol_nb.layers.planner import DEFAULT_CONTEXT_TOKENS
from sollol_nb.runtime.amounts import is_number
from sollol_nb.settings import config
from sollol_nb.settings.models import SavedModel, checked_entry
from sollol_nb.settings.table import DEFAULT_THRESHOLD_PARAMS
from sollol_nb.text.short_names import short_name

MODEL_PROFILES: dict[str, dict[str, Any]] = {
    # Small models: Ollama
    "llama3.2": {"parameter_count": 3, "estimated_memory_gb": 2, "requires_distributed": False},
    "phi": {"parameter_count": 3, "estimated_memory_gb": 1.5, "requires_distributed": False},
    # Medium models: Ollama
    "llama3.1:8b": {"parameter_count": 8, "estimated_memory_gb": 5, "requires_distributed": False},
    "codellama:13b": {"parameter_count": 13, "estimated_memory_gb": 8, "requires_distributed": False},
    # Large models: sharded with llama.cpp
    "llama3.1:70b": {"parameter_count": 70, "estimated_memory_gb": 40, "requires_distributed": True},
    "llama3.1:405b": {"parameter_count": 405, "estimated_memory_gb": 240, "requires_distributed": True},
    "mixtral:8x7b": {"parameter_count": 47, "estimated_memory_gb": 26, "requires_distributed": True},
    # The model that comes with the package, as one process and sharded
    "demo": {"parameter_count": 0.003, "estimated_memory_gb": 0.05, "requires_distributed": False},
    "demo:sharded": {"parameter_count": 0.003, "estimated_memory_gb": 0.05, "requires_distributed": True},
}
"""Model name -> `parameter_count` (billions), `estimated_memory_gb` (1e9 bytes), `requires_distributed`.

Add and change entries freely; any of the three keys may be missing, other keys are ignored.
"""

_BUILT_IN = copy.deepcopy(MODEL_PROFILES)
_SAVED_AS = {
    "parameter_count": "parameters",
    "estimated_memory_gb": "memory_gb",
    "requires_distributed": "sharded",
}
"""The keys of an entry -> those of the setting `models`."""

BYTES_PER_PARAMETER = 0.61
"""For models known by name only: Q4_K_M, Ollama's usual quantization, has 4.89 bits per weight (table in
llama.cpp's tools/quantize/README.md; Llama 3.1 70B: 43.1 GB)."""

MIXTURE_SHARE = 0.83
"""`8x7b` counts the shared attention layers eight times; Mixtral's true 46.7B of 8 x 7B and 141B of 8 x 22B
are 0.83 and 0.80 of the product."""

_SIZE = re.compile(
    r"(?<![a-z0-9.])(?:(?P<experts>\d+)x|e)?(?P<number>\d+(?:\.\d+)?)(?P<unit>[mbt])(?![a-z0-9])", re.IGNORECASE
)
_BILLIONS = {"m": 1e-3, "b": 1.0, "t": 1e3}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelProfile:
    """What is known about a model, and the source.

    Attributes:
        model: the name as the request has it.
        parameter_count_b: parameters in billions; None when unknown.
        memory_bytes: estimated memory for weights and a context of 4096 tokens; None when unknown.
        requires_distributed: whether it needs sharding; None when its size is unknown.
        source: "profile 'llama3.1:70b'", "GGUF header of <file name>", "name" or "unknown".
        reason: why it is sharded or not, as one line.
        is_stated: whether the user's table or settings state all of this, so that no file need be read.
        is_listed_as_sharded: whether a table or the settings say that it is sharded, whatever its size.
    """

    model: str
    parameter_count_b: float | None
    memory_bytes: int | None
    requires_distributed: bool | None
    source: str
    reason: str
    is_stated: bool = False
    is_listed_as_sharded: bool = False

    def __str__(self) -> str:
        name = short_name(self.model)
        if self.requires_distributed is None:
            advice = f"Set its size in MODEL_PROFILES, or with %sollol_profile {self.model} --parameters N"
            return f"{name}: size unknown, so it will not be sharded. {advice}"
        size = "size unknown" if self.parameter_count_b is None else _parameters(self.parameter_count_b)
        memory = "" if self.memory_bytes is None else f", about {self.memory_bytes / 1e9:.3g} GB"
        sharded = "sharded" if self.requires_distributed else "not sharded"
        return f"{name}: {size}{memory} (from {self.source}); {sharded}: {self.reason}"


def size_from_name(model: str) -> float | None:
    """Billions of parameters that a model's name states, or None.

    Understands `qwen3:235b`, `gemma3:270m`, `kimi-k2:1t`, `hf.co/user/Repo-70B-GGUF:Q4_K_M`, and mixtures:
    `mixtral:8x7b` is 8 x 7 x `MIXTURE_SHARE`; in `qwen3:30b-a3b` the active part (`a3b`) is not the size. Of
    several sizes the largest counts (`olmoe-1b-7b`), and trillions only where no other size is stated (a `3t`
    beside `1.1b` is the length of the training). `gemma3n:e4b` counts as stated, 4 (effective) billions, although
    more are stored.
    """
    last_part = model.rsplit("/", 1)[-1]
    sizes: dict[bool, list[float]] = {False: [], True: []}
    for match in _SIZE.finditer(last_part):
        unit = match["unit"].lower()
        size = float(match["number"]) * _BILLIONS[unit]
        if match["experts"]:
            size *= int(match["experts"]) * MIXTURE_SHARE
        sizes[unit == "t"].append(size)
    found = sizes[False] or sizes[True]
    return max(found) if found else None


def profile_of(
    model: str,
    *,
    facts: ModelFacts | None = None,
    threshold_params: float | None = None,
    profiles: Mapping[str, Mapping[str, Any]] = MODEL_PROFILES,
    saved: SavedModel = SavedModel(),  # noqa: B008 - never changes
) -> ModelProfile:
    """The profile of a model.

    A listed model is sharded if its entry says True. If its entry says False, it is sharded only when it has more
    parameters than a threshold given here. Any other model, by its entry, header or name, is sharded when it has
    more parameters than the threshold, or than `DEFAULT_THRESHOLD_PARAMS` if none is given.

    Args:
        model: name as the user wrote it; `x` and `x:latest` are the same, other tags are different models.
        facts: the header of the model's file, if there is one.
        threshold_params: the user's own threshold in billions of parameters.
        profiles: the table of listed models.
        saved: what the settings say about the model.

    Raises:
        ConfigError: no name, an unusable threshold, or a malformed entry.
    """
    if not model.strip():
        raise ConfigError("no model given; give a name such as llama3.2")
    if threshold_params is not None and not _is_amount(threshold_params):
        raise ConfigError(
            f"distributed_threshold_params={threshold_params!r} must be billions of parameters, such as 30"
        )
    key = _listed_key(model, profiles)
    entry = _Entry.read(key, None if key is None else profiles[key], saved)
    size, size_source = _size(model, entry, facts)
    if entry.memory_gb is not None:
        memory_bytes: int | None = round(entry.memory_gb * 1e9)
    elif facts is not None:
        memory_bytes = facts.file_bytes + sum(facts.kv_bytes(DEFAULT_CONTEXT_TOKENS))
    else:
        memory_bytes = None if size is None else round(size * 1e9 * BYTES_PER_PARAMETER)
    if entry.parameter_count_b is not None or entry.memory_gb is not None or (key is not None and facts is None):
        source = entry.sources.get("parameter_count") or entry.sources.get("estimated_memory_gb") or ""
        source = source if source and source != _TABLE else f"profile {key!r}"
    elif facts is not None:
        source = f"GGUF header of {facts.path.name}"
    else:
        source = "unknown" if size is None else "name"
    needs_sharding, reason = _decide(entry, size, size_source, threshold_params)
    return ModelProfile(
        model=model,
        parameter_count_b=size,
        memory_bytes=memory_bytes,
        requires_distributed=needs_sharding,
        source=source,
        reason=reason,
        is_stated=None not in (entry.parameter_count_b, entry.memory_gb),
        is_listed_as_sharded=entry.requires_distributed is True,
    )


_TABLE = "MODEL_PROFILES"


def save_profile(model: str, changes: Mapping[str, Any]) -> str:
    """Keep what is known of a model for all kernels (see `config.save_model`, which returns the path of the file).

    What `MODEL_PROFILES` says about the same in this process is reset, since it would come first.

    Args:
        changes: by the keys of `settings.models.KEYS`.

    Raises:
        ConfigError: it cannot be kept.
        ModelFileError: `gguf` is not a GGUF file.
    """
    checked = checked_entry(model, changes)
    if "gguf" in checked:
        read_facts(checked["gguf"].absolute())
    path = config.save_model(model, checked)
    entry, built_in = MODEL_PROFILES.get(model), _BUILT_IN.get(model, {})
    for name, saved_name in _SAVED_AS.items():
        if entry is not None and saved_name in checked:
            entry.pop(name, None)
            entry |= {name: built_in[name]} if name in built_in else {}
    if entry == {}:
        del MODEL_PROFILES[model]
    return path


@dataclass(frozen=True, slots=True)
class _Entry:
    """What the table and the settings say about a model, checked.

    `sources` has for each known key of the table where its value is from.
    """

    parameter_count_b: float | None = None
    memory_gb: float | None = None
    requires_distributed: bool | None = None
    sources: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, key: str | None, entry: object, saved: SavedModel) -> _Entry:
        listed = {} if key is None else _checked_entry(key, entry)
        built_in = _BUILT_IN.get(key or "", {})
        values, sources = {}, {}
        for name, saved_name in _SAVED_AS.items():
            value, is_built_in = listed.get(name), listed.get(name) == built_in.get(name)
            if saved_name in saved.values and (value is None or is_built_in):
                values[name], sources[name] = saved.values[saved_name], saved.source_name
            elif value is not None:
                values[name], sources[name] = value, _TABLE
        return cls(
            values.get("parameter_count"),
            values.get("estimated_memory_gb"),
            values.get("requires_distributed"),
            sources,
        )


def _checked_entry(key: str, entry: Any) -> Mapping[str, Any]:
    if not hasattr(entry, "get"):
        raise ConfigError(
            f"MODEL_PROFILES[{key!r}] is {entry!r}; make it a dict such as {{'parameter_count': 70}}"
        )
    for name in ("parameter_count", "estimated_memory_gb"):
        value = entry.get(name)
        if value is not None and not _is_amount(value):
            raise ConfigError(f"MODEL_PROFILES[{key!r}][{name!r}] is {value!r}; give a number, such as 70")
    needs_sharding = entry.get("requires_distributed")
    if needs_sharding is not None and not isinstance(needs_sharding, bool):
        raise ConfigError(
            f"MODEL_PROFILES[{key!r}]['requires_distributed'] is {needs_sharding!r}; give True or False"
        )
    checked: Mapping[str, Any] = entry
    return checked


def _is_amount(value: object) -> bool:
    return is_number(value) and 0 <= value < float("inf")


def _listed_key(model: str, profiles: Mapping[str, Any]) -> str | None:
    same_model = model.removesuffix(":latest") if model.endswith(":latest") else f"{model}:latest"
    return next((key for key in (model, same_model) if key in profiles), None)


def _size(model: str, entry: _Entry, facts: ModelFacts | None) -> tuple[float | None, str]:
    """Billions of parameters, and where the number is from."""
    if entry.parameter_count_b is not None:
        return float(entry.parameter_count_b), f"from {entry.sources['parameter_count']}"
    if facts is not None:
        return facts.parameter_count / 1e9, "from its GGUF header"
    return size_from_name(model), "from its name"


def _decide(
    entry: _Entry, size: float | None, size_source: str, threshold: float | None
) -> tuple[bool | None, str]:
    """Whether to shard, and why."""
    listed = f"listed in {entry.sources.get('requires_distributed')} as"
    if entry.requires_distributed:
        return True, f"{listed} needing sharding"
    if entry.requires_distributed is False:
        reason = f"{listed} not needing sharding"
        if threshold is None or size is None or size <= threshold:
            return False, reason
        return True, f"{reason}, but {_parameters(size)} are above the threshold of {_billions(threshold)}"
    if size is None:
        return None, "size unknown"
    limit = DEFAULT_THRESHOLD_PARAMS if threshold is None else threshold
    side = "above" if size > limit else "below" if size < limit else "at"
    return (
        size > limit,
        f"{_parameters(size)} ({size_source}), {side} the sharding threshold of {_billions(limit)}",
    )


def _parameters(size: float) -> str:
    return f"{_billions(size)} parameters"


def _billions(size: float) -> str:
    """`235B`, `46.5B`, `270M`."""
    return f"{size:.4g}B" if size >= 1 or size == 0 else f"{size * 1e3:.3g}M"
