"""Chooses what a starting coordinator drafts: `speculation.py` decides, from plans, calibrations and answers."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from sollol_nb.errors import ConfigError, ModelError
from sollol_nb.gguf.facts import ModelFacts, read_facts
from sollol_nb.layers.plan import THIS_MACHINE, LayerPlan
from sollol_nb.layers.token_time import value_bytes, worker_parts
from sollol_nb.llama_cpp.coordinators.coordinator import Coordinator
from sollol_nb.llama_cpp.coordinators.draft_memory import DraftMemory, Key, model_key
from sollol_nb.llama_cpp.coordinators.planning import Start
from sollol_nb.llama_cpp.coordinators.settings import known_flags
from sollol_nb.llama_cpp.coordinators.speculation import (
    AUTO,
    DRAFT,
    NO_SPECULATION,
    OFF,
    USUAL_COST,
    Costs,
    DraftResults,
    Speculation,
    choose,
)
from sollol_nb.llama_cpp.workers.calibrations import Calibration
from sollol_nb.models.draft_models import draft_problem, find_draft_model, keeps_a_state
from sollol_nb.models.files import find_model_file

USUAL_BYTES_PER_MS = 5e6
"""How fast weights are read where it was not measured: by one core."""
SMALL_BATCH = 2.0
"""Small batches use a processor less well than prompts do, and each token needs logits (measured on a CPU)."""
MEMORY_MARGIN = 1.2
"""A draft model may take the free memory of this machine divided by this."""


class Drafting:
    """Chooses what starting coordinators draft, and learns from answers. Lives on the I/O loop.

    Args:
        calibration_of: how fast a worker, or `THIS_MACHINE`, is.
    """

    def __init__(self, calibration_of: Callable[[str], Calibration | None]) -> None:
        self._calibration_of = calibration_of
        self._memory = DraftMemory()

    async def check(self, start: Start, given: str | None) -> Path | None:
        """The file of a given draft model, checked before anything is loaded; None without one.

        Raises:
            ConfigError: it cannot draft for the model, or drafts of a model are wanted and there is none.
        """
        if start.speculation not in (AUTO, DRAFT):
            return None
        if given is None:
            if start.speculation == DRAFT:
                found = await asyncio.to_thread(find_draft_model, start.model_path, start.facts)
                if found is None:
                    raise ConfigError(
                        f"speculation=draft: no model on this machine can draft for {start.model} (a fifth of its "
                        "size at most, with the same vocabulary); give one with draft=, or speculation=ngram"
                    )
                return found
            return None
        try:
            path = await asyncio.to_thread(find_model_file, given)
            if path is None:
                raise ConfigError(f"draft={given}: this machine has no file of it; give the path of a GGUF file")
            problem = await asyncio.to_thread(draft_problem, start.model_path, path)
        except ModelError as error:
            raise ConfigError(f"draft={given}: {error}") from error
        if problem:
            raise ConfigError(f"draft={given} cannot draft for {start.model}: {problem}; give another one")
        return path

    async def choose(
        self,
        start: Start,
        plan: LayerPlan | None,
        round_trips_ms: Mapping[str, float | None],
        given: Path | None,
    ) -> Speculation:
        """What a coordinator drafts that starts with this plan.

        Args:
            round_trips_ms: of workers; None where unknown.
            given: the draft model that the user has named, checked.
        """
        if start.speculation == OFF:
            return NO_SPECULATION
        if await asyncio.to_thread(keeps_a_state, start.model_path):
            return Speculation(why="the model keeps a state that cannot be taken back after a wrong draft")
        draft_model = given
        if draft_model is None and start.speculation == AUTO:
            draft_model = await asyncio.to_thread(find_draft_model, start.model_path, start.facts)
        costs = self._costs(start.facts, plan, round_trips_ms)
        if draft_model is not None:
            draft_facts = await asyncio.to_thread(read_facts, draft_model)
            needed = draft_facts.file_bytes + sum(draft_facts.kv_bytes(start.context_tokens))
            free_bytes = psutil.virtual_memory().available - _needed_here(start.facts, plan)
            if needed * MEMORY_MARGIN > free_bytes and given is None:
                draft_model = None
            else:
                costs = replace(costs, draft_ms=self._own_token_ms(draft_facts))
        model, layout = await asyncio.to_thread(model_key, start.model_path), layout_key(plan, round_trips_ms)
        chosen = choose(
            start.speculation,
            costs,
            await self._memory.of(model, layout),
            draft_model=draft_model,
            is_given=given is not None,
        )
        return chosen.with_known(await asyncio.to_thread(known_flags, start.engine.server))

    def add_answer(
        self, coordinator: Coordinator, results: Mapping[str, Any], round_trips_ms: Mapping[str, float | None]
    ) -> None:
        """Learn from an answer; `results` are those of `RequestRecord.draft_results`."""
        settings = coordinator.settings
        key: Key = (
            model_key(settings.model_path),
            layout_key(settings.plan, round_trips_ms),
            settings.speculation.kind,
        )
        self._memory.add(key, DraftResults(**results))

    async def save(self) -> None:
        """Write what was learnt."""
        await self._memory.save()

    def _costs(
        self, facts: ModelFacts, plan: LayerPlan | None, round_trips_ms: Mapping[str, float | None]
    ) -> Costs:
        """The costs of tokens, from calibrations, else estimated from the size of the weights."""
        if plan is None:
            token_ms = self._own_token_ms(facts)
            own = self._calibration_of(THIS_MACHINE)
            if token_ms is None or own is None:
                return Costs()
            return Costs(
                token_ms=token_ms, further_ms=SMALL_BATCH * own.prompt_ms_per_byte * sum(facts.read_bytes)
            )
        wait_ms = token_ms = further_ms = 0.0
        for shard, part in zip(plan.shards, worker_parts(plan, round_trips_ms, facts), strict=True):
            calibration = self._calibration_of(shard.endpoint)
            round_trip_ms = round_trips_ms.get(shard.endpoint)
            if calibration is None:
                work_ms = part.read_bytes / USUAL_BYTES_PER_MS
                further_ms += work_ms * USUAL_COST
            else:
                work_ms = part.read_bytes * calibration.ms_per_byte + part.block_count * calibration.block_ms
                work_ms += calibration.hop_ms
                further_ms += SMALL_BATCH * part.read_bytes * calibration.prompt_ms_per_byte
                round_trip_ms = calibration.round_trip_ms if round_trip_ms is None else round_trip_ms
                if shard.has_output and calibration.bytes_per_s:
                    further_ms += value_bytes(facts)[1] * 1000 / calibration.bytes_per_s
            wait_ms += round_trip_ms or 0.0
            token_ms += work_ms + (round_trip_ms or 0.0)
        return Costs(token_ms=token_ms, wait_ms=wait_ms, further_ms=further_ms)

    def _own_token_ms(self, facts: ModelFacts) -> float | None:
        """A token of a model that runs on this machine alone; None if the machine was not calibrated."""
        own = self._calibration_of(THIS_MACHINE)
        if own is None:
            return None
        return own.hop_ms + facts.layer_count * own.block_ms + sum(facts.read_bytes) * own.ms_per_byte


def layout_key(plan: LayerPlan | None, round_trips_ms: Mapping[str, float | None]) -> str:
    """What distinguishes layouts for which drafts bring different things: the units of each worker, and how far
    away they are together, in powers of two of a millisecond."""
    if plan is None:
        return "this machine"
    wait_ms = sum(round_trips_ms.get(endpoint) or 0.0 for endpoint in plan.endpoints)
    distance = round(math.log2(wait_ms)) if wait_ms > 1 else 0
    return f"{'/'.join(map(str, plan.unit_counts))} at 2^{distance} ms"


def _needed_here(facts: ModelFacts, plan: LayerPlan | None) -> int:
    """Memory of this machine that the model itself will take, without that of workers here."""
    if plan is None:
        return facts.file_bytes
    return plan.own_cpu.needed_bytes if plan.own_cpu is not None else 0
