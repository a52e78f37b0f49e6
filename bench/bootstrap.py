"""Bootstrap intervals of what is computed from ratios of times (Efron, Annals of Statistics 7, 1979): percentiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 1000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A value and the bounds between which it would lie in 95 % of runs like this one, as far as its rounds tell.

    What differs between runs but not within one, such as where memory lies, is not in it.
    """

    value: float
    low: float
    high: float

    @property
    def width(self) -> float:
        """Relative to the value."""
        return (self.high - self.low) / self.value


def median(ratios: Sequence[float]) -> Interval:
    """Of one ratio for each round."""
    return _interval([ratios], lambda medians: medians[0])


def geometric_mean(ratios: Sequence[Sequence[float]]) -> Interval:
    """Of the rows' medians; each row has one ratio for each of its rounds."""
    return _interval(ratios, lambda medians: medians.log().mean(0).exp())


def largest(ratios: Sequence[Sequence[float]]) -> Interval:
    """Of the rows' medians."""
    return _interval(ratios, lambda medians: medians.amax(0))


def change(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]) -> Interval:
    """Geometric mean of the rows' medians in ``after`` over those in ``before``, whose rounds are not paired."""
    if len(before) != len(after):
        raise ValueError(f"before and after: got {len(before)} and {len(after)} rows, wanted as many of both")
    return _interval(
        [*before, *after], lambda medians: medians.log().view(2, len(before), -1).diff(dim=0)[0].mean(0).exp()
    )


def _interval(ratios: Sequence[Sequence[float]], statistic: Callable[[Tensor], Tensor]) -> Interval:
    """``statistic`` maps medians of all rows, (rows, k), to (k,)."""
    if not ratios or not all(ratios):
        raise ValueError("ratios: got none, wanted at least one round of each row")
    rounds = [torch.tensor(row, dtype=torch.float64) for row in ratios]
    value = statistic(torch.stack([_median(row[None]) for row in rounds])).item()
    # Rows are given, not drawn: only the rounds of each are drawn again. The same seed, so that a file read again gives
    # the same interval.
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([
        _median(row[torch.randint(len(row), (RESAMPLES, len(row)), generator=generator)]) for row in rounds
    ])  # fmt: skip
    tails = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=torch.float64)
    low, high = torch.quantile(statistic(drawn), tails).tolist()
    return Interval(value, low, high)


def _median(values: Tensor) -> Tensor:
    """Of each row; of an even number the middle two's mean, which ``Tensor.median`` does not give."""
    return values.quantile(0.5, dim=1)
