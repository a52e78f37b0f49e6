"""Checks and times the peers at one shape under one setting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from deepcontrol_cuda import backends
from deepcontrol_cuda.timing import Shape, Step, Times, interleaved

from . import peers

DTYPES = ("float32", "bfloat16")
LAYOUTS = ("channels_last", "contiguous")
MODES = ("forward", "training")


@dataclass(frozen=True)
class Setting:
    """One of ``DTYPES``, of ``LAYOUTS`` and of ``MODES``; "training" is forward and backward, timed together."""

    dtype: str
    layout: str
    mode: str

    def __str__(self) -> str:
        return f"{self.dtype}, {self.layout}, {self.mode}"


@dataclass(frozen=True)
class Accuracy:
    """Relative error of one result of ours against float64 (``Step.errors``) and the largest that is let pass."""

    error: float
    budget: float


@dataclass(frozen=True)
class Row:
    """What one shape gave under one setting: times by peer, accuracies of ours by result."""

    setting: Setting
    shape: str
    times: dict[str, Times]
    accuracies: dict[str, Accuracy]

    def ratio(self, peer: str, to: str) -> float:
        return self.times[peer].median / self.times[to].median


class WrongResultError(RuntimeError):
    """Ours is further from float64 than rounding explains, so it is not timed."""


def measure(
    shape: Shape,
    setting: Setting,
    batch: int,
    names: Sequence[str],
    repeats: int,
    progress: Callable[[], object] = lambda: None,
) -> Row:
    """Check ours, then time the peers ``names`` call by call, ``repeats`` times; ``progress`` follows each round.

    Inputs are random. Raises ``WrongResultError``.
    """
    dtype = getattr(torch, setting.dtype)
    memory_format = torch.channels_last if setting.layout == "channels_last" else torch.contiguous_format
    generator = torch.Generator().manual_seed(1)

    def maps(channels: int, size: int) -> torch.Tensor:
        return torch.randn(batch, channels, size, size, generator=generator).to(dtype, memory_format=memory_format)

    x = maps(shape.in_channels, shape.size)
    grad_output = maps(shape.out_channels, shape.out_size) if setting.mode == "training" else None
    steps = {
        name: Step(peers.build(name, shape, dtype, memory_format), x, grad_output, not shape.reads_image)
        for name in names
    }
    with backends.use("cpu"):
        accuracies = check(steps["ours"], f"ours at {shape}, {setting}")
        times = interleaved(steps, repeats, progress)
    return Row(setting, str(shape), times, accuracies)


def check(step: Step, what: str) -> dict[str, Accuracy]:
    """Errors of ``step`` within twice the reference's in the same dtype plus one unit in the last place.

    In float64 the reference is what is compared with, so there it is eight units.

    Ours sums the gradient of gain from the weight gradient and the reference from the maps, so ours may be as far off
    as the reference's weight gradient is.
    """
    errors = step.errors()
    with backends.use("reference"):
        reference_errors = step.errors()
    rounding = torch.finfo(step.x.dtype).eps * (8 if step.x.dtype == torch.float64 else 1)
    accuracies = {}
    for name, error in errors.items():
        sources = [name, "gradient of weight"] if name == "gradient of gain" else [name]
        reference_error = max(reference_errors[source] for source in sources)
        budget = 2 * (reference_error + rounding)
        if not error <= budget:
            raise WrongResultError(
                f"{what}: error of the {name} {error:.1e}, wanted at most {budget:.1e} "
                f"(the reference's is {reference_error:.1e}); it is not timed"
            )
        accuracies[name] = Accuracy(error, budget)
    return accuracies
