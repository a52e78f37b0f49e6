"""What the Triton kernels have boundaries at: interpreted on the CPU by test_triton.py, or on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from conftest import INTERPRETED, assert_within_budget, library, memory_format, on_triton
from conv_cases import CASES, Case, check_convolution, some
from deepcontrol_cuda.triton_kernels import conv_center
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

    # What asks for an algorithm is the extension's alone.
    extension = {name: schema for name, schema in schemas("deepcontrol").items() if "algorithm" not in name}
    assert sorted(schemas("deepcontrol_triton").values()) == sorted(extension.values())


WORDS = {
    "fused": "one fused pass (", "held": "one fused pass that holds each map (", "direct": "one direct pass (",
    "two passes": "two passes, ",
}  # fmt: skip


def algorithm_of(case: Case) -> str:
    if len(case.size) == 1:  # PyTorch has no channels_last for these
        return "two passes"
    return "direct" if case.is_direct else "fused"


@contextmanager
def by(case: Case, algorithm: str) -> Iterator[None]:
    """The algorithm, of which it is made sure that it takes the case."""
    x, w = (
        torch.empty(1, case.channels, *case.size),
        torch.empty(case.filters, case.channels // case.groups, *case.each("kernel")),
    )
    x, w = (t.contiguous(memory_format=memory_format(t, True)) for t in (x, w))
    with conv_center.prefer(algorithm), torch.backends.cudnn.flags(allow_tf32=True):
        assert conv_center.describe(x, w, *case.geometry).startswith(WORDS[algorithm])
        yield


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_convolutions(backend, case, poisoned_memory):
    check_convolution(case, backend, torch.float32, by(case, algorithm_of(case)))


@some("one-tap-odd-channels", "3x3", "3x3-few-channels", "3x3-strided", "7x7-image", "one-output-pixel",
      "one-pixel-in-and-out", "two-groups", "3d", "one-sample")  # fmt: skip
def test_tiles_that_hold_maps(backend, case, poisoned_memory):
    """Some maps to a tile, and rows of a tile that no map has."""
    check_convolution(case._replace(batch=case.batch + 1), backend, torch.float32, by(case, "held"))


@some("one-tap-odd-channels", "two-groups", "depthwise")
@pytest.mark.parametrize("mean_scale", [None, 0.0], ids=("centred", "mean left in"))
# The interpreter multiplies no bfloat16 matrices.
@pytest.mark.parametrize("dtype", [torch.float16] if INTERPRETED else [torch.bfloat16, torch.float16], ids=str)
def test_convolutions_in_16_bits(backend, case, mean_scale, dtype, poisoned_memory):
    check_convolution(case, backend, dtype, by(case, algorithm_of(case)), mean_scale=mean_scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=("f32", "f64"))
def test_a_contiguous_convolution(backend, dtype, poisoned_memory):
    case = Case("contiguous", 9, 17, (5, 4), 3, padding=1)
    check_convolution(case, backend, dtype, conv_center.prefer("fused"), channels_last=False)


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
        with conv_center.prefer(algorithm_of(case)):
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
