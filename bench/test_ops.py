"""Times of single ops: ``python -m pytest bench --benchmark-only``. No comparison with float64 here, tests/ has it."""

from __future__ import annotations

import pytest
import torch

import deepcontrol_cuda as dc
from deepcontrol_cuda.timing import Shape, Step

from . import peers

DTYPES = (torch.float32, torch.bfloat16)
MAPS = ((8, 64, 56, 56), (8, 512, 7, 7))
CONVOLUTIONS = (Shape(64, 64, 3, 56), Shape(512, 2048, 1, 7))

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
maps = pytest.mark.parametrize("size", MAPS, ids=lambda size: "x".join(map(str, size)))
convolutions = pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
layers = pytest.mark.parametrize("name", peers.ALWAYS)


@pytest.fixture(autouse=True)
def compiled_kernels():
    with dc.backends.use("cpu"):
        yield


def random_maps(*size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(size).to(dtype, memory_format=torch.channels_last)


def random_vectors(channels: int) -> list[torch.Tensor]:
    return [torch.rand(channels) + 0.5 for _ in range(3)]


@pytest.mark.benchmark(group="center")
@maps
@dtypes
def test_center(benchmark, size, dtype):
    x = random_maps(*size, dtype=dtype)
    vectors = random_vectors(size[1])
    benchmark(dc.functional.deep_control, x, *vectors, activation="relu")


@pytest.mark.benchmark(group="center_backward")
@maps
@dtypes
def test_center_backward(benchmark, size, dtype):
    leaves = [tensor.requires_grad_() for tensor in (random_maps(*size, dtype=dtype), *random_vectors(size[1]))]
    output = dc.functional.deep_control(*leaves, activation="relu")
    grad_output = random_maps(*size, dtype=dtype)
    benchmark(torch.autograd.grad, output, leaves, grad_output, retain_graph=True)


@pytest.mark.benchmark(group="layer, forward")
@convolutions
@dtypes
@layers
def test_layer_forward(benchmark, shape, dtype, name):
    benchmark(_step(name, shape, dtype, training=False))


@pytest.mark.benchmark(group="layer, training")
@convolutions
@dtypes
@layers
def test_layer_training(benchmark, shape, dtype, name):
    step = _step(name, shape, dtype, training=True)
    benchmark.pedantic(step, setup=step.clear_gradients, rounds=10, warmup_rounds=1)


@pytest.mark.benchmark(group="project_kernel_gradients_")
@pytest.mark.parametrize("width", [64, 512])
def test_project_kernel_gradients(benchmark, width):
    parameters = [torch.nn.Parameter(torch.empty(width, width, 3, 3)) for _ in range(4)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    benchmark(dc.project_kernel_gradients_, parameters, 0.9)


def _step(name: str, shape: Shape, dtype: torch.dtype, training: bool) -> Step:
    layer = peers.build(name, shape, dtype, torch.channels_last)
    x = random_maps(8, shape.in_channels, shape.size, shape.size, dtype=dtype)
    if not training:
        return Step(layer, x)
    return Step(layer, x, random_maps(8, shape.out_channels, shape.out_size, shape.out_size, dtype=dtype))
