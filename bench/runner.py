"""Checks what is ours and times all peers of one case under one setting, in rounds, until the ratios are known."""

from __future__ import annotations

import random
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Protocol

import torch

from deepcontrol_cuda import backends
from deepcontrol_cuda.timing import Step

from . import bootstrap, peers
from .clock import Clock, GpuClock, WallClock
from .peers import Way
from .rows import Accuracy, Row, Setting


class WrongResultError(RuntimeError):
    """Ours is further from float64 than rounding explains, so it is not timed."""


class Call(Protocol):
    """What is timed: a step of a layer or of a network."""

    def __call__(self) -> object: ...

    def clear_gradients(self) -> None:
        """Between two calls, off the clock."""


class Contestant:
    """A call on a clock, in the context in which it is to be made.

    Args:
        calls: timed one by one in a round, whose time is their median; for what takes microseconds.
        parts: of a call; seconds are of one of them.
    """

    def __init__(self, call: Call, way: Way = nullcontext, calls: int = 1, parts: int = 1) -> None:
        self.call, self.way, self.calls, self.parts = call, way, calls, parts

    def prepare(self, clock: Clock) -> None:
        """The first call, which may compile, allocate and choose."""
        with self.way():
            if isinstance(clock, GpuClock):
                # Gradients that are there would be added to.
                self._prepared = clock.prepare([self.call.clear_gradients, self.call])
            else:
                self._prepared = self.call
                self.call()
        self.call.clear_gradients()

    def seconds(self, clock: Clock) -> float:
        found = []
        with self.way():
            for _ in range(self.calls):
                found.append(clock.seconds(self._prepared))
                self.call.clear_gradients()
        return statistics.median(found) / self.parts


@dataclass
class Prepared:
    """What ``Cell.prepare`` gives: everything of a row but its times."""

    contestants: dict[str, Contestant]
    accuracies: dict[str, dict[str, Accuracy]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    bytes: int | None = None
    operations: int | None = None
    peak_bytes: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, reason: str | None, make: Callable[[], Contestant]) -> None:
        """A peer, unless there is a reason against it or its making gives one."""
        if reason is None:
            try:
                self.contestants[name] = make()
            except Exception as error:  # what fails in one peer, for whatever reason, does not stop the others
                reason = _words(error)
        if reason is not None:
            self.skipped[name] = reason


@dataclass(frozen=True)
class Cell:
    """A row that is to be measured; ``prepare`` builds and checks what takes part."""

    case: str
    setting: Setting
    prepare: Callable[[], Prepared]
    baseline: str = "conv_relu"
    main: Sequence[str] = peers.MAIN
    """The peers whose ratios decide how many rounds there are."""
    least: tuple[int, int] = (5, 15)
    """Rounds of all peers, and of those."""


@dataclass(frozen=True)
class Box:
    """How long a row is timed.

    Attributes:
        seconds: no round is started after this, but for the least.
        least: of all peers.
        least_main: of the verdicts' peers.
        width: of the widest interval of a ratio, relative, at which it is enough.
        share: of the time for rounds of all peers; in the rest only those of the verdicts go on.
    """

    seconds: float
    least: int = 5
    least_main: int = 15
    most: int = 100
    width: float = 0.01
    share: float = 0.6

    @classmethod
    def exactly(cls, rounds: int) -> Box:
        return cls(float("inf"), rounds, rounds, rounds, 0.0, 1.0)


def clock_of(device: str) -> Clock:
    return GpuClock() if device == "cuda" else WallClock()


def race(
    contestants: Mapping[str, Contestant], main: Iterable[str], clock: Clock, box: Box, progress: Callable[[], object]
) -> tuple[dict[str, tuple[float, ...]], dict[str, str]]:
    """Seconds by contestant and round, and the reason why others could not go on.

    In a round each has its turn, in a new order, so that a slow spell of the machine falls on all alike and none always
    inherits the same neighbour's cache.
    """
    seconds: dict[str, list[float]] = {}
    failed: dict[str, str] = {}

    def attempt(name: str, do: Callable[[], None]) -> None:
        try:
            do()
        except Exception as error:  # one that fails, for whatever reason, does not take the others with it
            failed[name] = _words(error)
            seconds.pop(name, None)

    start = time.perf_counter()
    for name, contestant in contestants.items():
        seconds[name] = []
        attempt(name, lambda contestant=contestant: contestant.prepare(clock))
    shuffle = random.Random(0).shuffle
    done = 0
    while done < box.most and seconds:
        elapsed = time.perf_counter() - start
        if done >= box.least_main and (elapsed >= box.seconds or (done % 5 == 0 and _known(seconds, main, box.width))):
            break
        everybody = done < box.least or elapsed < box.share * box.seconds
        turns = [name for name in seconds if everybody or name in main]
        shuffle(turns)
        for name in turns:
            contestant = contestants[name]
            attempt(name, lambda n=name, c=contestant: seconds[n].append(float(f"{c.seconds(clock):.6g}")))
        done += 1
        progress()
    return {name: tuple(values) for name, values in seconds.items()}, failed


def _known(seconds: Mapping[str, Sequence[float]], main: Iterable[str], width: float) -> bool:
    """Whether every ratio of two of the verdicts' peers is."""
    names = [name for name in main if name in seconds]
    return all(
        bootstrap.median([a / b for a, b in zip(seconds[one], seconds[other])]).width <= width
        for one, other in pairwise(names)
    )


def measure(cell: Cell, clock: Clock, box: Box, progress: Callable[[], object] = lambda: None) -> tuple[Row, Prepared]:
    """The row of a cell, and what was prepared for it, with the reasons why peers are missing.

    What is prepared takes from the time in ``box``.
    """
    start = time.perf_counter()
    prepared = cell.prepare()
    box = replace(box, seconds=box.seconds - (time.perf_counter() - start))
    seconds, failed = race(prepared.contestants, cell.main, clock, box, progress)
    prepared.skipped |= failed
    row = Row(
        cell.case, cell.setting, cell.baseline, seconds,
        {name: found for name, found in prepared.accuracies.items() if name in seconds},
        prepared.bytes, prepared.operations, {}, prepared.peak_bytes,
    )  # fmt: skip
    return row, prepared


def ours_by(
    step: Step,
    names: Iterable[str],
    device: str,
    what: str,
    prepared: Prepared,
    calls: int = 1,
    checked: Sequence[Step] | None = None,
) -> None:
    """Put into ``prepared`` the step ``ours`` by each of ``names``, "ours" and ``peers.ways``, that is right.

    Args:
        calls: as for ``Contestant``.
        checked: what is compared with float64, ``step`` by default; of results of one name the last is kept.
    """
    ways = {"ours": nullcontext} | peers.ways(device)
    checked = checked or [step]
    with backends.use("reference"):
        reference_errors = [each.errors() for each in checked]
    for name in names:
        try:
            with ways[name]():
                found = [check(each, f"{name} at {what}", errors) for each, errors in zip(checked, reference_errors)]
        except WrongResultError as error:
            prepared.wrong[name] = str(error)
        except RuntimeError as error:
            # An algorithm may not take a layer; what is chosen by itself must run.
            reasons = prepared.wrong if name == "ours" else prepared.skipped
            reasons[name] = f"{name} at {what}: {error}" if name == "ours" else _words(error)
        else:
            prepared.accuracies[name] = {result: accuracy for one in found for result, accuracy in one.items()}
            prepared.contestants[name] = Contestant(step, ways[name], calls)


def check(step: Step, what: str, reference_errors: Mapping[str, float] | None = None) -> dict[str, Accuracy]:
    """Errors of ``step`` within twice the reference's in the same dtype plus one unit in the last place.

    In float64 the reference is what is compared with, so there it is eight units.

    Ours sums the gradient of gain from the weight gradient and the reference from the maps, so ours may be as far off
    as the reference's weight gradient is.
    """
    errors = step.errors()
    if reference_errors is None:
        with backends.use("reference"):
            reference_errors = step.errors()
    rounding = torch.finfo(step.x.dtype).eps * (8 if step.x.dtype == torch.float64 else 1)
    accuracies = {}
    for name, error in errors.items():
        sources = [name, f"{name.removesuffix('gain')}weight"] if name.endswith("gain") else [name]
        reference_error = max(reference_errors[source] for source in sources)
        budget = 2 * (reference_error + rounding)
        if not error <= budget:
            raise WrongResultError(
                f"{what}: error of the {name} {error:.1e}, wanted at most {budget:.1e} "
                f"(the reference's is {reference_error:.1e}); it is not timed"
            )
        accuracies[name] = Accuracy(error, budget)
    return accuracies


def _words(error: Exception) -> str:
    """The first line, without the name of the algorithm, which the peer's name has."""
    lines = str(error).strip().splitlines()
    return re.sub(r"^algorithm '[^']+': ", "", lines[0]) if lines else type(error).__name__
