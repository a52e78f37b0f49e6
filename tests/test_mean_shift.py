"""Mean Shift Rejection: kernels of mean zero stay so, by layers and by hooks of any optimizer."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import deepcontrol_cuda as dc
from deepcontrol_cuda import reference


def plain_net() -> nn.Sequential:
    """Plain convolutions with zero-mean kernels: an input convolution, a strided, a grouped and a 1x1 one, a head."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, 1, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=4),
        nn.Conv2d(8, 4, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5),
    )
    for module in net:
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            dc.init.zero_mean_unit_(module.weight)
    return net


def step(net: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, project=lambda: None) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(net(images), torch.arange(len(images)) % 5).backward()
    project()
    optimizer.step()


def largest_mean(kernel: torch.Tensor) -> float:
    return (kernel.detach().double().mean(reference.spatial(kernel)).abs().max() / kernel.detach().abs().max()).item()


OPTIMIZERS = {
    "sgd": lambda p, **o: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2, **o),
    "sgd-foreach": lambda p, **o: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2, foreach=True, **o),
    "sgd-fused": lambda p, **o: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2, fused=True, **o),
    "adamw": lambda p, **o: torch.optim.AdamW(p, 1e-2, **o),
    "adamw-foreach": lambda p, **o: torch.optim.AdamW(p, 1e-2, foreach=True, **o),
    "adamw-fused": lambda p, **o: torch.optim.AdamW(p, 1e-2, fused=True, **o),
    "rmsprop": lambda p, **o: torch.optim.RMSprop(p, 1e-3, **o),
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())


@pytest.mark.parametrize(
    "shape",
    [
        (8, 4, 3, 3),
        (8, 1, 5, 5),
        (6, 4, 7),
        (4, 3, 2, 3, 3),
        (8, 4, 1, 1),
        (8, 4, 1),
        (8, 4),
        (8, 1, 1, 1),
        (0, 4, 3, 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_kernels_start_with_mean_zero_and_norm_magnitude(shape, dtype):
    weight = torch.full(shape, float("nan"), dtype=dtype)
    assert dc.init.zero_mean_unit_(weight, magnitude=1.5) is weight
    exact, eps = weight.double(), torch.finfo(dtype).eps
    torch.testing.assert_close(
        exact.flatten(1).norm(dim=1), torch.full(shape[:1], 1.5, dtype=torch.float64), rtol=4 * eps, atol=0
    )
    taps = math.prod(shape[2:])
    axes = tuple(range(2, len(shape))) if taps > 1 else tuple(range(1, len(shape)))
    if weight.numel() > weight.shape[0]:
        assert (exact.mean(axes).abs() <= 2 * eps).all()
        if taps > 1 and shape[1] > 1 and shape[0]:
            assert exact.flatten(1).unique(dim=1).shape[1] == shape[1] * taps, "taps or channels share a draw"
    else:
        torch.testing.assert_close(exact.abs(), torch.full_like(exact, 1.5), rtol=2 * eps, atol=0)


def test_the_draw_is_uniform():
    """Before norms are set a kernel of many taps is nearly U(-1, 1): flat, where a normal draw has tails."""
    weight = dc.init.zero_mean_unit_(torch.empty(4, 1, 100, 100))
    ranks = (weight / weight.flatten(1).std(1).view(-1, 1, 1, 1)).abs() / math.sqrt(3)
    assert ranks.max() < 1.05
    for quantile in (0.1, 0.5, 0.9):
        assert ranks.flatten().quantile(quantile).item() == pytest.approx(quantile, abs=0.02)


def test_the_draw_is_its_generators():
    def draw(seed, **options):
        return dc.init.zero_mean_unit_(
            torch.empty(8, 4, 3, 3, **options), generator=torch.Generator().manual_seed(seed)
        )

    before = torch.random.get_rng_state()
    first = draw(1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, draw(1))
    assert torch.equal(first, draw(1).contiguous(memory_format=torch.channels_last))
    assert torch.equal(first, draw(1, memory_format=torch.channels_last))
    assert not torch.equal(first, draw(2))


@pytest.mark.parametrize(
    ("arguments", "exception", "message"),
    [
        (
            (torch.empty(4, 3, 3, 3, dtype=torch.int32),),
            TypeError,
            "weight: got torch.int32, wanted a tensor of a float",
        ),
        ((torch.empty(4, 3, 3, 3, dtype=torch.complex64),), TypeError, "weight: got torch.complex64"),
        (([1.0],), TypeError, "weight: got list"),
        ((torch.empty(4),), ValueError, r"weight: got shape \(4,\), wanted \(O, C / groups"),
        ((torch.empty(4, 3), 0.0), ValueError, "magnitude: got 0.0, wanted a positive number"),
        ((torch.empty(4, 3), float("inf")), ValueError, "magnitude: got inf"),
        ((torch.empty(4, 3), "large"), ValueError, "magnitude: got 'large'"),
    ],
)
def test_bad_initialization(arguments, exception, message):
    with pytest.raises(exception, match=message):
        dc.init.zero_mean_unit_(*arguments)


@every_optimizer
@pytest.mark.parametrize("weight", [0.9, 1.0, 0.0])
def test_hooks_do_what_projecting_by_hand_does(make, weight):
    net = plain_net()
    twin = copy.deepcopy(net)
    optimizer, by_hand = make(net.parameters()), make(twin.parameters())
    dc.MeanShiftRejection(optimizer, weight)

    def project():
        for p in twin.parameters():
            p.grad.copy_(reference.project(p.grad, weight))

    for _ in range(5):
        images = torch.randn(6, 3, 8, 8)
        step(net, optimizer, images)
        step(twin, by_hand, images, project)
    for p, wanted in zip(net.parameters(), twin.parameters()):
        torch.testing.assert_close(p, wanted, rtol=1e-4, atol=1e-5)


def test_means_stay_where_projected_and_move_elsewhere():
    net = plain_net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=1e-2)
    dc.MeanShiftRejection(optimizer, 1.0, scope=dc.spatial_kernels(net))
    for _ in range(20):
        step(net, optimizer, torch.randn(6, 3, 8, 8) + 1)
    assert largest_mean(net[2].weight) < 1e-6
    assert largest_mean(net[4].weight) < 1e-6
    assert largest_mean(net[0].weight) > 1e-3, "the input convolution is out of scope"


def test_the_amplified_form_is_the_plain_one_at_a_larger_learning_rate():
    net = plain_net()
    twin = copy.deepcopy(net)
    kernels = dc.spatial_kernels(net, input_convolution=True)
    groups = [{"params": kernels, "lr": 0.05}, {"params": [p for p in net.parameters() if p.dim() != 4], "lr": 0.3}]
    amplified = torch.optim.SGD(groups, momentum=0.9)
    dc.MeanShiftRejection(amplified, amplification=9.0)
    groups = [
        {"params": dc.spatial_kernels(twin, input_convolution=True), "lr": 0.5},
        {"params": [p for p in twin.parameters() if p.dim() != 4], "lr": 0.3},
    ]
    plain = torch.optim.SGD(groups, momentum=0.9)
    dc.MeanShiftRejection(plain, 0.9)
    for _ in range(3):
        images = torch.randn(6, 3, 8, 8)
        step(net, amplified, images)
        step(twin, plain, images)
    for p, wanted in zip(net.parameters(), twin.parameters()):
        torch.testing.assert_close(p, wanted, rtol=1e-4, atol=1e-5)


@every_optimizer
def test_recenter_keeps_kernels_at_mean_zero(make):
    net = plain_net()
    optimizer = make(net.parameters())
    dc.MeanShiftRejection(optimizer, 1.0, recenter=True)
    for _ in range(50):
        step(net, optimizer, torch.randn(6, 3, 8, 8) + 1)
    for kernel in (net[0].weight, net[2].weight, net[4].weight):
        assert largest_mean(kernel) < 2e-7


def test_without_recenter_adam_gives_kernels_a_mean():
    net = plain_net()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    dc.MeanShiftRejection(optimizer, 1.0)
    for _ in range(50):
        step(net, optimizer, torch.randn(6, 3, 8, 8) + 1)
    assert largest_mean(net[2].weight) > 1e-3


@pytest.mark.parametrize("positional", [True, False], ids=["positional", "keyword"])
@pytest.mark.parametrize("kind", ["sgd", "lbfgs"])
def test_gradients_of_a_closure_are_projected(kind, positional):
    net = plain_net()
    kernel = net[2].weight
    if kind == "sgd":
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
    else:
        optimizer = torch.optim.LBFGS(net.parameters(), 0.1, max_iter=5)
    dc.MeanShiftRejection(optimizer, 1.0)
    images, before, calls = torch.randn(6, 3, 8, 8) + 1, kernel.detach().clone(), []

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(images), torch.arange(6) % 5)
        loss.backward()
        calls.append(loss.item())
        return loss

    loss = optimizer.step(closure) if positional else optimizer.step(closure=closure)
    assert loss.item() == calls[0]
    assert not torch.equal(kernel, before)
    assert largest_mean(kernel) < 1e-6


def test_accumulated_micro_batches_equal_one_batch():
    net = plain_net()
    twin = copy.deepcopy(net)
    optimizers = [torch.optim.SGD(n.parameters(), 0.1) for n in (net, twin)]
    for optimizer in optimizers:
        dc.MeanShiftRejection(optimizer)
    images, labels = torch.randn(8, 3, 8, 8), torch.arange(8) % 5
    nn.functional.cross_entropy(net(images), labels).backward()
    for part, wanted in zip(images.chunk(4), labels.chunk(4)):
        (nn.functional.cross_entropy(twin(part), wanted) / 4).backward()
    for optimizer in optimizers:
        optimizer.step()
    for p, wanted in zip(twin.parameters(), net.parameters()):
        torch.testing.assert_close(p, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_a_grad_scaler_changes_nothing_and_its_skipped_steps_stay_skipped(fused):
    net = plain_net()
    twin = copy.deepcopy(net)
    scaled, unscaled = (torch.optim.SGD(n.parameters(), 0.1, momentum=0.9, fused=fused) for n in (net, twin))
    for optimizer in (scaled, unscaled):
        dc.MeanShiftRejection(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    labels = torch.arange(6) % 5
    for attempt in range(3):
        images = torch.randn(6, 3, 8, 8)
        if attempt == 1:
            before = copy.deepcopy(net.state_dict())
            scaled.zero_grad()
            scaler.scale(nn.functional.cross_entropy(net(images * float("inf")), labels)).backward()
            scaler.step(scaled)
            scaler.update()
            assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
            assert scaler.get_scale() == 2.0**9
        scaled.zero_grad()
        scaler.scale(nn.functional.cross_entropy(net(images), labels)).backward()
        scaler.unscale_(scaled)
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        scaler.step(scaled)
        scaler.update()
        step(twin, unscaled, images, lambda: nn.utils.clip_grad_norm_(twin.parameters(), 0.1))
    for p, wanted in zip(net.parameters(), twin.parameters()):
        torch.testing.assert_close(p, wanted, rtol=1e-4, atol=1e-6)


def test_scope():
    net = plain_net()
    kernels = [net[0].weight, net[2].weight, net[4].weight]
    optimizer = torch.optim.SGD(net[:4].parameters(), 0.1)
    hooks = dc.MeanShiftRejection(optimizer)
    assert [id(k) for k in hooks.kernels()] == [id(k) for k in kernels[:2]]
    optimizer.add_param_group({"params": list(net[4:].parameters())})
    assert [id(k) for k in hooks.kernels()] == [id(k) for k in kernels]
    assert "3 kernels" in repr(hooks)
    assert [id(k) for k in dc.spatial_kernels(net)] == [id(k) for k in kernels[1:]]
    assert [id(k) for k in dc.spatial_kernels(net, input_convolution=True)] == [id(k) for k in kernels]
    own = nn.Sequential(nn.Conv2d(3, 4, 3), dc.MeanShiftConv2d(4, 4, 3), dc.MeanShiftConv2d(4, 4, 3, projection=0.0))
    assert [id(k) for k in dc.spatial_kernels(own)] == [id(own[2].weight)]
    nn.utils.parametrizations.weight_norm(net[2])
    assert [id(k) for k in dc.spatial_kernels(net)] == [id(kernels[2])]


def tied_net() -> nn.Sequential:
    net = plain_net()
    net[4] = nn.Conv2d(8, 8, 3, padding=1)
    net[4].weight = net[2].weight
    return net


def test_a_kernel_of_two_layers_is_projected_once():
    net = tied_net()
    kernel = net[2].weight
    assert [id(k) for k in dc.spatial_kernels(net)] == [id(kernel)]
    gradient = torch.randn_like(kernel)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    hooks = dc.MeanShiftRejection(optimizer, amplification=9.0, scope=[kernel, kernel])
    kernel.grad = gradient.clone()
    optimizer.step()
    torch.testing.assert_close(kernel.grad, 10 * reference.project(gradient, 0.9), rtol=1e-4, atol=1e-5)
    hooks.remove()
    kernel.grad = gradient.clone()
    dc.project_kernel_gradients_([kernel, kernel], 0.9)
    torch.testing.assert_close(kernel.grad, reference.project(gradient, 0.9))
    norms = kernel.flatten(1).norm(dim=1)
    torch.testing.assert_close(dc.unity_decay([kernel, kernel], 1.0), (norms - 1).square().sum())
    net = plain_net()
    net[0] = nn.Conv2d(8, 8, 3, padding=1)
    net[2].weight = net[0].weight
    assert [id(k) for k in dc.spatial_kernels(net)] == [id(net[4].weight)], "it is the input convolution's too"


def test_frozen_kernels_are_out_of_scope_and_are_not_recentered():
    net = plain_net()
    net[2].weight.requires_grad_(False)
    kernels = dc.spatial_kernels(net)
    assert [id(k) for k in kernels] == [id(net[4].weight)]
    trained = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 1e-2)
    dc.MeanShiftRejection(trained, scope=kernels, recenter=True)
    everything = torch.optim.AdamW(net.parameters(), 1e-2)
    dc.MeanShiftRejection(everything, recenter=True)
    with torch.no_grad():
        net[2].weight += 1
    before = net[2].weight.clone()
    for optimizer in (trained, everything):
        step(net, optimizer, torch.randn(6, 3, 8, 8))
    assert torch.equal(net[2].weight, before)
    assert largest_mean(net[4].weight) < 2e-7


def test_hooks_are_not_copied_in_silence():
    optimizer = torch.optim.SGD(plain_net().parameters(), 0.1)
    hooks = dc.MeanShiftRejection(optimizer)
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied: make one for the copy of its optimizer"):
            copied(hooks)


def test_removed_hooks_do_nothing():
    net = plain_net()
    twin = copy.deepcopy(net)
    optimizer, bare = (torch.optim.AdamW(n.parameters(), 1e-2) for n in (net, twin))
    hooks = dc.MeanShiftRejection(optimizer, recenter=True)
    hooks.remove()
    hooks.remove()
    images = torch.randn(6, 3, 8, 8)
    step(net, optimizer, images)
    step(twin, bare, images)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters()))


def test_a_parameter_without_a_gradient_is_passed_over():
    net = plain_net()
    net[2].weight.requires_grad_(False)
    before = net[2].weight.clone()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    dc.MeanShiftRejection(optimizer)
    step(net, optimizer, torch.randn(6, 3, 8, 8))
    assert torch.equal(net[2].weight, before)


def of(*parameters: nn.Parameter) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, 0.1)


SPATIAL, ONE_TAP = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Parameter(torch.randn(4, 3, 1, 1))


@pytest.mark.parametrize(
    ("build", "exception", "message"),
    [
        (lambda: dc.MeanShiftRejection([SPATIAL]), TypeError, "optimizer: got list"),
        (lambda: dc.MeanShiftRejection(of(SPATIAL), 1.5), ValueError, "weight: got 1.5, wanted a number from 0 to 1"),
        (lambda: dc.MeanShiftRejection(of(SPATIAL), -0.1), ValueError, "weight: got -0.1"),
        (lambda: dc.MeanShiftRejection(of(SPATIAL), "all"), TypeError, "weight: got 'all'"),
        (lambda: dc.MeanShiftRejection(of(SPATIAL), 0.9, amplification=9), ValueError, "amplification: got weight too"),
        (lambda: dc.MeanShiftRejection(of(SPATIAL), amplification=0), ValueError, "amplification: got 0, wanted a p"),
        (lambda: dc.MeanShiftRejection(of(ONE_TAP)), ValueError, "none of its parameters is a kernel .* more than one"),
        (lambda: dc.MeanShiftRejection(of(SPATIAL), scope=[]), ValueError, "none of its parameters is a kernel"),
        (
            lambda: dc.MeanShiftRejection(of(SPATIAL, ONE_TAP), scope=[ONE_TAP]),
            ValueError,
            r"scope: got a kernel \(4, 3, 1, 1\) with one tap, wanted more: its whole gradient",
        ),
        (lambda: dc.MeanShiftRejection(of(ONE_TAP), scope=[SPATIAL]), ValueError, "that the optimizer does not hold"),
        (lambda: dc.MeanShiftRejection(of(SPATIAL), scope=["conv"]), TypeError, "scope: got str"),
        (
            lambda: dc.MeanShiftRejection(of(SPATIAL), recenter=True),
            ValueError,
            "recenter: got a kernel .* wanted kernels of mean zero: initialise them with init.zero_mean_unit_",
        ),
        (lambda: dc.unity_decay([SPATIAL], -1.0), ValueError, "weight: got -1.0, wanted a number of at least 0"),
        (lambda: dc.unity_decay([torch.ones(3)]), ValueError, "got none with two or more dimensions"),
        (lambda: dc.unity_decay(["w"]), TypeError, "parameters: got str"),
        (lambda: dc.unity_decay(nn.Conv2d(3, 4, 3)), TypeError, "parameters: got the module Conv2d, wanted its param"),
        (lambda: dc.MeanShiftRejection(of(SPATIAL), scope=nn.Conv2d(3, 4, 3)), TypeError, "scope: got the module Co"),
        (lambda: dc.spatial_kernels(of(SPATIAL)), TypeError, "model: got SGD, wanted a torch.nn.Module"),
        (lambda: dc.calibrate_gain_(nn.Conv2d(3, 4, 3), [(SPATIAL, 1)]), TypeError, "batch: got pairs, as of a data l"),
        (lambda: dc.MeanShiftConv2d(3, 4, 3, scaling="log"), ValueError, "scaling: got 'log', wanted 'exp', 'linear'"),
        (lambda: dc.MeanShiftConv2d(3, 4, 3, initial_scale=0.0), ValueError, "initial_scale: got 0.0, wanted a posit"),
        (lambda: dc.MeanShiftConv2d(3, 4, 3, scaling_noise=1.5), ValueError, "scaling_noise: got 1.5, wanted a number"),
        (lambda: dc.MeanShiftConv2d(3, 4, 3, projection=2), ValueError, "projection: got 2, wanted a number"),
        (lambda: dc.MapNoise(1.5), ValueError, "scale: got 1.5, wanted a number from 0 to 1"),
        (lambda: dc.MapNoise(0.1, -1.0), ValueError, "shift: got -1.0, wanted a number of at least 0"),
        (lambda: dc.MapNoise(0.1, float("nan")), ValueError, "shift: got nan"),
        (lambda: dc.MapNoise(0.1, "x"), TypeError, "shift: got 'x'"),
        (lambda: dc.MapNoise()(torch.ones(3)), ValueError, r"input: got shape \(3,\), wanted \(N, C, \*spatial\)"),
        (lambda: dc.MapNoise()(torch.ones(2, 3, 4, dtype=torch.int64)), TypeError, "input: got dtype torch.int64"),
        (lambda: dc.MapNoise()([1.0]), TypeError, "input: got list"),
    ],
)  # fmt: skip
def test_bad_arguments(build, exception, message):
    with pytest.raises(exception, match=message):
        build()


@pytest.mark.parametrize(
    ("grad", "message"),
    [
        (torch.zeros(4, 3, 3, 3).to_sparse(), "gradient of layout torch.sparse_coo, wanted a dense one"),
        (torch.zeros(4, 3, 3, 3, dtype=torch.complex64), "gradient of torch.complex64, wanted a floating dtype"),
    ],
    ids=["sparse", "complex"],
)
def test_gradients_that_cannot_be_projected_are_refused(grad, message):
    p = nn.Parameter(torch.zeros(4, 3, 3, 3, dtype=grad.dtype))
    p.grad = grad
    with pytest.raises(TypeError, match=message):
        dc.project_kernel_gradients_(p)
    optimizer = of(p)
    dc.MeanShiftRejection(optimizer)
    with pytest.raises(TypeError, match=message):
        optimizer.step()


def test_unity_decay_is_its_formula():
    parameters = [
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(4, 3, 3, 3), (5, 4), (5,), (0, 3, 3)]
    ]
    wanted = sum(0.5 * (p.flatten(1).norm(dim=1) - 1).square().sum() for p in parameters[:2])
    torch.testing.assert_close(dc.unity_decay(parameters, 0.5), wanted)
    assert torch.autograd.gradcheck(lambda *p: dc.unity_decay(p, 0.5), parameters[:2])
    half = torch.full((2, 8), 0.5, dtype=torch.bfloat16)
    assert dc.unity_decay(half, 1.0).dtype == torch.float32
    assert dc.unity_decay(half, 1.0).item() == pytest.approx(2 * (2**0.5 - 1) ** 2)
    dead = torch.zeros(2, 3, requires_grad=True)
    dc.unity_decay(dead).backward()
    assert torch.isfinite(dead.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shift", [0.0, 0.5])
@pytest.mark.parametrize("shape", [(64, 32, 3, 2), (64, 32, 5), (64, 32, 2, 2, 2), (64, 32)], ids=str)
def test_map_noise_is_one_factor_and_one_offset_a_map(shape, shift, dtype):
    x = torch.randn(shape, dtype=dtype)
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    y = dc.functional.map_noise(x, 0.25, shift, generator=torch.Generator().manual_seed(3))
    assert y.dtype == dtype
    assert y.stride() == x.stride()
    generator = torch.Generator().manual_seed(3)
    wide = torch.promote_types(dtype, torch.float32)
    size = (*shape[:2], *(1,) * (len(shape) - 2))
    factor = torch.empty(size, dtype=wide).uniform_(0.75, 1.25, generator=generator)
    offset = torch.empty(size, dtype=wide).uniform_(-shift, shift, generator=generator) if shift else 0.0
    # Rounded are the factor, the product of both, the result.
    bound = 2 * torch.finfo(dtype).eps * (x.double().abs().max() + shift) * 1.25
    assert (y.double() - (x.double() - offset) * factor).abs().max() <= bound
    assert factor.min() < 0.76
    assert factor.max() > 1.24


def test_map_noise_has_its_gradient_and_keeps_no_map():
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        y = dc.functional.map_noise(x, 0.5, 0.1)
    y.sum().backward()
    assert sum(kept) <= 12
    constant = x.grad.flatten(2)
    assert torch.equal(constant, constant[..., :1].expand_as(constant))
    assert constant[..., 0].unique().numel() == 12


def test_map_noise_is_for_training_and_repeats_with_its_seed():
    noise, x = dc.MapNoise(0.3, 0.1), torch.randn(4, 3, 5, 5)
    assert noise.eval()(x) is x
    assert dc.MapNoise(0.0, 0.0)(x) is x
    noise.train()
    torch.manual_seed(5)
    first, second = noise(x), noise(x)
    torch.manual_seed(5)
    assert torch.equal(noise(x), first)
    assert not torch.equal(first, second)
    own = dc.MapNoise(0.3, generator=torch.Generator().manual_seed(1))
    before = torch.random.get_rng_state()
    own(x)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert repr(noise) == "MapNoise(scale=0.3, shift=0.1)"


def test_map_noise_under_checkpointing_compile_and_autocast():
    noise = dc.MapNoise(0.3)
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(lambda x: noise(x).square(), x, use_reentrant=False)
    y.sum().backward()
    factor = (y.detach() / x.detach().square()).sqrt()
    torch.testing.assert_close(x.grad, 2 * x.detach() * factor.square(), rtol=1e-4, atol=1e-5)
    compiled = torch.compile(noise, backend="aot_eager", fullgraph=True)
    torch.manual_seed(5)
    wanted = noise(x)
    torch.manual_seed(5)
    torch.testing.assert_close(compiled(x), wanted)
    with torch.autocast("cpu", torch.bfloat16):
        assert noise(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("scaling", ["exp", "linear", None])
@pytest.mark.parametrize("shared", [False, True], ids=["per-filter", "shared"])
@pytest.mark.parametrize("rank", [1, 2, 3], ids=("1d", "2d", "3d"))
def test_a_layer_is_a_convolution_by_scaled_kernels(backend, rank, shared, scaling):
    layer = (dc.MeanShiftConv1d, dc.MeanShiftConv2d, dc.MeanShiftConv3d)[rank - 1](
        4, 6, 3, 2, 1, groups=2, bias=True, scaling=scaling, shared=shared, activation="relu"
    )
    names = {"exp": {"log_scale"}, "linear": {"scale"}, None: set()}[scaling]
    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias"} | names
    scale = {"exp": lambda: layer.log_scale.exp(), "linear": lambda: layer.scale, None: lambda: torch.ones(1)}[scaling]
    torch.testing.assert_close(scale(), torch.full((1 if shared or not scaling else 6,), 0.8 if scaling else 1.0))
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    x = torch.randn(3, 4, *(7, 6, 5)[:rank])
    conv = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[rank - 1]
    kernel = layer.weight * scale().view(-1, *(1,) * (rank + 1))
    z = conv(x, kernel, layer.bias, 2, 1, 1, 2)
    residual = torch.randn_like(z)
    torch.testing.assert_close(layer(x), z.relu(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(x, residual), (z + residual).relu(), rtol=1e-4, atol=1e-5)


def test_a_layers_gradient_is_projected_and_trains_to_kernels_of_mean_zero(backend):
    plain, layer = dc.MeanShiftConv2d(4, 6, 3, projection=0.0), dc.MeanShiftConv2d(4, 6, 3)
    layer.load_state_dict(plain.state_dict())
    x = torch.randn(3, 4, 6, 6)
    for module in (plain, layer):
        module(x).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, reference.project(plain.weight.grad, 0.9), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.log_scale.grad, plain.log_scale.grad)
    one_tap = dc.MeanShiftConv2d(4, 6, 1)
    one_tap(x).sum().backward()
    assert one_tap.weight.grad.abs().min() > 0


def test_scaling_noise_is_one_draw_a_filter_and_only_in_training():
    layer = dc.MeanShiftConv2d(4, 256, 3, scaling_noise=0.5, shared=True)
    x = torch.randn(3, 4, 6, 6)
    quiet = layer.eval()(x)
    assert torch.equal(layer(x), quiet)
    layer.train()
    torch.manual_seed(2)
    noisy = layer(x)
    ratios = (noisy / quiet).transpose(0, 1).flatten(1)
    torch.testing.assert_close(ratios, ratios[:, :1].expand_as(ratios), rtol=1e-3, atol=1e-3)
    assert 0.5 <= ratios.min() < 0.55
    assert 1.45 < ratios.max() <= 1.5 + 1e-3
    torch.manual_seed(2)
    assert torch.equal(layer(x), noisy)
    assert not torch.equal(layer(x), noisy)
    bare = dc.MeanShiftConv2d(4, 8, 3, scaling=None, scaling_noise=0.5)
    assert not torch.equal(bare(x), bare(x))


def test_a_net_of_layers_compiles_without_breaks_and_under_autocast():
    net = nn.Sequential(
        dc.MeanShiftConv2d(3, 8, 3, bias=True, projection=0.0, activation="relu"),
        dc.MapNoise(0.1),
        dc.MeanShiftConv2d(8, 8, 3, scaling_noise=0.1, activation="relu"),
        dc.MeanShiftConv2d(8, 4, 1, scaling="linear"),
    )
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 3, 8, 8)
    for autocast in (False, True):
        gradients = []
        for forward in (net, compiled):
            net.zero_grad()
            torch.manual_seed(1)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                y = forward(x)
            assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
            y.float().square().sum().backward()
            gradients.append([p.grad.clone() for p in net.parameters()])
        for eager, from_graph in zip(*gradients):
            assert eager.dtype == torch.float32
            torch.testing.assert_close(
                from_graph, eager, rtol=2e-2 if autocast else 1e-4, atol=1e-2 if autocast else 1e-4
            )
