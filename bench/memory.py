"""Bytes that layers, blocks and a chain of layers keep for backward, and the most that a step holds at a time."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import torch
from torch import Tensor, nn

from deepcontrol_cuda.memory import peak_bytes, saved_bytes
from deepcontrol_cuda.timing import Shape, Step
from deepcontrol_cuda.training.table import markdown_table

from . import blocks, options, peers, report
from .cases import SETS
from .networks import BLOCKS, Network
from .record import Recording
from .rows import Row, Setting, Verdict
from .step import TrainingStep

HELP = "count the bytes that layers, blocks and chains of layers keep for backward, and the peak of a step"
CHAINS = {
    "three layers of 64 channels": (Shape(64, 64, 3, 28),) * 3,
    "three layers from an image": (Shape(3, 64, 3, 28), *(Shape(64, 64, 3, 28),) * 2),
}
PEERS = ("conv_relu", "conv_bn_relu", "conv_inplace_abn", "ours")
BASELINE = "conv_bn_relu"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_machine(parser)
    options.add_grid(parser, modes=None)
    parser.add_argument("--batch", type=options.positive, default=8, help="default: 8")
    parser.add_argument("--quick", action="store_true", help="chains only")


def run(asked: argparse.Namespace) -> int:
    from tqdm import tqdm  # not where only `make gpu` runs

    (threads,) = options.threads(asked)
    torch.set_num_threads(threads)
    grid = product(asked.dtype, asked.layout)
    settings = [Setting(dtype, layout, "training", asked.batch, threads) for dtype, layout in grid]
    of_case = {str(case): case for case in (() if asked.quick else (*SETS["resnet50"], *BLOCKS))}
    cells = [(case, setting) for setting in settings for case in (*CHAINS, *of_case)]
    recording = Recording("memory", asked.output, verdicts, asked.device, quick=asked.quick, batch=asked.batch)
    with recording, tqdm(cells, unit="row", dynamic_ncols=True) as bar:
        for name, setting in bar:
            bar.set_description(f"{setting}: {name}")
            row, skipped = measure(name, of_case.get(name), setting, asked.device)
            for peer, reason in skipped.items():
                recording.skip(peer, reason, name, setting)
            recording.rows.append(row)
    print(f"\nBytes for backward and at the peak of a step, at batch {asked.batch}\n\n{table(recording.rows)}\n")
    return 0


def measure(
    name: str, case: Shape | Network | None, setting: Setting, device: str = "cpu"
) -> tuple[Row, dict[str, str]]:
    """The row of a case, a chain of that name if it is None, and the reasons why peers are missing."""
    reasons = {peer: peers.why_not(peer, setting, device) for peer in PEERS}
    skipped = {peer: reason for peer, reason in reasons.items() if reason is not None}
    shapes = CHAINS[name] if case is None else (case,)
    kept, peaks = {}, {}
    for peer, step in _steps(shapes, setting, [name for name in PEERS if name not in skipped], device):
        kept[peer] = saved_bytes(step.layer, step.x)
        peaks[peer] = peak(step, device)
    return Row(name, setting, BASELINE, {}, kept_bytes=kept, peak_bytes=peaks), skipped


def _steps(
    cases: Sequence[Shape | Network], setting: Setting, names: Sequence[str], device: str
) -> Iterator[tuple[str, Step]]:
    first = cases[0]
    if isinstance(first, Network):
        network, x = blocks.build(first, setting, device)
        for name in names:
            yield name, _step(peers.convert(name, network), x, True)
        return
    dtype = getattr(torch, setting.dtype)
    format = torch.channels_last if setting.layout == "channels_last" else torch.contiguous_format
    x = torch.randn(setting.batch, first.in_channels, first.size, first.size).to(dtype, memory_format=format)
    for name in names:
        layers = nn.Sequential(*(peers.build(name, shape, dtype, format) for shape in cases))
        yield name, _step(layers.to(device), x.to(device), not first.reads_image)


def _step(layer: nn.Module, x: Tensor, input_grad: bool) -> Step:
    # Gradient of the output: as large as that, and there before the step.
    with torch.no_grad():
        return Step(layer, x, torch.ones_like(layer(x)), input_grad)


def peak(step: Step | TrainingStep, device: str) -> int:
    """Most bytes that tensors of a step hold at a time; parameters and gradients, there before it, are not counted."""
    step()
    for tensor in (step.x, *getattr(step, "layer", getattr(step, "model", None)).parameters()):
        if tensor.grad is not None:
            tensor.grad.zero_()
    call: Callable[[], object] = getattr(step, "backward", step)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        found = torch.cuda.max_memory_allocated() - before
    else:
        found = peak_bytes(call)
    step.clear_gradients()
    return found


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Ours over Batch Norm's bytes for backward; of chains they have a target."""
    found = []
    for row in rows:
        ratio = row.kept_bytes["ours"] / row.kept_bytes[BASELINE]
        what = f"{row.case}, {row.setting}: kept bytes, ours / {BASELINE}"
        found.append(report.at_most(what, ratio, 0.5) if row.case in CHAINS else report.without_target(what, ratio))
    return found


def table(rows: Sequence[Row]) -> str:
    names = [name for name in PEERS if all(name in row.kept_bytes for row in rows)]
    lines = [["case", "setting", *(f"{name}, {what}" for what in ("kept", "peak") for name in names)]]
    for row in rows:
        counts = [str(bytes[name]) for bytes in (row.kept_bytes, row.peak_bytes) for name in names]
        lines.append([row.case, str(row.setting), *counts])
    return markdown_table(lines)
