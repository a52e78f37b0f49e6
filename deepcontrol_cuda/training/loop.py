"""Trains one network on the digits and records what happened."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..convert import replace_conv_bn
from .calibrate import unit_deviation_
from .digits import Digits
from .resnet import ResNet

NETWORKS = ("Batch Norm", "Deep Control", "Deep Control, calibrated", "no norm")
_MOMENTUM = 0.9
_CALIBRATION_IMAGES = 256


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


def build(network: str, seed: int, images: Tensor) -> nn.Module:
    """The ResNet with Batch Norm, or what becomes of it; for one seed all start with the same kernels."""
    torch.manual_seed(seed)
    model = ResNet()
    if network.startswith("Deep Control"):
        model = replace_conv_bn(model, initialization="fresh").model
    if network == "Deep Control, calibrated":
        unit_deviation_(model, images[:_CALIBRATION_IMAGES])
    if network == "no norm":
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.BatchNorm2d):
                model.set_submodule(name, nn.Identity())
    return model.to(memory_format=torch.channels_last)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Layers this small lose more by handing work to other threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def train(
    network: str, setting: Setting, seed: int, digits: Digits, on_step: Callable[[], object] = lambda: None
) -> Run:
    """Train ``network`` and test it, in one thread; networks of one seed see the same images in the same order."""
    model = build(network, seed, digits.train_images)
    optimizer = torch.optim.SGD(model.parameters(), setting.learning_rate, _MOMENTUM)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, setting.steps)
    batches = _batches(len(digits.train_labels), setting.batch_size, seed)
    losses: list[float] = []
    for step, batch in zip(range(setting.steps), batches, strict=False):
        loss = F.cross_entropy(model(digits.train_images[batch]), digits.train_labels[batch])
        if not math.isfinite(loss.item()):
            return Run(str(setting), network, seed, losses, diverged_at=step, test_accuracy=None)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        on_step()
    model.eval()
    with torch.no_grad():
        logits = model(digits.test_images)
    if not logits.isfinite().all():
        return Run(str(setting), network, seed, losses, diverged_at=setting.steps, test_accuracy=None)
    accuracy = (logits.argmax(1) == digits.test_labels).float().mean().item()
    return Run(str(setting), network, seed, losses, None, accuracy)


def _batches(samples: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Indices (batch_size,) without end, every epoch in a new order; what does not fill a batch is left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(samples, generator=generator)
        yield from order.split(batch_size)[: samples // batch_size]
