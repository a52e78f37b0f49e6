"""Trains a network with Batch Norm, converts it with its weights, trains it on, and records its accuracy on the way."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from ..conversion import replace_conv_bn
from .data import DataSet, InMemory, derive
from .loop import MOMENTUM, Setting, accuracy, build, fit
from .threads import one_thread

NETWORKS = {"Batch Norm": None, "Deep Control": "deep_control", "Mean Shift Rejection": "mean_shift_rejection"}
"""What is trained on, by the name that readers see: the network as it was, or converted by a method."""
# Nothing keeps gradients small in a converted network, and momentum would make many large steps of a large one.
CLIP = 1.0


@dataclass(frozen=True)
class Plan:
    """Training with Batch Norm on ``images`` of the training images, then on all of them after the conversion."""

    images: int
    first: Setting
    then: Setting


# A quarter of the digits, in 21 epochs at a rate at which all networks train; then six epochs at a tenth of it.
PLAN = Plan(336, Setting(64, 0.05, 105), Setting(64, 0.005, 126))


@dataclass(frozen=True)
class FineTuning:
    """Test accuracies of one network; None where outputs were not finite or training had ended before.

    Args:
        images, learning_rate: the plan's, of the first training and the highest of the second.
        before: at the end of the training with Batch Norm.
        deviation: largest difference that the conversion made to an output for the test images, over the largest.
        converted, first_step, first_epoch, end: before the first step, after it, after an epoch, and at the end.
        losses: of each step after the conversion.
        diverged_at: the step whose loss was not finite, or None.
    """

    images: int
    learning_rate: float
    network: str
    seed: int
    before: float
    deviation: float
    converted: float | None
    first_step: float | None
    first_epoch: float | None
    end: float | None
    losses: list[float]
    diverged_at: int | None


@one_thread()
def pretrain(plan: Plan, seed: int, data: DataSet, on_step: Callable[[], object] = lambda: None) -> nn.Module:
    """The ResNet-10 with Batch Norm after ``plan.first``, as ``loop.train`` trains it, in one thread."""
    train = InMemory(data.train.images[: plan.images], data.train.labels[: plan.images])
    setting = plan.first
    model = build("Batch Norm", seed, data)
    optimizer = torch.optim.SGD(model.parameters(), setting.learning_rate, MOMENTUM)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, setting.steps)
    fit(model, optimizer, schedule, setting, seed, replace(data, train=train), on_step)
    return model


@one_thread()
def fine_tune(
    trained: nn.Module, network: str, plan: Plan, seed: int, data: DataSet, on_step: Callable[[], object] = lambda: None
) -> FineTuning:
    """Convert a copy of ``trained``, the result of ``pretrain``, and train it by ``plan.then``, in one thread.

    SGD with momentum; the learning rate rises along a line over the first epoch and falls to zero along a cosine;
    gradients are clipped to the norm ``CLIP``. All networks of a seed see the same images in the same order.

    Args:
        network: one of ``NETWORKS``.
    """
    setting, method = plan.then, NETWORKS[network]
    model = copy.deepcopy(trained)
    if method is not None:
        model = replace_conv_bn(model, method, "folded").model
    before, deviation, converted = accuracy(trained, data), _deviation(trained, model, data), accuracy(model, data)
    epoch = max(1, len(data.train) // setting.batch_size)
    found: dict[int, float | None] = {}
    steps = 0

    def after_step() -> None:
        nonlocal steps
        steps += 1
        if steps in (1, epoch):
            found[steps] = accuracy(model, data)
        on_step()

    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, setting.learning_rate, MOMENTUM)
    optimizer.register_step_pre_hook(partial(_clip, parameters))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, epoch, setting.steps))
    losses, diverged_at = fit(model, optimizer, schedule, setting, derive(seed, "fine-tuning"), data, after_step)
    return FineTuning(
        plan.images, setting.learning_rate, network, seed, before, deviation, converted, found.get(1), found.get(epoch),
        accuracy(model, data) if diverged_at is None else None, losses, diverged_at,
    )  # fmt: skip


def _clip(parameters: list[nn.Parameter], *_) -> None:
    nn.utils.clip_grad_norm_(parameters, CLIP)


def _rate(step: int, warm_up: int, steps: int) -> float:
    """Share of the highest learning rate that step ``step`` of ``steps`` has."""
    return min(1.0, (step + 1) / warm_up) * (1 + math.cos(math.pi * step / steps)) / 2


@torch.no_grad()
def _deviation(trained: nn.Module, model: nn.Module, data: DataSet) -> float:
    images = data.normalise(data.test.images)
    wanted, got = (network.eval()(images) for network in (trained, model))
    trained.train()
    model.train()
    return ((got - wanted).abs().max() / wanted.abs().max()).item()
