"""What a benchmark sends, and in which order: a pure function of its arguments.

A case is a model that is spread over workers in one way (a target), with a number of requests at the same time.
Cases take turns, round after round (A B C, A B C, ...), so that a machine that becomes slower or faster meanwhile
does so for all of them, and each round compares cases that ran close to each other in time.

Every prompt begins with a unique mark, the same for all targets. So no engine can answer from its prompt cache,
and with `temperature=0` all targets of a model read and generate the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sollol_nb.errors import ConfigError
from sollol_nb.models import routing
from sollol_nb.runtime.amounts import is_whole_number
from sollol_nb.text.short_names import short_names
from sollol_nb.text.tables import counted

AUTO, LOCAL = "auto", "local"
DEFAULT_PROMPTS = 3
DEFAULT_REPEAT = 5
DEFAULT_WARMUP = 1
DEFAULT_MAX_TOKENS = 64

PROMPTS: tuple[str, ...] = (
    "What is model sharding?",
    "A model has twelve layers and an output layer, and three workers share them. Each token passes the workers "
    "one after the other, and each hop between two workers costs one round trip on the network. Explain in a few "
    "sentences when a third worker helps, and when two workers are faster.",
    "Here are the notes of a meeting. The team runs a language model on three machines in one room. The first has "
    "a large graphics card, the other two have small ones. The layers were spread evenly, and the small cards "
    "were full while the large one was half empty. After the layers were spread by free memory, the model could "
    "take longer prompts. The network is slow on some days. Someone asked whether fewer machines would be faster, "
    "and nobody knew. It was agreed to measure it, with the same questions for every layout, in turns, and to "
    "keep the numbers. Summarize these notes in three sentences.",
    "What is a worker?",
    "Write a short story about a machine that waits for its turn.",
    "What is a coordinator?",
    "List five things that can make a network slow, each in one sentence.",
    "What is a layer plan?",
)
"""Prompts of several lengths that suit every model; `prompts=3` takes the first three."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a model is spread: as the router decides, over a number of workers, or by exact unit counts.

    Attributes:
        worker_count: how many workers; 0 is a llama-server without any, None leaves it to the router.
        unit_counts: units (blocks, then the output layer) of each worker; empty where the strategy decides.
    """

    worker_count: int | None = None
    unit_counts: tuple[int, ...] = ()

    def __str__(self) -> str:
        """As it is written: `auto`, `local`, `3`, `5/4/4`."""
        if self.unit_counts:
            return "/".join(map(str, self.unit_counts))
        return AUTO if self.worker_count is None else str(self.worker_count or LOCAL)

    @property
    def description(self) -> str:
        """`auto`, `local`, `1 worker`, `3 workers`, `layers 5/4/4`."""
        if self.unit_counts:
            return f"layers {self}"
        if not self.worker_count:
            return str(self)
        return counted(self.worker_count, "worker")


@dataclass(frozen=True, slots=True)
class BenchTarget:
    """What the requests of a case are sent to: a model that is spread in one way.

    Attributes:
        strategy: the layer strategy; "" is the router's own, or that of exact counts.
    """

    model: str
    layout: Layout
    strategy: str = ""


@dataclass(frozen=True, slots=True)
class BenchCase:
    """A target, and how many clients send requests to it at the same time."""

    target: BenchTarget
    concurrency: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchSettings:
    """The checked arguments.

    Attributes:
        models, layouts, strategies, concurrency: a case combines one of each.
        prompts: the texts; each client sends all of them in each round.
        repeat: rounds.
        warmup: number of requests to a coordinator after its load that are not measured.
        reload: whether coordinators take turns on the same workers, each turn with a load (True), or are all
            loaded at the same time, each on its own workers (False); None decides by the number of free workers.
        options: of every request, such as `max_tokens`.
        timeout_s: limit of a request; None is the router's.
    """

    models: tuple[str, ...]
    layouts: tuple[Layout, ...]
    strategies: tuple[str, ...]
    concurrency: tuple[int, ...]
    prompts: tuple[str, ...]
    repeat: int
    warmup: int
    reload: bool | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float | None = None

    def requests_of(self, cases: Iterable[BenchCase]) -> int:
        """How many requests are measured."""
        return sum(self.repeat * len(self.prompts) * case.concurrency for case in cases)


def bench_settings(
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
    **options: Any,
) -> BenchSettings:
    """Check the arguments, which are those of `bench.bench`.

    Raises:
        ConfigError: one of them cannot be used.
    """
    settings = BenchSettings(
        models=_texts("models", models, "demo:sharded"),
        layouts=tuple(dict.fromkeys(parse_layout(layout) for layout in _each(layouts))),
        strategies=_texts("strategies", strategies, "even") if strategies else (),
        concurrency=_counts("concurrency", concurrency),
        prompts=_chosen_prompts(prompts),
        repeat=_counts("repeat", repeat)[0],
        warmup=_counts("warmup", warmup, least=0)[0],
        reload=reload,
        options={"temperature": 0.0, "max_tokens": DEFAULT_MAX_TOKENS}
        | {name: value for name, value in options.items() if value is not None},
        timeout_s=timeout,
    )
    if not settings.layouts:
        raise ConfigError("layouts is empty; write layouts='auto' or layouts=[1, 2, 3]")
    return settings


def parse_layout(layout: str | int) -> Layout:
    """A layout as it is written: `auto`, `local`, a number of workers, or units per worker such as `5/4/4`.

    Raises:
        ConfigError: it is none of these.
    """
    text = str(layout).strip()
    if text in (AUTO, LOCAL):
        return Layout() if text == AUTO else Layout(0)
    parts = text.split("/")
    if not all(part.isascii() and part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(
            f"{layout!r} is not a layout; write auto, local, a number of workers (3), or units per worker (5/4/4)"
        )
    counts = tuple(map(int, parts))
    return Layout(counts[0]) if len(counts) == 1 else Layout(len(counts), counts)


def check_counts(layout: Layout, model: str, layer_count: int) -> None:
    """Check that exact counts place every unit of the model.

    Raises:
        ConfigError: they do not.
    """
    total = sum(layout.unit_counts)
    if layout.unit_counts and total != layer_count + 1:
        raise ConfigError(
            f"layout {layout} places {total} units, but {model} has {layer_count + 1} "
            f"({layer_count} layers and the output layer); make the counts add up to that"
        )


def bench_cases(settings: BenchSettings, backends: Mapping[str, str]) -> tuple[BenchCase, ...]:
    """All cases in the order of their turns: those of one target follow each other.

    Args:
        backends: the backend that the router chooses for each model. Strategies do not apply to `auto` if the
            router does not shard the model, and `auto` is the same as `local` if it uses a local llama-server.
    """
    targets: list[BenchTarget] = []
    for model in settings.models:
        seen: set[tuple[Layout, str]] = set()
        for layout in settings.layouts:
            backend = backends.get(model) if layout == Layout() else None
            same_as = Layout(0) if backend == routing.LOCAL else layout
            is_open = bool(layout.worker_count) and not layout.unit_counts
            has_strategy = is_open or backend == routing.DISTRIBUTED
            for strategy in (settings.strategies if has_strategy else ()) or ("",):
                if (same_as, strategy) not in seen:
                    seen.add((same_as, strategy))
                    targets.append(BenchTarget(model, layout, strategy))
    return tuple(BenchCase(target, clients) for target in targets for clients in settings.concurrency)


def case_labels(cases: Sequence[BenchCase]) -> tuple[str, ...]:
    """A short name for each case, made of what differs among the cases: `2 workers, even, 4 clients`."""
    names = short_names(case.target.model for case in cases)
    parts = [
        (
            names[case.target.model],
            case.target.layout.description,
            case.target.strategy,
            counted(case.concurrency, "client"),
        )
        for case in cases
    ]
    differing = [position for position, column in enumerate(zip(*parts, strict=True)) if len(set(column)) > 1]
    return tuple(", ".join(part[position] for position in differing or [0] if part[position]) for part in parts)


def fits_side_by_side(worker_needs: Iterable[int], available_workers: int) -> bool:
    """Whether all coordinators can be loaded at the same time, each on its own workers."""
    return sum(worker_needs) <= available_workers


def client_prompts(
    settings: BenchSettings, concurrency: int, client: int, round_number: int, run_mark: int
) -> list[tuple[int, str]]:
    """(number of the prompt, text to send) of one client in one round, in order.

    Each client sends all prompts, and starts with a different one than the client before.

    Args:
        run_mark: distinguishes the requests of this run from those of earlier runs, whose prompts may still be
            cached.
    """
    count = len(settings.prompts)
    numbers = [(client + step) % count for step in range(count)]
    before = sum(settings.concurrency[: settings.concurrency.index(concurrency)])
    turn = round_number * sum(settings.concurrency) + before + client
    return [(number, marked(settings.prompts[number], run_mark + turn * count + number)) for number in numbers]


def marked(prompt: str, mark: int) -> str:
    """The prompt after a mark with reversed digits: the fastest changing digit comes first, so that no tokens are
    shared."""
    return f"[{str(mark)[::-1]}] {prompt}"


# --- checking ---------------------------------------------------------------------------------


def _each(value: str | int | Sequence[str | int]) -> list[str | int]:
    """The items of a list; a text is split at commas."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, Sequence) else [value]


def _texts(name: str, value: str | Sequence[str], example: str) -> tuple[str, ...]:
    texts = _each(value)
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ConfigError(f"{name}={value!r} must be a name or a list of names, such as {example!r}")
    return tuple(dict.fromkeys(str(text) for text in texts))


def _counts(name: str, value: int | str | Sequence[int | str], least: int = 1) -> tuple[int, ...]:
    counts: dict[int, None] = {}
    for item in _each(value):
        number = int(item) if isinstance(item, str) and item.isascii() and item.isdecimal() else item
        if not is_whole_number(number) or number < least:
            raise ConfigError(f"{name}={value!r} must be whole numbers of at least {least}")
        counts[number] = None
    if not counts:
        raise ConfigError(f"{name}={value!r} is empty; write {name}={max(1, least)}")
    return tuple(counts)


def _chosen_prompts(prompts: int | Sequence[str]) -> tuple[str, ...]:
    if is_whole_number(prompts):
        if not 1 <= prompts <= len(PROMPTS):
            raise ConfigError(
                f"prompts={prompts}: choose between 1 and {len(PROMPTS)} built-in prompts, or pass a list of texts"
            )
        return PROMPTS[:prompts]
    texts = [prompts] if isinstance(prompts, str) else prompts
    if (
        not isinstance(texts, Sequence)
        or not texts
        or not all(isinstance(text, str) and text.strip() for text in texts)
    ):
        raise ConfigError("prompts must be a number or a list of texts, such as ['What is a worker?']")
    return tuple(texts)
