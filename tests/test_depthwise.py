"""The direct pass of depthwise convolutions on the CPU: values, gradients, what it takes, repeats."""

from __future__ import annotations

import pytest
import torch
from conv_cases import Case, check_convolution
from test_ops import layouts, name_of

import deepcontrol_cuda as dc
from deepcontrol_cuda import _ops, backends

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
CASES = (
    Case("3x3", 20, 20, (7, 6), 3, padding=1, groups=20),
    Case("3x3-strided", 37, 37, (9, 8), 3, stride=2, padding=1, groups=37, activation="relu6"),
    Case("3x3-wide", 16, 16, (5, 23), 3, padding=1, groups=16, activation="identity"),
    Case("3x3-unpadded", 18, 18, (6, 7), 3, groups=18, activation="leaky_relu"),
    Case("5x5", 16, 16, (8, 7), 5, padding=2, groups=16, activation="hardswish"),
    Case("5x5-strided", 33, 33, (9, 11), 5, stride=2, padding=2, groups=33, activation="silu"),
    Case("7x7", 24, 24, (9, 8), 7, padding=3, groups=24, activation="gelu"),
    Case("4x4-even-map", 8, 8, (8, 6), 4, stride=2, padding=1, groups=8),
    Case("1x7", 16, 16, (3, 9), (1, 7), padding=3, groups=16, activation="relu6"),
    Case("kernel-larger-than-the-map", 17, 17, (2, 3), 7, padding=3, groups=17),
    Case("one-pixel", 19, 19, (1, 1), 5, padding=2, groups=19, activation="leaky_relu"),
    Case("one-output-pixel", 16, 16, (3, 3), 3, groups=16),
    Case("stride-larger-than-kernel", 16, 16, (11, 9), 3, stride=5, padding=1, groups=16, activation="gelu"),
    Case("padding-larger-than-kernel", 16, 16, (3, 4), 3, padding=4, groups=16, activation="relu6"),
    Case("one-tap", 16, 16, (5, 4), 1, stride=2, groups=16),
)  # fmt: skip


def obstacle(x, weight, stride=1, padding=1, dilation=1) -> str | None:
    """Why the direct pass does not take the layer, in both passes."""
    each = ([value] * (x.dim() - 2) for value in (stride, padding, dilation))
    with backends.prefer("two passes", "cpu"):
        plan = _ops.extension.plan_conv_cpu(backends._case_cpu(x, weight, (*each, x.shape[1])))
    forward, backward = (plan[name]["obstacles"]["direct"] for name in ("forward", "backward"))
    assert forward == backward
    return forward


@pytest.fixture(autouse=True)
def direct():
    """Every layer of these tests by the direct pass, though another be faster."""
    if reason := obstacle(torch.ones(1, 16, 3, 3), torch.ones(16, 1, 3, 3)):
        pytest.skip(reason)
    with backends.prefer("direct", "cpu"):
        yield


def layer(x, weight, gain=None, mean_scale=None, bias=None, padding=1, **arguments):
    return dc.functional.deep_control_conv2d(
        x, weight, gain, mean_scale, bias, padding=padding, groups=x.shape[1], backend="cpu", **arguments
    )


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_output_and_gradients(case, dtype, channels_last, poisoned_memory):
    check_convolution(case, "cpu", dtype, backends.prefer("direct", "cpu"), channels_last)


@layouts
def test_float16(channels_last, poisoned_memory):
    check_convolution(CASES[1], "cpu", torch.float16, backends.prefer("direct", "cpu"), channels_last)


@layouts
def test_a_mean_that_stays_in(channels_last):
    check_convolution(CASES[1], "cpu", torch.float32, backends.prefer("direct", "cpu"), channels_last, mean_scale=0.0)


@pytest.mark.parametrize(
    ("x", "weight", "geometry", "reason"),
    [
        ((2, 8, 5, 5), (16, 1, 3, 3), {}, "not one filter a channel"),
        ((2, 8, 5, 5), (8, 1, 3, 3), {"dilation": 2}, "dilated"),
        ((2, 8, 9, 9), (8, 1, 9, 9), {}, "too large"),
        ((2, 8, 5), (8, 1, 3), {}, "two dimensions"),
        ((0, 8, 5, 5), (8, 1, 3, 3), {}, "nothing to compute"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_it_does_not_take(x, weight, geometry, reason):
    assert reason in obstacle(torch.ones(x), torch.ones(weight), **geometry)


def test_double_precision_is_not_taken():
    x, weight = torch.ones(1, 8, 5, 5).double(), torch.ones(8, 1, 3, 3).double()
    assert "float32" in obstacle(x, weight)
    with pytest.raises(RuntimeError, match="algorithm 'direct': it computes in float32"):
        layer(x, weight)


def results(x, weight, grad, stride=1):
    """Output, gradients of input and weight, and of the vectors."""
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    vectors = [torch.linspace(0.5, 1.5, x.shape[1]).requires_grad_() for _ in range(3)]
    y = layer(*leaves, *vectors, stride=stride, activation="relu", projection=0.9)
    return [y.detach(), *torch.autograd.grad(y, [*leaves, *vectors], grad)]


def tensors(dtype, channels_last, batch=5):
    """Of a layer whose work is shared out to threads."""
    x, grad = torch.randn(batch, 40, 29, 29), torch.randn(batch, 40, 15, 15)
    format = torch.channels_last if channels_last else torch.contiguous_format
    x, grad = (t.to(dtype).contiguous(memory_format=format) for t in (x, grad))
    return x, torch.randn(40, 1, 3, 3).to(dtype), grad


@dtypes
@layouts
def test_bit_equal_from_run_to_run_and_by_any_number_of_threads(dtype, channels_last):
    x, weight, grad = tensors(dtype, channels_last)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 3, 3):
            torch.set_num_threads(count)
            runs.append(results(x, weight, grad, stride=2))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], run))


@layouts
def test_a_sample_does_not_depend_on_its_batch(channels_last):
    x, weight, grad = tensors(torch.float32, channels_last)
    whole = results(x, weight, grad, stride=2)
    alone = results(x[3:4], weight, grad[3:4], stride=2)
    assert torch.equal(whole[0][3:4], alone[0])
    assert torch.equal(whole[1][3:4], alone[1])


@layouts
def test_nan_and_infinity_stay_in_their_maps(channels_last):
    x, weight, _ = tensors(torch.float32, channels_last, batch=2)
    x[0, 3, 5, 5], x[1, 17, 0, 0] = float("nan"), float("inf")
    y = layer(x, weight, activation="relu")
    hit = torch.zeros(2, 40, dtype=torch.bool)
    hit[0, 3] = hit[1, 17] = True
    assert torch.equal(y.isnan().flatten(2).any(2), hit)
    wanted = dc.functional.deep_control_conv2d(x, weight, padding=1, groups=40, activation="relu", backend="reference")
    assert torch.equal(y.isnan(), wanted.isnan())


@layouts
def test_a_float32_weight_is_rounded_and_its_gradient_is_not(channels_last):
    x, weight, grad = tensors(torch.bfloat16, channels_last)
    weight = torch.randn(weight.shape)
    narrow = results(x, weight.bfloat16(), grad, stride=2)
    with torch.autocast("cpu", torch.bfloat16):
        wide = results(x, weight, grad, stride=2)
    assert torch.equal(wide[0], narrow[0])
    assert torch.equal(wide[1], narrow[1])
    assert wide[2].dtype == torch.float32
    assert torch.equal(wide[2].bfloat16(), narrow[2])


def test_gains_of_zero():
    """Their gradient is not read off a gradient that was multiplied by them."""
    x, weight, grad = tensors(torch.float32, True)
    grads = []
    for name in ("reference", "cpu"):
        gain = torch.linspace(-1, 1, 40).round().requires_grad_()
        y = dc.functional.deep_control_conv2d(x, weight, gain, stride=2, padding=1, groups=40, backend=name)
        grads.append(torch.autograd.grad(y, gain, grad)[0])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("wanted", ["input", "weight", "gain", "bias", "residual"])
def test_gradients_that_are_asked_for_alone(wanted):
    leaves = {
        "input": torch.randn(2, 20, 6, 5), "weight": torch.randn(20, 1, 3, 3), "gain": torch.rand(20) + 0.5,
        "bias": torch.randn(20), "residual": torch.randn(2, 20, 6, 5),
    }  # fmt: skip
    leaves[wanted].requires_grad_()
    grads = []
    for name in ("reference", "cpu"):
        y = dc.functional.deep_control_conv2d(
            leaves["input"], leaves["weight"], leaves["gain"], None, leaves["bias"], padding=1, groups=20,
            residual=leaves["residual"], activation="relu", projection=0.9, backend=name,
        )  # fmt: skip
        grads += torch.autograd.grad(y.square().sum(), leaves[wanted])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-3)
