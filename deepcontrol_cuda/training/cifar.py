"""Reads the python version of CIFAR-10 and CIFAR-100 (Krizhevsky 2009, https://www.cs.toronto.edu/~kriz/cifar.html)."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import TrainingError


@dataclass(frozen=True)
class _Layout:
    folder: str
    train: tuple[str, ...]
    test: str
    labels: bytes
    classes: int


_LAYOUTS = {
    "cifar10": _Layout(
        "cifar-10-batches-py", tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch", b"labels", 10
    ),
    "cifar100": _Layout("cifar-100-python", ("train",), "test", b"fine_labels", 100),
}
_SHAPE = (3, 32, 32)


def read(name: str, path: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], int]:
    """Training and test (images (N, 3, 32, 32) uint8, labels (N,) int64) and the number of classes.

    Args:
        name: "cifar10" or "cifar100".
        path: the folder with the batches, one that holds that folder, or the .tar.gz as it is downloaded.

    Raises:
        TrainingError: a file is missing, damaged, or holds something else than batches of CIFAR.
    """
    layout = _LAYOUTS[name]
    files = _contents(layout, path)
    train = [_batch(layout, path, file, files[file]) for file in layout.train]
    test = _batch(layout, path, layout.test, files[layout.test])
    return tuple(torch.cat(parts) for parts in zip(*train)), test, layout.classes


def _contents(layout: _Layout, path: Path) -> dict[str, bytes]:
    wanted = (*layout.train, layout.test)
    try:
        if path.is_dir():
            folder = path / layout.folder if (path / layout.folder).is_dir() else path
            found = {file: (folder / file).read_bytes() for file in wanted if (folder / file).is_file()}
        else:
            content = path.read_bytes()
            if content.startswith(b"\x1f\x8b"):
                # tarfile would stop ahead of the checksum at the end.
                content = gzip.decompress(content)
            with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                members = {Path(member.name).name: member for member in archive if member.isfile()}
                found = {file: archive.extractfile(members[file]).read() for file in wanted if file in members}
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise TrainingError(f"--data: {path} cannot be read: {error}") from error
    missing = [file for file in wanted if file not in found]
    if missing:
        raise TrainingError(
            f"--data: {path} has no {', '.join(missing)}; wanted the files of {layout.folder}, in a folder or in the "
            ".tar.gz of the python version"
        )
    return found


def _batch(layout: _Layout, path: Path, file: str, content: bytes) -> tuple[Tensor, Tensor]:
    def refuse(why: str) -> TrainingError:
        return TrainingError(f"--data: {file} in {path} {why}")

    try:
        batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # damaged pickles raise anything
        raise refuse(f"is no batch of CIFAR or damaged: {error}") from error
    if not isinstance(batch, dict) or not {b"data", layout.labels} <= batch.keys():
        raise refuse(f"is no batch of {layout.folder}: wanted a dict with data and {layout.labels.decode()}")
    data, labels = batch[b"data"], batch[layout.labels]
    size = int(np.prod(_SHAPE))
    if not (isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == size):
        got = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise refuse(f"holds data {got}, wanted uint8 (N, {size})")
    if not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise refuse("holds labels that are no list of integers")
    if len(labels) != len(data) or not labels:
        raise refuse(f"holds {len(data)} images and {len(labels)} labels, wanted as many of both and at least one")
    if not 0 <= min(labels) <= max(labels) < layout.classes:
        raise refuse(f"holds labels from {min(labels)} to {max(labels)}, wanted 0 to {layout.classes - 1}")
    return torch.from_numpy(data.reshape(-1, *_SHAPE).copy()), torch.tensor(labels)


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    """Makes arrays and plain containers, and calls nothing else, whatever the pickle asks for."""

    def find_class(self, module: str, name: str) -> Any:
        # NumPy 2 has moved what NumPy 1 pickled as numpy.core; bytes are latin1 text where Python 3 wrote protocol 2.
        allowed: dict[tuple[str, str], Callable] = {
            ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
            ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): _latin1,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch of CIFAR needs")
        return allowed[module, name]
