"""What the Triton kernels have boundaries at: interpreted on the CPU by test_triton.py, or on a GPU."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from conftest import INTERPRETED, assert_within_budget, library, memory_format, on_triton
from deepcontrol_cuda.triton_kernels import conv_center
from test_ops import compare, small_integers
from torch import nn

import deepcontrol_cuda as dc
from deepcontrol_cuda import _ops, reference

pytestmark = on_triton
layouts = pytest.mark.parametrize("channels_last", [False, True], ids=("contiguous", "channels_last"))


def test_schemas_are_those_of_the_extension(backend):
    def schemas(namespace: str) -> dict[str, str]:
        names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{namespace}::")]
        ops = getattr(torch.ops, namespace)
        return {name: str(getattr(ops, name.split("::")[1]).default._schema).split("::")[1] for name in names}

    assert sorted(schemas("deepcontrol_triton").values()) == sorted(schemas("deepcontrol").values())


WORDS = {
    "fused": "one fused pass (", "held": "one fused pass that holds each map (", "direct": "one direct pass (",
    "two passes": "two passes, ",
}  # fmt: skip


class Case(NamedTuple):
    """A convolution of ``channels`` maps of ``size``; numbers stand for as many equal ones."""

    id: str
    channels: int
    filters: int
    size: tuple[int, ...]
    kernel: int | tuple[int, ...]
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    activation: str = "relu"
    batch: int = 2

    @property
    def algorithm(self) -> str:
        if len(self.size) == 1:  # PyTorch has no channels_last for these
            return "two passes"
        return "direct" if self.channels // self.groups < 16 and self.groups > 1 else "fused"


CASES = (
    Case("one-tap", 24, 40, (5, 7), 1, activation="identity"),
    Case("one-tap-odd-channels", 19, 33, (5, 3), 1, activation="silu"),
    Case("one-tap-strided", 16, 24, (7, 6), 1, stride=2),
    Case("one-tap-stride-3", 8, 16, (7, 8), 1, stride=3, activation="leaky_relu"),
    Case("one-tap-padded", 8, 16, (4, 3), 1, padding=2, activation="gelu"),
    Case("3x3", 24, 40, (5, 7), 3, padding=1),
    Case("3x3-odd-channels", 19, 33, (5, 4), 3, padding=1, activation="hardswish"),
    Case("3x3-few-channels", 5, 17, (6, 5), 3, padding=1, activation="relu6"),
    Case("3x3-unpadded", 16, 16, (6, 5), 3, activation="silu"),
    Case("3x3-strided", 16, 24, (9, 7), 3, stride=2, padding=1),
    Case("3x3-stride-3-padding-2", 16, 9, (8, 7), 3, stride=3, padding=2, activation="leaky_relu"),
    Case("3x3-dilated", 16, 16, (8, 7), 3, padding=2, dilation=2, activation="identity"),
    Case("3x3-dilated-strided", 16, 8, (9, 8), 3, stride=2, padding=1, dilation=2),
    Case("padding-larger-than-kernel", 16, 16, (3, 4), 3, padding=4, activation="relu6"),
    Case("stride-larger-than-kernel", 16, 16, (11, 9), 3, stride=5, padding=1, activation="gelu"),
    Case("2x2-of-stride-3", 16, 16, (8, 9), 2, stride=3),
    Case("5x5", 16, 16, (7, 6), 5, padding=2, activation="hardswish"),
    Case("5x5-dilated-padding-3", 8, 16, (9, 8), 5, padding=3, dilation=2),
    Case("7x7-image", 3, 16, (15, 13), 7, stride=2, padding=3),
    Case("1x7", 16, 16, (3, 9), (1, 7), padding=0, activation="relu6"),
    Case("7x1", 16, 16, (9, 3), (7, 1), padding=3, activation="identity"),
    Case("one-output-pixel", 16, 16, (3, 3), 3),
    Case("one-pixel-in-and-out", 16, 24, (1, 1), 3, padding=1, activation="leaky_relu"),
    Case("one-output-pixel-of-much-padding", 8, 8, (2, 2), 5, stride=7, padding=3, activation="silu"),
    Case("two-groups", 32, 48, (5, 4), 3, padding=1, groups=2),
    Case("odd-groups", 9, 15, (5, 4), 3, stride=2, padding=1, groups=3, activation="leaky_relu"),
    Case("groups-of-one-tap", 32, 32, (4, 5), 1, groups=4, activation="identity"),
    Case("depthwise", 20, 20, (7, 6), 3, padding=1, groups=20),
    Case("depthwise-strided", 16, 16, (8, 7), 3, stride=2, padding=1, groups=16, activation="relu6"),
    Case("depthwise-5x5-dilated", 8, 8, (9, 8), 5, padding=4, dilation=2, groups=8, activation="hardswish"),
    Case("depthwise-two-filters-a-channel", 10, 20, (6, 5), 3, padding=1, groups=10, activation="gelu"),
    Case("depthwise-one-output-pixel", 8, 8, (3, 3), 3, groups=8),
    Case("1d", 16, 24, (19,), 3, stride=2, padding=1, activation="silu"),
    Case("3d", 16, 16, (3, 4, 5), 3, padding=1),
    Case("3d-one-tap", 16, 24, (2, 3, 4), 1, activation="leaky_relu"),
    Case("3d-flat-kernel", 16, 16, (2, 5, 4), (1, 3, 3), stride=2, padding=1),
    Case("one-sample", 16, 24, (5, 4), 3, padding=1, batch=1, activation="identity"),
)  # fmt: skip
CONVOLUTIONS = {1: dc.functional.deep_control_conv1d, 2: dc.functional.deep_control_conv2d,
                3: dc.functional.deep_control_conv3d}  # fmt: skip


def check_convolution(
    case: Case, backend: str, dtype: torch.dtype, channels_last: bool = True, mean_scale: float | None = None,
    algorithm: str | None = None,
) -> None:  # fmt: skip
    """Output and all gradients, within their budgets; in channels_last by the algorithm of the case and no other."""
    algorithm = algorithm or (case.algorithm if channels_last else "two passes")
    rank = len(case.size)
    kernel, stride, padding, dilation = (
        (value,) * rank if isinstance(value, int) else value
        for value in (case.kernel, case.stride, case.padding, case.dilation)
    )
    x = small_integers(case.batch, case.channels, *case.size)
    w = small_integers(case.filters, case.channels // case.groups, *kernel, bound=1)

    def function(x, w, gain, scale, bias, residual, **arguments):
        scale = mean_scale if scale is None else scale
        geometry = (stride, padding, dilation, case.groups)
        if arguments["backend"] == backend:
            assert conv_center.describe(x, w, *geometry).startswith(WORDS[algorithm])
        return CONVOLUTIONS[rank](x, w, gain, scale, bias, *geometry, residual=residual, **arguments)

    gain, scale, bias = torch.rand(case.filters) + 0.5, torch.rand(case.filters), torch.randn(case.filters)
    shape = function(x, w, None, None, None, None, backend="reference").shape
    # With a mean that stays in, no residual either.
    tensors = [x, w, gain, *((scale, bias, small_integers(*shape)) if mean_scale is None else (None, bias, None))]
    seed = torch.randn(shape).to(dtype).double()
    # Small integers are exact in TF32 too.
    cudnn = {"enabled": True, "benchmark": False, "deterministic": True, "allow_tf32": True}
    with conv_center.prefer(algorithm), torch.backends.cudnn.flags(**cudnn):
        compare(
            function, tensors, dtype, channels_last, seed, activation=case.activation, projection=0.9, backend=backend
        )


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_convolutions(backend, case, poisoned_memory):
    check_convolution(case, backend, torch.float32)


BY_ID = {case.id: case for case in CASES}


def some(*ids: str):
    return pytest.mark.parametrize("case", [BY_ID[id] for id in ids], ids=ids)


@some("one-tap-odd-channels", "3x3", "3x3-few-channels", "3x3-strided", "7x7-image", "one-output-pixel",
      "one-pixel-in-and-out", "two-groups", "3d", "one-sample")  # fmt: skip
def test_tiles_that_hold_maps(backend, case, poisoned_memory):
    """Some maps to a tile, and rows of a tile that no map has."""
    check_convolution(case._replace(batch=case.batch + 1), backend, torch.float32, algorithm="held")


@some("one-tap-odd-channels", "two-groups", "depthwise")
@pytest.mark.parametrize("mean_scale", [None, 0.0], ids=("centred", "mean left in"))
# The interpreter multiplies no bfloat16 matrices.
@pytest.mark.parametrize("dtype", [torch.float16] if INTERPRETED else [torch.bfloat16, torch.float16], ids=str)
def test_convolutions_in_16_bits(backend, case, mean_scale, dtype, poisoned_memory):
    check_convolution(case, backend, dtype, mean_scale=mean_scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=("f32", "f64"))
def test_a_contiguous_convolution(backend, dtype, poisoned_memory):
    case = Case("contiguous", 9, 17, (5, 4), 3, padding=1)
    check_convolution(case, backend, dtype, channels_last=False)


@layouts
def test_a_convolution_of_no_samples(backend, channels_last, poisoned_memory):
    x = torch.empty(0, 16, 5, 5).to(memory_format=memory_format(torch.empty(1, 1, 1, 1), channels_last))
    leaves = [x.requires_grad_(), torch.randn(24, 16, 3, 3, requires_grad=True), torch.ones(24, requires_grad=True)]
    y = dc.functional.deep_control_conv2d(*leaves, padding=1, activation="relu", backend=backend)
    assert y.shape == (0, 24, 5, 5)
    y.sum().backward()
    assert leaves[0].grad.shape == x.shape
    assert all(leaf.grad.eq(0).all() for leaf in leaves[1:])


@some("3x3", "one-tap", "depthwise")
def test_a_sample_does_not_depend_on_its_batch(backend, case):
    """Bit for bit, in a batch that is cut into other tiles; the gradient of the input is the library's."""
    x, w = torch.randn(5, case.channels, *case.size), torch.randn(case.filters, case.channels // case.groups, 1, 1)
    w = w.expand(-1, -1, case.kernel, case.kernel).contiguous(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    geometry = ([1, 1], [case.padding] * 2, [1, 1], case.groups)
    results = []
    for part in (slice(0, 5), slice(3, 4)):
        with conv_center.prefer(case.algorithm):
            results.append(
                library(backend).conv_center(x[part], w, None, None, 1.0, None, None, *geometry, "silu", 0.0, True)
            )
    for whole, alone in zip(*results):
        assert torch.equal(whole[3:4], alone)


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("f32", "bf16"))
def test_projection_of_many_gradients(backend, channels_last, dtype):
    """Of more tensors than one launch takes, in one call; those of one tap stay as they are."""
    shapes = [(1 + i % 7, 1 + i % 5, *((1, 1), (3, 3), (1, 7), (2, 2))[i % 4]) for i in range(70)]
    shapes += [(3, 2, 5), (2, 3, 3, 3, 3)]
    gradients = [torch.randn(shape).to(dtype) for shape in shapes]
    gradients = [g.contiguous(memory_format=memory_format(g, channels_last)) for g in gradients]
    before = [gradient.clone() for gradient in gradients]
    library(backend).project_kernel_gradients_(gradients, 0.9)
    for gradient, old in zip(gradients, before):
        if old[0, 0].numel() == 1:
            assert torch.equal(gradient, old)
        else:
            oracle = reference.project(old.double(), 0.9)
            assert_within_budget(gradient, oracle, reference.project(old, 0.9), dtype, what=str(tuple(old.shape)))


@layouts
def test_compiled_without_a_graph_break(backend, channels_last):
    """Forward and backward of layers that are behind each other."""
    net = nn.Sequential(
        dc.DeepControlConv2d(16, 16, 3, padding=1, activation="relu", projection=0.9),
        dc.DeepControlConv2d(16, 24, 1, activation="silu"),
        dc.DeepControl2d(24, activation="leaky_relu"),
    )
    x = torch.randn(2, 16, 5, 4)
    x = x.contiguous(memory_format=memory_format(x, channels_last)).requires_grad_()
    net.to(x.device)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    leaves = [x, *net.parameters()]
    outputs = [f(x) for f in (net, compiled)]
    wanted, got = ([y, *torch.autograd.grad(y.square().mean(), leaves)] for y in outputs)
    for a, b in zip(got, wanted):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b)
    torch.compiler.reset()


def test_bits_of_a_convolution_unpack_to_the_mask(backend):
    """Also where the channels of a group end within a byte."""
    for filters, groups in ((24, 1), (33, 1), (10, 2)):
        x = torch.randn(2, 16, 5, 3).to(memory_format=torch.channels_last)
        w = torch.randn(filters, 16 // groups, 3, 3)
        geometry = ([1, 1], [1, 1], [1, 1], groups)
        with conv_center.prefer("fused"):
            output, _, bits = library(backend).conv_center(
                x, w, None, None, 1.0, None, None, *geometry, "relu", 0.0, True
            )
        assert torch.equal(_ops.unpack_bits(bits, output.shape, True), output > 0)
