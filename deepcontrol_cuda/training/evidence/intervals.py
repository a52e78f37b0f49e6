"""Means, intervals and verdicts over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t as student

from .runs import Run
from .tasks import GUESSING

CONFIDENCE = 0.95
# Of the test images, for a run to count as trained; above GUESSING by far.
TRAINED_ACCURACY = 0.5


@dataclass(frozen=True)
class Estimate:
    """A mean and half the width of its interval, which is None for one value."""

    mean: float
    half: float | None
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.half is None else f" ± {self.half:.3f}")


def accuracy(run: Run) -> float:
    """Of a run that diverged what its network, which gives nothing but NaN, would reach by guessing."""
    return GUESSING if run.accuracy is None else run.accuracy


def trained(run: Run) -> bool:
    return run.accuracy is not None and run.accuracy >= TRAINED_ACCURACY


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of ``values``, and Student's interval of it."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Estimate(mean, None, len(values))
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Estimate(mean, _quantile(len(values) - 1) * error, len(values))


def difference(first: Sequence[float], second: Sequence[float]) -> Estimate:
    """Mean of ``first`` over mean of ``second``, and Welch's interval of the difference."""
    mean = statistics.fmean(first) - statistics.fmean(second)
    if min(len(first), len(second)) < 2:
        return Estimate(mean, None, len(first))
    parts = [statistics.variance(values) / len(values) for values in (first, second)]
    total = sum(parts)
    if not total:
        return Estimate(mean, 0.0, len(first))
    freedom = total**2 / sum(p**2 / (len(v) - 1) for p, v in zip(parts, (first, second)))
    return Estimate(mean, _quantile(freedom) * math.sqrt(total), len(first))


def _quantile(freedom: float) -> float:
    return float(student.ppf((1 + CONFIDENCE) / 2, freedom))
