"""Every backend agrees with the reference: values, gradients, layouts, edge cases, memory."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import (
    HARNESS_GPUS,
    assert_within_budget,
    harness,
    library,
    memory_format,
    on_every_backend,
    on_every_gpu,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

import deepcontrol_cuda as dc
from deepcontrol_cuda import _ops, activations, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
name_of = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.float64: "f64"}.get
layouts = pytest.mark.parametrize("channels_last", [False, True], ids=("contiguous", "channels_last"))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=name_of)


def run(function, tensors, dtype, channels_last, grad_output, **arguments):
    """Output and gradients of ``function(*tensors)`` in ``dtype``; vectors of 16-bit runs stay float32."""
    leaves = []
    for tensor in tensors:
        if tensor is not None:
            wide = torch.float32 if tensor.dim() == 1 and dtype.itemsize == 2 else dtype
            tensor = tensor.to(wide)
            tensor = tensor.contiguous(memory_format=memory_format(tensor, channels_last)).detach().requires_grad_()
        leaves.append(tensor)
    output = function(*leaves, **arguments)
    output.backward(grad_output.to(dtype))
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


def compare(function, tensors, dtype, channels_last, grad_output, precision=None, **arguments):
    """``precision``: of the products, where that is less than the dtype's; as a dtype of as many bits."""
    backend = arguments.pop("backend")
    precision = precision or dtype
    pre = pre_activation(function, tensors, **arguments)
    grad_output = away_from_kinks(pre, grad_output)
    oracle = run(function, tensors, torch.float64, channels_last, grad_output, backend="reference", **arguments)
    low = run(function, tensors, precision, channels_last, grad_output, backend="reference", **arguments)
    got = run(function, tensors, dtype, channels_last, grad_output, backend=backend, **arguments)
    names = [n for n, t in zip(("input", "weight", "gain", "mean_scale", "bias", "residual"), tensors) if t is not None]
    for i, what in enumerate(("output", *(f"gradient of {n}" for n in names))):
        # The gradient of a vector is a sum of terms up to the largest pre-activation; roundings add up as the root.
        terms = got[0].numel() / oracle[i].numel() if oracle[i].dim() == 1 else 0
        magnitude = terms**0.5 * max(1.0, pre.abs().max().item())
        assert_within_budget(got[i], oracle[i], low[i].to(got[i].dtype), precision, magnitude, what)
    assert got[0].is_contiguous(memory_format=memory_format(got[0], channels_last))


def pre_activation(function, tensors, **arguments):
    doubles = [None if t is None else t.double() for t in tensors]
    return function(*doubles, **{**arguments, "activation": "identity"}, backend="reference")


def away_from_kinks(pre, grad_output):
    """Zero where the pre-activation is so near to a jump of a derivative that rounding decides the side."""
    near = sum((pre - kink).abs() < 0.05 for kink in (0, 6, -3, 3)).bool()
    return grad_output.masked_fill(near, 0.0)


def small_integers(*shape, bound=3):
    """Values that every dtype holds exactly, and so do the sums of products of a convolution: masks do not flip."""
    return torch.randint(-bound, bound + 1, shape).double()


def center(input, _, gain, mean_scale, bias, residual, **arguments):
    return dc.functional.deep_control(input, gain, mean_scale, bias, residual=residual, **arguments)


@on_every_gpu
@dtypes
@layouts
@pytest.mark.parametrize("activation", activations.ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True], ids=("plain", "residual"))
def test_center(backend, dtype, channels_last, activation, with_residual, poisoned_memory):
    for shape in ((2, 19, 9, 7), (3, 40, 5, 3), (2, 33, 1, 1), (1, 3, 17, 33)):
        channels = shape[1]
        tensors = [
            small_integers(*shape),
            None,
            torch.rand(channels) + 0.5,
            torch.rand(channels),
            torch.randn(channels),
        ]
        tensors.append(small_integers(*shape) if with_residual else None)
        seed = torch.randn(shape).to(dtype).double()
        compare(center, tensors, dtype, channels_last, seed, activation=activation, backend=backend)


LARGE_MAPS = ((2, 3, 81, 83), (1, 66, 33, 31))


@on_every_gpu
@dtypes
@layouts
@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
def test_center_of_large_maps(backend, dtype, channels_last, activation, poisoned_memory):
    """Such as one block has no room for on the small GPUs."""
    for shape in LARGE_MAPS:
        vectors = [torch.rand(shape[1]) + 0.5, torch.rand(shape[1]), torch.randn(shape[1])]
        tensors = [small_integers(*shape), None, *vectors, small_integers(*shape)]
        seed = torch.randn(shape).to(dtype).double()
        compare(center, tensors, dtype, channels_last, seed, activation=activation, backend=backend)


@layouts
@pytest.mark.parametrize(("name", "clusters"), [("host_cuda-90-small", True), ("host_cuda-80-small", False)])
def test_small_gpus_share_large_maps(name, clusters, channels_last):
    """In clusters from compute capability 9.0 on, before that in launches for sums and apply."""
    emulator, ops = harness(), torch.ops.deepcontrol_host_cuda
    emulator.configure(**HARNESS_GPUS[name])
    seen = set()
    for shape in LARGE_MAPS:
        x = torch.randn(shape, dtype=torch.float64)
        x = x.contiguous(memory_format=memory_format(x, channels_last))
        emulator.take_counts()
        ops.center(x, None, None, 1.0, None, None, "identity", 0.0, True)
        counts = {name: count for name, count in emulator.take_counts().items() if name.startswith("forward")}
        (count,) = counts.values()
        seen.add((count.launches, count.cluster_launches))
    emulator.configure()
    assert ((1, 1) if clusters else (2, 0)) in seen
    assert clusters or all(cluster_launches == 0 for _, cluster_launches in seen)


@on_every_gpu
@dtypes
@layouts
@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu", "silu"])
@pytest.mark.parametrize("mean_scale", [None, 0.0], ids=("centred", "mean left in"))
def test_center_with_mean(backend, dtype, channels_last, activation, mean_scale, poisoned_memory):
    """center, and the mean over each map of what it stores."""
    ops = library(backend)
    constant = 1.0 if mean_scale is None else mean_scale
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    for shape in ((2, 19, 9, 7), (3, 40, 31), (1, 32, 2, 3, 4), (2, 33, 1, 1), (0, 4, 3, 3)):
        x, residual = (
            tensor.contiguous(memory_format=memory_format(tensor, channels_last)).to(dtype)
            for tensor in (torch.randn(shape), torch.randn(shape))
        )
        gain, bias = (torch.rand(shape[1], dtype=wide) + 0.5 for _ in range(2))
        arguments = (x, gain, None, constant, bias, residual, activation, 0.1, True)
        *results, means = ops.center_with_mean(*arguments)
        for got, wanted in zip(results, ops.center(*arguments)):
            assert torch.equal(got, wanted)
        exact = results[0].double().mean(tuple(range(2, len(shape))))
        assert means.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert means.shape == exact.shape
        if means.numel():
            largest = results[0].abs().max().item()
            assert (means - exact).abs().max() <= 8 * torch.finfo(means.dtype).eps * largest


@on_every_backend
@dtypes
@layouts
@pytest.mark.parametrize("rank", [1, 2, 3], ids=("1d", "2d", "3d"))
@pytest.mark.parametrize("activation", ["identity", "relu", "silu"])
def test_conv_center(backend, dtype, channels_last, rank, activation, poisoned_memory):
    function = (
        dc.functional.deep_control_conv1d,
        dc.functional.deep_control_conv2d,
        dc.functional.deep_control_conv3d,
    )[rank - 1]
    cases = (
        (6, 9, 3, 1, 1, 1, 1),
        (4, 8, 3, 2, 0, 1, 2),
        (5, 5, 3, 1, 2, 2, 5),
        (7, 40, 1, 1, 0, 1, 1),
        (3, 4, 4, 1, "same", 1, 1),
    )
    for channels, filters, kernel, stride, padding, dilation, groups in cases:
        x = small_integers(2, channels, *(7, 6, 9)[:rank])
        w = small_integers(filters, channels // groups, *(kernel,) * rank, bound=1)
        shape = function(x, w, None, None, None, stride, padding, dilation, groups, backend="reference").shape
        # A gain of zero and a tiny one take the other way through backward.
        gain = torch.rand(filters) + 0.5
        gain[0], gain[1], gain[2] = 0, 1e-5, -0.7
        tensors = [x, w, gain, torch.rand(1), torch.randn(filters), small_integers(*shape)]
        seed = torch.randn(shape).to(dtype).double()

        def positional(
            x, w, gain, mean_scale, bias, residual, *, geometry=(stride, padding, dilation, groups), **arguments
        ):
            return function(x, w, gain, mean_scale, bias, *geometry, residual=residual, **arguments)

        compare(positional, tensors, dtype, channels_last, seed, activation=activation, projection=0.9, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("activation", activations.ACTIVATIONS)
@pytest.mark.parametrize("mean_scale", [None, 0.0], ids=("centred", "mean left in"))
@layouts
def test_convolution_by_one_tap(backend, dtype, activation, mean_scale, channels_last, poisoned_memory):
    """Kernels of their own on the CPU: tails of every panel, tile and slot, several tiles of a slot, parts of maps."""
    cases = ((8, 8, 3, 3), (64, 64, 5, 7), (66, 130, 15, 14), (2, 200, 4, 1), (130, 36, 4, 5), (34, 70, 1, 1))
    if not channels_last:
        cases = ((8, 8, 3, 3), (66, 130, 15, 14), (34, 70, 17, 19), (130, 36, 17, 19))
    for channels, filters, height, width in cases:
        if height * width == 1 and mean_scale is None:
            continue  # the output is the bias there: test_one_pixel_gives_the_bias
        x, w = small_integers(2, channels, height, width), small_integers(filters, channels, 1, 1, bound=1)
        gain = torch.rand(filters) + 0.5
        gain[0], gain[1], gain[2] = 0, 1e-5, -0.7
        residual = small_integers(2, filters, height, width) if activation in ("relu", "gelu") else None
        tensors = [x, w, gain, None, torch.randn(filters), residual]
        seed = torch.randn(2, filters, height, width).to(dtype).double()

        def function(x, w, gain, _, bias, residual, **arguments):
            return dc.functional.deep_control_conv2d(x, w, gain, mean_scale, bias, residual=residual, **arguments)

        compare(function, tensors, dtype, channels_last, seed, activation=activation, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("mean_scale", [None, 0.0], ids=("centred", "mean left in"))
@layouts
def test_strided_convolution_by_one_tap(backend, dtype, mean_scale, channels_last, poisoned_memory):
    """The pixels between those that the stride meets get no gradient."""
    for channels, filters, height, width, stride in (
        (34, 70, 15, 15, 2),
        (66, 18, 20, 45, (1, 3)),
        (8, 8, 2, 9, (5, 2)),
    ):
        x, w = small_integers(2, channels, height, width), small_integers(filters, channels, 1, 1, bound=1)
        tensors = [x, w, torch.rand(filters) + 0.5, None, torch.randn(filters)]
        seed = torch.randn_like(torch.nn.functional.conv2d(x, w, stride=stride)).to(dtype).double()

        def function(x, w, gain, _, bias, **arguments):
            return dc.functional.deep_control_conv2d(x, w, gain, mean_scale, bias, **arguments)

        compare(function, tensors, dtype, channels_last, seed, stride=stride, activation="relu", backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation"), [(3, 2, 1, 1), ((4, 2), (1, 2), (2, 0), (1, 2))])
def test_weight_gradient_of_many_weights_over_few_pixels(backend, dtype, kernel, stride, padding, dilation):
    """On the CPU a product over the unfolded input, from 2^21 weights on."""
    rows, columns = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    channels, filters = 256, 2**21 // (256 * rows * columns) + 2
    x, w = torch.randn(8, channels, 14, 14), torch.randn(filters, channels, rows, columns) / 64
    options = (stride, padding, dilation)
    seed = torch.randn_like(torch.nn.functional.conv2d(x, w, None, *options)).to(dtype).double()

    def function(x, w, gain, **arguments):
        return dc.functional.deep_control_conv2d(x, w, gain, None, None, *options, **arguments)

    tensors = [x.to(dtype).double(), w.to(dtype).double(), torch.rand(filters) + 0.5]
    compare(function, tensors, dtype, True, seed, activation="identity", backend=backend)


@on_every_backend
def test_one_pixel_gives_the_bias(backend):
    """Up to the rounding of what cancels: the map mean and the pixel are computed apart, from the same products."""
    x = small_integers(3, 34, 1, 1).float()
    w, bias = small_integers(70, 34, 1, 1).float(), torch.randn(70)
    got = dc.functional.deep_control_conv2d(x, w, None, None, bias, backend=backend)
    cancelled = torch.nn.functional.conv2d(x, w).abs().max().item()
    assert (got - bias.view(1, 70, 1, 1)).abs().max() <= 2 * torch.finfo(torch.float32).eps * cancelled


@layouts
@pytest.mark.parametrize(("kernel", "fused"), [(1, True), (3, False)])
def test_one_tap_needs_no_library_convolution(kernel, fused, channels_last):
    if dc._ops.extension.info()["isa"] == "portable":
        pytest.skip("the portable kernels have no matrix product")
    x = torch.randn(2, 16, 24, 24)
    x = x.to(memory_format=memory_format(x, channels_last)).requires_grad_()
    w = torch.randn(32, 16, kernel, kernel, requires_grad=True)
    # Which algorithm such a small layer gets by itself is the table's to say.
    with dc.backends.prefer("product" if fused else "two passes", "cpu"), torch.profiler.profile() as profile:
        dc.functional.deep_control_conv2d(x, w, activation="relu").sum().backward()
    names = {event.name for event in profile.events()}
    assert names.isdisjoint({"aten::convolution", "aten::convolution_backward"}) == fused


@on_every_gpu
@dtypes
@layouts
@pytest.mark.parametrize("rank", [1, 2, 3], ids=("1d", "2d", "3d"))
def test_window_mean(backend, dtype, channels_last, rank, poisoned_memory):
    x = torch.randn(2, 35, *(9, 7, 6)[:rank])
    x = x.contiguous(memory_format=memory_format(x, channels_last)).to(dtype)
    for kernel, stride, padding, dilation in (
        (1, 1, 0, 1),
        (3, 1, 1, 1),
        (3, 2, 1, 1),
        (2, 3, 0, 2),
        (5, 1, 4, 1) if rank < 3 else (3, 1, 2, 1),  # 125 taps would take minutes where programs are interpreted
        (1, 2, 0, 1),
    ):
        steps = [(v,) * rank for v in (kernel, stride, padding, dilation)]
        oracle = reference.window_mean(x.double(), *steps)
        got = library(backend).window_mean(x, *steps)
        assert_within_budget(got, oracle, reference.window_mean(x, *steps), dtype)


@on_every_backend
@dtypes
@layouts
@pytest.mark.parametrize("kernel", [(3, 3), (1, 7), (5,), (3, 3, 3), (1, 1)], ids=str)
def test_project_kernel_gradients(backend, dtype, channels_last, kernel):
    parameters = [torch.nn.Parameter(torch.empty(o, c, *kernel).to(dtype)) for o, c in ((7, 5), (1, 1), (33, 40))]
    for p in parameters:
        grad = torch.randn(p.shape)
        p.grad = grad.contiguous(memory_format=memory_format(grad, channels_last)).to(dtype)
    untouched = torch.nn.Linear(3, 3)
    untouched.weight.grad = torch.ones(3, 3)
    before = [p.grad.clone() for p in parameters]
    with dc.backends.use(backend):
        dc.project_kernel_gradients_([*parameters, *untouched.parameters()], weight=0.9)
    for p, grad in zip(parameters, before):
        oracle = reference.project(grad.double(), 0.9)
        assert_within_budget(p.grad, oracle, reference.project(grad, 0.9), dtype)
    assert untouched.weight.grad.eq(1).all()


@on_every_backend
def test_project_kernel_gradients_of_a_view(backend):
    """A gradient that is not dense is projected too, in place."""
    base = torch.randn(6, 4, 3, 6)
    p = torch.nn.Parameter(torch.empty(6, 4, 3, 3))
    p.grad = base[..., ::2]
    wanted = reference.project(p.grad, 1.0)
    with dc.backends.use(backend):
        dc.project_kernel_gradients_(p, weight=1.0)
    torch.testing.assert_close(base[..., ::2], wanted)


@on_every_gpu
@layouts
@pytest.mark.parametrize("shape", [(0, 4, 5, 5), (1, 1, 1, 1), (5, 3, 1, 1), (2, 1, 4, 4)], ids=str)
def test_edge_shapes(backend, channels_last, shape, poisoned_memory):
    x = torch.randn(shape)
    x = x.contiguous(memory_format=memory_format(x, channels_last)).requires_grad_()
    w = torch.randn(6, shape[1], 1, 1, requires_grad=True)
    y = dc.functional.deep_control_conv2d(x, w, torch.ones(6), None, torch.zeros(6), activation="relu", backend=backend)
    y.sum().backward()
    assert y.shape == (shape[0], 6, *shape[2:])
    wanted = dc.functional.deep_control_conv2d(x, w, activation="relu", backend="reference")
    torch.testing.assert_close(y, wanted)
    assert x.grad.shape == x.shape
    assert torch.isfinite(w.grad).all()


@on_every_backend
@layouts
@pytest.mark.parametrize("how", ["expanded", "sliced", "transposed"])
def test_strange_strides(backend, channels_last, how, poisoned_memory):
    """Inputs, residuals and gradients that are not dense: stride 0, gaps, transposed maps."""

    def strange(shape):
        n, c, h, w = shape
        if how == "expanded":
            return torch.randn(1, c, 1, 1).expand(shape)
        if how == "sliced":
            return torch.randn(n, c, h, 2 * w)[..., ::2]
        return torch.randn(n, c, w, h).transpose(2, 3)

    x, residual, seed = strange((2, 6, 5, 4)), strange((2, 8, 5, 4)), strange((2, 8, 5, 4))
    w = torch.randn(8, 6, 3, 3)
    if channels_last:
        w = w.contiguous(memory_format=torch.channels_last)
    results = []
    for name in ("reference", backend):
        leaves = [t.detach().requires_grad_() for t in (x, w, residual)]
        y = dc.functional.deep_control_conv2d(
            leaves[0], leaves[1], torch.ones(8), None, None, 1, 1, residual=leaves[2], activation="relu", backend=name
        )
        y.backward(seed)
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for wanted, got in zip(*results):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@on_every_gpu
@layouts
@pytest.mark.parametrize("activation", activations.ACTIVATIONS)
def test_nan_and_infinity_propagate(backend, channels_last, activation):
    """As in PyTorch on the CPU; on a GPU its derivatives of relu6 and hardswish are others at NaN."""
    x = torch.randn(5, 20, 3, 3)
    x[0, 0, 1, 1], x[3, :, 0, 0] = float("nan"), float("nan")
    if activation != "gelu":  # PyTorch's own gelu(inf) is inf for one element and NaN for eight
        x[1, 1, 0, 0], x[2, 2, 2, 2], x[4, 3] = float("inf"), float("-inf"), float("inf")
    x = x.contiguous(memory_format=memory_format(x, channels_last))
    for mean_scale in (None, 0.0):
        outputs, grads = [], []
        for name in ("reference", backend):
            leaf = x.clone(memory_format=torch.preserve_format)
            leaf = (leaf.cpu() if name == "reference" else leaf).requires_grad_()
            y = dc.functional.deep_control(leaf, None, mean_scale, activation=activation, backend=name)
            y.backward(torch.ones_like(y))
            outputs.append(y.detach().cpu())
            grads.append(leaf.grad.cpu())
        torch.testing.assert_close(outputs[1], outputs[0], equal_nan=True, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grads[1], grads[0], equal_nan=True, rtol=1e-5, atol=1e-6)


@on_every_backend
def test_raw_ops_on_nothing(backend):
    """What the functions in front refuse, the ops still answer: with NaN for a mean of nothing and zero for a sum."""
    ops = library(backend)
    x = torch.empty(2, 3, 0, 5)
    output, map_mean, _ = ops.center(x, None, None, 1.0, None, None, "identity", 0.0, True)
    assert output.shape == x.shape
    assert map_mean.isnan().all()
    means = ops.window_mean(x, [1, 3], [1, 1], [1, 1], [1, 1])
    assert torch.equal(means, torch.zeros(2, 3, 1, 3))
    gradient = torch.empty(2, 3, 0)
    assert torch.equal(ops.finish_weight_grad_(gradient, gradient.clone(), None, None, 0.9), torch.zeros(2))


@on_every_backend
@pytest.mark.parametrize("shape", [(2, 0, 1, 1), (2, 0, 3, 3)], ids=str)
def test_no_channels(backend, shape):
    x = torch.empty(shape, requires_grad=True)
    y = dc.functional.deep_control(x, activation="relu", backend=backend)
    y.sum().backward()
    assert y.shape == x.grad.shape == shape


@on_every_backend
def test_gradient_of_a_squeezed_sample(backend):
    """A view of one sample brings back a gradient whose batch stride says nothing; as many channels as pixels."""
    x = torch.randn(1, 16, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    grads = []
    for name in ("reference", backend):
        y = dc.functional.deep_control(x, activation="relu", backend=name)
        grads += torch.autograd.grad(y.squeeze(0).square().sum(), x)
    torch.testing.assert_close(grads[1], grads[0])


@on_every_backend
def test_small_gains_in_float16(backend):
    """Small gradients times small gains leave float16's normal numbers, and dgain must not be read off what is left."""
    x, w = torch.randn(4, 8, 9, 9).half(), torch.randn(8, 8, 3, 3).half()
    seed = (torch.randn(4, 8, 7, 7) * 1e-4).half()
    grads = []
    for dtype, name in ((torch.float64, "reference"), (torch.float16, "reference"), (torch.float16, backend)):
        gain = torch.full((8,), 0.02, dtype=dtype, requires_grad=True)
        y = dc.functional.deep_control_conv2d(x.to(dtype), w.to(dtype), gain, backend=name)
        grads += torch.autograd.grad(y, gain, seed.to(dtype))
    assert_within_budget(grads[2], grads[0], grads[1], torch.float16)


def tangent(call, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(call(forward_ad.make_dual(x, x.cos()))).tangent


DERIVATIVES = {
    "grad": lambda call, x: torch.func.grad(lambda x: call(x).square().sum())(x),
    "vjp": lambda call, x: torch.func.vjp(lambda x: call(x).sin(), x)[1](call(x))[0],
    "jvp": lambda call, x: torch.func.jvp(call, (x,), (x.cos(),))[1],
    "jacfwd": lambda call, x: torch.func.jacfwd(call)(x),
    "per sample": lambda call, x: torch.func.vmap(torch.func.grad(lambda x: call(x[None]).square().sum()))(x),
    "forward mode": tangent,
}


@on_every_backend
@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES)
def test_derivatives_that_ops_do_not_have_name_what_does(backend, derivative):
    """Rather than a derivative of zero, or an error of torch that names nothing."""
    x, weight = torch.randn(2, 2, 3, 3), torch.randn(2, 2, 2, 2)

    def center(x, backend=backend):
        return dc.functional.deep_control(x, backend=backend)

    def conv(x, backend=backend, projection=0.9):
        return dc.functional.deep_control_conv2d(x, weight, projection=projection, backend=backend)

    takes = rf"^backend '{backend}': .*transforms but vmap; backend='reference' takes them"
    with pytest.raises(RuntimeError, match=f"{takes}$"):
        derivative(center, x)
    with pytest.raises(RuntimeError, match=f"{takes}, with projection=0.0$"):
        derivative(conv, x)
    assert derivative(partial(center, backend="reference"), x).any()
    assert derivative(partial(conv, backend="reference", projection=0.0), x).any()


def test_the_reference_refuses_a_projection_in_transforms():
    def conv(weight):
        return dc.functional.deep_control_conv2d(torch.ones(1, 1, 3, 3), weight, projection=0.9, backend="reference")

    with pytest.raises(RuntimeError, match=r"projection: got 0\.9, wanted 0\.0 in torch\.func's transforms"):
        torch.func.vmap(conv)(torch.ones(2, 1, 1, 2, 2))


@on_every_backend
def test_in_place_ops_tell_autograd(backend):
    p = torch.nn.Parameter(torch.randn(2, 2, 3, 3))
    p.grad = torch.randn(2, 2, 3, 3)
    before = p.grad._version
    with dc.backends.use(backend):
        dc.project_kernel_gradients_(p)
    assert p.grad._version > before


@on_every_backend
@layouts
def test_sums_do_not_drift(backend, channels_last):
    """A map of 2^18 pixels far from zero: the error of its mean stays at rounding, not at the number of pixels."""
    x = 1000 + torch.rand(1, 2, 512, 512)
    x = x.contiguous(memory_format=memory_format(x, channels_last))
    got = dc.functional.deep_control(x, backend=backend)
    oracle = reference.deep_control(x.double())
    assert (got - oracle).abs().max() < 4 * 1000 * torch.finfo(torch.float32).eps


@on_every_gpu
@layouts
def test_what_is_constant_cancels_exactly(backend, channels_last):
    """No rounding error lets a gradient through that the reference stops, whatever the gain."""
    x = torch.full((2, 40, 4, 4), 3.25)
    x = x.contiguous(memory_format=memory_format(x, channels_last)).requires_grad_()
    gain = torch.linspace(0.3, 1.7, 40)
    y = dc.functional.deep_control(x, gain, activation="relu", backend=backend)
    y.backward(torch.full_like(y, 0.7))
    assert (y == 0).all()
    assert (x.grad == 0).all()
    x.grad = None
    dc.functional.deep_control(x, gain, backend=backend).backward(torch.full_like(y, 0.75))
    assert (x.grad == 0).all()


@layouts
@pytest.mark.parametrize(("channels", "filters"), [(2048, 64), (64, 2048)])
def test_long_sums_of_products_do_not_drift(channels, filters, channels_last):
    """Of positive numbers, so that every rounding shows: one running float32 sum of 2048 is off by 20 epsilons here."""
    torch.manual_seed(0)
    x = torch.rand(1, channels, 8, 8)
    x = x.to(memory_format=memory_format(x, channels_last)).requires_grad_()
    weight = torch.rand(filters, channels, 1, 1)
    y = dc.functional.deep_control_conv2d(x, weight, mean_scale=0.0, backend="cpu")
    y.backward(grad := torch.rand_like(y))
    exact = torch.nn.functional.conv2d(x.detach().double(), weight.double())
    exact_grad = torch.nn.grad.conv2d_input(x.shape, weight.double(), grad.double())
    for got, oracle in ((y.detach(), exact), (x.grad, exact_grad)):
        assert ((got - oracle).abs() / oracle).max() < 8 * torch.finfo(torch.float32).eps


@on_every_gpu
@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_bit_equal_from_run_to_run(backend, channels_last, dtype):
    x = torch.randn(3, 32, 14, 14).to(dtype)
    x = x.contiguous(memory_format=memory_format(x, channels_last))
    w, seed = torch.randn(64, 32, 3, 3).to(dtype), torch.randn(3, 64, 14, 14).to(dtype)
    vectors = [torch.rand(64) + 0.5 for _ in range(3)]
    runs = []
    for _ in range(3):
        leaves = [t.clone().requires_grad_() for t in (x, w, *vectors)]
        y = dc.functional.deep_control_conv2d(*leaves, 1, 1, activation="relu", projection=0.9, backend=backend)
        y.backward(seed)
        runs.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for repeat in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], repeat))


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_a_product_is_bit_equal_and_does_not_depend_on_the_batch(channels_last, dtype):
    """Tiles of one tap's product hold as many maps as there are, or parts of a map."""
    # Five samples, and 25 x 25 pixels, are no even share for two threads: maps are split further, or with filters.
    for batch, size in ((6, 7), (6, 14), (6, 17), (5, 14), (5, 25)):
        x = torch.randn(batch, 64, size, size).to(dtype)
        x = x.contiguous(memory_format=memory_format(x, channels_last))
        w, seed = torch.randn(66, 64, 1, 1).to(dtype), torch.randn(batch, 66, size, size).to(dtype)
        runs = []
        for samples in (slice(batch), slice(batch), slice(4, 5)):
            leaves = [x[samples].clone().requires_grad_(), w.clone().requires_grad_(), torch.rand(66).fill_(0.7)]
            y = dc.functional.deep_control_conv2d(*leaves, activation="relu", backend="cpu")
            y.backward(seed[samples])
            runs.append((y.detach(), leaves[0].grad, leaves[1].grad))
        first, again, alone = runs
        assert all(torch.equal(a, b) for a, b in zip(first, again))
        assert torch.equal(first[0][4:5], alone[0])


@on_every_gpu
@layouts
def test_a_sample_does_not_depend_on_its_batch(backend, channels_last):
    x = torch.randn(4, 24, 9, 9)
    x = x.contiguous(memory_format=memory_format(x, channels_last))
    whole = dc.functional.deep_control(x, activation="relu", backend=backend)
    alone = dc.functional.deep_control(x[2:3], activation="relu", backend=backend)
    assert torch.equal(whole[2:3], alone)


@on_every_gpu
@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_a_large_sample_does_not_depend_on_its_batch(backend, channels_last, dtype):
    """Bit for bit, forward and backward, also where blocks share a map."""
    ops = library(backend)
    for shape in LARGE_MAPS:
        x, grad = (torch.randn(5, *shape[1:]).to(dtype) for _ in range(2))
        x, grad = (t.contiguous(memory_format=memory_format(t, channels_last)) for t in (x, grad))
        results = []
        for part in (slice(0, 5), slice(3, 4)):
            output, mean, bits = ops.center(x[part], None, None, 1.0, None, None, "relu", 0.0, True)
            mask = [True, False, False, False, False]
            error = ops.center_backward(grad[part], None, None, None, 1.0, mean, bits, "relu", 0.0, mask)[0]
            results.append((output, mean, error))
        for whole, alone in zip(*results):
            assert torch.equal(whole[3:4], alone)


@pytest.mark.parametrize("backend", ["cpu"])
@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=name_of)
def test_center_does_not_depend_on_the_number_of_threads(backend, channels_last, dtype):
    """One shares out samples; two and three share out the pixels of a map whose channels exceed a task's."""
    accumulation = torch.promote_types(dtype, torch.float32)
    x, grad, residual = (
        t.contiguous(memory_format=memory_format(t, channels_last)) for t in torch.randn(3, 1, 530, 45, 35).to(dtype)
    )
    vectors = [torch.rand(530, dtype=accumulation) + 0.5 for _ in range(3)]
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaves = [t.clone().requires_grad_() for t in (x, *vectors, residual)]
            y = dc.functional.deep_control(*leaves[:-1], residual=leaves[-1], activation="relu", backend=backend)
            runs.append([y.detach(), *torch.autograd.grad(y, leaves, grad)])
    finally:
        torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other))


@on_every_gpu
@layouts
def test_bits_unpack_to_the_mask(backend, channels_last):
    x = torch.randn(2, 21, 5, 3)
    x = x.contiguous(memory_format=memory_format(x, channels_last))
    output, _, bits = library(backend).center(x, None, None, 1.0, None, None, "relu", 0.0, True)
    assert bits.dtype == torch.uint8
    assert bits.numel() <= x.numel() / 8 * 24 / 15
    assert torch.equal(_ops.unpack_bits(bits, x.shape, channels_last), output > 0)


dimension = st.integers(1, 9)


@on_every_backend
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(0, 3), groups=st.integers(1, 3), per_group=st.integers(1, 5), filters=st.integers(1, 12),
    maps=st.lists(dimension, min_size=1, max_size=3), kernel=st.integers(1, 4), stride=st.integers(1, 3),
    padding=st.integers(0, 3), dilation=st.integers(1, 2), channels_last=st.booleans(),
    activation=st.sampled_from(activations.ACTIVATIONS), with_residual=st.booleans(),
    dtype=st.sampled_from((torch.float32, torch.float64)),
)  # fmt: skip
def test_random_convolutions(
    backend, batch, groups, per_group, filters, maps, kernel, stride, padding, dilation, channels_last, activation,
    with_residual, dtype,
):  # fmt: skip
    rank = len(maps)
    if any(m + 2 * padding < dilation * (kernel - 1) + 1 for m in maps):
        return
    x = torch.randn(batch, groups * per_group, *maps, dtype=dtype)
    x = x.contiguous(memory_format=memory_format(x, channels_last)).requires_grad_()
    w = torch.randn(groups * filters, per_group, *(kernel,) * rank, dtype=dtype, requires_grad=True)
    vectors = [torch.rand(groups * filters, dtype=dtype, requires_grad=True) for _ in range(3)]
    function = (
        dc.functional.deep_control_conv1d,
        dc.functional.deep_control_conv2d,
        dc.functional.deep_control_conv3d,
    )[rank - 1]
    residual = None
    results = []
    for name in ("reference", backend):
        y = function(
            x, w, *vectors, stride, padding, dilation, groups, residual=residual, activation=activation, backend=name
        )
        if with_residual and residual is None:
            residual = torch.randn_like(y)
            y = function(
                x,
                w,
                *vectors,
                stride,
                padding,
                dilation,
                groups,
                residual=residual,
                activation=activation,
                backend=name,
            )
        if name == "reference":
            seed = torch.randn_like(y)
        results.append([y, *torch.autograd.grad(y, (x, w, *vectors), seed)])
    tolerance = 1e-3 if dtype == torch.float32 else 1e-9
    for wanted, got in zip(*results):
        scale = max(1.0, wanted.abs().max().item() if wanted.numel() else 0.0)
        assert (got - wanted).abs().max().item() <= tolerance * scale if wanted.numel() else got.shape == wanted.shape


@pytest.mark.parametrize("size", [(2, 2), (3, 3), (2, 1)], ids=str)
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu"])
def test_contiguous_maps_strided_to_one_pixel(size, activation):
    """A map of one pixel lies the same in every layout, and what is kept of it for backward must not depend on one."""
    x = torch.randn(512, 8, *size)
    weight, grad = torch.randn(24, 8, 1, 1), torch.randn(512, 24, 1, 1)
    found = []
    for backend in ("cpu", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        y = dc.functional.deep_control_conv2d(
            *leaves, mean_scale=0.0, stride=3, activation=activation, negative_slope=0.25, backend=backend
        )
        found.append([y, *torch.autograd.grad(y, leaves, grad)])
    for got, wanted in zip(*found):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_other_instruction_sets(isa):
    """The op tests once more with the kernels that this machine would not choose."""
    environment = {**os.environ, "DEEPCONTROL_ISA": isa}
    probe = subprocess.run(
        [sys.executable, "-c", "import torch, deepcontrol_cuda as dc; print(dc.backends.explain(torch.ones(1, 1, 1)))"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if "this processor can run" in probe.stderr + probe.stdout:
        pytest.skip(f"this processor cannot run {isa}")
    assert f"{isa} kernels" in probe.stdout
    # Between avx512 and the widest only bfloat16 differs.
    dtype = "bf16 and" if isa == "avx512" else ""
    chosen = f"cpu and {dtype} (center or one_tap or window_mean or nan or sums or bits or project)"
    files = [Path(__file__).with_name(name) for name in ("test_ops.py", "test_winograd.py", "test_depthwise.py")]
    chosen += f" or {dtype} (test_winograd or test_depthwise)"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, "-k", chosen],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:]
