"""What the networks are trained on, and for how long."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from .. import data as datasets
from ..data import DataSet, InMemory
from ..networks import NETWORKS, Architecture, BasicBlock
from . import shapes

# What a network that has learned nothing gets right: every task has ten classes.
GUESSING = 0.1
_TRAIN_SHAPES, _TEST_SHAPES = 8000, 1000
_TRAIN_SEED, _TEST_SEED = 1, 2


@dataclass(frozen=True)
class Task:
    """A data set, the network for it, and a budget.

    Args:
        images: how many a run of the sweep over learning rates sees.
        text: what a reader needs to know of it.
    """

    make: Callable[[], DataSet]
    network: Architecture
    images: int
    text: str


def _shapes() -> DataSet:
    parts = []
    for count, seed in ((_TRAIN_SHAPES, _TRAIN_SEED), (_TEST_SHAPES, _TEST_SEED)):
        images, labels = shapes.make(count, seed)
        parts.append(InMemory(torch.from_numpy(images), torch.from_numpy(labels)))
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part.images.numpy().tobytes())
    mean, std = torch.full((3,), 127.5), torch.full((3,), 64.0)
    return DataSet("shapes", len(shapes.CLASSES), *parts, mean, std, digest.hexdigest())


TASKS = {
    "digits": Task(
        datasets.digits,
        NETWORKS["resnet10"],
        6400,
        "scikit-learn's handwritten digits: 1347 training and 450 test images, 8x8 pixels, grey, ten classes. "
        "ResNet-10 of 16 and 32 channels.",
    ),
    "shapes": Task(
        _shapes,
        Architecture(BasicBlock, (8, 16, 32), (2, 2, 2)),
        6400,
        f"Images made by a program from a seed: which of ten shapes ({', '.join(shapes.CLASSES)}) is in a colour image "
        f"of {shapes.SIZE}x{shapes.SIZE} pixels. Place, size, stretch, rotation, colours, clutter, contrast, "
        f"brightness and noise are drawn anew for each of {_TRAIN_SHAPES} training and {_TEST_SHAPES} test images. "
        "ResNet-14 of 8, 16 and 32 channels.",
    ),
}


@cache
def load(name: str) -> DataSet:
    """The data of a task, made once in each process."""
    return TASKS[name].make()
