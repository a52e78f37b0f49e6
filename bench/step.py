"""A training step of a network on random input."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TrainingStep:
    """Forward, cross entropy with random labels, backward, and SGD with momentum.

    Args:
        model: (N, C, *spatial) to logits, (N, classes) or (N, classes, *spatial).
        x: its input.
        autocast: to bfloat16, else all is float32.
    """

    def __init__(self, model: nn.Module, x: Tensor, autocast: bool = False) -> None:
        self.model, self.x, self.autocast = model, x, autocast
        # So small a rate that a net without norms stays finite; the time of a step does not depend on it.
        self.optimizer = torch.optim.SGD(model.parameters(), 1e-6, 0.9)
        self._labels: Tensor | None = None

    def __call__(self) -> None:
        self.backward()
        self.optimizer.step()

    def backward(self) -> None:
        """Forward, loss and backward."""
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.autocast):
            logits = self.model(self.x)
            if self._labels is None:
                batch, classes, *size = logits.shape
                labels = torch.randint(classes, (batch, *size), generator=torch.Generator().manual_seed(1))
                self._labels = labels.to(self.x.device)
            loss = F.cross_entropy(logits, self._labels)
        loss.backward()

    def clear_gradients(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)


class InferenceStep:
    """Forward of a model in ``eval()``, nothing recorded; ``x`` and ``autocast`` as for ``TrainingStep``."""

    def __init__(self, model: nn.Module, x: Tensor, autocast: bool = False) -> None:
        self.model, self.x, self.autocast = model.eval(), x, autocast

    @torch.no_grad()
    def __call__(self) -> Tensor:
        with torch.autocast(self.x.device.type, torch.bfloat16, enabled=self.autocast):
            return self.model(self.x)

    def clear_gradients(self) -> None:
        """There are none."""
