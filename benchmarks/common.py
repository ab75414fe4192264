"""What all benchmarks share: the report, measurements in turns, and an environment apart from the user's.

A benchmark is a script with this frame:

    def main() -> Report:
        parser = parser_of(__doc__)
        ...
        with isolated():
            ...
        report.table("Tokens per second", "way", "tokens/s", "ratio").add("local", 794.0, 1.0)
        return report

    if __name__ == "__main__":
        sys.exit(run(main))

`run` prints the report, writes it as JSON for `--json FILE`, and returns the exit code. `make bench` runs every
script without other arguments, so the defaults are what `RESULTS.md` shows.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

sys.path.insert(0, str(Path(__file__).parents[1]))

from sollol_nb.llama_cpp.engine.find import find_engine
from sollol_nb.llama_cpp.processes.running import stop_engines
from sollol_nb.models.files import DEMO_MODEL_PATH
from sollol_nb.runtime.io_loop import run_blocking
from sollol_nb.text.tables import markdown_table
from tests.support import own_folders
from tests.support.smollm2 import smollm2_path

__all__ = ["DEMO_MODEL_PATH", "smollm2_path"]  # for benchmarks that need one of the two
MODELS: Mapping[str, Callable[[], Path]] = {"demo": lambda: DEMO_MODEL_PATH, "smollm2": smollm2_path}
"""The paths of models that can be chosen; SmolLM2 is fetched where it is missing."""

REPOSITORY = Path(__file__).parents[1]
START_LIMIT_S = 60.0
Cell = str | int | float
Way = TypeVar("Way")

# --- the report -------------------------------------------------------------------------------


@dataclass
class Table:
    """One table of a report. A float is shown with three significant digits; give a text for anything else."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]] = field(default_factory=list)

    def add(self, *row: Cell) -> None:
        """Add a row, one value for each column."""
        assert len(row) == len(self.columns), f"{len(row)} values for {len(self.columns)} columns"
        self.rows.append(row)

    def as_markdown(self) -> str:
        return markdown_table(self.columns, [[shown(value) for value in row] for row in self.rows])


@dataclass
class Report:
    """What a benchmark found.

    Attributes:
        tables: with the figures.
        goals: what was to be reached, what was measured, and whether that is enough.
        notes: what a reader has to know: what was left out, and why.
        failed: why the benchmark is not valid; then its exit code is 1. A missed goal is not a failure.
    """

    tables: list[Table] = field(default_factory=list)
    goals: list[tuple[str, Cell, bool]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failed: str = ""

    def table(self, title: str, *columns: str) -> Table:
        """Begin a table."""
        self.tables.append(Table(title, columns))
        return self.tables[-1]

    def goal(self, text: str, measured: Cell, is_met: bool) -> None:
        self.goals.append((text, measured, bool(is_met)))

    def as_markdown(self) -> str:
        """Tables, goals and notes."""
        parts = []
        for table in self.tables:
            parts += [f"{table.title}:", table.as_markdown()]
        if self.goals:
            rows = [
                (text, shown(measured), "met" if is_met else "missed") for text, measured, is_met in self.goals
            ]
            parts += [markdown_table(("goal", "measured", ""), rows)]
        return "\n\n".join([*parts, *self.notes, *([f"Failed: {self.failed}"] if self.failed else [])])

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Report:
        """The report of a file that `run` has written."""
        names = ("tables", "goals", "notes", "failed")
        found = cls(**{name: data[name] for name in names if name in data})  # type: ignore[arg-type]
        found.tables = [Table(**table) for table in data["tables"]]  # type: ignore[attr-defined]
        return found


def shown(value: Cell) -> str:
    """A cell as text: 1,234, 12.3, 1.23 and 0.00123."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) or abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"


def parser_of(doc: str | None) -> ArgumentParser:
    """A parser with the module's docstring as help."""
    parser = ArgumentParser(description=doc, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    return parser


def add_models(parser: ArgumentParser) -> None:
    """Add `--models`: which models are measured; all of them by default."""
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))


def run(main: Callable[[], Report]) -> int:
    """Run a benchmark, print its report, and write it for `--json FILE`; returns the exit code."""
    arguments, _ = parser_of(None).parse_known_args(
        [word for word in sys.argv[1:] if word not in ("-h", "--help")]
    )
    began = time.perf_counter()
    report = main()
    print(report.as_markdown())
    if arguments.json is not None:
        about = {"took_s": round(time.perf_counter() - began, 1), "machine": machine()}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(asdict(report) | about, indent=1) + "\n", encoding="utf-8")
    return 1 if report.failed else 0


@cache
def machine() -> dict[str, Cell]:
    """On what the figures were measured: nothing that names a host, a user or a folder."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else processor
    return {
        "processor": processor,
        "cores": os.cpu_count() or 1,
        "system": platform.system(),
        "python": platform.python_version(),
        "engine": find_engine().version,
        "date": datetime.now(UTC).date().isoformat(),
    }


# --- measurements -----------------------------------------------------------------------------


def in_turns(ways: Sequence[Way], rounds: int) -> Iterator[Way]:
    """Each way once in every round, in alternating directions (A B C, C B A, ...), so that drift cancels."""
    for number in range(rounds):
        yield from ways if number % 2 == 0 else reversed(ways)


def measured(ways: Mapping[str, Callable[[], float]], rounds: int, warm_up: int = 1) -> dict[str, list[float]]:
    """The values of each way, measured in turns; `warm_up` rounds before them are not counted."""
    values: dict[str, list[float]] = {name: [] for name in ways}
    for name in in_turns(list(ways), warm_up + rounds):
        values[name].append(ways[name]())
    return {name: found[warm_up:] for name, found in values.items()}


def seconds_of(work: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def percentile(values: Sequence[float], percent: float) -> float:
    """The value at this percent of the sorted values, 50 being the median."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = ordered[int(place)]
    return below + (ordered[min(int(place) + 1, len(ordered) - 1)] - below) * (place - int(place))


def paired_ratio(values: Sequence[float], base: Sequence[float]) -> float:
    """The median of the ratios to another way in the same round."""
    return statistics.median(value / other for value, other in zip(values, base, strict=True))


def paired_difference(values: Sequence[float], base: Sequence[float]) -> float:
    """The median of the differences to another way in the same round."""
    return statistics.median(value - other for value, other in zip(values, base, strict=True))


# --- waiting, and the environment --------------------------------------------------------------------------


def wait_until(
    is_true: Callable[[], bool], what: str, process: subprocess.Popen[Any] | None = None, poll_s: float = 0.02
) -> None:
    """Wait for something; raises RuntimeError if its process ends before, or after a minute."""
    deadline = time.monotonic() + START_LIMIT_S
    while not is_true():
        if process is not None and process.poll() is not None:
            raise RuntimeError(f"{what} ended with exit code {process.returncode}")
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what} did not answer within {START_LIMIT_S:g} s")
        time.sleep(poll_s)


@contextmanager
def isolated(*, keeps_contexts: bool = False) -> Iterator[Path]:
    """Nothing of the user's is read or used: own state and cache folder, built-in settings, no Ollama. Ends all
    engines.

    The engine and the models for tests stay. Programs that are started meanwhile inherit it.

    Args:
        keeps_contexts: whether contexts are saved, as for users; else each prompt and load is as the first one.
    """
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        settings = own_folders.own_settings(Path(folder)) | {"SOLLOL_TENSOR_CACHE_GB": "0"}
        own_folders.use(settings if keeps_contexts else settings | {"SOLLOL_CONTEXT_CACHE_GB": "0"})
        try:
            yield Path(folder) / "state"
        finally:
            run_blocking(stop_engines(also_used=True))
            os.environ.clear()
            os.environ |= before
