"""Single layers against their peers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

import torch

from deepcontrol_cuda.timing import Shape, Step

from . import grid, options, peers, report, runner
from .cases import SETS
from .counts import of_layer
from .record import Recording
from .rows import Setting
from .runner import Cell, Contestant, Prepared

HELP = "time layers against their peers, call by call"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_machine(parser, several=True)
    options.add_grid(parser, layouts=None)
    options.add_time(parser, 560, 90)
    parser.add_argument("--set", choices=SETS, default="resnet50", help="shapes (default: resnet50)")
    parser.add_argument("--batch", type=options.positive, default=8, help="default: 8")
    names = (*peers.PEERS, peers.ALGORITHMS)
    main = " and ".join(peers.MAIN)
    parser.add_argument("--peers", nargs="+", choices=names, help=f"{main} always run; default: all, none with --quick")


def run(asked: argparse.Namespace) -> int:
    names = wanted(asked)
    asked.layout = asked.layout or (options.LAYOUTS[:1] if asked.quick else options.LAYOUTS)
    cells = [
        cell(shape, setting, names, asked.device)
        for setting in grid.settings(asked, asked.batch)
        for shape in SETS[asked.set]
    ]
    conditions = {"quick": asked.quick, "set": asked.set, "batch": asked.batch, "peers": names}
    recording = Recording("layers", asked.output, report.layer_verdicts, asked.device, **conditions)
    status = grid.run(recording, cells, asked)
    if asked.set != "resnet50" or asked.batch != 8 or asked.device != "cpu":
        print("The targets are set for the shapes of resnet50 at batch 8 on a CPU; this run is another.")
    return status


def wanted(asked: argparse.Namespace) -> list[str]:
    """Names of the peers, ``peers.ALGORITHMS`` for all the ways to run ours."""
    every = (*peers.PEERS, peers.ALGORITHMS)
    chosen = asked.peers or (() if asked.quick else every)
    return [name for name in every if name in (*chosen, *peers.MAIN)]


def cell(shape: Shape, setting: Setting, names: Sequence[str], device: str, calls: int = 1) -> Cell:
    return Cell(str(shape), setting, partial(prepare, shape, setting, names, device, calls))


def prepare(shape: Shape, setting: Setting, names: Sequence[str], device: str, calls: int = 1) -> Prepared:
    """Layers on random input, what is ours checked against float64."""
    dtype = getattr(torch, setting.dtype)
    memory_format = torch.channels_last if setting.layout == "channels_last" else torch.contiguous_format
    generator = torch.Generator().manual_seed(1)

    def maps(channels: int, size: int) -> torch.Tensor:
        values = torch.randn(setting.batch, channels, size, size, generator=generator)
        return values.to(dtype, memory_format=memory_format).to(device)

    x = maps(shape.in_channels, shape.size)
    grad_output = maps(shape.out_channels, shape.out_size) if setting.mode == "training" else None

    def step(name: str) -> Step:
        layer = peers.build(name, shape, dtype, memory_format).to(device)
        return Step(layer, x, grad_output, not shape.reads_image)

    prepared = Prepared({}, bytes=of_layer(shape, setting).bytes, operations=of_layer(shape, setting).operations)
    for name in names:
        if name not in ("ours", peers.ALGORITHMS):
            reason = peers.why_not(name, setting, device)
            prepared.add(name, reason, lambda name=name: Contestant(step(name), calls=calls))
    ours = ["ours", *(peers.ways(device) if peers.ALGORITHMS in names else ())]
    runner.ours_by(step("ours"), ours, device, f"{shape}, {setting}", prepared, calls)
    return prepared
