"""The reference is right: against closed forms, finite differences and the identities that the kernels rest on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from deepcontrol_cuda import activations, reference

DOUBLE = torch.float64
MAPS = {1: (7,), 2: (5, 6), 3: (3, 4, 5)}
# Every boundary case: strides that do not divide, padding beyond the kernel's half, dilation, groups.
GEOMETRIES = [
    {"kernel": 3, "stride": 1, "padding": 1, "dilation": 1, "groups": 1},
    {"kernel": 3, "stride": 2, "padding": 0, "dilation": 1, "groups": 2},
    {"kernel": 2, "stride": 3, "padding": 2, "dilation": 1, "groups": 1},
    {"kernel": 2, "stride": 1, "padding": 0, "dilation": 2, "groups": 4},
    {"kernel": 1, "stride": 2, "padding": 0, "dilation": 1, "groups": 1},
]


def operands(rank, kernel, groups, filters=8, channels=4):
    return torch.randn(2, channels, *MAPS[rank], dtype=DOUBLE), torch.randn(
        filters, channels // groups, *(kernel,) * rank, dtype=DOUBLE
    )


@pytest.mark.parametrize("activation", activations.ACTIVATIONS)
def test_formula(activation):
    x, gain, scale, bias, residual = (torch.randn(s, dtype=DOUBLE) for s in ((3, 4, 5, 6), 4, 4, 4, (3, 4, 5, 6)))
    got = reference.deep_control(x, gain, scale, bias, residual=residual, activation=activation, negative_slope=0.2)
    act = {
        "identity": lambda v: v,
        "relu": torch.relu,
        "leaky_relu": lambda v: F.leaky_relu(v, 0.2),
        "relu6": F.relu6,
        "silu": F.silu,
        "gelu": F.gelu,
        "hardswish": F.hardswish,
    }[activation]
    for n in range(3):
        for c in range(4):
            wanted = act(gain[c] * (x[n, c] - scale[c] * x[n, c].mean()) + bias[c] + residual[n, c])
            torch.testing.assert_close(got[n, c], wanted, rtol=1e-12, atol=1e-12)


def test_constant_maps_give_the_bias():
    x = torch.randn(2, 4, 1, 1, dtype=DOUBLE).expand(2, 4, 5, 6)
    bias = torch.randn(4, dtype=DOUBLE)
    got = reference.deep_control(x, torch.randn(4, dtype=DOUBLE), None, bias)
    torch.testing.assert_close(got, bias.view(1, 4, 1, 1).expand_as(got))


def test_mean_scale_one_gives_zero_mean_maps_and_zero_gives_the_plain_convolution():
    x, w = operands(2, 3, 1)
    assert reference.deep_control_conv(x, w).mean((2, 3)).abs().max() < 1e-14
    torch.testing.assert_close(reference.deep_control_conv(x, w, mean_scale=0.0), F.conv2d(x, w))


def test_samples_do_not_see_each_other():
    x, w = operands(2, 3, 1)
    x = x.repeat(3, 1, 1, 1) + torch.randn(6, 1, 1, 1, dtype=DOUBLE)
    whole = reference.deep_control_conv(x, w, activation="relu")
    order = torch.randperm(6)
    torch.testing.assert_close(reference.deep_control_conv(x[order], w, activation="relu"), whole[order])
    torch.testing.assert_close(reference.deep_control_conv(x[4:5], w, activation="relu"), whole[4:5])


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    "geometry", GEOMETRIES, ids=lambda g: "k{kernel}s{stride}p{padding}d{dilation}g{groups}".format(**g)
)
def test_window_means_give_the_map_mean(rank, geometry):
    """The identity of the fused convolution: the mean of a convolution is known from window means of its input."""
    kernel, groups = geometry["kernel"], geometry["groups"]
    x, w = operands(rank, kernel, groups)
    steps = [(geometry[name],) * rank for name in ("stride", "padding", "dilation")]
    conv = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    wanted = conv(x, w, None, *steps, groups).flatten(2).mean(2)
    means = reference.window_mean(x, (kernel,) * rank, *steps)
    got = torch.einsum("ngk,gok->ngo", means.view(2, groups, -1), w.view(groups, w.shape[0] // groups, -1)).flatten(1)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_same_padding(rank):
    x, w = operands(rank, 2, 1)
    assert reference.deep_control_conv(x, w, padding="same").shape == (2, 8, *MAPS[rank])
    torch.testing.assert_close(
        reference.deep_control_conv(x, w, padding="valid"), reference.deep_control_conv(x, w, padding=0)
    )


@pytest.mark.parametrize("activation", activations.ACTIVATIONS)
def test_first_and_second_derivatives(activation):
    # Small, since the second derivative is a matrix of every element by every element.
    x = torch.randn(2, 2, 3, 4, dtype=DOUBLE, requires_grad=True)
    w = torch.randn(4, 1, 3, 3, dtype=DOUBLE, requires_grad=True)
    vectors = [torch.randn(n, dtype=DOUBLE, requires_grad=True) for n in (4, 1, 4)]
    residual = torch.randn(2, 4, 2, 2, dtype=DOUBLE, requires_grad=True)

    def op(x, w, gain, scale, bias, residual):
        return reference.deep_control_conv(
            x, w, gain, scale, bias, 2, 1, 1, 2, residual=residual, activation=activation, negative_slope=0.1
        )

    assert gradcheck(op, (x, w, *vectors, residual))
    assert gradgradcheck(op, (x, w, *vectors, residual))


@pytest.mark.parametrize("activation", activations.SMOOTH)
def test_derivative_formulas(activation):
    # hardswish has kinks at -3 and 3, where PyTorch's side is taken.
    pre = torch.cat([torch.linspace(-6, 6, 97, dtype=DOUBLE), torch.tensor([-3.0, 3.0], dtype=DOUBLE)]).requires_grad_()
    (wanted,) = torch.autograd.grad(activations.apply(pre, activation).sum(), pre)
    torch.testing.assert_close(activations.derivative(pre.detach(), activation), wanted, rtol=1e-12, atol=1e-12)


def test_projection_in_backward():
    x, w = operands(2, 3, 1)
    w.requires_grad_()
    grads = []
    for projection in (0.0, 0.9):
        w.grad = None
        reference.deep_control_conv(x, w, projection=projection).square().sum().backward()
        grads.append(w.grad)
    torch.testing.assert_close(grads[1], grads[0] - 0.9 * grads[0].mean((2, 3), keepdim=True))
    assert reference.project(torch.ones(3, 2, 1, 1), 1.0).eq(1).all(), "a kernel of one tap must be left alone"


def test_finish_weight_grad_against_autograd():
    x, w = operands(2, 3, 1)
    gain = torch.randn(8, dtype=DOUBLE, requires_grad=True)
    w.requires_grad_()
    seed = torch.randn(2, 8, 3, 4, dtype=DOUBLE)
    wanted = torch.autograd.grad((gain.view(1, -1, 1, 1) * F.conv2d(x, w) * seed).sum(), (w, gain))
    scale = torch.rand(8, dtype=DOUBLE) + 0.5
    raw = torch.nn.grad.conv2d_weight(x, w.shape, seed * scale.view(1, -1, 1, 1))
    dw, dgain = reference.finish_weight_grad(raw, w.detach(), gain.detach(), scale, 0.7)
    torch.testing.assert_close(dgain, wanted[1])
    torch.testing.assert_close(dw, reference.project(wanted[0], 0.7))
