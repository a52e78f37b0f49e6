"""What a step must move and compute at least, whoever computes it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from deepcontrol_cuda.timing import Shape

from .rows import Setting


class Counts(NamedTuple):
    bytes: int
    operations: int
    """A product and a sum are two."""


def of_layer(shape: Shape, setting: Setting) -> Counts:
    """Of a convolution with ReLU; vectors, thousandths of it, are not counted."""
    input = setting.batch * shape.in_channels * shape.size**2
    output = setting.batch * shape.out_channels * shape.out_size**2
    of_filter = shape.in_channels // shape.groups * shape.kernel_size**2
    passes = 1 if setting.mode == "forward" else 2 if shape.reads_image else 3
    return _counts(
        input, output, shape.out_channels * of_filter, 2 * output * of_filter * passes, setting, not shape.reads_image
    )


def of_network(network: nn.Module, x: Tensor, setting: Setting) -> Counts:
    """Of a module of convolutions with ReLU that takes ``x``, if nothing between its ends were moved."""
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        meta = network.to("meta")
        output = meta(torch.empty(x.shape, requires_grad=setting.mode == "training"))
        if setting.mode == "training":
            output.sum().backward()
    weights = sum(parameter.numel() for parameter in network.parameters() if parameter.dim() > 1)
    return _counts(x.numel(), output.numel(), weights, counter.get_total_flops(), setting, True)


def _counts(input: int, output: int, weights: int, operations: int, setting: Setting, input_grad: bool) -> Counts:
    """Forward reads input and weights and writes the output; backward reads all three's like and writes gradients.

    Backward's own: the output's gradient with a bit for each element that tells where ReLU let it pass, input and
    weights again, and the gradients of these.
    """
    size = getattr(torch, setting.dtype).itemsize
    moved = (input + weights + output) * size
    if setting.mode == "training":
        written = weights + (input if input_grad else 0)
        moved += (output + input + weights + written) * size + 2 * (output // 8)
    return Counts(moved, operations)
