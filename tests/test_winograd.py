"""Winograd's convolution on the CPU: every pass against float64, bit-equality, and that it is what runs."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_within_budget, memory_format

import deepcontrol_cuda as dc
from deepcontrol_cuda import _ops, backends


class Layer(NamedTuple):
    batch: int
    channels: int
    filters: int
    size: tuple[int, int]
    padding: tuple[int, int] = (1, 1)


RESNET50 = [Layer(8, c, c, (n, n)) for c, n in ((64, 56), (128, 28), (256, 14), (512, 7))]
LAYERS = {
    "whole tiles": Layer(2, 64, 64, (12, 8)),
    "odd": Layer(3, 47, 70, (9, 7)),
    "few channels": Layer(2, 3, 17, (6, 11)),
    "few filters": Layer(2, 40, 5, (7, 5)),
    "many channels": Layer(1, 300, 130, (5, 6)),
    "more weights than pixels": Layer(1, 130, 140, (4, 3)),
    "unpadded": Layer(2, 33, 64, (7, 8), (0, 0)),
    "one row of padding": Layer(2, 32, 32, (3, 5), (1, 0)),
    "much padding": Layer(2, 32, 65, (5, 4), (2, 2)),
    "one pixel": Layer(2, 32, 32, (1, 1)),
    "one pixel out": Layer(2, 32, 32, (3, 3), (0, 0)),
    "nothing but padding at the edge": Layer(1, 16, 16, (1, 2), (2, 2)),
    "many tiles": Layer(2, 20, 36, (50, 44)),
}


def plan_of(layer: Layer, dtype=torch.float32, channels_last=True) -> dict:
    x, w, _ = tensors_of(layer, dtype, channels_last)
    return _ops.extension.plan_conv_cpu(backends._case_cpu(x, w, ((1, 1), layer.padding, (1, 1), 1)))


def tensors_of(layer: Layer, dtype=torch.float32, channels_last=True, weight_channels_last=True):
    """Input, weight and gradient of the output."""
    x = torch.randn(layer.batch, layer.channels, *layer.size, dtype=dtype)
    w = torch.randn(layer.filters, layer.channels, 3, 3, dtype=dtype) / layer.channels**0.5
    size = [n + 2 * padding - 2 for n, padding in zip(layer.size, layer.padding)]
    grad = torch.randn(layer.batch, layer.filters, *size, dtype=dtype)
    layouts = (channels_last, weight_channels_last, channels_last)
    return [t.contiguous(memory_format=memory_format(t, last)) for t, last in zip((x, w, grad), layouts)]


@pytest.fixture(autouse=True)
def winograd():
    if reason := plan_of(RESNET50[1])["forward"]["obstacles"]["winograd"]:
        pytest.skip(reason)
    with backends.prefer("winograd", "cpu"):
        yield


def convolve(x, w, grad, padding, mean_scale=0.0):
    """Output, gradient of the input and of the weight."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = dc.functional.deep_control_conv2d(x, w, None, mean_scale, None, 1, padding, backend="cpu")
    y.backward(grad)
    return y.detach(), x.grad, w.grad


def library(x, w, grad, padding):
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    y = F.conv2d(x, w, padding=padding)
    y.backward(grad)
    return y.detach(), x.grad, w.grad


@pytest.mark.parametrize("weight_channels_last", [False, True], ids=("contiguous-weight", "channels_last-weight"))
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_every_pass_is_within_its_budget(layer, weight_channels_last, poisoned_memory):
    x, w, grad = tensors_of(layer, weight_channels_last=weight_channels_last)
    assert plan_of(layer)["forward"]["chosen"] == "winograd"
    got = convolve(x, w, grad, layer.padding)
    low = library(x, w, grad, layer.padding)
    oracle = library(x.double(), w.double(), grad.double(), layer.padding)
    # A sum of n terms that cancel rounds as much as a large one does.
    terms = (9 * layer.channels, 9 * layer.filters, grad[:, 0].numel())
    for i, what in enumerate(("output", "gradient of the input", "gradient of the weight")):
        assert_within_budget(got[i], oracle[i], low[i], torch.float32, what=f"{what} ({terms[i]} terms)")
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    assert got[1].is_contiguous(memory_format=torch.channels_last)
    assert got[2].is_contiguous(memory_format=memory_format(w, weight_channels_last))


@pytest.mark.parametrize("channels_last", [False, True], ids=("contiguous", "channels_last"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("f32", "bf16"))
@pytest.mark.parametrize("layer", RESNET50, ids=str)
def test_resnet50_layers_are_within_their_budgets(layer, dtype, channels_last):
    layer = layer._replace(batch=2 if layer.channels > 64 else 1)
    x, w, grad = tensors_of(layer, dtype, channels_last, channels_last)
    x.relu_()
    got, low = (f(x, w, grad, layer.padding) for f in (convolve, library))
    oracle = library(x.double(), w.double(), grad.double(), layer.padding)
    for i, what in enumerate(("output", "gradient of the input", "gradient of the weight")):
        assert_within_budget(got[i], oracle[i], low[i], dtype, what=what)
    assert got[0].is_contiguous(memory_format=memory_format(x, channels_last))


@pytest.mark.parametrize("layer", [LAYERS["odd"], LAYERS["more weights than pixels"], LAYERS["much padding"]], ids=str)
def test_odd_sizes_in_bfloat16_and_contiguous(layer):
    for dtype, channels_last in ((torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, False)):
        x, w, grad = tensors_of(layer, dtype, channels_last, not channels_last)
        got, low = (f(x, w, grad, layer.padding) for f in (convolve, library))
        oracle = library(x.double(), w.double(), grad.double(), layer.padding)
        for i, what in enumerate(("output", "gradient of the input", "gradient of the weight")):
            assert_within_budget(got[i], oracle[i], low[i], dtype, what=f"{what} in {dtype}")


def test_autocast_keeps_float32_weights():
    x, _, grad = tensors_of(LAYERS["odd"], torch.bfloat16)
    w = (torch.randn(70, 47, 3, 3) / 8).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = dc.functional.deep_control_conv2d(x, w, mean_scale=0.0, padding=1, backend="cpu")
    y.backward(grad)
    assert (y.dtype, w.grad.dtype) == (torch.bfloat16, torch.float32)
    low = library(x, w.detach().bfloat16(), grad, 1)
    oracle = library(x.double(), w.detach().bfloat16().double(), grad.double(), 1)
    assert_within_budget(y.detach(), oracle[0], low[0], torch.bfloat16)
    assert_within_budget(w.grad, oracle[2], low[2].float(), torch.bfloat16)


@pytest.mark.parametrize("channels_last", [False, True], ids=("contiguous", "channels_last"))
def test_it_is_what_runs_for_resnet50(channels_last):
    backends._prefer(None, "cpu")
    for layer in RESNET50:
        plan = plan_of(layer, channels_last=channels_last)
        assert [plan[name]["chosen"] for name in ("forward", "backward")] == ["winograd"] * 2, layer
    few_filters = plan_of(Layer(8, 64, 16, (56, 56)))
    assert few_filters["forward"]["chosen"] != "winograd"


@pytest.mark.parametrize("layer", [LAYERS["odd"], LAYERS["many tiles"], RESNET50[2], RESNET50[3]], ids=str)
def test_runs_are_bit_equal_and_samples_do_not_depend_on_their_batch(layer):
    x, w, grad = tensors_of(layer)
    first = convolve(x, w, grad, layer.padding, 1.0)
    assert plan_of(layer._replace(batch=1))["forward"]["chosen"] == "winograd"
    for a, b in zip(first, convolve(x, w, grad, layer.padding, 1.0)):
        assert torch.equal(a, b)
    alone = convolve(x[-1:], w, grad[-1:], layer.padding, 1.0)
    assert torch.equal(alone[0], first[0][-1:])
    assert torch.equal(alone[1], first[1][-1:])
    torch.set_num_threads(1)
    try:
        sequential = convolve(x, w, grad, layer.padding, 1.0)
    finally:
        torch.set_num_threads(2)
    assert torch.equal(sequential[0], first[0])
    assert torch.equal(sequential[1], first[1])


def test_strange_strides():
    layer = Layer(3, 32, 48, (6, 9))
    x, w, grad = tensors_of(layer)
    for strange in (x[:1].expand_as(x), x[:, :, :1].expand_as(x), torch.cat([x, x], 1)[:, ::2], x.flip(3)):
        y = dc.functional.deep_control_conv2d(strange, w, mean_scale=0.0, padding=1, backend="cpu")
        dense = strange.contiguous(memory_format=torch.channels_last)
        assert torch.equal(y, dc.functional.deep_control_conv2d(dense, w, mean_scale=0.0, padding=1, backend="cpu"))
    x = x.requires_grad_()
    dc.functional.deep_control_conv2d(x, w, mean_scale=0.0, padding=1, backend="cpu").sum().backward()
    oracle = library(x.double(), w.double(), torch.ones_like(grad).double(), 1)[1]
    torch.testing.assert_close(x.grad.double(), oracle, rtol=0, atol=1e-4)


def test_what_is_not_finite_spreads_to_whole_tiles_and_no_further():
    """Direct convolution gives NaN or infinity at the 3 x 3 outputs around such a pixel; a tile subtracts and adds."""
    x, w, _ = tensors_of(Layer(2, 32, 32, (20, 20)))
    for value in (float("nan"), float("inf"), float("-inf")):
        x[1, 3, 9, 9] = value
        y = dc.functional.deep_control_conv2d(x, w, mean_scale=0.0, padding=1, backend="cpu")
        assert y[1, :, 8:11, 8:11].isfinite().logical_not().all()
        far = torch.ones_like(y, dtype=torch.bool)
        far[1, :, 4:15, 6:13] = False
        assert y[far].isfinite().all()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stride": 2}, "the stride is not one"),
        ({"dilation": 2}, "the kernel is dilated"),
        ({"groups": 2}, "the channels are in groups"),
        ({"padding": 3}, "the padding is larger than two"),
    ],
    ids=str,
)
def test_what_it_does_not_take_is_refused_with_the_reason(change, reason):
    x, w, _ = tensors_of(Layer(1, 8, 8, (9, 9)))
    w = w[:, : 8 // change.get("groups", 1)]
    with pytest.raises(RuntimeError, match=f"algorithm 'winograd': {reason}"):
        dc.functional.deep_control_conv2d(x, w, backend="cpu", **change)
