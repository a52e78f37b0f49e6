"""The package's kernels that only move and add, against a copy of as many bytes."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch

from deepcontrol_cuda.training.table import markdown_table

from . import bootstrap, grid, kernels, options, record, report
from .clock import Clock
from .kernels import Case
from .record import Recording
from .rows import Row, Setting, Verdict
from .runner import Cell, Contestant, Prepared, WrongResultError, clock_of

HELP = "time centring, its backward, window means and the projection against a copy of as many bytes"
OPS = ("center", "center_backward", "window_mean", "project_kernel_gradients_")
MAPS = ((64, 112), (256, 56), (512, 28), (2048, 7))
"""Channels by pixels a side, of ``kernels.RESNET50_MAPS``."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_machine(parser, several=True)
    options.add_grid(parser, layouts=None, modes=None)
    options.add_time(parser, 100, 50)
    parser.add_argument("--batch", type=options.positive, default=8, help="default: 8")
    parser.set_defaults(mode=("forward",))


def run(asked: argparse.Namespace) -> int:
    asked.layout = asked.layout or (options.LAYOUTS[:1] if asked.quick else options.LAYOUTS)
    clock = clock_of(asked.device)
    if asked.device == "cpu":
        clock.cache_bytes = _cache_bytes()
    maps = MAPS[::2] if asked.quick else MAPS
    cells = [
        Cell(name, setting, partial(prepare, case, clock), "copy", ("copy", "ours"))
        for setting in grid.settings(asked, asked.batch)
        for name, case in cases(setting, maps)
    ]
    conditions = {"quick": asked.quick, "batch": asked.batch}
    recording = Recording("bandwidth", asked.output, verdicts, asked.device, **conditions)
    status = grid.run(recording, cells, asked)
    print(f"\nBytes read and written a second, medians\n\n{table(recording.rows)}\n")
    return status


def _cache_bytes() -> int:
    """Of the last level; where the system does not tell, as much as few processors have."""
    sizes = [
        int(size.removesuffix("K")) * 1024 for size in record.machine()["caches"].values() if re.match(r"\d+K$", size)
    ]
    return max(sizes, default=64 * 2**20)


def cases(setting: Setting, maps: Sequence[tuple[int, int]]) -> list[tuple[str, Case]]:
    """Every op and variant with its name; of the projection there is one, for it is on kernels and not on maps."""
    found = []
    for case in kernels.of_maps(OPS, setting.dtype, setting.layout, setting.batch, maps):
        of = "x".join(map(str, case.shape[1:])) or "kernels of ResNet-50"
        found.append((f"{case.op}, {case.variant}, {of}", case))
    return found


def prepare(case: Case, clock: Clock) -> Prepared:
    prepared = Prepared({}, bytes=case.bytes)
    try:
        accuracy, contestants = kernels.contestants(case, torch.ops.deepcontrol, clock)
    except WrongResultError as error:
        prepared.wrong["ours"] = str(error)
        return prepared
    prepared.accuracies["ours"] = {"worst result": accuracy}
    names = {"copy": "copy", "kernel": "ours"}
    prepared.contestants = {
        names[name]: Contestant(_InTurn(calls), parts=len(calls)) for name, calls in contestants.items()
    }
    return prepared


class _InTurn:
    """Calls one after the other, each on data of its own, which the cache no longer holds."""

    def __init__(self, calls: Sequence[Callable[[], object]]) -> None:
        self.calls = calls

    def __call__(self) -> None:
        for call in self.calls:
            call()

    def clear_gradients(self) -> None:
        """There are none."""


def table(rows: Sequence[Row]) -> str:
    lines = [["kernel", "setting", "copy, GB/s", "ours, GB/s"]]
    for row in rows:
        lines.append([row.case, str(row.setting), *(_speed(row, peer) for peer in ("copy", "ours"))])
    return markdown_table(lines)


def _speed(row: Row, peer: str) -> str:
    return report.significant(row.bytes / median(row.seconds[peer]) / 1e9) if peer in row.seconds else "-"


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Bandwidth over the copy's by op, over all its maps."""
    found = []
    for setting, some in report.by_setting(rows).items():
        for op in OPS:
            shares = [row.ratios("copy", "ours") for row in some if row.case.split(",")[0] == op]
            if shares:
                what = f"{setting}: {op}, bandwidth / copy's, geometric mean"
                found.append(report.without_target(what, bootstrap.geometric_mean(shares)))
    return found
