"""Run a benchmark through the router: cases in turns, one row for each request, and a result that keeps them.

`bench` is `HybridRouter.bench`, `bench_blocking` that of the blocking router; `measure` yields rows one by one.
`bench.plan` decides what is sent in which order, and `bench.targets` loads the coordinators.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, closing
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Self, Unpack

from sollol_nb.bench.plan import (
    AUTO,
    DEFAULT_PROMPTS,
    DEFAULT_REPEAT,
    DEFAULT_WARMUP,
    BenchCase,
    BenchSettings,
    BenchTarget,
    bench_settings,
    case_labels,
    client_prompts,
    marked,
)
from sollol_nb.bench.result import BenchResult
from sollol_nb.bench.rows import BenchRow, measurements_of
from sollol_nb.bench.targets import BenchTargets
from sollol_nb.chat.options import ChatOptions
from sollol_nb.errors import RequestCancelledError, SollolError
from sollol_nb.router.router import Router
from sollol_nb.runtime.events import Event
from sollol_nb.runtime.io_loop import io_bound_stream, iterate_blocking
from sollol_nb.runtime.progress_bars import progress_bar
from sollol_nb.text.short_names import short_names

if TYPE_CHECKING:
    from tqdm import tqdm

TICK_S = 0.2


@dataclass(frozen=True, slots=True)
class BenchStart:
    """A benchmark starts: the labels of its cases, and the number of requests that it measures."""

    cases: tuple[str, ...]
    request_count: int


@dataclass(frozen=True, slots=True)
class BenchNote:
    """A remark that matters for reading the numbers."""

    text: str


async def bench(
    router: Router,
    /,
    models: str | Sequence[str],
    *,
    layouts: str | int | Sequence[str | int] = AUTO,
    strategies: str | Sequence[str] = (),
    concurrency: int | str | Sequence[int] = 1,
    prompts: int | Sequence[str] = DEFAULT_PROMPTS,
    repeat: int = DEFAULT_REPEAT,
    warmup: int = DEFAULT_WARMUP,
    reload: bool | None = None,
    timeout: float | None = None,
    **options: Unpack[ChatOptions],
) -> BenchResult:
    """Measure models with several layouts, strategies and levels of concurrency; all cases take turns.

    In each round, each client of each case (`concurrency`) sends every prompt once, so that drift of the machine
    affects all cases alike. A case that fails does not end the benchmark; its rows contain the error. The blocking
    twin shows a progress bar; the stop button or Ctrl-C ends it and keeps what was measured (`complete` is False).

    Args:
        models: one name, or several.
        layouts: `"auto"` (as the router decides), `"local"` (no workers), a number of workers, or units per worker
            such as `"5/4/4"` (blocks and, last, the output layer); one, or several.
        strategies: layer strategies, for layouts without exact counts; by default the router's own.
        concurrency: how many requests each case sends at the same time; one number, or several.
        prompts: how many of the built-in prompts, or a list of texts.
        repeat: rounds.
        warmup: number of requests after each load that are not measured. With 0, the first measured request loads
            the model, and the summary leaves it out.
        reload: True lets the coordinators take turns on the same workers, with a load at each turn; False loads
            all of them at the same time, each on its own workers; by default this depends on whether enough
            workers are free.
        timeout: limit of each request in seconds.
        **options: of each request, as for `route_request`; by default `temperature=0`, `max_tokens=64`. Sharded
            models run without drafts, which would copy the answers that rounds repeat.

    Raises:
        ConfigError: an argument cannot be used.
        WorkersUnavailableError: there are too few workers for a layout.
        RequestCancelledError: the blocking twin was stopped before anything was measured.
        SollolError: no case could be measured; this is the first error.
    """
    settings = bench_settings(
        models,
        layouts=layouts,
        strategies=strategies,
        concurrency=concurrency,
        prompts=prompts,
        repeat=repeat,
        warmup=warmup,
        reload=reload,
        timeout=timeout,
        **options,
    )
    collector = _Collector(settings)
    async with aclosing(measure(router, settings)) as items:
        async for item in items:
            collector.add(item)
    return collector.result(complete=True)


def bench_blocking(router: Router, models: str | Sequence[str], **arguments: Any) -> BenchResult:
    """`bench` for a thread other than the I/O loop's; this thread draws the progress bar."""
    settings = bench_settings(models, **arguments)
    collector = _Collector(settings)
    status: deque[str] = deque(maxlen=1)

    def on_event(event: Event) -> None:
        if event.kind.source in ("coordinator", "engine", "worker"):
            status.append(event.message)

    unsubscribe = router.events.subscribe(on_event)
    is_complete = True
    try:
        # Front ends accept the bar from this thread only, so ticks let it show the progress of loads.
        with _Bar() as bar, closing(iterate_blocking(measure(router, settings), tick_s=TICK_S)) as items:
            for item in items:
                if item is not None:
                    collector.add(item)
                    status.clear()
                bar.show(item, status[0] if status else "")
    except KeyboardInterrupt:
        is_complete = False
        if not collector.rows:
            raise RequestCancelledError("the benchmark was stopped before anything was measured") from None
    finally:
        unsubscribe()
    return collector.result(complete=is_complete)


@io_bound_stream
async def measure(
    router: Router, settings: BenchSettings
) -> AsyncGenerator[BenchStart | BenchNote | BenchRow, None]:
    """Run a benchmark; yields its start, then rows and notes one by one.

    Closing the generator ends the benchmark and the coordinators that were started for it. Errors are those of
    `bench`.
    """
    targets = BenchTargets(router, settings)
    try:
        await targets.prepare()
        labels = case_labels(targets.cases)
        yield BenchStart(labels, settings.requests_of(targets.cases))
        async with aclosing(_Rounds(settings, targets, labels).run()) as items:
            async for item in items:
                yield item
    finally:
        # The engines must be stopped even if the waiting task is cancelled again.
        await asyncio.shield(targets.close())


class _Rounds:
    """The rounds of one benchmark."""

    def __init__(self, settings: BenchSettings, targets: BenchTargets, labels: Sequence[str]) -> None:
        self._settings = settings
        self._targets = targets
        self._labels = dict(zip(targets.cases, labels, strict=True))
        self._names = short_names(case.target.model for case in targets.cases)
        self._run_mark = int(time.time() * 1000) % 10**8
        self._began = time.perf_counter()
        self._first_error: SollolError | None = None

    async def run(self) -> AsyncGenerator[BenchNote | BenchRow, None]:
        """All rows and notes. Raises the first error if nothing could be measured."""
        targets = list(dict.fromkeys(case.target for case in self._labels))
        has_measured = False
        for round_number in range(self._settings.repeat):
            for target in list(targets):
                cases = [case for case in self._labels if case.target == target]
                try:
                    await self._load(target)
                except SollolError as error:  # the target is skipped from now on
                    self._first_error = self._first_error or error
                    targets.remove(target)
                    for case in cases:
                        yield replace(self._empty_row(case, round_number), error=str(error))
                    continue
                for text in self._targets.take_notes():
                    yield BenchNote(text)
                for case in cases:
                    async with aclosing(self._turn(case, round_number)) as rows:
                        async for row in rows:
                            has_measured |= not row.error
                            yield row
        if self._first_error is not None and not has_measured:
            raise self._first_error

    async def _load(self, target: BenchTarget) -> None:
        """Load the next target, and warm it up."""
        settings = self._settings
        while True:
            try:
                if await self._targets.load(target):
                    for number in range(settings.warmup):
                        prompt = marked(
                            settings.prompts[number % len(settings.prompts)], self._run_mark - 1 - number
                        )
                        await self._targets.ask(target, prompt)
                return
            except SollolError as error:
                if not await self._targets.record_failure(target, error):
                    raise

    async def _turn(self, case: BenchCase, round_number: int) -> AsyncGenerator[BenchRow, None]:
        """One round of one case, with all its clients at the same time; yields rows one by one."""
        rows: asyncio.Queue[BenchRow | None] = asyncio.Queue()

        async def client(number: int) -> None:
            try:
                for row, prompt in self._requests(case, round_number, number):
                    rows.put_nowait(await self._ask(case, row, prompt))
            finally:
                rows.put_nowait(None)

        clients = [asyncio.create_task(client(number)) for number in range(case.concurrency)]
        try:
            busy = case.concurrency
            while busy:
                row = await rows.get()
                if row is None:
                    busy -= 1
                else:
                    yield row
            await asyncio.gather(*clients)
        finally:
            for task in clients:
                task.cancel()
            await asyncio.gather(*clients, return_exceptions=True)

    def _requests(self, case: BenchCase, round_number: int, client: int) -> list[tuple[BenchRow, str]]:
        """The rows of one client without measurements, each with its prompt."""
        prompts = client_prompts(self._settings, case.concurrency, client, round_number, self._run_mark)
        empty = self._empty_row(case, round_number)
        return [(replace(empty, client=client, prompt=number), prompt) for number, prompt in prompts]

    def _empty_row(self, case: BenchCase, round_number: int) -> BenchRow:
        target = case.target
        return BenchRow(
            case=self._labels[case],
            model=self._names[target.model],
            layout=str(target.layout),
            strategy=target.strategy,
            concurrency=case.concurrency,
            round=round_number,
            client=0,
            prompt=0,
            start_s=self._now_s(),
        )

    async def _ask(self, case: BenchCase, row: BenchRow, prompt: str) -> BenchRow:
        row = replace(row, start_s=self._now_s())
        try:
            completion = await self._targets.ask(case.target, prompt)
        except SollolError as error:
            self._first_error = self._first_error or error
            return replace(row, error=str(error))
        return replace(row, **measurements_of(completion))

    def _now_s(self) -> float:
        return time.perf_counter() - self._began


class _Collector:
    """The rows and notes so far, and the result of them."""

    def __init__(self, settings: BenchSettings) -> None:
        self.rows: list[BenchRow] = []
        self._settings = asdict(settings) | {
            "layouts": [str(layout) for layout in settings.layouts],
            "started_at": time.time(),
        }
        self._cases: tuple[str, ...] = ()
        self._notes: list[str] = []

    def add(self, item: BenchStart | BenchNote | BenchRow) -> None:
        match item:
            case BenchStart():
                self._cases = item.cases
            case BenchNote() if item.text not in self._notes:
                self._notes.append(item.text)
            case BenchRow():
                self.rows.append(item)

    def result(self, *, complete: bool) -> BenchResult:
        errors = {row.case: row.error for row in self.rows if row.error}
        notes = [*self._notes, *(f"{case}: {error}" for case, error in errors.items())]
        return BenchResult(self._cases, tuple(self.rows), self._settings, tuple(notes), complete)


class _Bar:
    """A progress bar over the requests, for terminals and notebooks; it disappears at the end."""

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None
        self._text = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, item: BenchStart | BenchNote | BenchRow | None, status: str) -> None:
        """Show a new item, or the status in between."""
        if isinstance(item, BenchStart):
            self._bar = progress_bar(desc="benchmark", unit="request", leave=False, total=item.request_count)
        if self._bar is None:
            return
        text = item.case if isinstance(item, BenchRow) else status or self._text
        if text != self._text:
            self._text = text
            self._bar.set_postfix_str(text)
        if isinstance(item, BenchRow):
            self._bar.update()
