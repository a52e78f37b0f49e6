"""Whole networks: training steps and inference, time and peak memory, before and after ``replace_conv_bn``."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from functools import cache, partial

import torch

import deepcontrol_cuda as dc

from . import grid, memory, networks, options, peers, report
from .bootstrap import Interval
from .counts import of_network
from .networks import MODELS, Network
from .record import Recording
from .rows import Accuracy, Row, Setting, Verdict
from .runner import Cell, Contestant, Prepared
from .step import InferenceStep, TrainingStep

HELP = "time training steps and inference of ResNet-50, MobileNetV2 and a 3D U-Net, and count their peak memory"
PEERS = tuple(name for name in peers.NETWORK_PEERS if "instance" not in name and "group" not in name)
MAIN = ("conv_bn_relu", "ours")
COMPILED = "conv_bn_relu_compiled"
TOLERANCE = 1e-5
"""Of a converted model's output against Batch Norm's in float64, over the largest output."""
_METHODS = {"ours": "deep_control", peers.MEAN_SHIFT_REJECTION: "mean_shift_rejection"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_machine(parser, several=True)
    options.add_grid(parser, options.LAYOUTS[:1])
    options.add_time(parser, 330, 100)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="default: all")
    parser.add_argument("--peers", nargs="+", choices=PEERS, help=f"{' and '.join(MAIN)} always run; default: all")
    parser.add_argument("--batch", type=options.positive, default=8, help="default: 8")
    parser.add_argument("--size", type=options.positive, help="pixels a side (default: 224, or 96 with --quick)")
    parser.add_argument("--depth", type=options.positive, help="voxels a side (default: 32, or 16 with --quick)")


def run(asked: argparse.Namespace) -> int:
    chosen = asked.peers or (() if asked.quick else PEERS)
    names = [name for name in PEERS if name in (*chosen, *MAIN)]
    size, depth = asked.size or (96 if asked.quick else 224), asked.depth or (16 if asked.quick else 32)
    built = [network for network in networks.models(size, depth) if network.name in asked.models]
    cells = [
        Cell(str(model), setting, partial(prepare, model, setting, names, asked.device), MAIN[0], MAIN, least=(4, 8))
        for setting in grid.settings(asked, asked.batch)
        for model in built
    ]
    conditions = {"quick": asked.quick, "batch": asked.batch, "size": size, "depth": depth, "peers": names}
    recording = Recording("models", asked.output, verdicts, asked.device, **conditions)
    status = grid.run(recording, cells, asked)
    if size != 224 or asked.batch != 8:
        print("The targets are set for images of 224 pixels at batch 8; this run is another.")
    return status


def prepare(model: Network, setting: Setting, names: Sequence[str], device: str) -> Prepared:
    format, autocast = model.memory_format(setting.layout), setting.dtype == "bfloat16"
    network = model.build().to(device, memory_format=format)
    x = model.random_input(setting.batch).to(device, memory_format=format)
    prepared = Prepared({}, operations=of_network(copy.deepcopy(network), x, setting).operations)

    def contestant(name: str) -> Contestant:
        converted = peers.convert(name, network)
        if setting.mode == "forward":
            return Contestant(InferenceStep(converted, x, autocast))
        step = TrainingStep(converted.train(), x, autocast)
        if name != COMPILED:
            prepared.peak_bytes[name] = memory.peak(step, device)
        return Contestant(step)

    for name in names:
        if name in _METHODS:
            error = error_of(model, _METHODS[name])
            if not error <= TOLERANCE:
                prepared.wrong[name] = (
                    f"{name} at {model}: error of the converted model {error:.1e}, wanted at most {TOLERANCE:.0e}; "
                    "it is not timed"
                )
                continue
            prepared.accuracies[name] = {"output of the folded model, float32": Accuracy(error, TOLERANCE)}
        prepared.add(name, _why_not(model, name, setting, device), partial(contestant, name))
    return prepared


def _why_not(model: Network, name: str, setting: Setting, device: str) -> str | None:
    if name == COMPILED and model.name != MODELS[0]:
        return f"only {MODELS[0]} is compiled, since compiling takes longer than all timing"
    return peers.why_not(name, setting, device)


@cache
@torch.no_grad()
def error_of(model: Network, method: str) -> float:
    """Of the model as ``replace_conv_bn`` folds it over the largest output, against Batch Norm's in float64.

    On small images, with statistics of their own.
    """
    small = model.input[:1] + tuple(min(size, 64) for size in model.input[1:])
    x = torch.randn(2, *small, generator=torch.Generator().manual_seed(0))
    x = x.to(memory_format=model.memory_format("channels_last"))
    network = model.build().to(memory_format=model.memory_format("channels_last"))
    network(x)
    network.eval()
    exact = copy.deepcopy(network).double()(x.double())
    got = dc.replace_conv_bn(network, method, "folded").model(x)
    return ((got.double() - exact).abs().max() / exact.abs().max()).item()


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Batch Norm's time over ours, also compiled, and our peak over Batch Norm's; ResNet-50's training has targets."""
    found = []
    for row in rows:
        targeted = row.case.startswith(MODELS[0]) and row.setting.mode == "training"
        for name in (name for name in _METHODS if name in row.seconds):
            what = f"{row.case}, {row.setting}: {{}} / {name}"
            for norm in ("conv_bn_relu", COMPILED):
                if norm in row.seconds:
                    ratio: Interval = row.ratio(norm, name)
                    with_target = targeted and norm != COMPILED
                    judge = partial(report.at_least, target=1.25) if with_target else report.without_target
                    found.append(judge(what.format(norm), ratio))
            if {name, "conv_bn_relu"} <= row.peak_bytes.keys():
                peak = row.peak_bytes[name] / row.peak_bytes["conv_bn_relu"]
                judge = partial(report.at_most, target=0.6) if targeted else report.without_target
                found.append(judge(f"{row.case}, {row.setting}: peak bytes, {name} / conv_bn_relu", peak))
    return found
