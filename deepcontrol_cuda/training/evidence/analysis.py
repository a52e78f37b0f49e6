"""What the runs of a comparison say: cells of equal settings, the best learning rates, the largest stable ones."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..methods import METHODS
from .intervals import Estimate, accuracy, estimate, trained
from .plan import BATCH_SIZE, Setting
from .runs import Run


@dataclass(frozen=True)
class Sweep:
    """Runs that differ in method, learning rate and seed only."""

    task: str
    batch_size: int
    images: int


class Analysis:
    """Looks up ``runs`` by sweep, method and learning rate; all lists are in order of seeds, rates and methods."""

    def __init__(self, runs: Iterable[Run]) -> None:
        self._cells: dict[tuple[Sweep, str, float], list[Run]] = defaultdict(list)
        for run in sorted(runs, key=lambda run: _order(run.setting)):
            setting = run.setting
            sweep = Sweep(setting.task, setting.batch_size, setting.images)
            self._cells[sweep, setting.method, setting.learning_rate].append(run)

    def rate_sweeps(self) -> list[Sweep]:
        """The sweep over learning rates of each task: at the common batch size, of the runs that see most images."""
        longest: dict[str, Sweep] = {}
        for sweep, _, _ in self._cells:
            known = longest.get(sweep.task)
            if sweep.batch_size == BATCH_SIZE and (known is None or known.images < sweep.images):
                longest[sweep.task] = sweep
        return list(longest.values())

    def batch_sweeps(self) -> dict[str, list[Sweep]]:
        """For each task that has them, sweeps of several batch sizes in which runs see equally many images."""
        groups: dict[tuple[str, int], set[Sweep]] = defaultdict(set)
        for sweep, _, _ in self._cells:
            groups[sweep.task, sweep.images].add(sweep)
        return {
            task: sorted(sweeps, key=lambda sweep: sweep.batch_size)
            for (task, _), sweeps in groups.items()
            if len(sweeps) > 1
        }

    def methods(self, sweep: Sweep) -> list[str]:
        found = {method for other, method, _ in self._cells if other == sweep}
        return [method for method in METHODS if method in found]

    def rates(self, sweep: Sweep, method: str | None = None) -> list[float]:
        return sorted({rate for other, m, rate in self._cells if other == sweep and method in (None, m)})

    def cell(self, sweep: Sweep, method: str, rate: float) -> list[Run]:
        return self._cells.get((sweep, method, rate), [])

    def accuracies(self, sweep: Sweep, method: str, rate: float) -> list[float]:
        return [accuracy(run) for run in self.cell(sweep, method, rate)]

    def estimate(self, sweep: Sweep, method: str, rate: float) -> Estimate:
        return estimate(self.accuracies(sweep, method, rate))

    def common_rates(self, sweep: Sweep, methods: Iterable[str]) -> list[float]:
        """Those at which there are runs of each of ``methods``."""
        return sorted(set.intersection(*(set(self.rates(sweep, method)) for method in methods)))

    def best_rate(self, sweep: Sweep, method: str, rates: Sequence[float] | None = None) -> float:
        """The learning rate, of ``rates`` or all, of the highest mean accuracy, the lower one of equals."""
        return max(rates or self.rates(sweep, method), key=lambda rate: self.estimate(sweep, method, rate).mean)

    def at_edge(self, sweep: Sweep, method: str) -> bool:
        """Whether the best learning rate is the lowest or the highest there is, so that a better one may lie beyond."""
        rates = self.rates(sweep, method)
        return self.best_rate(sweep, method) in (rates[0], rates[-1])

    def worst_rate(self, sweep: Sweep, method: str) -> float:
        return min(self.rates(sweep, method), key=lambda rate: self.estimate(sweep, method, rate).mean)

    def best(self, sweep: Sweep, method: str) -> list[float]:
        """Accuracies at the best learning rate."""
        return self.accuracies(sweep, method, self.best_rate(sweep, method))

    def all_trained(self, sweep: Sweep, method: str, rate: float) -> bool:
        return all(trained(run) for run in self.cell(sweep, method, rate))

    def stable_rate(self, sweep: Sweep, method: str, rates: Sequence[float] | None = None) -> float | None:
        """The largest of ``rates``, or all, going up from the lowest at which all seeds trained to the first not."""
        stable = None
        for rate in rates or self.rates(sweep, method):
            if self.all_trained(sweep, method, rate):
                stable = rate
            elif stable is not None:
                break
        return stable

    def unstable_rates(self, sweep: Sweep, method: str) -> list[float]:
        """The learning rates above the largest stable one."""
        stable = self.stable_rate(sweep, method)
        return [rate for rate in self.rates(sweep, method) if stable is None or rate > stable]

    def mean_shifts(self, task: str, method: str) -> list[Run]:
        """The runs, of all seeds, in which the mean shift was measured."""
        sweeps = [sweep for sweep in self.rate_sweeps() if sweep.task == task]
        found = [r for (sweep, m, _), runs in self._cells.items() if sweep in sweeps and m == method for r in runs]
        return [run for run in found if run.mean_shifts]

    def mean_shift(self, task: str, method: str) -> list[float]:
        """For each seed the mean over layers and points of the training."""
        return [
            statistics.fmean(ratio for shift in run.mean_shifts for ratio in shift.layers)
            for run in self.mean_shifts(task, method)
        ]


def _order(setting: Setting) -> tuple:
    return setting.task, setting.images, setting.batch_size, setting.learning_rate, setting.seed
