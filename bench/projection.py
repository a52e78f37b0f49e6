"""What Mean Shift Rejection's projection costs a training step of ResNet-50: between backward and step, and within."""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Callable, Sequence

import torch
from torch import nn

import deepcontrol_cuda as dc
from deepcontrol_cuda.timing import summarize
from deepcontrol_cuda.training.methods import METHODS

from . import options, report
from .record import Recording
from .rows import Row, Setting, Verdict
from .step import TrainingStep

HELP = "time the projection of kernel gradients in ResNet-50's step"
BETWEEN, WITHIN = "between backward and step", "within backward"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=options.positive, help="of the CPU (default: torch's choice)")
    parser.add_argument("--batch", type=options.positive, default=8, help="default: 8")
    parser.add_argument("--size", type=options.positive, help="pixels a side (default: 224, or 96 with --quick)")
    parser.add_argument("--rounds", type=options.rounds, default=15, help="default: 15")
    parser.add_argument("--quick", action="store_true", help="small images")
    parser.set_defaults(device="cpu")
    options.add_output(parser)


def run(asked: argparse.Namespace) -> int:
    from tqdm import tqdm  # not where only `make gpu` runs

    (threads,) = options.threads(asked)
    torch.set_num_threads(threads)
    size = asked.size or (96 if asked.quick else 224)
    setting = Setting("float32", "channels_last", "training", asked.batch, threads)
    conditions = {"quick": asked.quick, "batch": asked.batch, "size": size}
    recording = Recording("projection", asked.output, verdicts, **conditions)
    with recording, tqdm(total=2 * asked.rounds, unit="round", dynamic_ncols=True) as bar:
        for case, measure in ((BETWEEN, between), (WITHIN, within)):
            bar.set_description(case)
            seconds = measure(asked.batch, size, asked.rounds, bar.update)
            baseline = next(iter(seconds))
            found = {name: tuple(values) for name, values in seconds.items()}
            recording.rows.append(Row(case, setting, baseline, found))
    return 0


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    found = []
    for row in rows:
        if row.case == BETWEEN:
            share = row.ratio("projection")
            found.append(report.at_most(f"{BETWEEN}: projection / step", share, 0.02))
        else:
            what = f"{WITHIN}: projected / not projected"
            # Nothing that can be measured: in a quarter of the rounds or more it was no slower.
            quartile = summarize(row.ratios("projected")).lower_quartile
            found.append(report.at_most(f"{what}, lower quartile", quartile, 1.0))
            found.append(report.without_target(f"{what}, median", row.ratio("projected")))
    return found


Seconds = dict[str, list[float]]
"""Of a training step by what it is of, the baseline first; one for each round."""


def between(batch: int, size: int, repeats: int, progress: Callable[[], object] = lambda: None) -> Seconds:
    """``project_kernel_gradients_`` on every spatial kernel of a plain net, where an optimizer's hook has it.

    So gradients are as warm in cache as backward leaves them.
    """
    step = _step(METHODS["none"].build("resnet50", 3, 1000, seed=0), batch, size)
    kernels = dc.spatial_kernels(step.model)
    seconds: Seconds = {"step": [], "projection": []}
    step()
    for _ in range(repeats):
        step.clear_gradients()
        backward = _seconds(step.backward)
        seconds["projection"].append(_seconds(lambda: dc.project_kernel_gradients_(kernels)))
        seconds["step"].append(backward + _seconds(step.optimizer.step))
        progress()
    return seconds


def within(batch: int, size: int, repeats: int, progress: Callable[[], object] = lambda: None) -> Seconds:
    """Steps of the net of ``MeanShiftConv2d``, whose backward projects, and of one whose does not, in turn."""
    projected = METHODS["mean_shift_rejection"].build("resnet50", 3, 1000, seed=0)
    plain = copy.deepcopy(projected)
    for module in plain.modules():
        if isinstance(module, dc.MeanShiftConv2d):
            module.projection = 0.0
    steps = {"not projected": _step(plain, batch, size), "projected": _step(projected, batch, size)}
    seconds: Seconds = {name: [] for name in steps}
    order = list(steps)
    shuffle = random.Random(0).shuffle
    for step in steps.values():
        step()
    for _ in range(repeats):
        shuffle(order)
        for name in order:
            steps[name].clear_gradients()
            seconds[name].append(_seconds(steps[name]))
        progress()
    return seconds


def _step(model: nn.Module, batch: int, size: int) -> TrainingStep:
    x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
    return TrainingStep(model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last))


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
