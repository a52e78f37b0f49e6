"""Trains one network on the digits and records what happened."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .data import DataSet
from .methods import CALIBRATION_IMAGES, METHODS
from .threads import one_thread

_METHODS = [METHODS[name] for name in ("batch_norm", "deep_control_uncalibrated", "deep_control", "none")]
NETWORKS = {method.label: method for method in _METHODS}
MOMENTUM = 0.9


@dataclass(frozen=True)
class Setting:
    """SGD with momentum 0.9, the learning rate falling to zero along a cosine over ``steps``."""

    batch_size: int
    learning_rate: float
    steps: int

    def __str__(self) -> str:
        return f"batch size {self.batch_size}, learning rate {self.learning_rate:g}"


@dataclass(frozen=True)
class Run:
    """One training. ``losses`` holds every step's loss; after a loss that is not finite the run stops."""

    setting: str
    network: str
    seed: int
    losses: list[float]
    diverged_at: int | None
    test_accuracy: float | None

    @property
    def final_loss(self) -> float | None:
        """Mean over the last tenth of the steps; None if the run diverged."""
        tail = self.losses[-max(1, len(self.losses) // 10) :]
        return None if self.diverged_at is not None else sum(tail) / len(tail)


def build(network: str, seed: int, data: DataSet) -> nn.Module:
    """The ResNet-10 of ``NETWORKS``, ready to be trained; for one seed all start with the same kernels."""
    method = NETWORKS[network]
    model = method.build("resnet10", data.channels, data.classes, seed)
    method.prepare(model, data.sample(CALIBRATION_IMAGES, seed))
    return model.to(memory_format=torch.channels_last)


@one_thread()
def train(
    network: str, setting: Setting, seed: int, data: DataSet, on_step: Callable[[], object] = lambda: None
) -> Run:
    """Train ``network`` and test it, in one thread; networks of one seed see the same images in the same order."""
    model = build(network, seed, data)
    optimizer = torch.optim.SGD(model.parameters(), setting.learning_rate, MOMENTUM)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, setting.steps)
    losses, diverged_at = fit(model, optimizer, schedule, setting, seed, data, on_step)
    found = None if diverged_at is not None else accuracy(model, data)
    if diverged_at is None and found is None:
        diverged_at = setting.steps
    return Run(str(setting), network, seed, losses, diverged_at, found)


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    setting: Setting,
    seed: int,
    data: DataSet,
    on_step: Callable[[], object] = lambda: None,
) -> tuple[list[float], int | None]:
    """Train ``model`` with the batches and steps of ``setting``, the images in the order of ``seed``.

    Args:
        on_step: is called after each step.

    Returns:
        The loss of each step, and the step whose loss was not finite, which ends the training, or None.
    """
    images, labels = data.normalise(data.train.images), data.train.labels
    batches = (batch for epoch in itertools.count() for batch in data.order(seed, epoch, setting.batch_size))
    losses: list[float] = []
    for step, batch in zip(range(setting.steps), batches, strict=False):
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        if not math.isfinite(loss.item()):
            return losses, step
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        on_step()
    return losses, None


@torch.no_grad()
def accuracy(model: nn.Module, data: DataSet) -> float | None:
    """Share of the test images that ``model`` is right on in ``eval()``; None if an output is not finite."""
    training = model.training
    logits = model.eval()(data.normalise(data.test.images))
    model.train(training)
    if not logits.isfinite().all():
        return None
    return (logits.argmax(1) == data.test.labels).float().mean().item()
