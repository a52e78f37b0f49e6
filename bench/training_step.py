"""A training step of ResNet-50 with Batch Norm, and of what ``replace_conv_bn`` makes of it: time and peak memory."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import deepcontrol_cuda as dc
from deepcontrol_cuda.memory import peak_bytes
from deepcontrol_cuda.timing import Times, summarize
from deepcontrol_cuda.training.table import markdown_table

from .report import Verdict, at_least, at_most
from .runner import WrongResultError
from .step import TrainingStep

BATCH_NORM = "Batch Norm"
COMPILED = "Batch Norm, compiled"
OURS = ("Deep Control", "Mean Shift Rejection")
MODELS = (BATCH_NORM, COMPILED, "no norm", *OURS)
TOLERANCE = 1e-5


class Bottleneck(nn.Module):
    """As it is mostly written: one ReLU module called three times, and a sum in place (arXiv 1512.03385, figure 5)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or in_channels != 4 * channels:
            conv = nn.Conv2d(in_channels, 4 * channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(4 * channels))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def resnet50() -> nn.Sequential:
    """ResNet-50 with Batch Norm, He initialised, in channels_last."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    layers.append(nn.MaxPool2d(3, 2, 1))
    width = 64
    for stage, count in enumerate((3, 4, 6, 3)):
        for index in range(count):
            layers.append(Bottleneck(width, 64 << stage, 2 if stage and not index else 1))
            width = 256 << stage
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model.to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Result:
    """One dtype, by the names in ``MODELS``.

    Attributes:
        times: seconds of a step: forward, loss, backward and SGD with momentum.
        ratios: Batch Norm's time over each model's, within each round.
        peak_bytes: most bytes that tensors made by the step hold at a time; parameters, their gradients and the
            optimizer's state, which are there before it, not counted.
    """

    dtype: str
    times: dict[str, Times]
    ratios: dict[str, Times]
    peak_bytes: dict[str, int]


def models(names: tuple[str, ...] = MODELS) -> dict[str, nn.Module]:
    """The models to compare, in ``train()``; each starts from the same Batch Norm model."""
    torch.manual_seed(0)
    batch_norm = resnet50().train()
    make = {
        BATCH_NORM: lambda: batch_norm,
        COMPILED: lambda: torch.compile(copy.deepcopy(batch_norm)),
        "no norm": lambda: _without_norms(batch_norm),
        "Deep Control": lambda: dc.replace_conv_bn(batch_norm).model,
        "Mean Shift Rejection": lambda: dc.replace_conv_bn(batch_norm, "mean_shift_rejection").model,
    }
    return {name: make[name]() for name in names}


def _without_norms(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, nn.Identity())
    return model


@torch.no_grad()
def check(size: int) -> float:
    """Largest error of converted models over the largest output, against Batch Norm's ``eval()`` in float64.

    Raises ``WrongResultError`` above ``TOLERANCE``: what is wrong is not timed.
    """
    torch.manual_seed(0)
    model = resnet50()
    images = torch.randn(2, 3, size, size).to(memory_format=torch.channels_last)
    model(images)  # statistics of its own
    model.eval()
    exact = copy.deepcopy(model).double()(images.double())
    errors = []
    for method in ("deep_control", "mean_shift_rejection"):
        got = dc.replace_conv_bn(model, method, "folded").model(images)
        errors.append(((got.double() - exact).abs().max() / exact.abs().max()).item())
    if not max(errors) <= TOLERANCE:
        raise WrongResultError(f"converted models are off by {max(errors):.1e}, wanted at most {TOLERANCE:.0e}")
    return max(errors)


def measure(
    dtype: str, batch: int, size: int, repeats: int, names: tuple[str, ...], progress: Callable[[], object]
) -> Result:
    """Steps of all models in turn, in a new order each round; bfloat16 is autocast."""
    steps = {name: TrainingStep(model, batch, size, dtype == "bfloat16") for name, model in models(names).items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
        step()
    order = list(steps)
    shuffle = random.Random(0).shuffle
    for _ in range(repeats):
        shuffle(order)
        for name in order:
            seconds[name].append(steps[name]())
        progress()
    ratios = {n: summarize([b / s for b, s in zip(seconds[BATCH_NORM], seconds[n])]) for n in steps if n != BATCH_NORM}
    peaks = {name: peak_bytes(partial(step.backward, set_to_none=False)) for name, step in steps.items()}
    return Result(dtype, {name: summarize(values) for name, values in seconds.items()}, ratios, peaks)


def table(results: list[Result]) -> str:
    """Markdown: medians of the times, of the ratios with their quartiles, and peaks."""
    lines = [["dtype", "model", "ms", "Batch Norm / model", "quartiles", "peak, MiB", "of Batch Norm's"]]
    for result in results:
        for name, times in result.times.items():
            ratio = result.ratios.get(name)
            peak = result.peak_bytes[name]
            lines.append([
                result.dtype, name, f"{1e3 * times.median:.0f}", f"{ratio.median:.3f}" if ratio else "",
                f"{ratio.lower_quartile:.3f} to {ratio.upper_quartile:.3f}" if ratio else "",
                f"{peak / 2**20:.0f}", f"{peak / result.peak_bytes[BATCH_NORM]:.3f}",
            ])  # fmt: skip
    return markdown_table(lines)


def verdicts(results: list[Result]) -> list[Verdict]:
    """Each of ours against Batch Norm, eager and compiled, by medians over the rounds; and its peak."""
    found = []
    for result in results:
        for name in (name for name in OURS if name in result.times):
            what = f"{result.dtype}: {{}}, {name}"
            found.append(at_least(what.format("Batch Norm / ours"), result.ratios[name].median, 1.15))
            if COMPILED in result.ratios:
                over = result.ratios[name].median / result.ratios[COMPILED].median
                found.append(at_least(what.format("compiled Batch Norm / ours"), over, 1.0))
            peak = result.peak_bytes[name] / result.peak_bytes[BATCH_NORM]
            found.append(at_most(what.format("peak bytes, ours / Batch Norm"), peak, 0.6))
    return found
