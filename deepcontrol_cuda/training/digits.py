"""The handwritten digits that come with scikit-learn, split once and for all into training and test images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_TEST_SHARE = 0.25


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, 8, 8) float32 with zero mean and unit deviation over the training set, labels (N,) int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load() -> Digits:
    """1797 images of 8 x 8 pixels, a quarter of them for testing, stratified by class with a fixed seed.

    Source: ``sklearn.datasets.load_digits``, the test part of UCI's Optical Recognition of Handwritten Digits.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=_TEST_SHARE, random_state=0, stratify=labels)
    train_images, test_images = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) for part in split[:2])
    train_labels, test_labels = (torch.tensor(part, dtype=torch.int64) for part in split[2:])
    mean, std = train_images.mean(), train_images.std()
    return Digits((train_images - mean) / std, train_labels, (test_images - mean) / std, test_labels)
