"""What only a GPU can show: graphs, streams, tensors past 2^31 elements, memory that is another's."""

from __future__ import annotations

import pytest
import torch
from conftest import GPU, library, memory_format

import deepcontrol_cuda as dc
from deepcontrol_cuda import reference

pytestmark = pytest.mark.parametrize("backend", GPU, indirect=True)
layouts = pytest.mark.parametrize("channels_last", [False, True], ids=("contiguous", "channels_last"))
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("f32", "bf16"))
every_op = pytest.mark.parametrize("op", ["conv", "center"])


@pytest.fixture(autouse=True)
def errors_are_of_this_test(backend):
    yield
    torch.cuda.synchronize()


@pytest.fixture
def ops(backend):
    return library(backend)


def maps(*shape, dtype=torch.float32, channels_last=False):
    tensor = torch.randn(shape, dtype=dtype)
    return tensor.contiguous(memory_format=memory_format(tensor, channels_last))


def training_step(op, dtype, channels_last):
    """A leaf, and what computes the output and all gradients from what is in it."""
    x = maps(4, 32, 15, 14, dtype=dtype, channels_last=channels_last).requires_grad_()
    if op == "conv":
        layer = dc.DeepControlConv2d(32, 64, 3, padding=1, activation="relu", projection=0.9)
        layer.weight.data = layer.weight.data.to(dtype, memory_format=memory_format(x, channels_last))
    else:
        layer = dc.DeepControl2d(32, activation="relu")
    grad_output = maps(4, 64 if op == "conv" else 32, 15, 14, dtype=dtype, channels_last=channels_last)

    def step():
        output = layer(x)
        return output.detach(), *torch.autograd.grad(output, [x, *layer.parameters()], grad_output)

    return x, step


def assert_all_equal(got, wanted):
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@every_op
@layouts
@dtypes
def test_a_graph_replays_on_new_data(op, channels_last, dtype):
    x, step = training_step(op, dtype, channels_last)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        assert_all_equal(captured, step())


@every_op
@layouts
@dtypes
def test_kernels_run_on_the_current_stream(op, channels_last, dtype):
    """The input is written on another stream after a long wait: a kernel that does not queue behind it reads zeros."""
    x, step = training_step(op, dtype, channels_last)
    values = torch.randn_like(x)
    with torch.no_grad():
        x.copy_(values)
    wanted = step()
    with torch.no_grad():
        x.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        with torch.no_grad():
            x.copy_(values)
        got = step()
    stream.synchronize()
    assert_all_equal(got, wanted)


def test_in_place_kernels_run_on_the_current_stream():
    p = torch.nn.Parameter(torch.empty(64, 32, 3, 3))
    values = torch.randn_like(p)
    p.grad = torch.zeros_like(p)
    dc.project_kernel_gradients_(p)  # what is compiled the first time takes longer than the sleep
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        p.grad.copy_(values)
        dc.project_kernel_gradients_(p)
    stream.synchronize()
    torch.testing.assert_close(p.grad, reference.project(values, 0.9))


@layouts
@pytest.mark.parametrize("shape", [(33, 64, 1024, 1024), (22000, 2048, 7, 7)], ids=("large maps", "many maps"))
def test_more_elements_than_31_bits_count(ops, channels_last, shape):
    """Of the first, middle and last sample, forward and backward."""
    wanted = 28 * 2**30
    free, _ = torch.cuda.mem_get_info()
    if free < wanted:
        pytest.skip(f"{free / 2**30:.0f} GiB of the GPU's memory are free, {wanted / 2**30:.0f} are needed")
    assert torch.Size(shape).numel() > 2**31

    def filled():
        format = torch.channels_last if channels_last else torch.contiguous_format
        return torch.empty(shape, dtype=torch.bfloat16, memory_format=format).normal_()

    x, grad = filled(), filled()
    gain, mean_scale, bias = (torch.rand(shape[1]) + 0.5 for _ in range(3))
    output, map_mean, saved = ops.center(x, gain, mean_scale, 1.0, bias, None, "relu", 0.0, True)
    mask = [True, False, True, True, False]
    grads = ops.center_backward(grad, None, gain, mean_scale, 1.0, map_mean, saved, "relu", 0.0, mask)
    for sample in (0, shape[0] // 2, shape[0] - 1):
        at = slice(sample, sample + 1)
        leaf = x[at].double().requires_grad_()
        vectors = [v.double() for v in (gain, mean_scale, bias)]
        exact = reference.deep_control(leaf, *vectors, activation="relu")
        assert_near(output[at], exact.detach())
        # Where rounding puts an output on the other side of zero, both gradients are right.
        same = (output[at] > 0) == (exact > 0)
        assert same.float().mean() > 0.999
        (exact_grad,) = torch.autograd.grad(exact, leaf, grad[at].double() * (output[at] > 0))
        assert_near(grads[0][at] * same, exact_grad * same, 2e-2)
        torch.testing.assert_close(map_mean[at].double(), leaf.detach().mean((2, 3)), rtol=1e-4, atol=1e-4)
    kept = output > 0
    for i in (0, shape[1] - 1):
        exact = (grad[:, i].double() * kept[:, i]).sum()
        assert abs(grads[3][i] - exact) <= 1e-4 * grad[:, i].double().abs().sum()


def test_a_convolution_of_more_elements_than_31_bits_count(ops):
    """Of the first, middle and last sample, forward and the gradient of the input."""
    wanted = 28 * 2**30
    free, _ = torch.cuda.mem_get_info()
    if free < wanted:
        pytest.skip(f"{free / 2**30:.0f} GiB of the GPU's memory are free, {wanted / 2**30:.0f} are needed")
    shape = (2100, 64, 128, 128)
    assert torch.Size(shape).numel() > 2**31

    def filled():
        return torch.empty(shape, dtype=torch.bfloat16, memory_format=torch.channels_last).normal_()

    x, grad = filled(), filled()
    w = (torch.randn(64, 64, 3, 3) / 24).to(torch.bfloat16, memory_format=torch.channels_last)
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    output, mean, saved = ops.conv_center(x, w, None, None, 1.0, None, None, *geometry, "identity", 0.0, True)
    mask = [True, False, False, False, False, False]
    grad_input = ops.conv_center_backward(
        grad, x, w, None, None, 1.0, mean, saved, *geometry, "identity", 0.0, 0.0, mask
    )[0]
    for sample in (0, shape[0] // 2, shape[0] - 1):
        at = slice(sample, sample + 1)
        leaf = x[at].double().requires_grad_()
        exact = reference.deep_control(torch.nn.functional.conv2d(leaf, w.double(), padding=1))
        assert_near(output[at], exact.detach())
        assert_near(grad_input[at], torch.autograd.grad(exact, leaf, grad[at].double())[0])


def assert_near(got, exact, tolerance=1e-2):
    assert (got.double() - exact).abs().max() <= tolerance * exact.abs().max()


@layouts
@dtypes
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_repeats_are_bit_equal(ops, channels_last, dtype, activation):
    """With more blocks than the GPU has room for, and the rest of it busy."""
    x = maps(64, 256, 28, 28, dtype=dtype, channels_last=channels_last)
    grad = maps(64, 256, 28, 28, dtype=dtype, channels_last=channels_last)
    gain = torch.rand(256) + 0.5
    busy = torch.cuda.Stream()
    noise = torch.randn(2048, 2048)
    first = None
    for _ in range(5):
        with torch.cuda.stream(busy):
            noise @ noise
        output, mean, saved = ops.center(x, gain, None, 1.0, None, None, activation, 0.0, True)
        backward = ops.center_backward(
            grad, x, gain, gain, 1.0, mean, saved, activation, 0.0, [True, True, True, True, True]
        )
        results = [output, mean, saved, *backward]
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results))


@layouts
@dtypes
@pytest.mark.parametrize("groups", [1, 2, 64], ids=("dense", "grouped", "depthwise"))
def test_repeats_of_a_convolution_are_bit_equal(channels_last, dtype, groups):
    x = maps(32, 64, 28, 28, dtype=dtype, channels_last=channels_last).requires_grad_()
    w = maps(64, 64 // groups, 3, 3, dtype=dtype, channels_last=channels_last).requires_grad_()
    grad = maps(32, 64, 28, 28, dtype=dtype, channels_last=channels_last)
    leaves = [x, w, *((torch.rand(64) + 0.5).requires_grad_() for _ in range(3))]
    busy = torch.cuda.Stream()
    noise = torch.randn(2048, 2048)
    first = None
    for _ in range(5):
        with torch.cuda.stream(busy):
            noise @ noise
        output = dc.functional.deep_control_conv2d(*leaves, padding=1, groups=groups, activation="relu")
        results = [output.detach(), *torch.autograd.grad(output, leaves, grad)]
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results))


@layouts
@dtypes
@pytest.mark.parametrize("shape", [(4, 33, 17, 64), (2, 64, 37, 32), (3, 256, 7, 7)], ids=str)
def test_nothing_is_written_beside_the_output(ops, channels_last, dtype, shape):
    """The output lands between two tensors that hold a pattern. Backward's input gradient too."""
    x = maps(*shape, dtype=dtype, channels_last=channels_last)
    grad = maps(*shape, dtype=dtype, channels_last=channels_last)
    mean, saved = ops.center(x, None, None, 1.0, None, None, "relu", 0.0, True)[1:]
    mask = [True, False, False, False, False]
    calls = (
        lambda: ops.center(x, None, None, 1.0, None, None, "relu", 0.0, False)[0],
        lambda: ops.center_backward(grad, None, None, None, 1.0, mean, saved, "relu", 0.0, mask)[0],
    )
    for call in calls:
        torch.cuda.empty_cache()
        size = x.numel() * x.element_size()
        guards = [torch.full((size,), 165, dtype=torch.uint8) for _ in range(3)]
        place = guards.pop(1).data_ptr()
        result = call()
        if result.data_ptr() != place:
            pytest.skip("the allocator put the result elsewhere")
        assert all((guard == 165).all() for guard in guards)


@dtypes
@pytest.mark.parametrize("offset", [0, 1, 8])
def test_nothing_is_written_beside_a_gradient(ops, dtype, offset):
    for shape in ((33, 7, 3, 3), (8, 16, 3, 3), (4, 3, 7, 7)):
        size = torch.Size(shape).numel()
        buffer = torch.full((size + 128,), 7.0, dtype=dtype)
        inside = slice(64 + offset, 64 + offset + size)
        p = torch.nn.Parameter(torch.empty(shape, dtype=dtype))
        p.grad = buffer[inside].view(shape)
        p.grad.normal_()
        dc.project_kernel_gradients_(p)
        ops.finish_weight_grad_(p.grad, torch.randn(shape, dtype=dtype), None, None, 0.9)
        assert (buffer[: inside.start] == 7).all()
        assert (buffer[inside.stop :] == 7).all()


@pytest.mark.parametrize("name", ["weight", "gain", "mean_scale", "bias", "residual"])
def test_a_tensor_that_stayed_on_the_cpu_is_named(name):
    x = maps(2, 4, 5, 5)
    tensors = {"weight": torch.randn(8, 4, 3, 3), "residual": maps(2, 8, 3, 3)}
    tensors |= {vector: torch.ones(8) for vector in ("gain", "mean_scale", "bias")}
    tensors[name] = tensors[name].cpu()
    with pytest.raises(ValueError, match=f"{name}: is on cpu, wanted the device of input, cuda:0"):
        dc.functional.deep_control_conv2d(x, **tensors)


def test_the_ops_refuse_tensors_of_two_devices(ops):
    """Where no function in front protects them."""
    x = maps(2, 4, 5, 5)
    with pytest.raises(ValueError, match="gain: is on cpu, wanted the device of the other tensors, cuda:0"):
        ops.center(x, torch.ones(4, device="cpu"), None, 1.0, None, None, "relu", 0.0, True)
    with pytest.raises(ValueError, match="residual: is on cpu, wanted the device of the other tensors, cuda:0"):
        ops.center(x, None, None, 1.0, None, x.cpu(), "relu", 0.0, True)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_the_second_gpu():
    """While the first is current."""
    x = maps(2, 4, 5, 5)
    wanted = dc.functional.deep_control(x, activation="relu")
    got = dc.functional.deep_control(x.to("cuda:1"), activation="relu")
    assert got.device == torch.device("cuda:1")
    torch.testing.assert_close(got.cpu(), wanted.cpu())
    with pytest.raises(ValueError, match="gain: is on cuda:1, wanted the device of input, cuda:0"):
        dc.functional.deep_control(x, torch.ones(4, device="cuda:1"))
    parameters = [torch.nn.Parameter(torch.empty(4, 4, 3, 3, device=device)) for device in ("cuda:0", "cuda:1")]
    for p in parameters:
        p.grad = torch.ones_like(p)
    dc.project_kernel_gradients_(parameters, weight=1.0)
    assert all(p.grad.eq(0).all() for p in parameters)


@layouts
def test_compiled_with_graphs_of_its_own(channels_last):
    """torch.compile's mode that captures CUDA graphs itself."""
    net = torch.nn.Sequential(
        dc.DeepControlConv2d(8, 16, 3, padding=1, activation="relu"),
        torch.nn.Conv2d(16, 16, 1),
        dc.DeepControl2d(16, activation="silu"),
    )
    net = net.to(memory_format=torch.channels_last) if channels_last else net
    compiled = torch.compile(net, mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        x = maps(4, 8, 9, 9, channels_last=channels_last)
        wanted = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
        got = torch.autograd.grad(compiled(x).square().sum(), list(net.parameters()))
        for a, b in zip(got, wanted):
            assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6
    torch.compiler.reset()


def test_the_planner_sees_this_gpu(backend):
    """Whether its kernels are proven or not, the answer names its compute capability."""
    capability = "{}.{}".format(*torch.cuda.get_device_capability())
    with dc.backends.use(None):
        text = dc.backends.explain(maps(1, 8, 3, 3))
    assert capability in text
    assert dc.backends.explain(maps(1, 8, 3, 3), backend).startswith(f"{backend}, ")
