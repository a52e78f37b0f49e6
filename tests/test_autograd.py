"""Derivatives to the second order, and what wraps around autograd: compile, autocast, no_grad, what is kept."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from conftest import ON_GPUS, library, memory_format, on_every_backend, on_reference_too
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import deepcontrol_cuda as dc
from deepcontrol_cuda import _ops, activations, autograd

F = dc.functional
CONVS = {1: F.deep_control_conv1d, 2: F.deep_control_conv2d, 3: F.deep_control_conv3d}
MAPS = {1: (5,), 2: (3, 4), 3: (3, 2, 3)}
NAMES = ("input", "weight", "gain", "mean_scale", "bias", "residual")
layouts = pytest.mark.parametrize("channels_last", [False, True], ids=("contiguous", "channels_last"))
every_activation = pytest.mark.parametrize("activation", activations.ACTIVATIONS)


def leaf(*shape: int, dtype=torch.float64, channels_last=False) -> torch.Tensor:
    tensor = torch.randn(shape, dtype=dtype)
    return tensor.contiguous(memory_format=memory_format(tensor, channels_last)).requires_grad_()


def operands(vector=4, rank=2, groups=1, **options) -> dict[str, torch.Tensor]:
    """Leaves for a convolution of 2 (or for two groups 4) channels to 4 maps of the input's size."""
    return {
        "input": leaf(2, 2 * groups, *MAPS[rank], **options),
        "weight": leaf(4, 2, *(3,) * rank, **options),
        **{name: leaf(vector, **options) for name in ("gain", "mean_scale", "bias")},
        "residual": leaf(2, 4, *MAPS[rank], **options),
    }


def conv(rank=2, groups=1, **arguments):
    """The convolution as a function of its six operands in order."""

    def call(input, weight, gain, mean_scale, bias, residual):
        arguments.setdefault("negative_slope", 0.1)
        return CONVS[rank](input, weight, gain, mean_scale, bias, 1, 1, 1, groups, residual=residual, **arguments)

    return call


def center(**arguments):
    def call(input, gain, mean_scale, bias, residual):
        return F.deep_control(input, gain, mean_scale, bias, residual=residual, negative_slope=0.1, **arguments)

    return call


def check_both(function, leaves):
    """Along random directions; entry by entry it would take minutes."""
    assert gradcheck(function, leaves, fast_mode=True)
    assert gradgradcheck(function, leaves, fast_mode=True)


@every_activation
@layouts
def test_derivatives_of_the_convolution(backend, activation, channels_last):
    leaves = operands(channels_last=channels_last)
    check_both(conv(activation=activation, backend=backend), tuple(leaves.values()))


@pytest.mark.parametrize("rank", [1, 3], ids=("1d", "3d"))
def test_derivatives_of_the_other_ranks(backend, rank):
    check_both(conv(rank, activation="silu", backend=backend), tuple(operands(rank=rank).values()))


@on_every_backend
def test_derivatives_with_groups_and_single_vectors(backend):
    leaves = operands(vector=1, groups=2)
    check_both(conv(groups=2, activation="relu", backend=backend), tuple(leaves.values()))


@layouts
def test_derivatives_of_a_kernel_of_one_tap(backend, channels_last):
    """One tap takes a way of its own; it has float32 only, so here against the reference."""
    leaves = [leaf(2, 8, 3, 4, channels_last=channels_last), leaf(16, 8, 1, 1), *(leaf(16) for _ in range(3))]
    seed = torch.randn(2, 16, 3, 4)
    results = []
    for name, dtype in (("reference", torch.float64), (backend, torch.float32)):
        inputs = [t.detach().to(dtype).requires_grad_() for t in leaves]
        y = F.deep_control_conv2d(*inputs, activation="gelu", backend=name)
        first = torch.autograd.grad(y, inputs, seed.to(dtype), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
        results.append([y, *first, *second])
    for wanted, got in zip(*results):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-4 * wanted.abs().max().item())


@every_activation
@layouts
def test_derivatives_of_center(backend, activation, channels_last):
    leaves = (leaf(2, 3, 3, 2, channels_last=channels_last), leaf(3), leaf(1), leaf(3), leaf(2, 3, 3, 2))
    check_both(center(activation=activation, backend=backend), leaves)


@pytest.mark.parametrize("mean_scale", [None, 0.0, 0.7], ids=str)
def test_derivatives_with_a_constant_mean_scale(backend, mean_scale):
    leaves = operands()
    chosen = [leaves[name] for name in ("input", "weight", "gain", "bias")]

    def call(input, weight, gain, bias):
        return conv(activation="relu", backend=backend)(input, weight, gain, mean_scale, bias, None)

    check_both(call, chosen)

    def without_conv(input, gain):
        return center(activation="silu", backend=backend)(input, gain, mean_scale, None, None)

    check_both(without_conv, (leaf(2, 3, 3, 2), leaf(3)))


@on_every_backend
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("op", ["conv", "center"])
def test_one_operand_alone_requires_grad(backend, op, name):
    """The gradient is what it is with all, and the others get none."""
    call = conv if op == "conv" else center
    leaves = operands()
    if op == "center":
        if name == "weight":
            pytest.skip("center has no weight")
        del leaves["weight"]
        leaves["input"] = leaf(2, 4, *MAPS[2])
    seed = torch.randn(2, 4, *MAPS[2], dtype=torch.float64)
    y = call(activation="silu", backend=backend)(*leaves.values())
    wanted = dict(zip(leaves, torch.autograd.grad(y, leaves.values(), seed)))[name]
    alone = {n: t.detach().requires_grad_(n == name) for n, t in leaves.items()}
    call(activation="silu", backend=backend)(*alone.values()).backward(seed)
    torch.testing.assert_close(alone[name].grad, wanted, rtol=1e-12, atol=1e-12)
    assert all(t.grad is None for n, t in alone.items() if n != name)


@on_every_backend
def test_double_backward_projects(backend):
    """The first derivative is projected on purpose, so finite differences say nothing: the reference decides."""
    leaves = list(operands().values())
    results = []
    for name in ("reference", backend):
        y = conv(activation="silu", projection=0.9, backend=name)(*leaves)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        results.append([*first, *torch.autograd.grad(sum(g.sin().sum() for g in first), leaves)])
    for wanted, got in zip(*results):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


GEOMETRY = ([2, 1], [1, 1], [1, 1], 1)


def op_calls(ops, channels_last):
    """Every op of a library with arguments."""

    def dense(*shape):
        tensor = torch.randn(shape)
        return tensor.contiguous(memory_format=memory_format(tensor, channels_last))

    x, w, vector = dense(2, 9, 5, 6), dense(10, 9, 3, 3), torch.rand(10) + 0.5
    residual = dense(2, 10, 3, 6)
    one = torch.rand(1)
    for activation in ("identity", "relu", "gelu"):
        arguments = (x, torch.rand(9), None, 1.0, None, dense(2, 9, 5, 6), activation, 0.1, True)
        _, mean, saved = ops.center(*arguments)
        yield ops.center, arguments
        yield ops.center_with_mean, arguments
        yield (
            ops.center_backward,
            (dense(*x.shape), x, torch.rand(9), None, 1.0, mean, saved, activation, 0.1, [True] * 5),
        )
        arguments = (x, w, vector, one, 1.0, vector, residual, *GEOMETRY, activation, 0.1, True)
        output, mean, saved = ops.conv_center(*arguments)
        yield ops.conv_center, arguments
        for mask in ([True] * 6, [False, True, False, False, True, False]):
            backward = (
                torch.randn_like(output),
                x,
                w,
                vector,
                one,
                1.0,
                mean,
                saved,
                *GEOMETRY,
                activation,
                0.1,
                0.9,
                mask,
            )
            yield ops.conv_center_backward, backward
    tap = dense(16, 9, 1, 1)
    yield ops.conv_center, (x, tap, None, None, 0.0, None, None, [1, 1], [0, 0], [1, 1], 1, "relu", 0.0, False)
    yield ops.window_mean, (x, [3, 2], [2, 1], [1, 0], [1, 1])
    yield ops.project_kernel_gradients_, ([dense(4, 3, 3, 3), torch.randn(2, 2, 5)], 0.9)
    yield ops.finish_weight_grad_, (w.clone(), w, vector, None, 0.9)


@on_every_backend
@layouts
def test_opcheck(backend, channels_last):
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    seen = set()
    ops = library(backend)
    for op, arguments in op_calls(ops, channels_last):
        seen.add(str(op.default).split(".")[1])
        torch.library.opcheck(op.default, arguments, test_utils=checks)
    names = {name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{ops.name}::")}
    # Nobody asks for an algorithm in a graph.
    assert seen == {name for name in names if "algorithm" not in name}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("filters", "kernel"), [(90, 1), (18, 1), (8, 3)])
@layouts
def test_float32_weight_beside_a_16_bit_input(dtype, filters, kernel, channels_last):
    """On a CPU: the results are those of the rounded weight, but the weight's gradient is float32 and no less exact."""
    ops = library("cpu")
    geometry = ([2, 1], [kernel // 2] * 2, [1, 1], 1)
    format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(4, 34, 20, 11).to(dtype).contiguous(memory_format=format)
    wide = torch.randn(filters, 34, kernel, kernel).contiguous(memory_format=format)
    gain, mean_scale, bias = torch.rand(filters) + 0.5, torch.rand(filters), torch.randn(filters)
    gain[0] = 0.0
    outputs, gradients = [], []
    for weight in (wide, wide.to(dtype)):
        forward = (x, weight, gain, mean_scale, 1.0, bias, None, *geometry, "relu", 0.0, True)
        outputs.append(ops.conv_center(*forward))
        output, map_mean, saved = outputs[0]
        seed = torch.ones_like(output) * torch.arange(11).to(dtype)
        backward = (
            seed,
            x,
            weight,
            gain,
            mean_scale,
            1.0,
            map_mean,
            saved,
            *geometry,
            "relu",
            0.0,
            0.9,
            [True] * 5 + [False],
        )
        gradients.append(ops.conv_center_backward(*backward))
        if weight is wide:
            torch.library.opcheck(ops.conv_center.default, forward, test_utils=("test_schema", "test_faketensor"))
            torch.library.opcheck(
                ops.conv_center_backward.default, backward, test_utils=("test_schema", "test_faketensor")
            )
    assert all(torch.equal(a, b) for a, b in zip(*outputs))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert gradients[0][1].dtype == torch.float32

    exact = wide.to(dtype).double().requires_grad_()
    tensors = (t.double() for t in (gain, mean_scale, bias))
    y = F.deep_control_conv2d(x.double(), exact, *tensors, *geometry, projection=0.9, backend="reference")
    y.backward(seed.double() * _ops.unpack_bits(saved, output.shape, channels_last))
    errors = [(gradient[1].double() - exact.grad).norm() for gradient in gradients]
    assert errors[0] <= 1.01 * errors[1]
    assert errors[1] <= 4 * torch.finfo(dtype).eps * exact.grad.norm()


class Net(nn.Module):
    """The layers in the ways they are used: strided, by one tap, with a residual, and behind another layer."""

    def __init__(self):
        super().__init__()
        self.first = dc.DeepControlConv2d(3, 16, 3, 2, 1, activation="relu", projection=0.9)
        self.second = dc.DeepControlConv2d(16, 16, 1, mean_scale=0.5, activation="silu")
        self.block = dc.DeepControlConv2d(16, 16, 3, padding=1, activation="relu")
        self.third = nn.Conv2d(16, 8, 3)
        self.norm = dc.DeepControl2d(8, activation="leaky_relu")

    def forward(self, x):
        x = self.first(x)
        return self.norm(self.third(self.block(self.second(x), x)))


@pytest.fixture
def net():
    net = Net()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) * 0.3 + 0.5)
    return net


@pytest.fixture(autouse=True)
def forget_compiled():
    yield
    torch.compiler.reset()


def results_of(net, call, x, dtype=None):
    """Output and gradients of ``call``, under autocast to ``dtype`` if one is given."""
    x = x.detach().requires_grad_()
    net.zero_grad()
    with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
        y = call(x)
    y.float().square().mean().backward()
    return {"output": y.detach(), "input": x.grad, **{name: p.grad for name, p in net.named_parameters()}}


def assert_same(got, wanted, tolerance):
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype, name
        assert got[name].stride() == value.stride(), name
        error = (got[name] - value).norm() / value.norm()
        assert error <= tolerance, f"{name}: {error:.1e}"


@on_every_backend
@layouts
def test_compiled_net_equals_eager(backend, net, channels_last):
    net = net.to(memory_format=torch.channels_last) if channels_last else net
    compiled = torch.compile(net, fullgraph=True, dynamic=True)
    for batch in (2, 5):
        x = torch.randn(batch, 3, 8, 8)
        x = x.contiguous(memory_format=memory_format(x, channels_last))
        assert_same(results_of(net, compiled, x), results_of(net, net, x), 1e-5)


@on_every_backend
@pytest.mark.parametrize(
    ("layer", "op"),
    [
        (dc.DeepControlConv2d(4, 4, 3, activation="relu"), "conv_center"),
        (dc.DeepControl2d(4, activation="relu"), "center"),
    ],
    ids=("conv", "center"),
)
def test_compiled_backward_is_the_op(backend, layer, op):
    """And not the formulas that exist for second derivatives, which give the same numbers slowly."""
    graphs = []

    def keep(graph, _):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    x = torch.randn(2, 4, 5, 5)
    compiled = torch.compile(
        layer.to(x.device), fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep)
    )
    compiled(x).sum().backward()
    forward, backward = graphs
    namespace = library(backend).name
    assert f"{namespace}.{op}.default" in forward
    assert f"{namespace}.{op}_backward.default" in backward


@on_every_backend
@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_unit_that_is_off_stops_an_infinite_gradient(backend, activation):
    """With create_graph as without: zero, not zero times infinity."""
    x = torch.tensor([[[-1.0, 1.0]]], requires_grad=True)
    y = dc.functional.deep_control(x, None, 0.0, activation=activation, backend=backend)
    seed = torch.tensor([[[float("inf"), 2.0]]])
    for create_graph in (False, True):
        (grad,) = torch.autograd.grad(y, x, seed, retain_graph=True, create_graph=create_graph)
        assert torch.equal(grad.detach(), torch.tensor([[[0.0, 2.0]]]))


@pytest.mark.parametrize(
    "layer", [dc.DeepControlConv2d(4, 4, 3, padding=1), dc.DeepControl2d(4)], ids=("conv", "center")
)
def test_compiled_layer_whose_residual_is_its_input(backend, layer):
    """The shortest residual block."""
    x = torch.randn(2, 4, 5, 5)
    layer = layer.to(x.device)

    def block(x):
        return layer(x, x)

    compiled = torch.compile(block, fullgraph=True)
    assert_same(results_of(layer, compiled, x), results_of(layer, block, x), 1e-5)


def test_compiled_net_under_autocast(backend, net):
    x = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(net, fullgraph=True)
    got = results_of(net, compiled, x, torch.bfloat16)
    assert got["output"].dtype == torch.bfloat16
    # Inductor keeps some intermediates in float32, so both are compared to float32.
    exact = results_of(net, net, x)
    eager = results_of(net, net, x, torch.bfloat16)
    for name, value in exact.items():
        budget = 2 * (eager[name].float() - value).norm() + 2**-8 * value.norm()
        assert (got[name].float() - value).norm() <= budget, name


def test_compiled_function_is_one_graph_in_float64_with_a_dynamic_batch(backend):
    """``torch.compile`` of the bare function: static first, then recompiled once for any batch."""
    leaves = operands()
    call = conv(activation="relu6", projection=0.5, backend=backend)
    compiled = torch.compile(call, fullgraph=True)
    for batch in (2, 3, 4):
        inputs = [
            torch.randn(batch, *t.shape[1:]).double() if t.dim() == 4 and t.shape[0] == 2 else t
            for t in leaves.values()
        ]
        inputs = [t.detach().requires_grad_() for t in inputs]
        outputs = [f(*inputs) for f in (call, compiled)]
        seed = torch.randn_like(outputs[0])
        wanted, got = ([y, *torch.autograd.grad(y, inputs, seed)] for y in outputs)
        for a, b in zip(wanted, got):
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)


@on_reference_too
def test_autocast(backend, net):
    x = torch.randn(2, 3, 8, 8)
    with dc.backends.use(backend):
        low, high = results_of(net, net, x, torch.bfloat16), results_of(net, net, x)
    assert low["output"].dtype == torch.bfloat16
    for key in high.keys() - {"output"}:
        assert low[key].dtype == torch.float32, key
    assert_same({key: value.float() for key, value in low.items()}, high, 0.1)


@on_reference_too
def test_autocast_leaves_vectors_and_float64_alone(backend, monkeypatch):
    leaves = operands(dtype=torch.float32)
    device = leaves["input"].device.type
    seen = []
    entry = (F.reference, "deep_control_conv") if backend == "reference" else (F.autograd, "conv_center")
    original = getattr(*entry)
    monkeypatch.setattr(*entry, lambda *a, **k: seen.append(a) or original(*a, **k))
    with torch.autocast(device, torch.bfloat16):
        conv(backend=backend)(*leaves.values())
    weight = torch.float32 if backend in dc.backends.ROUND_WEIGHTS else torch.bfloat16
    assert [t.dtype for t in seen[0][:5]] == [torch.bfloat16, weight] + [torch.float32] * 3

    doubles = list(operands().values())
    with torch.autocast(device, torch.bfloat16):
        under_autocast = conv(backend=backend)(*doubles)
    assert torch.equal(under_autocast, conv(backend=backend)(*doubles))


@on_reference_too
def test_autocast_casts_the_residual(backend):
    """A float32 skip connection beside a bfloat16 layer, and the other way round."""
    wide, narrow = torch.randn(2, 4, 3, 4), torch.randn(2, 4, 3, 4).bfloat16()
    weight = torch.randn(4, 4, 1, 1)
    device = weight.device.type
    with torch.autocast(device, torch.bfloat16):
        assert F.deep_control(narrow, residual=wide, backend=backend).dtype == torch.bfloat16
        assert F.deep_control(wide, residual=narrow, backend=backend).dtype == torch.float32
        assert F.deep_control_conv2d(narrow, weight, residual=wide, backend=backend).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_autocast_of_another_device_does_not_matter(backend):
    other = "cpu" if backend in ON_GPUS else "cuda"
    before = torch.is_autocast_enabled(other)
    torch.set_autocast_enabled(other, True)
    try:
        y = F.deep_control_conv2d(torch.randn(1, 2, 3, 3), torch.randn(2, 2, 1, 1), backend=backend)
    finally:
        torch.set_autocast_enabled(other, before)
    assert y.dtype == torch.float32


class SaveFlags(TorchDispatchMode):
    """Notes of each forward op whether it is to keep what backward needs."""

    def __init__(self):
        super().__init__()
        self.flags = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "deepcontrol_autograd":  # seen in inference mode only, else taken apart before
            with self:
                return op.decompose(*args, **(kwargs or {}))
        if op.name().split("::")[1] in ("center", "conv_center"):
            self.flags.append(args[-1])
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_grad_nothing_is_kept(backend, mode):
    leaves = list(operands(dtype=torch.float32).values())
    x = leaf(2, 4, 3, 4, dtype=torch.float32)
    calls = (
        lambda: conv(activation="gelu", backend=backend)(*leaves),
        lambda: F.deep_control(x, activation="relu", backend=backend),
    )
    with SaveFlags() as recorded:
        for call in calls:
            wanted = call()
            with mode():
                got = call()
            assert torch.equal(got, wanted)
            assert not got.requires_grad
    assert recorded.flags == [True, False, True, False], "whether backward's share is computed"


class Saved:
    """Counts the bytes that autograd keeps, each storage once, without parameters."""

    def __init__(self, net):
        self.parameters = {p.untyped_storage().data_ptr() for p in net.parameters()}
        self.sizes: dict[int, int] = {}
        self.kept = []

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.parameters:
            self.sizes[storage.data_ptr()] = storage.nbytes()
            self.kept.append(storage)  # an address is not used again while its storage lives
        return tensor

    def bytes_of(self, net, x):
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda t: t):
            y = net(x)
        self.sizes.pop(y.untyped_storage().data_ptr(), None)
        return sum(self.sizes.values())


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("f32", "bf16"))
@layouts
def test_bytes_kept_for_backward(backend, dtype, channels_last):
    """Three layers behind a picture keep at most half of what conv + BN + ReLU keeps, the last output aside."""
    widths = (3, 32, 32, 32)
    ours, batch_norm = [], []
    for channels, filters in pairwise(widths):
        ours.append(dc.DeepControlConv2d(channels, filters, 3, padding=1, activation="relu", backend=backend))
        batch_norm += [nn.Conv2d(channels, filters, 3, padding=1, bias=False), nn.BatchNorm2d(filters), nn.ReLU()]
    x = torch.randn(4, 3, 16, 16, dtype=dtype)
    x = x.contiguous(memory_format=memory_format(x, channels_last))
    sizes = []
    for layers in (ours, batch_norm):
        net = nn.Sequential(*layers).to(dtype)
        sizes.append(Saved(net).bytes_of(net, x))
    assert sizes[0] <= 0.5 * sizes[1]
    # Nothing but each layer's input, one bit an output and the map means in float32.
    pixels = 4 * 16 * 16
    assert sizes[0] == pixels * sum(widths[:-1]) * dtype.itemsize + pixels * sum(widths[1:]) // 8 + 4 * 4 * sum(
        widths[1:]
    )


@every_activation
def test_backward_after_the_output_was_changed_in_place(backend, activation):
    for call, names in ((conv, NAMES), (center, NAMES[:1] + NAMES[2:])):
        leaves = operands()
        if call is center:
            leaves["input"] = leaf(2, 4, *MAPS[2])
        inputs = [leaves[name] for name in names]
        y = call(activation=activation, backend=backend)(*inputs)
        wanted = torch.autograd.grad((2 * y).sum(), inputs)
        y = call(activation=activation, backend=backend)(*inputs)
        y.mul_(2)
        for a, b in zip(wanted, torch.autograd.grad(y.sum(), inputs)):
            torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


def test_backward_twice_through_a_retained_graph(backend):
    leaves = list(operands().values())
    y = conv(activation="relu", projection=0.9, backend=backend)(*leaves)
    first, second = (torch.autograd.grad(y.sum(), leaves, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_backward_through_a_freed_graph_is_refused(backend):
    leaves = list(operands().values())
    y = conv(activation="relu", backend=backend)(*leaves)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


@pytest.mark.parametrize("name", ["input", "weight", "gain", "mean_scale"])
def test_a_change_in_place_of_what_is_kept_is_noticed(backend, name):
    leaves = operands()
    leaves[name] = leaves[name].clone()
    y = conv(backend=backend)(*leaves.values())
    leaves[name].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def first_and_second(function, leaves):
    """The output, its gradients and theirs."""
    y = function(*leaves)
    first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    return [y, *first, *torch.autograd.grad(sum(g.sin().sum() for g in first), leaves)]


@pytest.mark.parametrize("activation", ["identity", "leaky_relu", "gelu"])
def test_nodes_in_python_do_what_those_in_the_extension_do(backend, activation, monkeypatch):
    """torch.compile traces them, and Triton without the extension has no others."""
    control = (leaf(2, 4, 3, 2), leaf(4), leaf(1), leaf(1), leaf(2, 4, 3, 2))
    for call, leaves in ((conv, tuple(operands(vector=1).values())), (center, control)):
        results = []
        for nodes in (autograd._nodes, None):
            monkeypatch.setattr(autograd, "_nodes", nodes)
            results.append(first_and_second(call(activation=activation, backend=backend), leaves))
        assert all(torch.equal(a, b) for a, b in zip(*results))


def test_hooks(backend):
    """On the node, on what it keeps, and on the gradients of leaves."""
    leaves = operands()
    wanted = torch.autograd.grad(conv(activation="relu", backend=backend)(*leaves.values()).sum(), leaves.values())
    seen = []
    leaves["bias"].register_hook(lambda grad: seen.append(grad))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        y = conv(activation="relu", backend=backend)(*leaves.values())
    y.grad_fn.register_prehook(lambda grads: (grads[0] * 2, *grads[1:]))
    y.grad_fn.register_hook(lambda grads, _: seen.append(grads[0]))
    y.sum().backward()
    assert len(seen) == 2
    for grad, leaf in zip(wanted, leaves.values()):
        torch.testing.assert_close(leaf.grad, 2 * grad, rtol=1e-12, atol=1e-12)


def test_forward_and_backward_in_several_threads(backend):
    """One layer, a batch of its own in each thread: gradients arrive as if they had come one after the other."""
    layer = dc.DeepControlConv2d(4, 4, 3, padding=1, activation="relu", backend=backend).double()
    batches = torch.randn(16, 2, 4, 5, 5, dtype=torch.float64)

    def gradients(x):
        x = x.clone().requires_grad_()
        return torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(gradients, batches))
    for x, got in zip(batches, together):
        for a, b in zip(got, gradients(x)):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap(backend):
    """Over samples, and over gradients of the output in backward."""
    layer = dc.DeepControl2d(4, activation="silu", backend=backend)
    x = torch.randn(3, 2, 4, 5, 5, requires_grad=True)
    seeds = torch.randn(2, 3, 2, 4, 5, 5)
    each, mapped = torch.stack([layer(part) for part in x]), torch.func.vmap(layer)(x)
    torch.testing.assert_close(mapped, each)
    leaves = [x, *layer.parameters()]
    for y in (each, mapped):
        batched = torch.autograd.grad(y, leaves, seeds, is_grads_batched=True, retain_graph=True)
        one_by_one = zip(*(torch.autograd.grad(y, leaves, seed, retain_graph=True) for seed in seeds))
        for a, b in zip(batched, one_by_one):
            torch.testing.assert_close(a, torch.stack(b))


def test_gradients_of_a_loss_that_mixes_orders(backend):
    """A gradient penalty: the first derivative is both a result and part of the loss, as in training."""
    leaves = list(operands().values())
    results = []
    for name in ("reference", backend):
        inputs = [t.detach().clone().requires_grad_() for t in leaves]
        y = conv(activation="leaky_relu", backend=name)(*inputs)
        (grad,) = torch.autograd.grad(y.square().sum(), inputs[:1], create_graph=True)
        (y.sum() + grad.square().sum()).backward()
        results.append([t.grad for t in inputs])
    for wanted, got in zip(*results):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
