"""Which runs are done: everything in the comparison is constant but what a ``Setting`` names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..methods import METHODS
from .tasks import TASKS

BATCH_SIZE = 32
LEARNING_RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
MOMENTUM = 0.9
# Those whose mean shift is measured, at a learning rate at which all of them train.
MEAN_SHIFT_METHODS = ("none", "batch_norm", "deep_control", "mean_shift_rejection")
MEAN_SHIFT_RATE = 0.05

# What is compared on both tasks; the others, ingredients of a method, are on the first only.
COMPARED = (
    "none",
    "batch_norm",
    "group_norm",
    "instance_norm",
    "gradient_centralization",
    "deep_control",
    "deep_control_uncalibrated",
    "deep_control_mean_shift",
    "mean_shift_rejection",
)


@dataclass(frozen=True)
class Setting:
    """One training. ``images`` is how many it sees."""

    task: str
    method: str
    batch_size: int
    learning_rate: float
    images: int
    seed: int

    def __str__(self) -> str:
        return (
            f"{self.task}, {METHODS[self.method].label}, batch size {self.batch_size}, "
            f"learning rate {self.learning_rate:g}, seed {self.seed}"
        )

    @property
    def steps(self) -> int:
        return self.images // self.batch_size

    @property
    def measures_mean_shift(self) -> bool:
        where = (BATCH_SIZE, MEAN_SHIFT_RATE)
        return self.method in MEAN_SHIFT_METHODS and (self.batch_size, self.learning_rate) == where


# The ingredients of a method and the shapes are done at fewer learning rates.
_FEWER_RATES = tuple(rate for rate in LEARNING_RATES if rate != 0.02)
_INGREDIENT_RATES = (0.05, 0.2, 0.4, 0.8, 1.6)

# Learning rates for each batch size, about where the best are; few, since steps of one image take long.
_BATCH_RATES = {
    "digits": {
        1: (0.003, 0.01, 0.02),
        2: (0.003, 0.01, 0.05),
        8: (0.02, 0.1, 0.4),
        32: (0.05, 0.2, 0.8),
        128: (0.1, 0.4, 1.6),
    },
    "shapes": {1: (0.003, 0.01, 0.03), 2: (0.003, 0.01, 0.05)},
}
_BATCH_METHODS = {
    "digits": tuple(m for m in COMPARED if m not in ("gradient_centralization", "deep_control_uncalibrated")),
    "shapes": ("batch_norm", "deep_control", "deep_control_mean_shift", "mean_shift_rejection"),
}
_BATCH_IMAGES = 3200


def settings(tasks: Iterable[str], seeds: int, quick: bool) -> list[Setting]:
    """All runs, every seed of all settings before the next seed, so that what is stopped early can be compared.

    ``quick``: a few steps of a few methods, to see that everything runs.
    """
    of_seed = _quick if quick else _full
    return [setting for seed in range(seeds) for task in tasks for setting in of_seed(task, seed)]


def _full(task: str, seed: int) -> Iterator[Setting]:
    digits = task == "digits"
    rates = dict.fromkeys(COMPARED, LEARNING_RATES if digits else _FEWER_RATES)
    if digits:
        rates = dict.fromkeys(METHODS, _INGREDIENT_RATES) | rates
    for method, of_method in rates.items():
        for rate in of_method:
            yield Setting(task, method, BATCH_SIZE, rate, TASKS[task].images, seed)
    for batch_size, of_batch in _BATCH_RATES[task].items():
        for method in _BATCH_METHODS[task]:
            for rate in of_batch:
                yield Setting(task, method, batch_size, rate, _BATCH_IMAGES, seed)


def _quick(task: str, seed: int) -> Iterator[Setting]:
    for method in MEAN_SHIFT_METHODS:
        for batch_size, rate in ((BATCH_SIZE, MEAN_SHIFT_RATE), (BATCH_SIZE, 1.6), (2, MEAN_SHIFT_RATE)):
            yield Setting(task, method, batch_size, rate, 4 * batch_size, seed)
