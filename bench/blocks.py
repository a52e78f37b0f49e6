"""Blocks of a few layers with residual sums, against the same blocks with other norms."""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from deepcontrol_cuda.timing import Step

from . import grid, options, peers, report, runner
from .counts import of_network
from .networks import BLOCKS, Network
from .record import Recording
from .rows import Setting
from .runner import Cell, Contestant, Prepared

HELP = "time blocks: a bottleneck, an inverted residual, a 3D double convolution"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_machine(parser, several=True)
    options.add_grid(parser, options.LAYOUTS[:1])
    options.add_time(parser, 150, 60)
    parser.add_argument("--batch", type=options.positive, default=8, help="default: 8")


def run(asked: argparse.Namespace) -> int:
    names = peers.MAIN if asked.quick else (*PEERS, peers.ALGORITHMS)
    cells = [
        Cell(str(block), setting, partial(prepare, block, setting, names, asked.device))
        for setting in grid.settings(asked, asked.batch)
        for block in BLOCKS
    ]
    conditions = {"quick": asked.quick, "batch": asked.batch, "peers": names}
    return grid.run(Recording("blocks", asked.output, report.row_verdicts, asked.device, **conditions), cells, asked)


PEERS = tuple(name for name in peers.NETWORK_PEERS if name != peers.MEAN_SHIFT_REJECTION)


def build(block: Network, setting: Setting, device: str) -> tuple[nn.Module, Tensor]:
    """Batch Norm's block, kernels in the setting's dtype and layout, and an input; vectors stay float32."""
    dtype, format = getattr(torch, setting.dtype), block.memory_format(setting.layout)
    network = block.build()
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.data = parameter.data.to(dtype, memory_format=format)
    return network.to(device), block.random_input(setting.batch).to(dtype, memory_format=format).to(device)


def prepare(block: Network, setting: Setting, names: Sequence[str], device: str) -> Prepared:
    network, x = build(block, setting, device)
    training = setting.mode == "training"
    with torch.no_grad():
        size = network(x).shape
    grad_output = torch.randn(size, generator=torch.Generator().manual_seed(2)).to(x)
    grad_output = grad_output.to(memory_format=block.memory_format(setting.layout))

    def step(name: str) -> Step:
        return Step(peers.convert(name, network), x, grad_output if training else None)

    prepared = Prepared({}, **of_network(copy.deepcopy(network), x, setting)._asdict())
    for name in names:
        if name not in ("ours", peers.ALGORITHMS):
            reason = peers.why_not(name, setting, device)
            prepared.add(name, reason, lambda name=name: Contestant(step(name)))
    ours = ["ours", *(peers.ways(device) if peers.ALGORITHMS in names else ())]
    step_of_ours = step("ours")
    _scatter(step_of_ours.layer)
    runner.ours_by(step_of_ours, ours, device, f"{block}, {setting}", prepared, checked=_checked(step_of_ours))
    return prepared


@torch.no_grad()
def _scatter(layer: nn.Module) -> None:
    """Random values in the vectors of ours: at their start a bias in front of a map that is centred has no gradient."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in layer.named_parameters():
        if parameter.dim() == 1:
            values = torch.rand(parameter.shape, generator=generator)
            parameter.copy_(values - 0.5 if name.endswith("bias") else values + 0.5)


def _checked(step: Step) -> list[Step]:
    """What is compared with float64: the output, and gradients without activations.

    Somewhere inside rounding puts a value on the other side of an activation's kink than float64 does, and two
    gradients that are both right then differ by the whole of what comes back there.
    """
    output = Step(step.layer, step.x)
    if step.grad_output is None:
        return [output]
    smooth = copy.deepcopy(step.layer)
    for module in list(smooth.modules()):
        if getattr(module, "activation", "identity") != "identity":
            module.activation = "identity"
        for name, child in module.named_children():
            if isinstance(child, (nn.ReLU, nn.ReLU6)):
                setattr(module, name, nn.Identity())
    return [_Together(smooth, step.x, step.grad_output), output]


class _Together(Step):
    """A step whose parameters' gradients have one error, the root mean square of theirs.

    A vector of few elements behind several layers can by chance be far closer to float64 in the reference than in ours.
    """

    def errors(self) -> dict[str, float]:
        errors = super().errors()
        own = {name: errors.pop(name) for name in ("output", "gradient of input")}
        return own | {"gradients of parameters": statistics.fmean(error**2 for error in errors.values()) ** 0.5}
