"""How a router starts coordinators, what one of them runs, and the flags of llama-server for it."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from sollol_nb.errors import EngineError
from sollol_nb.gguf.facts import ModelFacts, read_facts
from sollol_nb.layers.plan import THIS_MACHINE, LayerPlan
from sollol_nb.llama_cpp.coordinators.placement import split_over_devices
from sollol_nb.llama_cpp.coordinators.speculation import NO_SPECULATION, Speculation
from sollol_nb.llama_cpp.processes.machine import usable_cores
from sollol_nb.models.files import find_model_file, names_file
from sollol_nb.models.modelfile import NO_MODELFILE, Modelfile
from sollol_nb.settings import config
from sollol_nb.settings.endpoints import LOOPBACK
from sollol_nb.settings.table import DEFAULT_SLOTS, MAX_DEFAULT_CONTEXT_TOKENS
from sollol_nb.text.short_names import short_name
from sollol_nb.text.tables import counted

FEW_CORES = 4
"""Of so many cores or less, a coordinator with layers on its own CPU leaves one to all else."""

GPU_HEAD_WIDTHS = (40, 64, 72, 80, 96, 112, 128)
"""Widths of attention heads up to 128 for which llama.cpp's CUDA backend has flash attention."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolSettings:
    """How the coordinators of a router are started. See `HybridRouter` for the meaning of each.

    Attributes:
        replan: what happens when another layout of a running model has become faster; see the setting.
        standby: whether a second coordinator of a model over workers is kept ready; see `standby.py`.
        exact: use no running coordinator that was started with other settings, though it would serve as well.
        adopt_only: start none: use those that other processes have started, also with other settings.
    """

    num_rpc_backends: int | None
    auto_discover_rpc: bool | None
    auto_setup_rpc: bool
    coordinator_timeout_s: float
    coordinator_port: int
    rpc_port: int
    layer_strategy: str
    context_tokens: int | None
    slots: int
    speculation: str
    draft: str | None
    llama_cpp: Path | None
    keep_alive_s: float | None
    keep_alive_of: Mapping[str, float | None] = field(default_factory=dict)
    replan: str = "say"
    standby: bool = False
    exact: bool = False
    adopt_only: bool = False

    def keep_alive(self, model: str) -> float | None:
        """Seconds that this model's coordinator lives without a request; None is forever."""
        return self.keep_alive_of.get(model, self.keep_alive_of.get(short_name(model), self.keep_alive_s))


@dataclass(frozen=True, kw_only=True, slots=True)
class CoordinatorSettings:
    """What one coordinator runs.

    Attributes:
        model: its name for display: the one it was first requested by, of a path the name of the file.
        model_path: the GGUF file.
        facts: the file's facts.
        plan: the layer plan; None runs everything on this machine.
        context_tokens: shared by all slots.
        slots: requests served at the same time.
        device_free_bytes: free bytes of each device, per endpoint, for workers with several devices.
        modelfile: what is added to the file; of that, the engine needs what `Modelfile.of_engine` has.
        speculation: what it drafts.
        may_use_gpus: whether a worker of the plan may be a GPU; what it is, the RPC protocol does not say.
        repacks_weights: whether weights on the own CPU are rearranged for it; see `OwnDevices`.
        contexts: the folder in which the contexts of its slots can be saved. Without one (None) the engine does
            not empty slots, either.
    """

    model: str
    model_path: Path
    facts: ModelFacts
    plan: LayerPlan | None
    context_tokens: int
    slots: int = DEFAULT_SLOTS
    device_free_bytes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    modelfile: Modelfile = NO_MODELFILE
    speculation: Speculation = NO_SPECULATION
    repacks_weights: bool = True
    may_use_gpus: bool = False
    contexts: Path | None = None

    def is_named(self, model: str) -> bool:
        """Whether a name that somebody writes means this: its name, or what stands for its file."""
        return model == self.model or (names_file(model) and find_model_file(model) == self.model_path)

    def describe_workers(self) -> str:
        """Where it runs, such as `on 3 workers (5/4/4 layers)` or `on this machine`."""
        if self.plan is None:
            return "on this machine"
        layers = "/".join(map(str, self.plan.unit_counts))
        where = counted(len(self.plan.workers), "worker")
        if self.plan.own:
            where = f"{THIS_MACHINE} and {where}" if self.plan.workers else THIS_MACHINE
        return f"on {where} ({layers} layers)"

    @property
    def _lacks_attention(self) -> bool:
        """Whether a GPU may lack flash attention for this model."""
        return self.plan is not None and self.may_use_gpus and not _has_gpu_attention(self.facts)

    @property
    def uses_own_cpu(self) -> bool:
        """Whether layers may be on this machine's CPU."""
        return self.plan is None or self.plan.own_cpu is not None

    def as_dict(self) -> dict[str, Any]:
        """For a registry entry: what another kernel needs to decide whether to use the coordinator."""
        return {
            "model": self.model,
            "model_file": file_identity(self.model_path),
            "plan": self.plan.as_dict() if self.plan else None,
            "workers": list(self.plan.endpoints) if self.plan else [],
            "context_tokens": self.context_tokens,
            "slots": self.slots,
            "modelfile": self.modelfile.of_engine,
            "speculation": self.speculation.as_dict(),
            "contexts": str(self.contexts) if self.contexts is not None else "",
            "kv": {"type": "f16", "flash_attention": "off" if self._lacks_attention else "auto"},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CoordinatorSettings:
        """The settings of an `as_dict`. Reads the model file again.

        Raises:
            KeyError, TypeError, ValueError: they are not settings.
            ModelFileError: the model file cannot be read.
        """
        path = Path(data["model_file"]["path"])
        plan = LayerPlan.from_dict(data["plan"]) if data["plan"] else None
        return cls(
            model=str(data["model"]),
            model_path=path,
            facts=read_facts(path),
            plan=plan,
            context_tokens=int(data["context_tokens"]),
            slots=int(data["slots"]),
            modelfile=Modelfile.from_engine(data["modelfile"]) if data.get("modelfile") else NO_MODELFILE,
            speculation=Speculation.from_dict(data["speculation"]) if data.get("speculation") else NO_SPECULATION,
            contexts=Path(data["contexts"]) if data.get("contexts") else None,
        )


def context_tokens_for(settings: PoolSettings, modelfile: Modelfile, facts: ModelFacts) -> int:
    """The context that a model gets: the router's, or that of its Modelfile, or a default; of the last two no more
    than the model was trained for."""
    wanted = modelfile.context_tokens or MAX_DEFAULT_CONTEXT_TOKENS
    return settings.context_tokens or min(facts.context_length or wanted, wanted)


def file_identity(path: Path) -> dict[str, Any]:
    """What distinguishes a file from others and from its next version: path, size and time of change."""
    about = path.stat()
    return {"path": str(path), "size": about.st_size, "mtime_ns": about.st_mtime_ns}


def server_flags(settings: CoordinatorSettings, port: int, known: frozenset[str]) -> list[str]:
    """llama-server's arguments for these settings.

    Args:
        known: flags that this build knows; flags that not all versions have are only passed if they are known.
    """
    flags = ["-m", str(settings.model_path), "--host", LOOPBACK, "--port", str(port)]
    flags += ["-c", str(settings.context_tokens), "-np", str(settings.slots)]
    if settings.plan is not None:
        flags += _placement_flags(settings.plan, settings.device_free_bytes)
    flags += _thread_flags(settings.plan)
    optional = [
        ("--kv-unified", []),  # one pool of context for all slots, instead of an equal part for each
        ("--cache-ram", ["0"]),  # the prompt cache in memory aborts over RPC (llama.cpp issue 26529)
        ("--offline", []),
        ("--no-webui", []),
        ("--jinja", []),
    ]
    if settings.plan is not None:
        optional.append(("--fit", ["off"]))  # it would change the plan
    if settings._lacks_attention:
        optional.append(("--flash-attn", ["off"]))
    if settings.uses_own_cpu and not settings.repacks_weights:  # workers get them as they are
        optional.append(("--no-repack", []))
    if settings.contexts is not None:
        optional.append(("--slot-save-path", [str(settings.contexts)]))
    adapters = settings.modelfile.adapters
    if adapters:
        quoted = ('"{}"'.format(str(path).replace('"', '""')) for path in adapters)
        flags += ["--lora", ",".join(quoted)]
    if settings.modelfile.projector is not None:
        flags += ["--mmproj", str(settings.modelfile.projector)]
        if settings.plan is not None:  # the plan does not give a worker memory for it
            flags += ["--no-mmproj-offload"]
    for flag, values in optional:
        if flag in known:
            flags += [flag, *values]
    flags += settings.speculation.flags()
    return [*flags, "-lv", "5"]


def _placement_flags(plan: LayerPlan, device_free_bytes: Mapping[str, Sequence[int]]) -> list[str]:
    """Where llama.cpp places the units.

    The units that are not offloaded stay on the CPU, from the first block on. The others go to devices in the
    order of `--device`, by default the workers and then all GPUs. It names workers by their position in `--rpc`,
    which must come first.
    """
    flags = ["--rpc", ",".join(plan.endpoints)] if plan.endpoints else []
    own = [shard.device for shard in plan.offloaded if shard.is_own]
    if own or not plan.endpoints:
        count = sum(max(1, len(device_free_bytes.get(endpoint, ()))) for endpoint in plan.endpoints)
        names = [f"RPC{position}" for position in range(count)] + own
        flags += ["--device", ",".join(names) or "none"]
    flags += ["-ngl", str(plan.gpu_layers)]
    if plan.offloaded:
        flags += ["-sm", "layer", "-ts", split_over_devices(plan, device_free_bytes)]
    return flags


def _thread_flags(plan: LayerPlan | None) -> list[str]:
    """How many threads the coordinator's own CPU uses; none where llama.cpp's own choice is good."""
    threads = usable_cores()
    if plan is not None and plan.own_cpu is not None and threads <= FEW_CORES:
        # Its threads wait for each other without giving up their cores: where one core does something else, each
        # token took five times as long (measured on 2 cores).
        threads = max(1, threads - 1)
    # llama.cpp also counts cores that a container may not use.
    return ["-t", str(threads)] if threads < (os.cpu_count() or 1) else []


def _has_gpu_attention(facts: ModelFacts) -> bool:
    """Whether GPUs have flash attention for heads of this size.

    llama-server cannot ask a worker's device, and uses it; a CUDA worker that lacks it aborts (fattn.cu). Larger
    heads depend on more than their size; models with them were made for GPUs.
    """
    key_width, value_width = facts.head_widths
    return key_width > 128 or (key_width in GPU_HEAD_WIDTHS and value_width == key_width)


def server_variables(settings: CoordinatorSettings) -> dict[str, str]:
    """llama-server's environment for these settings: what must not be seen in its arguments."""
    template = settings.modelfile.chat_template
    return {"LLAMA_ARG_CHAT_TEMPLATE": template} if template else {}


@lru_cache
def known_flags(server: Path) -> frozenset[str]:
    """The flags that this build of llama-server knows. Raises EngineError if it does not run."""
    try:
        answer = subprocess.run(
            [str(server), "--help"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            env=config.child_environment(),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"{server} does not run ({error}); run `sollol-nb doctor`") from error
    return frozenset(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", answer.stdout + answer.stderr))
