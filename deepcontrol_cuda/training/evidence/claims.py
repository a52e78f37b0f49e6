"""What is claimed of the two methods, held against the runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..methods import METHODS
from .analysis import Analysis, Sweep
from .intervals import Estimate, difference

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
# Mean Shift Rejection is to train at so many times the largest stable learning rate of the network without a norm.
_STABLE_FACTOR = 4
_SMALL_BATCHES = (1, 2)
_DEEP_CONTROL = ("deep_control", "deep_control_mean_shift")
_PAPER_DEEP_CONTROL, _PAPER_MEAN_SHIFT = "arXiv 1706.03907", "arXiv 1911.13173"


@dataclass(frozen=True)
class Claim:
    """One sentence, where it is from ("ours": an aim of this package), on which task, and what the runs say to it."""

    text: str
    source: str
    task: str
    verdict: str
    numbers: str


def check(analysis: Analysis) -> list[Claim]:
    """Every claim for which there are runs."""
    claims: list[Claim] = []
    for sweep in analysis.rate_sweeps():
        methods = set(analysis.methods(sweep))
        if {"none", "batch_norm"} <= methods:
            claims += (_where_none_fails(analysis, sweep, m) for m in _DEEP_CONTROL if m in methods)
            for method in (*_DEEP_CONTROL, "mean_shift_rejection"):
                if method in methods:
                    claims.append(_against_batch_norm(analysis, sweep, method))
        if {"none", "mean_shift_rejection"} <= methods:
            claims.append(_learning_rate(analysis, sweep))
        if {"deep_control", "deep_control_uncalibrated"} <= methods:
            claims.append(_calibration(analysis, sweep))
        claims += _mean_shifts(analysis, sweep.task)
    for sweeps in analysis.batch_sweeps().values():
        for sweep in sweeps:
            if sweep.batch_size in _SMALL_BATCHES:
                methods = set(analysis.methods(sweep))
                present = [m for m in _DEEP_CONTROL if {m, "batch_norm"} <= methods]
                claims += (_small_batch(analysis, sweep, method) for method in present)
    return claims


def decide(over: Estimate) -> str:
    """Whether what is to be positive is, by its interval."""
    if over.half is None or abs(over.mean) <= over.half:
        return UNDECIDED
    return HOLDS if over.mean > 0 else FAILS


def _where_none_fails(analysis: Analysis, sweep: Sweep, method: str) -> Claim:
    holds, numbers = [], []
    for rate in analysis.unstable_rates(sweep, "none"):
        if not (analysis.cell(sweep, method, rate) and analysis.cell(sweep, "batch_norm", rate)):
            continue
        ours, theirs = analysis.estimate(sweep, method, rate), analysis.estimate(sweep, "batch_norm", rate)
        comparison = f"{rate:g}: {ours} against {theirs}"
        if not analysis.all_trained(sweep, "batch_norm", rate):
            comparison += ", not counted"
        elif theirs.half is not None:
            # Of a wide interval even a network that guesses might be part.
            holds.append(analysis.all_trained(sweep, method, rate) and ours.mean >= theirs.mean - theirs.half)
            comparison += "" if holds[-1] else ", below"
        numbers.append(comparison)
    verdict = UNDECIDED if not holds else HOLDS if all(holds) else "holds in part" if any(holds) else FAILS
    text = "at the learning rates where no norm fails, accuracy within Batch Norm's interval or above"
    return Claim(f"{METHODS[method].label}: {text}", "ours", sweep.task, verdict, "; ".join(numbers))


def _against_batch_norm(analysis: Analysis, sweep: Sweep, method: str) -> Claim:
    over = difference(analysis.best(sweep, method), analysis.best(sweep, "batch_norm"))
    numbers = f"{_best(analysis, sweep, method)} against {_best(analysis, sweep, 'batch_norm')}; difference {over}"
    source = _PAPER_MEAN_SHIFT if method == "mean_shift_rejection" else f"{_PAPER_DEEP_CONTROL}: equal or higher"
    text = f"{METHODS[method].label}: higher accuracy than Batch Norm, each at its best learning rate"
    return Claim(text, source, sweep.task, decide(over), numbers)


def _learning_rate(analysis: Analysis, sweep: Sweep) -> Claim:
    none, ours = (analysis.stable_rate(sweep, method) for method in ("none", "mean_shift_rejection"))
    if none is None or ours is None:
        verdict = UNDECIDED
    else:
        verdict = HOLDS if ours >= _STABLE_FACTOR * none else FAILS
    numbers = f"largest stable learning rate {_rate(ours)} against {_rate(none)} without a norm"
    return Claim(
        f"Mean Shift Rejection: trains at {_STABLE_FACTOR} times the largest stable learning rate of no norm or more",
        f"ours; higher learning rates: {_PAPER_MEAN_SHIFT}", sweep.task, verdict, numbers,
    )  # fmt: skip


def _calibration(analysis: Analysis, sweep: Sweep) -> Claim:
    rate = analysis.rates(sweep, "deep_control")[0]
    with_it, without = (analysis.accuracies(sweep, m, rate) for m in ("deep_control", "deep_control_uncalibrated"))
    over = difference(with_it, without)
    numbers = (
        f"{analysis.estimate(sweep, 'deep_control', rate)} against "
        f"{analysis.estimate(sweep, 'deep_control_uncalibrated', rate)}; difference {over}"
    )
    text = f"Deep Control: at the lowest learning rate, {rate:g}, calibrated gains give higher accuracy than gains of 1"
    return Claim(text, "ours", sweep.task, decide(over), numbers)


def _mean_shifts(analysis: Analysis, task: str) -> Iterator[Claim]:
    none = analysis.mean_shift(task, "none")
    for method, source in (("deep_control", _PAPER_DEEP_CONTROL), ("mean_shift_rejection", _PAPER_MEAN_SHIFT)):
        ours = analysis.mean_shift(task, method)
        if none and ours:
            less = difference(none, ours)
            numbers = f"{difference(ours, [0.0]).mean:.3f} against {difference(none, [0.0]).mean:.3f}; less by {less}"
            text = f"{METHODS[method].label}: maps have a smaller mean than without a norm"
            yield Claim(text, source, task, decide(less), numbers)


def _small_batch(analysis: Analysis, sweep: Sweep, method: str) -> Claim:
    over = difference(analysis.best(sweep, method), analysis.best(sweep, "batch_norm"))
    numbers = f"{_best(analysis, sweep, method)} against {_best(analysis, sweep, 'batch_norm')}; difference {over}"
    text = f"at batch size {sweep.batch_size}, higher accuracy than Batch Norm, each at its best learning rate"
    text = f"{METHODS[method].label}: {text}"
    return Claim(text, "ours", sweep.task, decide(over), numbers)


def _best(analysis: Analysis, sweep: Sweep, method: str) -> str:
    rate = analysis.best_rate(sweep, method)
    edge = ", the edge of the grid" if analysis.at_edge(sweep, method) else ""
    return f"{analysis.estimate(sweep, method, rate)} (at {rate:g}{edge})"


def _rate(rate: float | None) -> str:
    return "none" if rate is None else f"{rate:g}"
