"""How long layers took by each backend: ``measured.json``, written by ``make gpu``, read by the planner."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .tables import Table

FILE = Path(__file__).with_name("measured.json")


@dataclass(frozen=True, order=True)
class Time:
    """Of a layer's forward and backward on one GPU."""

    capability: str
    """Compute capability, "9.0"."""
    dtype: str
    """As in ``torch.<dtype>``."""
    layout: str
    """"contiguous" or "channels_last"."""
    layer: str
    """As ``layer`` tells it."""
    backend: str
    algorithm: str
    """Of ``backends.ALGORITHMS["cuda"]`` the fastest; "" for a backend that does not have them."""
    seconds: float
    """Sum of the medians over the batches that were timed."""
    gpu: str
    result: str
    """The file of bench/results that it is from."""

    @property
    def place(self) -> tuple[str, str, str, str]:
        return self.capability, self.dtype, self.layout, self.layer


def layer(kernel_size: Sequence[int], channels: int, filters: int, stride: Sequence[int], groups: int) -> str:
    """What a time is kept for: the convolution, whatever the size of its maps."""
    size, steps = ("x".join(map(str, values)) for values in (kernel_size, stride))
    return f"{size}, {channels} to {filters}, stride {steps}, groups {groups}"


_TABLE = Table(Time, "times", 2, "chooses among proven backends without knowing their times")
read, read_or_warn, write = _TABLE.read, _TABLE.read_or_warn, _TABLE.write


def fastest(times: Iterable[Time], place: tuple[str, str, str, str], backends: Sequence[str]) -> Time | None:
    """The least time at ``place`` if each of ``backends`` has one there, else None."""
    found = {time.backend: time for time in times if time.place == place and time.backend in backends}
    return min(found.values(), key=lambda time: time.seconds) if found.keys() == set(backends) else None
