"""Data sets: images in memory or in files, in an order and with an augmentation that (seed, epoch) alone decide."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import TrainingError

Batch = tuple[Tensor, Tensor]
_DIGITS_TEST_SHARE = 0.25
# Padding and flip of arXiv 1512.03385, section 4.2.
_CIFAR_PADDING = 4


def derive(*parts: object) -> int:
    """A seed below 2^63 that depends on all of ``parts``, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def generator(*parts: object) -> torch.Generator:
    return torch.Generator().manual_seed(derive(*parts))


class Part(Protocol):
    """The training or the test images of a data set."""

    def __len__(self) -> int: ...

    def batches(self, chunks: Sequence[Tensor], seed: int | None) -> Iterator[Batch]:
        """Images (N, C, H, W) as stored and labels (N,) int64 for each of ``chunks``, indices (N,) int64.

        What is random in a sample depends on ``seed`` and its index only; None: nothing is.
        """


@dataclass(frozen=True)
class InMemory:
    """Images (N, C, H, W) uint8 or float32 and labels (N,) int64; training crops after ``padding`` and may ``flip``."""

    images: Tensor
    labels: Tensor
    padding: int = 0
    flip: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, chunks: Sequence[Tensor], seed: int | None) -> Iterator[Batch]:
        if seed is None or not (self.padding or self.flip):
            for chunk in chunks:
                yield self.images[chunk], self.labels[chunk]
            return
        # Drawn for all samples at once, so that no sample's draw depends on how batches are cut.
        draws = generator(seed)
        offsets = torch.randint(2 * self.padding + 1, (len(self), 2), generator=draws)
        flips = torch.rand(len(self), generator=draws) < (0.5 if self.flip else 0.0)
        for chunk in chunks:
            yield _crop(self.images[chunk], self.padding, offsets[chunk], flips[chunk]), self.labels[chunk]


def _crop(images: Tensor, padding: int, offsets: Tensor, flips: Tensor) -> Tensor:
    """``images`` (N, C, H, W) in a border of zeros, cropped at ``offsets`` (N, 2), mirrored where ``flips`` (N,)."""
    n, _, height, width = images.shape
    rows = offsets[:, 0, None] + torch.arange(height)
    columns = offsets[:, 1, None] + torch.arange(width)
    columns = torch.where(flips[:, None], columns.flip(1), columns)
    padded = F.pad(images, (padding,) * 4)
    sample = torch.arange(n)[:, None, None]
    return padded[sample, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@dataclass(frozen=True)
class DataSet:
    """Training and test images of ``classes`` classes.

    Args:
        name: as in ``settings.DATASETS``.
        mean, std: (C,) float32, of the training images, in the units in which they are stored.
        fingerprint: changes with the images' order and labels, and for images in memory with their content.
    """

    name: str
    classes: int
    train: Part
    test: Part
    mean: Tensor
    std: Tensor
    fingerprint: str

    @property
    def channels(self) -> int:
        return len(self.mean)

    def __str__(self) -> str:
        return f"{self.name}: {len(self.train)} training and {len(self.test)} test images, {self.classes} classes"

    def normalise(self, images: Tensor) -> Tensor:
        """Stored images to float32 with mean 0 and deviation 1 per channel over the training images."""
        mean, std = (values.to(images.device).view(-1, 1, 1) for values in (self.mean, self.std))
        return (images.float() - mean) / std

    def order(self, seed: int, epoch: int, batch_size: int) -> tuple[Tensor, ...]:
        """Indices (batch_size,) of each batch of an epoch; what does not fill a batch is left out."""
        order = torch.randperm(len(self.train), generator=generator(seed, epoch, "order"))
        return order.split(batch_size)[: len(order) // batch_size]

    def sample(self, count: int, seed: int) -> Tensor:
        """Normalised training images (min(count, N), C, H, W), without augmentation."""
        chunk = torch.randperm(len(self.train), generator=generator(seed, "sample"))[:count]
        (images, _), *_ = self.train.batches([chunk], None)
        return self.normalise(images)


def load(name: str, path: Path | None, image_size: int = 224, workers: int = 0) -> DataSet:
    """The data set ``name`` of ``settings.DATASETS``.

    Args:
        path: where it is; None for digits.
        image_size: side of the squares that files of an image folder are cropped to, in pixels.
        workers: processes that read files.

    Raises:
        TrainingError: it is not there, or not what it must be.
    """
    if name == "digits":
        if path is not None:
            raise TrainingError(f"--data {path}: digits come with scikit-learn; leave it out, or name a --dataset")
        return digits()
    if path is None:
        raise TrainingError(f"--dataset {name} wants --data PATH, where the data is")
    if not path.exists():
        raise TrainingError(f"--data: {path} does not exist")
    if name == "imagefolder":
        from .imagefolder import load as load_folder

        return load_folder(path, image_size, workers)
    from .cifar import read

    return _cifar(name, *read(name, path))


def digits() -> DataSet:
    """1797 images (1, 8, 8) of handwritten digits, a quarter of them for testing, stratified with a fixed seed.

    Source: ``sklearn.datasets.load_digits``, the test part of UCI's Optical Recognition of Handwritten Digits.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=_DIGITS_TEST_SHARE, random_state=0, stratify=labels)
    train_images, test_images = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) for part in split[:2])
    train_labels, test_labels = (torch.tensor(part, dtype=torch.int64) for part in split[2:])
    train, test = InMemory(train_images, train_labels), InMemory(test_images, test_labels)
    mean, std = train_images.mean().view(1), train_images.std().view(1)
    return DataSet("digits", 10, train, test, mean, std, _fingerprint(train, test))


def _cifar(name: str, train: Batch, test: Batch, classes: int) -> DataSet:
    mean, std = _moments(train[0])
    parts = InMemory(*train, padding=_CIFAR_PADDING, flip=True), InMemory(*test)
    return DataSet(name, classes, *parts, mean, std, _fingerprint(*parts))


def _moments(images: Tensor) -> Batch:
    """Mean and deviation (C,) float32 of each channel of ``images`` (N, C, H, W) uint8, computed in float64."""
    counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in images.unbind(1)]).double()
    weights, values = counts / counts.sum(1, keepdim=True), torch.arange(256, dtype=torch.float64)
    mean = weights @ values
    variance = (weights * (values - mean[:, None]) ** 2).sum(1)
    # A channel without contrast, as in a set of grey squares, is only shifted.
    return mean.float(), torch.where(variance > 0, variance.sqrt(), 1.0).float()


def _fingerprint(*parts: InMemory) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part.labels.numpy().tobytes())
        digest.update(part.images.numpy().data)
    return digest.hexdigest()
