"""What layers cost by each algorithm: ``costs.json``, fitted by ``python -m bench costs``, read by the planner."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from . import _ops
from .tables import Table

FILE = Path(__file__).with_name("costs.json")


@dataclass(frozen=True, order=True)
class Cost:
    """Of a pass of all layers of a kind, by one algorithm on one kind of hardware.

    A layer takes ``fixed_microseconds``, and more for each operation (two for a multiply-add) and for each byte that it
    must move at least.
    """

    backend: str
    hardware: str
    """Instruction set of the CPU kernels, as "avx512"."""
    threads: int
    dtype: str
    """As in ``torch.<dtype>``."""
    layout: str
    """"contiguous" or "channels_last"."""
    kind: str
    """"1x1"; "3x3", in two dimensions at stride 1; "depthwise"; "other"."""
    mode: str
    """"forward" or "backward"."""
    algorithm: str
    """Of ``backends.ALGORITHMS``."""
    fixed_microseconds: float
    milliseconds_per_gigaoperation: float
    milliseconds_per_gigabyte: float
    layers: int
    """How many were measured."""
    error: float
    """Median of the relative deviation of what it predicts for these."""
    results: str
    """Files of bench/results that they are from."""

    def seconds(self, operations: float, bytes: float) -> float:
        """Of a layer of that kind."""
        milliseconds = (
            operations * self.milliseconds_per_gigaoperation + bytes * self.milliseconds_per_gigabyte
        ) / 1e9 + self.fixed_microseconds / 1e3
        return milliseconds / 1e3


_TABLE = Table(Cost, "costs", 1, "chooses among algorithms by rule alone")
read, read_or_warn, write = _TABLE.read, _TABLE.read_or_warn, _TABLE.write


def tell_extension(costs: Iterable[Cost], algorithms: Collection[str]) -> None:
    """Make ``costs`` of this CPU, but those of other ``algorithms``, what the extension chooses by."""
    rows = [
        (
            cost.algorithm, cost.mode, cost.dtype, cost.layout == "channels_last", cost.kind, cost.threads,
            cost.fixed_microseconds / 1e6,
            cost.milliseconds_per_gigaoperation / 1e12,
            cost.milliseconds_per_gigabyte / 1e12,
            cost.error,
        )
        for cost in costs
        if cost.algorithm in algorithms
    ]  # fmt: skip
    _ops.extension.set_costs_cpu(rows)
