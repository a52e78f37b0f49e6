"""Times the algorithms of a layer at its first call, and keeps which is the fastest in a file for later processes.

The file is JSON in ``folder()``, one for each situation: package, torch, kernels and processor. It has layers in the
order in which they were timed, and no more than ``MOST_LAYERS``: the oldest go. Several processes may write it at a
time: each adds what it found under a lock and puts the whole file in place in one step.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from . import _ops, files
from ._version import __version__

VARIABLE = "DEEPCONTROL_CACHE_DIR"
MOST_LAYERS = 4096
_FORMAT = 1
_SECONDS = 0.1
"""For the timing of one pass; there are at least ``_LEAST`` rounds."""
_LEAST, _MOST = 5, 50
PASSES = ("forward", "backward")


class Timed(NamedTuple):
    """Median seconds of each algorithm of a pass; the first of the fastest is chosen."""

    forward: dict[str, float]
    backward: dict[str, float]

    def fastest(self, mode: str) -> str:
        seconds = getattr(self, mode)
        return min(seconds, key=seconds.__getitem__)


def folder() -> Path:
    """DEEPCONTROL_CACHE_DIR, else deepcontrol_cuda in XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get(VARIABLE):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deepcontrol_cuda"


def situation() -> dict[str, str]:
    """What a timing holds for."""
    from .training.conditions import cpu_model

    return {
        "deepcontrol_cuda": __version__,
        "torch": torch.__version__,
        "kernels": _digest(),
        "cpu": f"{cpu_model()}, {os.cpu_count()} cores, {_ops.extension.info()['isa']}",
    }


@cache
def _digest() -> str:
    """Of the extension, all of whose kernels and compiler flags are in it."""
    return hashlib.sha256(Path(_ops.extension.__file__).read_bytes()).hexdigest()[:16]


def may_time(input: Tensor, weight: Tensor) -> bool:
    """Whether a call is an ordinary one, whose tensors have values: not traced, exported, counted or transformed."""
    return (
        not torch.compiler.is_exporting()
        and not torch.jit.is_tracing()
        and input.numel() * weight.numel() > 0
        and all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in (input, weight))
        and _get_current_dispatch_mode() is None
        and not torch._C._functorch.peek_interpreter_stack()
    )


class Cache:
    """What was timed in one situation, in this process and by others through the file."""

    def __init__(self, where: Path, situation: Mapping[str, str]) -> None:
        text = json.dumps(situation, sort_keys=True)
        self.path = where / f"timed-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        self._situation = dict(situation)
        self._told = False
        self._unsaved: dict[str, Timed] = {}
        self.known = self._read()

    def add(self, layer: str, timed: Timed) -> None:
        """Keep one layer's times; where the file cannot be written, in this process only, with one warning."""
        self.known[layer] = self._unsaved[layer] = timed
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with files.hold(self.path.parent):
                # What others found in the meantime stays; of the same layer the last one's.
                older = [(name, one) for name, one in self._read().items() if name not in self._unsaved]
                self.known = dict([*older, *self._unsaved.items()][-MOST_LAYERS:])
                content = {
                    "format": _FORMAT,
                    "situation": self._situation,
                    "layers": {name: one._asdict() for name, one in self.known.items()},
                }
                files.replace(self.path, (json.dumps(content, indent=1) + "\n").encode())
                self._unsaved.clear()
        except OSError as error:
            self._warn(f"keeps no times of layers for later processes: {error}; {VARIABLE} names another folder")

    def _read(self) -> dict[str, Timed]:
        try:
            text = self.path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError) as error:
            self._warn(f"times layers again, since {self.path} cannot be read ({error})")
            return {}
        try:
            content = json.loads(text)
            if content["format"] != _FORMAT or content["situation"] != self._situation:
                raise ValueError("it is of another version or machine")
            return {name: _checked(one) for name, one in content["layers"].items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            self._warn(f"times layers again, since {self.path} is not its own ({type(error).__name__}: {error})")
            return {}

    def _warn(self, what: str) -> None:
        if not self._told:
            self._told = True
            warnings.warn(f"deepcontrol_cuda {what}", stacklevel=6)


def _checked(one: Mapping[str, Mapping[str, float]]) -> Timed:
    for name in PASSES:
        if not one[name] or not all(isinstance(value, float) and value > 0 for value in one[name].values()):
            raise ValueError("a time is no positive number")
    return Timed(*(dict(one[name]) for name in PASSES))


def time_on_cpu(input: Tensor, weight: Tensor, geometry: Sequence, possible: Mapping[str, Sequence[str]]) -> Timed:
    """Forward and backward of a centred layer with ReLU, by each algorithm that takes them.

    Args:
        geometry: stride, padding and dilation of each spatial dimension, and groups.
        possible: names of the algorithms by pass.
    """
    extension, ops = _ops.extension, torch.ops.deepcontrol
    with torch.no_grad():
        x, w = input.detach(), weight.detach()
        vector = torch.ones(w.shape[0], dtype=_ops.accumulation(x))
        vectors = (vector, vector, 1.0)
        output, means, saved = ops.conv_center(x, w, *vectors, vector, None, *geometry, "relu", 0.0, True)
        mask = [True, True, True, True, True, False]
        calls = {
            "forward": lambda: ops.conv_center(x, w, *vectors, vector, None, *geometry, "relu", 0.0, True),
            "backward": lambda: ops.conv_center_backward(
                output, x, w, *vectors, means, saved, *geometry, "relu", 0.0, 0.0, mask
            ),
        }

        def seconds(call, algorithm: str) -> float:
            # Other threads go on by their own choice.
            extension.prefer_algorithm_cpu(algorithm, of_thread=True)
            start = time.perf_counter()
            call()
            return time.perf_counter() - start

        try:
            return Timed(*(_interleaved(calls[name], possible[name], seconds) for name in PASSES))
        finally:
            extension.prefer_algorithm_cpu("", of_thread=True)


def _interleaved(call, algorithms: Sequence[str], seconds) -> dict[str, float]:
    # The first call of each allocates and chooses.
    round_seconds = sum(seconds(call, algorithm) for algorithm in algorithms)
    rounds = max(_LEAST, min(_MOST, int(_SECONDS / round_seconds)))
    found = {algorithm: [] for algorithm in algorithms}
    for i in range(rounds):
        for algorithm in algorithms if i % 2 else reversed(algorithms):
            found[algorithm].append(seconds(call, algorithm))
    return {algorithm: float(f"{statistics.median(times):.4g}") for algorithm, times in found.items()}
