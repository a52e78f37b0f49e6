"""Times of single ops: ``python -m pytest bench --benchmark-only``. No comparison with float64 here, tests/ has it.

Names and groups stay as they are from commit to commit, so that ``--benchmark-compare`` finds what it compares with. In
a group of layers everything computes one convolution in one dtype, layout and mode; groups of ops hold all their sizes.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import deepcontrol_cuda as dc
from deepcontrol_cuda import backends
from deepcontrol_cuda.timing import Shape, Step

from . import peers

BATCH = 8
ROUNDS = 10
DTYPES = (torch.float32, torch.bfloat16)
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
MAPS = ((BATCH, 64, 56, 56), (BATCH, 512, 7, 7))
CONVOLUTIONS = {
    "3x3": Shape(128, 128, 3, 28),
    "1x1": Shape(128, 512, 1, 28),
    "depthwise": Shape(192, 192, 3, 28, groups=192),
}
OURS = "ours"
LAYERS = ("conv_relu", "conv_bn_relu", OURS, *(f"{OURS}, {name}" for name in backends.ALGORITHMS["cpu"]))

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
layouts = pytest.mark.parametrize("layout", LAYOUTS)
maps = pytest.mark.parametrize("size", MAPS, ids=lambda size: "x".join(map(str, size)))
convolutions = pytest.mark.parametrize("convolution", CONVOLUTIONS)
modes = pytest.mark.parametrize("mode", ["forward", "training"])
layers = pytest.mark.parametrize("layer", LAYERS)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def compiled_kernels():
    with backends.use("cpu"):
        yield


def random_maps(*size: int, dtype: torch.dtype, layout: str) -> torch.Tensor:
    return torch.randn(size).to(dtype, memory_format=LAYOUTS[layout])


def random_vectors(channels: int) -> list[torch.Tensor]:
    return [torch.rand(channels) + 0.5 for _ in range(3)]


def time(benchmark, function, *arguments, **settings) -> None:
    """A fixed number of rounds, so that the suite takes as long everywhere and every figure comes from as many."""
    benchmark.pedantic(function, arguments, warmup_rounds=2, **{"rounds": 5 * ROUNDS, **settings})


@pytest.mark.benchmark(group="center")
@maps
@dtypes
@layouts
def test_center(benchmark, size, dtype, layout):
    x = random_maps(*size, dtype=dtype, layout=layout)
    gain, mean_scale, bias = random_vectors(size[1])
    with torch.no_grad():
        time(benchmark, lambda: dc.functional.deep_control(x, gain, mean_scale, bias, activation="relu"))


@pytest.mark.benchmark(group="center_backward")
@maps
@dtypes
@layouts
def test_center_backward(benchmark, size, dtype, layout):
    x = random_maps(*size, dtype=dtype, layout=layout)
    leaves = [tensor.requires_grad_() for tensor in (x, *random_vectors(size[1]))]
    output = dc.functional.deep_control(*leaves, activation="relu")
    grad_output = random_maps(*size, dtype=dtype, layout=layout)
    time(benchmark, lambda: torch.autograd.grad(output, leaves, grad_output, retain_graph=True))


@pytest.mark.benchmark(group="window_mean")
@pytest.mark.parametrize("kernel_size", [1, 3])
@maps
@dtypes
@layouts
def test_window_mean(benchmark, size, dtype, layout, kernel_size):
    x = random_maps(*size, dtype=dtype, layout=layout)
    geometry = [kernel_size] * 2, [1, 1], [kernel_size // 2] * 2, [1, 1]
    time(benchmark, torch.ops.deepcontrol.window_mean, x, *geometry)


@pytest.mark.benchmark(group="project_kernel_gradients_")
@pytest.mark.parametrize("width", [64, 512])
def test_project_kernel_gradients(benchmark, width):
    parameters = [torch.nn.Parameter(torch.empty(width, width, 3, 3)) for _ in range(4)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    time(benchmark, dc.project_kernel_gradients_, parameters, 0.9)


@layers
@layouts
@dtypes
@convolutions
@modes
def test_layer(benchmark, mode, convolution, dtype, layout, layer):
    shape = CONVOLUTIONS[convolution]
    peer, _, algorithm = layer.partition(", ")
    benchmark.group = f"layer, {mode}, {convolution}, {str(dtype).removeprefix('torch.')}, {layout}"
    x = random_maps(BATCH, shape.in_channels, shape.size, shape.size, dtype=dtype, layout=layout)
    training = mode == "training"
    grad_output = torch.randn(BATCH, shape.out_channels, shape.out_size, shape.out_size).to(x) if training else None
    step = Step(peers.build(peer, shape, dtype, LAYOUTS[layout]), x, grad_output)
    with backends.prefer(algorithm, "cpu") if algorithm else nullcontext():
        if algorithm:
            try:
                step()
            except RuntimeError as reason:
                pytest.skip(str(reason))
        time(benchmark, step, rounds=ROUNDS, setup=step.clear_gradients)
