"""Runs every kernel of a backend on small tensors, for compute-sanitizer: ``python -m bench.sanitize_gpu triton``.

Tensors are made on the CPU and copied, so that nearly all that runs on the GPU is this package's. With the argument
``convolutions`` behind the backend the ops of convolutions run, by every algorithm that takes them; with ``own`` only
what runs without cuDNN, of which racecheck knows nothing.
"""

from __future__ import annotations

import sys
from itertools import product

import torch
from torch import Tensor

from deepcontrol_cuda import backends

# Whole vectors and odd ends; one pixel; maps that the blocks of a cluster share, and one that takes two launches.
SHAPES = ((2, 64, 8, 8), (3, 19, 9, 7), (2, 9, 1, 1), (1, 8, 96, 96), (1, 3, 300, 301), (1, 2, 700, 701))
ACTIVATIONS = ("identity", "relu", "silu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FORMATS = (torch.contiguous_format, torch.channels_last)


def main(backend: str, which: str = "kernels") -> int:
    """Run all of it, and print how many calls that were."""
    if reason := backends.available()[backend]:
        raise RuntimeError(f"backend {backend!r}: {reason}")
    device, ops = backends._compiled[backend].device, getattr(torch.ops, backends._compiled[backend].namespace)
    run = {"kernels": _kernels, "convolutions": _convolutions, "own": _own_convolutions}[which]
    # Triton compiles each kernel for each dtype anew, which the sanitizers are no faster than others to wait for.
    dtypes = DTYPES[:2] if backend == "triton" else DTYPES
    count = sum(run(ops, _Maker(dtype, format, device)) for dtype, format in product(dtypes, FORMATS))
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{count} calls")
    return 0


class _Maker:
    def __init__(self, dtype: torch.dtype, format: torch.memory_format, device: str):
        self.dtype, self.format, self.device = dtype, format, device

    def maps(self, *shape: int) -> Tensor:
        return torch.randn(shape).to(self.dtype, memory_format=self.format).to(self.device)

    def vectors(self, channels: int) -> list[Tensor]:
        wide = torch.float32 if self.dtype.itemsize == 2 else self.dtype
        return [(torch.rand(channels, dtype=wide) + 0.5).to(self.device) for _ in range(3)]


def _kernels(ops, make: _Maker) -> int:
    count = 0
    for i, (shape, activation) in enumerate(product(SHAPES, ACTIVATIONS)):
        x, grad, residual = make.maps(*shape), make.maps(*shape), make.maps(*shape) if i % 2 else None
        gain, mean_scale, bias = make.vectors(shape[1])
        for vector, constant in ((mean_scale, 1.0), (None, 0.0)):
            arguments = (x, gain, vector, constant, bias, residual, activation, 0.1, True)
            _, mean, saved = ops.center(*arguments)
            ops.center_with_mean(*arguments)
            for mask in ([True] * 5, [True, False, True, True, False]):
                ops.center_backward(grad, x, gain, vector, constant, mean, saved, activation, 0.1, mask)
            count += 4
    for shape, (kernel, stride, padding) in product(SHAPES[:2], ((3, 1, 1), (3, 2, 1), (1, 2, 0), (5, 1, 4))):
        ops.window_mean(make.maps(*shape), *([value] * 2 for value in (kernel, stride, padding, 1)))
        count += 1
    gradients = [make.maps(o, c, k, k) for o, c, k in ((33, 7, 3), (8, 16, 3), (4, 3, 7), (64, 64, 1))]
    ops.project_kernel_gradients_(gradients, 0.9)
    for gradient in gradients:
        ops.finish_weight_grad_(gradient, gradient.clone(), make.vectors(len(gradient))[0], None, 0.9)
    return count + 1 + len(gradients)


# Input channels, filters, taps and pixels a side, stride and groups: whole vectors, odd ends, depthwise, an image.
CONVOLUTIONS = (
    (19, 33, 3, 9, 1, 1),
    (64, 64, 3, 14, 1, 1),
    (64, 32, 1, 14, 2, 1),
    (32, 32, 3, 9, 2, 32),
    (3, 16, 7, 20, 2, 1),
)


def _convolutions(ops, make: _Maker) -> int:
    return _run(ops, make, [True] * 6)


def _own_convolutions(ops, make: _Maker) -> int:
    """By this package's kernels alone, so without the gradient of the input."""
    count = 0
    for algorithm in backends.ALGORITHMS["cuda"]:
        if algorithm != "two passes":
            ops.prefer_algorithm(algorithm)
            count += _run(ops, make, [False] + [True] * 5)
    ops.prefer_algorithm("")
    return count


def _run(ops, make: _Maker, mask: list[bool]) -> int:
    count = 0
    for channels, filters, taps, size, stride, groups in CONVOLUTIONS:
        x, w = make.maps(2, channels, size, size), make.maps(filters, channels // groups, taps, taps)
        out_size = (size + 2 * (taps // 2) - taps) // stride + 1
        grad = make.maps(2, filters, out_size, out_size)
        gain, mean_scale, bias = make.vectors(filters)
        vectors, geometry = (gain, mean_scale, 1.0), ([stride] * 2, [taps // 2] * 2, [1, 1], groups)
        try:
            _, mean, saved = ops.conv_center(x, w, *vectors, bias, grad, *geometry, "relu", 0.0, True)
        except RuntimeError as error:
            if not str(error).startswith("algorithm "):
                raise
            continue  # that algorithm does not take it
        ops.conv_center_backward(grad, x, w, *vectors, mean, saved, *geometry, "relu", 0.0, 0.9, mask)
        count += 2
    return count


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
