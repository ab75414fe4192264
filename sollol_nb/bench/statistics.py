"""Medians with percentile bootstrap intervals, which are the same at every call.

Source: B. Efron and R. J. Tibshirani, An Introduction to the Bootstrap (Chapman & Hall, 1993), chapter 13: the
middle 95 % of the medians of many samples, drawn from the values with replacement. It assumes nothing about the
distribution of the values. With few values the interval is rough and tends to be too narrow. With fewer than
`LEAST_VALUES` their range is given instead, with one value nothing.

The random draws have a fixed seed, so that the same values always give the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
RESAMPLES = 4000
SEED = 20240229
LEAST_VALUES = 5
"""With fewer, the interval of their medians would be their range under another name."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median and its interval; NaN if unknown.

    Attributes:
        median: of the values.
        lower, upper: ends of the 95 % interval; of fewer than `LEAST_VALUES` values the smallest and the largest;
            NaN for fewer than two.
        n: how many values.
    """

    median: float
    lower: float
    upper: float
    n: int


def estimate(values: Iterable[float | None]) -> Estimate:
    """Median and interval of the values; None and NaN are left out."""
    import numpy as np

    known = np.array([value for value in values if _is_known(value)], dtype=float)
    if not known.size:
        return Estimate(math.nan, math.nan, math.nan, 0)
    median = float(np.median(known))
    if known.size == 1:
        return Estimate(median, math.nan, math.nan, 1)
    if known.size < LEAST_VALUES:
        return Estimate(median, float(known.min()), float(known.max()), int(known.size))
    draws = np.random.default_rng(SEED).integers(known.size, size=(RESAMPLES, known.size))
    tail = (1 - CONFIDENCE) / 2
    lower, upper = np.quantile(np.median(known[draws], axis=1), [tail, 1 - tail])
    return Estimate(median, float(lower), float(upper), int(known.size))


def paired_ratio(values: Sequence[float | None], baseline: Sequence[float | None]) -> Estimate:
    """Median and interval of the ratios `values[i] / baseline[i]`.

    The two values of a pair are measured close to each other in time, so that a slowdown of the machine affects
    both and cancels out. Pairs with a missing value, or with a baseline of 0, are left out.
    """
    return estimate(
        value / base if value is not None and base else None for value, base in zip(values, baseline, strict=True)
    )


def _is_known(value: float | None) -> bool:
    return value is not None and not math.isnan(value)
