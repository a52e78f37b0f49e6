"""Trains one network for one setting and records how it went."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import derive
from ..methods import CALIBRATION_IMAGES, METHODS
from ..networks import ResNet
from ..threads import one_thread
from . import tasks
from .plan import MOMENTUM, Setting

_MEAN_SHIFT_POINTS = 12


@dataclass(frozen=True)
class MeanShift:
    """``layers`` holds, in the order of calls, each layer's mean over (sample, map) of |mean of map| / rms of map.

    The map is that of what the layer makes of its input, ahead of residual and activation; in the network as it trains,
    over the batch of step ``step``. From 0, no mean, to 1, nothing but mean; maps of zeros are left out.
    """

    step: int
    layers: list[float]


@dataclass(frozen=True)
class Run:
    """What became of a ``Setting``.

    Args:
        diverged_at: step of the first loss that was not finite, at which the run ended; ``steps`` if it was the test's;
            None if all were finite.
        final_loss: mean training loss, cross-entropy in nats, over the last tenth of the steps; None if it diverged.
        accuracy: on the test images, in ``eval()``; None if it diverged.
    """

    setting: Setting
    diverged_at: int | None
    final_loss: float | None
    accuracy: float | None
    mean_shifts: list[MeanShift]


@one_thread()
def train(setting: Setting) -> Run:
    """SGD with momentum, the learning rate falling to zero along a cosine; the same for every method.

    No weight decay, warm-up, augmentation or clipping. Runs of one task and seed see the same images in the same order,
    and methods of one initialisation start with the same kernels. The global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(setting.seed, "layers"))
        return _train(setting)


def _train(setting: Setting) -> Run:
    data, method = tasks.load(setting.task), METHODS[setting.method]
    model = method.build(tasks.TASKS[setting.task].network, data.channels, data.classes, setting.seed)
    model = model.to(memory_format=torch.channels_last)
    method.prepare(model, data.sample(CALIBRATION_IMAGES, setting.seed))
    optimizer = torch.optim.SGD(method.parameter_groups(model, setting.learning_rate), momentum=MOMENTUM)
    method.attach(model, optimizer)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, setting.steps)
    points = set()
    if setting.measures_mean_shift:
        points = {round(i * (setting.steps - 1) / (_MEAN_SHIFT_POINTS - 1)) for i in range(_MEAN_SHIFT_POINTS)}
    losses: list[float] = []
    shifts: list[MeanShift] = []
    for step, (images, labels) in enumerate(_batches(setting)):
        with _mean_shift(model, step, shifts if step in points else None):
            loss = F.cross_entropy(model(images), labels)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return Run(setting, step, None, None, shifts)
        penalty = method.penalty(model)
        optimizer.zero_grad()
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        schedule.step()
    logits, labels = _test(model, setting)
    if not logits.isfinite().all():
        return Run(setting, setting.steps, None, None, shifts)
    tail = losses[-max(1, len(losses) // 10) :]
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    return Run(setting, None, round(sum(tail) / len(tail), 6), round(accuracy, 6), shifts)


def _batches(setting: Setting) -> Iterator[tuple[Tensor, Tensor]]:
    data = tasks.load(setting.task)
    done = epoch = 0
    while done < setting.steps:
        order = data.order(setting.seed, epoch, setting.batch_size)[: setting.steps - done]
        for images, labels in data.train.batches(order, None):
            yield data.normalise(images).contiguous(memory_format=torch.channels_last), labels
        done += len(order)
        epoch += 1


@torch.no_grad()
def _test(model: ResNet, setting: Setting) -> tuple[Tensor, Tensor]:
    data = tasks.load(setting.task)
    model.eval()
    ((images, labels),) = data.test.batches([torch.arange(len(data.test))], None)
    return model(data.normalise(images)), labels


@contextmanager
def _mean_shift(model: ResNet, step: int, results: list[MeanShift] | None) -> Iterator[None]:
    """Measure during one forward and append to ``results``; nothing where that is None."""
    if results is None:
        yield
        return
    shifts: list[float] = []

    def of_norm(_, args: tuple, output: Tensor) -> None:
        shifts.append(_shift(output))

    def of_fused(module: nn.Module, args: tuple, output: Tensor) -> None:
        # Without residual and activation, which are part of the op.
        activation, module.activation = module.activation, "identity"
        with torch.no_grad():
            shifts.append(_shift(module.forward(args[0])))
        module.activation = activation

    hooks = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            if hasattr(module, "activation"):
                hooks.append(module.register_forward_hook(of_fused))
        elif isinstance(norm := getattr(module, "norm", None), nn.Module):
            hooks.append(norm.register_forward_hook(of_norm))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    results.append(MeanShift(step, shifts))


@torch.no_grad()
def _shift(maps: Tensor) -> float:
    rms = maps.square().mean((2, 3)).sqrt()
    alive = rms > 0
    ratios = maps.mean((2, 3)).abs()[alive] / rms[alive]
    return round(ratios.mean().item(), 4) if alive.any() else 0.0
