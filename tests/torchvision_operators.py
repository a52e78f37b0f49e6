"""Lets torchvision be imported beside a torch that its compiled operators do not fit."""

from __future__ import annotations

import importlib.machinery
import importlib.util
from pathlib import Path

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_libraries: list[torch.library.Library] = []


def define_missing() -> None:
    """Define the operators that torchvision describes while it is imported, unless its own extension loads.

    The wheel of torchvision that a package index serves is built for CUDA; beside a torch for the CPU its extension
    does not load, and the import then ends in "operator torchvision::nms does not exist". No network of torchvision
    calls these operators, so that schemas suffice. To be called before the first import of torchvision.
    """
    if _extension_loads() or hasattr(torch.ops.torchvision, "nms"):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(name + _SCHEMA)
    # A library takes its definitions back when it is collected.
    _libraries.append(library)


def _extension_loads() -> bool:
    package = importlib.util.find_spec("torchvision")
    if package is None or package.origin is None:
        return False
    loader = (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES)
    extension = importlib.machinery.FileFinder(str(Path(package.origin).parent), loader).find_spec("_C")
    if extension is None or extension.origin is None:
        return False
    try:
        torch.ops.load_library(extension.origin)
    except OSError:
        return False
    return True
