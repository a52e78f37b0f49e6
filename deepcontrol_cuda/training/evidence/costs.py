"""What a training step of each method costs: time, and memory kept for backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...memory import peak_bytes, saved_bytes
from ...timing import interleaved
from ..methods import METHODS, Method
from ..threads import one_thread
from . import tasks
from .plan import BATCH_SIZE, MOMENTUM

_LEARNING_RATE = 0.01


@dataclass(frozen=True)
class Cost:
    """One method on one task, batches of ``plan.BATCH_SIZE``.

    Args:
        milliseconds: median of a step: forward, backward and the optimizer's part.
        spread: distance between the quartiles over the median.
        saved_bytes: of the storages that forward keeps for backward, besides parameters and buffers.
        peak_bytes: most that a step holds at a time, gradients included, above what is there before it.
    """

    method: str
    milliseconds: float
    spread: float
    saved_bytes: int
    peak_bytes: int


@one_thread()
def measure(task: str, rounds: int, progress: Callable[[], object] = lambda: None) -> list[Cost]:
    """Time a step of every method, all of them in each of ``rounds`` rounds; ``progress`` follows each round."""
    steps = {name: _Step(method, task) for name, method in METHODS.items()}
    kept = {name: saved_bytes(step.model, step.images) for name, step in steps.items()}
    times = interleaved(steps, rounds, progress)
    return [
        Cost(name, round(1e3 * time.median, 3), round(time.spread, 3), kept[name], peak_bytes(steps[name]))
        for name, time in times.items()
    ]


class _Step:
    """One training step of a method on one batch."""

    def __init__(self, method: Method, task: str) -> None:
        data = tasks.load(task)
        self.method = method
        self.model = method.build(tasks.TASKS[task].network, data.channels, data.classes, seed=0)
        self.model = self.model.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(method.parameter_groups(self.model, _LEARNING_RATE), momentum=MOMENTUM)
        method.attach(self.model, self.optimizer)
        ((images, self.labels),) = data.train.batches([torch.arange(BATCH_SIZE)], None)
        self.images = data.normalise(images).contiguous(memory_format=torch.channels_last)

    def __call__(self) -> Tensor:
        loss = F.cross_entropy(self.model(self.images), self.labels)
        penalty = self.method.penalty(self.model)
        loss = loss if penalty is None else loss + penalty
        loss.backward()
        self.optimizer.step()
        return loss

    def clear_gradients(self) -> None:
        self.optimizer.zero_grad()
