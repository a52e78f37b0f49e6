"""How the time of a layer grows with the batch, the channels, the map's size and the threads: one axis at a time."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from dataclasses import replace

import torch

from deepcontrol_cuda.timing import Shape

from . import grid, layers, options, peers, report
from .record import Recording
from .rows import Setting

HELP = "time a layer along the axes batch, channels, map size and threads"
SHAPE, BATCH = Shape(64, 64, 3, 28), 8
AXES = ("batch", "channels", "size", "threads")
_VALUES = {"batch": (1, 2, 4, 8, 16, 32), "channels": (16, 32, 64, 128, 256), "size": (7, 14, 28, 56, 112)}
_QUICK = {"batch": (1, 8, 32), "channels": (16, 64, 128), "size": (7, 28, 56)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_machine(parser)
    options.add_grid(parser, options.LAYOUTS[:1])
    options.add_time(parser, 220, 75)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=AXES, help="default: all")


def run(asked: argparse.Namespace) -> int:
    base = grid.settings(asked, BATCH)
    places = {
        axis: [point(axis, value, setting) for value in values(axis, asked.quick) for setting in base]
        for axis in asked.axes
    }
    # A place where axes cross is measured once; those of one number of threads and of one setting are neighbours.
    every = sorted({place for some in places.values() for place in some}, key=_order)
    names = ("conv", *peers.MAIN)
    cells = [layers.cell(shape, setting, names, asked.device) for shape, setting in every]
    recording = Recording("scaling", asked.output, report.row_verdicts, asked.device, quick=asked.quick)
    try:
        return grid.run(recording, cells, asked)
    finally:
        torch.set_num_threads(base[0].threads)


def values(axis: str, quick: bool) -> Iterable[int]:
    if axis != "threads":
        return (_QUICK if quick else _VALUES)[axis]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return sorted({cores, *(2**power for power in range(cores.bit_length()))})


def point(axis: str, value: int, setting: Setting) -> tuple[Shape, Setting]:
    """The layer and the setting at a value on an axis; all else as ``SHAPE`` and ``setting`` have it."""
    if axis == "channels":
        return replace(SHAPE, in_channels=value, out_channels=value), setting
    if axis == "size":
        return replace(SHAPE, size=value), setting
    return SHAPE, replace(setting, **{axis: value})


def _order(place: tuple[Shape, Setting]) -> tuple:
    shape, setting = place
    where = (setting.threads, setting.dtype, setting.layout, setting.mode, setting.batch)
    return *where, shape.in_channels, shape.size
