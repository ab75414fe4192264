"""A batch: the same question about many rows, over all slots of the model. It can be stopped and continued.

* Everything is checked, and every row filled in, before the first request.
* Rows with a missing or blank value have nothing to ask: they are skipped.
* Rows that ask the same are asked once. Rows that an earlier batch (of this kernel or another) has answered are
  not asked again; `batch/store.py` says what counts as the same, and how long answers are kept.
* Each answer is kept as soon as it is complete. After an interrupt, a crash or a restart of the kernel, the same
  call asks only the rest.
* A row's error stays beside it and stops no other row; the next call asks it again. What would fail every row
  (an unknown model, no workers) is raised and ends the batch.
* Requests wait with priority BATCH, behind all others.
* Rows that begin alike are asked in an order in which that beginning is processed once; `batch/order.py` says how.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections import Counter, defaultdict, deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from sollol_nb.batch import order
from sollol_nb.batch.frame import CACHED, ERROR, OK, SKIPPED, RowResult, check_columns, joined
from sollol_nb.batch.rows import Rows, RowTable, RowTemplate, questions
from sollol_nb.batch.store import BatchStore, answer_key
from sollol_nb.chat.completion import Completion
from sollol_nb.chat.options import ChatOptions
from sollol_nb.chat.request import checked_timeout_s, options_with_schema
from sollol_nb.errors import (
    AnswerInterruptedError,
    BatchInterrupted,
    ConfigError,
    ContextOverflowError,
    CoordinatorStartError,
    CoordinatorTimeoutError,
    EngineError,
    GatewayError,
    ModelError,
    OllamaResponseError,
    OllamaUnavailableError,
    RequestRejectedError,
    SollolError,
    StructureError,
    WorkerError,
)
from sollol_nb.models.routing import checked_backend
from sollol_nb.router.finder import ModelSlots
from sollol_nb.router.router import Router
from sollol_nb.runtime.amounts import is_whole_number
from sollol_nb.runtime.io_loop import io_bound_stream, iterate_blocking
from sollol_nb.runtime.priority import Priority, checked_priority
from sollol_nb.runtime.progress_bars import progress_bar
from sollol_nb.schema.schema import parser_of
from sollol_nb.settings import config
from sollol_nb.settings.models import model_text
from sollol_nb.text.short_names import short_name
from sollol_nb.text.tables import counted

if TYPE_CHECKING:
    import pandas as pd
    from tqdm.std import tqdm

logger = logging.getLogger(__name__)

HITS_EVERY_ROW = (
    ConfigError,
    EngineError,
    ModelError,
    WorkerError,
    CoordinatorStartError,
    CoordinatorTimeoutError,
    OllamaUnavailableError,
    GatewayError,
)
"""Errors that are not about a single row."""

READ_AT_ONCE = 1000
"""How many kept answers are read at a time: neither a stop nor the progress bar waits for all."""

SAME_REFUSALS = 5
"""When this many different rows were refused with the same message and none was answered, the batch fails."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How many more rows have their result, and its status."""

    rows: int
    status: str


class Batch:
    """One batch of a router. The arguments are those of `HybridRouter.map`.

    Raises:
        ConfigError: an argument cannot be used, or a row cannot be filled in. Nothing is sent.
    """

    def __init__(
        self,
        router: Router,
        store: BatchStore,
        /,
        rows: Rows,
        template: RowTemplate,
        *,
        model: str | Path | None = None,
        schema: object = None,
        system: str | None = None,
        backend: str | None = None,
        concurrency: int | None = None,
        priority: int = Priority.BATCH,
        timeout: float | None = None,
        fresh: bool = False,
        progress: bool = True,
        prefix: str = "",
        **options: Unpack[ChatOptions],
    ) -> None:
        self._router = router
        self._store = store
        self._model = config.default("model") if model is None else model_text(model)
        if not self._model:
            raise ConfigError(
                'no model given; pass model="demo", or set a default: %config Sollol.model = "demo" (in a script: '
                "the variable SOLLOL_MODEL)"
            )
        if concurrency is not None and not (is_whole_number(concurrency) and concurrency > 0):
            raise ConfigError(f"concurrency={concurrency!r} must be a whole number of requests, 1 or more")
        if timeout is not None:
            checked_timeout_s(timeout)
        self._arguments: dict[str, Any] = {
            "journal": False,  # the answers have their own store
            "schema": schema,
            "backend": checked_backend(backend),
            "priority": checked_priority(priority),
            "timeout": timeout,
            **options,
        }
        self._options = options_with_schema(options, schema)
        self._schema = schema
        self._parse = None if schema is None else parser_of(schema)
        self._concurrency = concurrency
        self._fresh = fresh
        self._shows_progress = progress
        self._prefix = prefix
        self._table = RowTable.read(rows)
        check_columns(self._table.frame, prefix, schema)
        self._questions = questions(self._table.items, template, system)
        self._results = [RowResult()] * len(self._questions)
        self._counts: Counter[str] = Counter()  # of rows, by status
        self._refusals: Counter[str] = Counter()  # of questions, by the error's message
        self._are_kept = True
        self._to_keep: dict[str, Completion] = {}
        self._keeping: asyncio.Task[None] | None = None

    def frame(self) -> pd.DataFrame:
        """The rows with the results so far."""
        return joined(
            self._table.frame, self._results, model=self._model, schema=self._schema, prefix=self._prefix
        )

    async def run(self) -> pd.DataFrame:
        """Ask all rows. Errors are those of `HybridRouter.map`."""
        with self._bar() as bar:
            async with aclosing(self._steps()) as steps:
                async for step in steps:
                    self._show(bar, step)
        return self.frame()

    def run_blocking(self) -> pd.DataFrame:
        """The same, from any thread but the I/O loop's. The calling thread draws the progress bar, since front
        ends may not take it from another.

        Raises:
            BatchInterrupted: KeyboardInterrupt; running requests are cancelled on the engine.
        """
        try:
            with self._bar() as bar, closing(iterate_blocking(self._steps())) as steps:
                for step in steps:
                    self._show(bar, step)
        except KeyboardInterrupt:
            if self._are_kept:
                next_step = "run the same call again to continue, or take the rows so far from .partial"
            else:
                next_step = "take them from .partial"
            message = f"stopped: {self._describe_progress()}; {next_step}"
            raise BatchInterrupted(message, partial=self.frame()) from None
        return self.frame()

    @io_bound_stream
    async def _steps(self) -> AsyncGenerator[Progress, None]:
        """Ask all rows; yields as they get their results."""
        skipped = [position for position, messages in enumerate(self._questions) if messages is None]
        self._note(skipped, RowResult(SKIPPED))
        if skipped:
            yield Progress(len(skipped), SKIPPED)
        if len(skipped) == len(self._questions):
            return
        model_slots = await self._router.slots_for(self._model, backend=self._arguments["backend"])
        # Over many rows this takes long, and the I/O loop is everybody's.
        rows_of = await asyncio.to_thread(self._by_question, model_slots.identity)
        if not self._fresh:
            keys = list(rows_of)
            for start in range(0, len(keys), READ_AT_ONCE):
                try:
                    kept = await asyncio.to_thread(self._kept, keys[start : start + READ_AT_ONCE])
                except (OSError, sqlite3.Error) as error:
                    logger.warning("kept answers cannot be read from %s: %s", self._store.path, error)
                    break
                for key, result in kept.items():
                    self._note(rows_of[key], result)
                if count := sum(len(rows_of[key]) for key in kept):
                    yield Progress(count, CACHED)
        to_ask = [(key, rows) for key, rows in rows_of.items() if self._results[rows[0]].status != CACHED]
        concurrency = self._concurrency or model_slots.slots
        # Over many rows this takes long, too.
        steps = deque(await asyncio.to_thread(self._in_order, to_ask, concurrency, model_slots))
        asking: dict[asyncio.Task[Progress], Sequence[int]] = {}  # what is asked after each
        done: set[asyncio.Task[Progress]] = set()

        def begin(questions: Sequence[int]) -> asyncio.Task[Progress]:
            task = asyncio.create_task(self._ask(*to_ask[questions[0]]))
            asking[task] = questions[1:]
            return task

        try:
            leader: asyncio.Task[Progress] | None = None
            while steps or asking:
                while steps and len(asking) < concurrency and leader is None and not (steps[0].leads and asking):
                    step = steps.popleft()
                    task = begin(step.questions)
                    leader = task if step.leads else None
                done, _ = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    left = asking.pop(task)
                    if left:
                        begin(left)
                    yield task.result()
                if leader in done:
                    leader = None
                    with suppress(SollolError):  # of a gateway; without it, each slot processes the beginning
                        await self._router.save_contexts()
        except SollolError as error:
            if self._counts[OK]:
                error.add_note(f"{self._describe_progress()}; the same call continues once this is fixed")
            raise
        finally:
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, *done, return_exceptions=True)
            if self._keeping is not None:  # also where the batch is being stopped
                await self._keeping
        await self._prune()

    def _by_question(self, identity: Mapping[str, Any]) -> dict[str, list[int]]:
        """The positions of the rows, by the key of what they ask."""
        rows_of = defaultdict(list)
        for position, messages in enumerate(self._questions):
            if messages is None:
                continue
            rows_of[answer_key(self._model, identity, messages, self._options)].append(position)
        return dict(rows_of)

    def _in_order(
        self, to_ask: Sequence[tuple[str, list[int]]], concurrency: int, model_slots: ModelSlots
    ) -> list[order.Step]:
        """The steps in which the questions are asked."""
        kept = model_slots.keeps and not self._arguments.get("deterministic")
        return order.in_order(
            [order.text_of(self._questions[rows[0]] or ()) for _, rows in to_ask],
            slots=concurrency,
            are_kept=kept,
            are_saved=kept and model_slots.saves,
        )

    def _kept(self, keys: list[str]) -> dict[str, RowResult]:
        """The answers of earlier batches that match the schema."""
        kept: dict[str, RowResult] = {}
        for key, completion in self._store.get(keys).items():
            with suppress(StructureError):  # the class checks more by now than its JSON schema says
                kept[key] = self._result(CACHED, completion)
        return kept

    async def _ask(self, key: str, rows: list[int]) -> Progress:
        try:
            messages = self._questions[rows[0]]
            assert messages is not None
            completion = await self._router.route_request(self._model, messages, **self._arguments)
            result = self._result(OK, completion)
        except HITS_EVERY_ROW:
            raise
        except SollolError as error:
            if isinstance(error, RequestRejectedError | OllamaResponseError):
                self._note_refusal(error)
            result = RowResult(ERROR, _answer_of(error), error=" ".join(str(error).split()))
        self._note(rows, result)
        if result.status == OK:
            self._keep(key, completion)
        return Progress(len(rows), result.status)

    def _note(self, rows: list[int], result: RowResult) -> None:
        for position in rows:
            self._results[position] = result
        self._counts[result.status] += len(rows)

    def _result(self, status: str, completion: Completion) -> RowResult:
        """Raises StructureError where the answer does not match the schema."""
        if self._parse is None or completion["message"].get("tool_calls"):
            return RowResult(status, completion)
        return RowResult(status, completion, self._parse(completion.text))

    def _note_refusal(self, error: SollolError) -> None:
        if isinstance(error, ContextOverflowError):  # is about its row, also with the same message
            return
        self._refusals[str(error)] += 1
        none_answered = not self._counts[OK] + self._counts[CACHED]
        if none_answered and self._refusals[str(error)] >= SAME_REFUSALS:
            raise error

    def _keep(self, key: str, completion: Completion) -> None:
        """Have an answer kept while the next rows are asked, together with those that come meanwhile."""
        self._to_keep[key] = completion
        if self._keeping is None or self._keeping.done():
            self._keeping = asyncio.create_task(self._keep_all())

    async def _keep_all(self) -> None:
        while self._to_keep:
            answers, self._to_keep = self._to_keep, {}
            try:
                await asyncio.to_thread(self._store.put, answers)
            except (OSError, sqlite3.Error) as error:  # an answer is worth more than its keeping
                if self._are_kept:  # reported once; there may be thousands
                    self._are_kept = False
                    reason = f"{self._store.path}: {error} (if the file is damaged, delete it)"
                    logger.warning("an answer was not kept in %s", reason)

    async def _prune(self) -> None:
        try:
            await asyncio.to_thread(self._store.prune)
        except (OSError, sqlite3.Error) as error:
            logger.warning("old answers were not removed from %s: %s", self._store.path, error)

    # --- what is shown --------------------------------------------------------------------------

    def _describe_progress(self) -> str:
        done = self._counts[OK] + self._counts[CACHED] + self._counts[SKIPPED]
        kept = " and kept" if self._are_kept else ", but could not be kept"
        return f"{done:,} of {len(self._results):,} rows are done{kept}"

    def _bar(self) -> tqdm[Any]:
        return progress_bar(
            total=len(self._questions), desc=short_name(self._model), unit="row", disable=not self._shows_progress
        )

    def _show(self, bar: tqdm[Any], step: Progress) -> None:
        if step.status in (CACHED, SKIPPED) and not bar.disable:
            bar.initial += step.rows  # so that the pace is that of the requests
        if self._counts[ERROR]:
            bar.set_postfix_str(counted(self._counts[ERROR], "error"), refresh=False)
        bar.update(step.rows)


def _answer_of(error: SollolError) -> Completion | None:
    """The answer of a request that failed, as far as there is one."""
    answer: Completion | None = None
    if isinstance(error, StructureError):
        answer = error.completion
    elif isinstance(error, AnswerInterruptedError):
        answer = error.partial
    return answer
