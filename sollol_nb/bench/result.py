"""The result of a benchmark: one row per request, and their medians with intervals, per case.

A summary weighs rounds, not requests, since the requests of a round ran under the same conditions. A case's value
in a round is the median of its requests there. The median over rounds, its interval and the ratio to the first
case (round by round) are computed from these values. Throughput is measured for a whole round.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sollol_nb.bench.figure import draw_metric, draw_overview
from sollol_nb.bench.rows import DTYPES, METRICS, BenchRow
from sollol_nb.bench.statistics import LEAST_VALUES, Estimate, estimate, paired_ratio
from sollol_nb.errors import ConfigError
from sollol_nb.text.tables import counted

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMAT_VERSION = 1
THROUGHPUT = "throughput_tokens_per_s"
OVERVIEW_METRICS = ("ttft_ms", "prompt_tokens_per_s", "tokens_per_s")


@dataclass(frozen=True, slots=True)
class _Summary:
    """One metric of one case: over the rounds, and as the ratio to the first case."""

    value: Estimate
    ratio: Estimate


@dataclass(frozen=True, repr=False)
class BenchResult:
    """What a benchmark measured.

    Attributes:
        cases: the labels of all cases, in the order of their turns.
        rows: one for each request.
        settings: the arguments as plain data: models, layouts, prompts, repeat, options, ...
        notes: remarks that matter for reading the numbers.
        complete: False if it was stopped early.
    """

    cases: tuple[str, ...]
    rows: tuple[BenchRow, ...]
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    complete: bool = True

    @property
    def frame(self) -> pd.DataFrame:
        """One row per request; columns as in `BenchRow`."""
        import pandas as pd

        frame = pd.DataFrame(
            [asdict(row) for row in self.rows], columns=[column.name for column in fields(BenchRow)]
        )
        return frame.astype({name: DTYPES.get(name, "float64") for name in frame.columns})

    def rounds(self) -> pd.DataFrame:
        """One row per case, round and metric (columns `case`, `round`, `metric`, `value`), from which summaries
        are made.

        Requests that failed or waited for a load are left out, together with their round: prompts differ, so the
        median of some prompts is not that of all. If a case has no complete round, its incomplete rounds count,
        except for throughput.
        """
        import pandas as pd

        return pd.DataFrame(
            [
                (case, number, metric, value)
                for (case, number), values in self._values.items()
                for metric, value in values.items()
            ],
            columns=["case", "round", "metric", "value"],
        )

    def summary(self) -> pd.DataFrame:
        """One row per case and metric (the index).

        Columns: `median`, `lower`, `upper` (interval or range, see `bench.statistics`), `n` (number of rounds),
        `ratio`, `ratio_lower`, `ratio_upper` (to the first case, round by round), `requests` and `errors` (of the
        case). A metric that no request of a case has is NaN, with `n` 0.
        """
        import pandas as pd

        lines = [
            {
                "median": estimates.value.median,
                "lower": estimates.value.lower,
                "upper": estimates.value.upper,
                "n": estimates.value.n,
                "ratio": estimates.ratio.median,
                "ratio_lower": estimates.ratio.lower,
                "ratio_upper": estimates.ratio.upper,
                "requests": sum(row.case == case for row in self.rows),
                "errors": self._errors(case),
            }
            for (case, _), estimates in self._summaries.items()
        ]
        return pd.DataFrame(lines, index=pd.MultiIndex.from_tuples(self._summaries, names=["case", "metric"]))

    def plot(self, ax: Axes | None = None, metric: str = "tokens_per_s") -> Axes:
        """Draw one metric: median and interval of each case, and every round as a dot.

        Args:
            ax: where to draw; by default a new figure.
            metric: a name in `METRICS`.

        Raises:
            ConfigError: there is no such metric.
        """
        return draw_metric(self.rounds(), self.summary(), self.cases, metric, ax)

    def overview(self) -> Figure:
        """A figure with the metrics side by side: first token, prompt speed, generation speed, and throughput
        where a case sends several requests at the same time.

        It is not registered with pyplot, so it appears only where it is displayed explicitly.
        """
        is_concurrent = any(row.concurrency > 1 for row in self.rows)
        metrics = OVERVIEW_METRICS + (THROUGHPUT,) * is_concurrent
        return draw_overview(self.rounds(), self.summary(), self.cases, metrics)

    # --- file -----------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write everything to a JSON file; returns its path."""
        path = Path(path)
        data = {
            "format": FORMAT_VERSION,
            "cases": self.cases,
            "settings": dict(self.settings),
            "notes": self.notes,
            "complete": self.complete,
            "rows": [asdict(row) for row in self.rows],
        }
        path.write_text(json.dumps(data, indent=1, ensure_ascii=False), encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> BenchResult:
        """Read what `save` wrote.

        Raises:
            ConfigError: the file does not exist, or is not a saved benchmark.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if data["format"] != FORMAT_VERSION:
                raise ConfigError(
                    f"{path} has format {data['format']}; this version reads format {FORMAT_VERSION}"
                )
            rows = tuple(BenchRow(**row) for row in data["rows"])
            return cls(tuple(data["cases"]), rows, data["settings"], tuple(data["notes"]), data["complete"])
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{path} is not a saved benchmark (a file written by BenchResult.save())") from error

    # --- display --------------------------------------------------------------------------

    def __repr__(self) -> str:
        state = "" if self.complete else ", incomplete"
        cases, requests = counted(len(self.cases), "case"), counted(len(self.rows), "request")
        return f"<BenchResult: {cases}, {requests}{state}>"

    def __str__(self) -> str:
        return "\n".join([self._table().to_string(), *self._remarks()])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        remarks = "<br>".join(map(html.escape, self._remarks()))
        return {
            "text/plain": str(self),
            "text/html": f"{self._table().to_html()}\n<p><small>{remarks}</small></p>",
        }

    def _table(self) -> pd.DataFrame:
        """The summary as people read it: a line for each case, `median [lower, upper]` for each metric."""
        import pandas as pd

        columns: dict[str, list[str]] = {}
        for metric_name, metric in METRICS.items():
            values = [self._summaries[case, metric_name].value for case in self.cases]
            is_shown = metric_name != "queue_ms" or any(value.median >= 1.0 for value in values)
            if is_shown and any(value.n for value in values):
                columns[metric.title] = [_format(value) for value in values]
        if len(self.cases) > 1:
            ratios = [self._summaries[case, "tokens_per_s"].ratio for case in self.cases]
            columns["generation, ratio to first case"] = [_format(ratio) for ratio in ratios]
        errors = [self._errors(case) for case in self.cases]
        if any(errors):
            columns["errors"] = [str(count) for count in errors]
        return pd.DataFrame(columns, index=pd.Index(self.cases, name="case"))

    def _remarks(self) -> list[str]:
        rounds = len({number for (_, number), values in self._values.items() if values})
        basis = f"medians over {rounds} rounds, each case in turn"
        if rounds == 1:
            basis = "one round: no intervals"
        elif 0 < rounds < LEAST_VALUES:
            basis += f"; [range] (intervals need {LEAST_VALUES} rounds)"
        else:
            basis += "; [95 % bootstrap interval]"
        remarks = [f"{basis}; {counted(len(self.rows), 'request')}"]
        if not self.complete:
            remarks.append("incomplete: stopped before the end")
        if not any(self._values.values()):
            remarks.append("no request was measured: all failed or waited for a model load")
        return [*remarks, *self.notes]

    # --- inside ---------------------------------------------------------------------------------

    def _errors(self, case: str) -> int:
        return sum(bool(row.error) for row in self.rows if row.case == case)

    @cached_property
    def _values(self) -> dict[tuple[str, int], dict[str, float]]:
        """(case, round) -> metric -> value."""
        rows: dict[tuple[str, int], list[BenchRow]] = {}
        for row in self.rows:
            rows.setdefault((row.case, row.round), []).append(row)
        prompt_count = len(self.settings.get("prompts", ()))
        complete = {
            key
            for key, round_rows in rows.items()
            if len(_good(round_rows)) == prompt_count * round_rows[0].concurrency
        }
        cases_with_complete = {case for case, _ in complete}
        return {
            key: _round_values(round_rows, is_complete=key in complete)
            for key, round_rows in rows.items()
            if key in complete or key[0] not in cases_with_complete
        }

    @cached_property
    def _summaries(self) -> dict[tuple[str, str], _Summary]:
        """(case, metric) -> its median, interval and ratio."""
        numbers = sorted({row.round for row in self.rows})
        summaries = {}
        for metric in METRICS:
            baseline: list[float | None] = []
            for case in self.cases:
                values = [self._values.get((case, number), {}).get(metric) for number in numbers]
                baseline = baseline or values
                summaries[case, metric] = _Summary(estimate(values), paired_ratio(values, baseline))
        return {(case, metric): summaries[case, metric] for case in self.cases for metric in METRICS}


def _good(rows: list[BenchRow]) -> list[BenchRow]:
    return [row for row in rows if not row.error and not row.load_ms]


def _round_values(rows: list[BenchRow], *, is_complete: bool) -> dict[str, float]:
    """The value of each metric in one round of one case; metrics that no request has are left out."""
    good = _good(rows)
    values: dict[str, float] = {}
    for metric in METRICS:
        if metric == THROUGHPUT:
            if is_complete:
                values[metric] = _throughput(good)
            continue
        of_requests = estimate(getattr(row, metric) for row in good)
        if of_requests.n:
            values[metric] = of_requests.median
    return values


def _throughput(rows: list[BenchRow]) -> float:
    """Tokens per second of all requests together."""
    end_s = max(row.start_s + (row.total_ms or 0.0) / 1000 for row in rows)
    return sum(row.completion_tokens or 0 for row in rows) / max(end_s - min(row.start_s for row in rows), 1e-9)


def _format(value: Estimate) -> str:
    """`344 [330, 351]`, with three significant digits of the median."""
    if not value.n:
        return "-"
    digits = 0 if not value.median else max(0, 2 - math.floor(math.log10(abs(value.median))))
    text = f"{value.median:,.{digits}f}"
    return text if value.n == 1 else f"{text} [{value.lower:,.{digits}f}, {value.upper:,.{digits}f}]"
