"""What one tiny layer costs, so small that its time is Python's and the dispatcher's."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from deepcontrol_cuda.timing import Shape

from . import grid, layers, options, peers, report
from .record import Recording
from .rows import Row, Verdict

HELP = "time one tiny layer: Python's and the dispatcher's share"
SHAPE = Shape(16, 16, 3, 4)
CALLS = 20
"""In a round, timed one by one; a round's time is their median."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_machine(parser, several=True)
    options.add_grid(parser, options.LAYOUTS[:1])
    options.add_time(parser, 40, 10)


def run(asked: argparse.Namespace) -> int:
    names = ("conv", *peers.MAIN)
    cells = [layers.cell(SHAPE, setting, names, asked.device, CALLS) for setting in grid.settings(asked, batch=1)]
    conditions = {"quick": asked.quick, "batch": 1, "calls": CALLS}
    return grid.run(Recording("overhead", asked.output, verdicts, asked.device, **conditions), cells, asked)


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    return [
        report.at_most(f"{row.setting}: ours / conv_bn_relu", row.ratio("ours", "conv_bn_relu"), 1.0)
        for row in rows
        if {"ours", "conv_bn_relu"} <= row.seconds.keys()
    ]
