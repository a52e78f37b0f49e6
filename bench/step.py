"""A training step of an image classifier, on random images, on the clock."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import nn

from deepcontrol_cuda import backends


class TrainingStep:
    """SGD with momentum on random images, in channels_last; calls return seconds.

    Args:
        model: (N, 3, H, W) to logits of 1000 classes, on the CPU.
        batch, size: N; H and W.
        autocast: to bfloat16, else float32.
    """

    def __init__(self, model: nn.Module, batch: int, size: int, autocast: bool = False) -> None:
        self.model = model.to(memory_format=torch.channels_last)
        self.autocast = autocast
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(batch, 3, size, size, generator=generator)
        self.images = images.to(memory_format=torch.channels_last)
        self.labels = torch.randint(1000, (batch,), generator=generator)
        # So small a rate that a net without norms stays finite; the time of a step does not depend on it.
        self.optimizer = torch.optim.SGD(model.parameters(), 1e-6, 0.9)

    def __call__(self) -> float:
        return self.backward() + self.update()

    def backward(self, set_to_none: bool = True) -> float:
        """Forward, loss and backward; gradients are cleared before, off the clock."""
        self.optimizer.zero_grad(set_to_none)
        start = time.perf_counter()
        with backends.use("cpu"):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                loss = F.cross_entropy(self.model(self.images), self.labels)
            loss.backward()
        return time.perf_counter() - start

    def update(self) -> float:
        start = time.perf_counter()
        self.optimizer.step()
        return time.perf_counter() - start
