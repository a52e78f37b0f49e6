"""Images in files, a folder for each class: ``train/CLASS/*`` and ``val/CLASS/*``."""

from __future__ import annotations

import hashlib
import os
import random
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .data import Batch, DataSet, derive
from .errors import TrainingError

_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
# Of ImageNet's training images, in bytes: what networks for photographs are usually trained with.
_MEAN = (255 * 0.485, 255 * 0.456, 255 * 0.406)
_STD = (255 * 0.229, 255 * 0.224, 255 * 0.225)
# Random crops as in arXiv 1409.4842, section 6; test images lose an eighth of the shorter side, as 256 to 224 pixels.
_AREA = (0.08, 1.0)
_ASPECT = (3 / 4, 4 / 3)
_TEST_SHARE = 224 / 256
_ATTEMPTS = 10


def load(path: Path, size: int, workers: int) -> DataSet:
    """The data set below ``path``, its images cropped and scaled to (3, size, size).

    Raises:
        TrainingError: a folder is missing, empty or not of a class for training.
    """
    classes = _classes(path / "train")
    unknown = set(_classes(path / "val")) - set(classes)
    if unknown:
        raise TrainingError(f"--data: {path / 'val'} has classes that {path / 'train'} lacks: {_some(unknown)}")
    digest = hashlib.blake2b(digest_size=16)
    parts = [_part(path / name, classes, size, workers, digest) for name in ("train", "val")]
    mean, std = torch.tensor(_MEAN), torch.tensor(_STD)
    return DataSet("imagefolder", len(classes), *parts, mean, std, digest.hexdigest())


def sample(folder: Path, size: int, count: int) -> Tensor:
    """Up to ``count`` of the images below ``folder``, spread evenly over them: (N, 3, size, size) float32.

    Cropped as for testing, normalised with the mean and deviation of ImageNet's.

    Raises:
        TrainingError: there is no such folder, no image in it, or one that cannot be read.
    """
    try:
        files = sorted(_images(folder))
    except OSError as error:
        raise TrainingError(f"--images: {error.filename}: {error.strerror}; wanted a folder of images") from error
    if not files:
        raise TrainingError(f"--images: {folder} holds no images ({', '.join(_SUFFIXES)})")
    files = files[:: max(1, len(files) // count)][:count]
    chunk = torch.arange(len(files))
    (images, _), *_ = ImageFiles(files, torch.zeros_like(chunk), size, workers=0).batches([chunk], None)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (_MEAN, _STD))
    return (images.float() - mean) / std


def _classes(folder: Path) -> list[str]:
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError as error:
        raise TrainingError(
            f"--data: {folder}: {error.strerror}; wanted a folder with train/CLASS/*.jpg and val/CLASS/*.jpg"
        ) from error
    if not names:
        raise TrainingError(f"--data: {folder} has no folders; wanted one for each class, with its images")
    return names


def _part(folder: Path, classes: list[str], size: int, workers: int, digest) -> ImageFiles:
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        try:
            images = sorted(_images(folder / name))
        except OSError as error:
            raise TrainingError(f"--data: {error.filename}: {error.strerror}; wanted a folder to look into") from error
        # A small test set may lack a class, but what shall a network learn of one without images?
        if not images and folder.name == "train":
            raise TrainingError(f"--data: {folder / name} holds no images ({', '.join(_SUFFIXES)})")
        files += images
        labels += [label] * len(images)
    if not files:
        raise TrainingError(f"--data: {folder} holds no images ({', '.join(_SUFFIXES)})")
    for file, label in zip(files, labels):
        digest.update(f"{folder.name}{file[len(str(folder)) :]}\0{label}\0".encode(errors="surrogateescape"))
    return ImageFiles(files, torch.tensor(labels), size, workers)


def _images(folder: str | Path, above: tuple[str, ...] = ()) -> Iterator[str]:
    """The images below ``folder``, through links too, but for links that lead back to a folder ``above`` them."""
    place = os.path.realpath(folder)
    if place in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _images(entry.path, (*above, place))
            elif entry.name.lower().endswith(_SUFFIXES):
                yield entry.path


class ImageFiles(Dataset):
    """Image files as a ``data.Part``: squares of (3, size, size) uint8, read by ``workers`` processes.

    Images are turned as their EXIF data say, and become RGB: transparency is dropped. Those with more than 8 bits a
    channel are refused, since no one knows which part of their range matters.
    """

    def __init__(self, files: list[str], labels: Tensor, size: int, workers: int) -> None:
        # One array, not a list: counting references to a million strings would copy their pages into every worker.
        self.files = np.array([os.fsencode(file) for file in files])
        self.labels = labels
        self.size = size
        self.workers = workers

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: tuple[int, int | None]) -> tuple[Tensor, Tensor] | str:
        """Image and label of sample ``index``, or what is wrong with its file; ``key`` is (index, seed)."""
        index, seed = key
        file = os.fsdecode(self.files[index])
        try:
            with Image.open(file) as image:
                if image.mode[0] in "IF":
                    # Pillow would clip their values to 0..255.
                    return f"{file} is in mode {image.mode} of Pillow, wanted 8 bits a channel; convert or remove it"
                ImageOps.exif_transpose(image, in_place=True)
                pixels = self._square(
                    image.convert("RGB"), None if seed is None else random.Random(derive(seed, index))
                )
        except Exception as error:  # decoders raise what they like
            return f"{file} cannot be read as an image: {error}; replace or remove it"
        return torch.from_numpy(pixels).permute(2, 0, 1), self.labels[index]

    def _square(self, image: Image.Image, draws: random.Random | None) -> np.ndarray:
        box = _centre(*image.size) if draws is None else _random_box(*image.size, draws)
        image = image.resize((self.size, self.size), Image.Resampling.BILINEAR, box)
        if draws is not None and draws.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.array(image)

    def batches(self, chunks: Sequence[Tensor], seed: int | None) -> Iterator[Batch]:
        # The seed travels with the index: a worker has only its own copy of the data set.
        keys = ([(index, seed) for index in chunk.tolist()] for chunk in chunks)
        loader = DataLoader(
            self, batch_sampler=keys, num_workers=self.workers, collate_fn=_collate,
            pin_memory=torch.cuda.is_available(), worker_init_fn=_leave_interrupts,
        )  # fmt: skip
        for batch in loader:
            # Raised here: what a worker raises arrives as a traceback in a message.
            if isinstance(batch, str):
                raise TrainingError(batch)
            yield batch


def _collate(samples: list[tuple[Tensor, Tensor] | str]) -> Batch | str:
    broken = [sample for sample in samples if isinstance(sample, str)]
    if broken:
        return broken[0]
    images, labels = zip(*samples)
    return torch.stack(images), torch.stack(labels)


def _leave_interrupts(_: int) -> None:
    """Ctrl-C reaches every process of a terminal; it is the first one's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _centre(width: int, height: int) -> tuple[float, float, float, float]:
    side = _TEST_SHARE * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _random_box(width: int, height: int, draws: random.Random) -> tuple[float, float, float, float]:
    """A box of random area and aspect ratio inside the image; the largest square in the middle where none is found."""
    for _ in range(_ATTEMPTS):
        area = width * height * draws.uniform(*_AREA)
        aspect = _ASPECT[0] * (_ASPECT[1] / _ASPECT[0]) ** draws.random()
        box_width, box_height = (area * aspect) ** 0.5, (area / aspect) ** 0.5
        if box_width <= width and box_height <= height:
            left, top = draws.uniform(0, width - box_width), draws.uniform(0, height - box_height)
            return left, top, left + box_width, top + box_height
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _some(names: set[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
