"""What Mean Shift Rejection's projection costs a training step of ResNet-50: between backward and step, and within."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

import deepcontrol_cuda as dc
from deepcontrol_cuda.timing import Times, summarize
from deepcontrol_cuda.training.methods import METHODS

from .step import TrainingStep


@dataclass(frozen=True)
class Cost:
    """Seconds of a training step, by what it is of, and ratios of one to another within each round."""

    times: dict[str, Times]
    ratios: dict[str, Times]


def between(batch: int, size: int, repeats: int, progress: Callable[[], object] = lambda: None) -> Cost:
    """``project_kernel_gradients_`` on every spatial kernel of a plain net, where an optimizer's hook has it.

    So gradients are as warm in cache as backward leaves them.
    """
    step = TrainingStep(METHODS["none"].build("resnet50", 3, 1000, seed=0), batch, size)
    kernels = dc.spatial_kernels(step.model)
    seconds: dict[str, list[float]] = {"step": [], "projection": []}
    step()
    for _ in range(repeats):
        taken = step.backward()
        start = time.perf_counter()
        dc.project_kernel_gradients_(kernels)
        seconds["projection"].append(time.perf_counter() - start)
        seconds["step"].append(taken + step.update())
        progress()
    return _cost(seconds, "projection", "step")


def within(batch: int, size: int, repeats: int, progress: Callable[[], object] = lambda: None) -> Cost:
    """Steps of the net of ``MeanShiftConv2d``, whose backward projects, and of one whose does not, in turn."""
    projected = METHODS["mean_shift_rejection"].build("resnet50", 3, 1000, seed=0)
    plain = copy.deepcopy(projected)
    for module in plain.modules():
        if isinstance(module, dc.MeanShiftConv2d):
            module.projection = 0.0
    steps = {"projected": TrainingStep(projected, batch, size), "not projected": TrainingStep(plain, batch, size)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    shuffle = random.Random(0).shuffle
    for step in steps.values():
        step()
    for _ in range(repeats):
        shuffle(order)
        for name in order:
            seconds[name].append(steps[name]())
        progress()
    return _cost(seconds, "projected", "not projected")


def _cost(seconds: dict[str, list[float]], part: str, whole: str) -> Cost:
    ratios = [a / b for a, b in zip(seconds[part], seconds[whole])]
    return Cost({name: summarize(values) for name, values in seconds.items()}, {f"{part} / {whole}": summarize(ratios)})
