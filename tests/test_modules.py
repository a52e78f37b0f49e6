"""The modules take the place of ``nn.ConvNd`` and ``nn.BatchNormNd``: arguments, state, copies, devices, training."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn

import deepcontrol_cuda as dc
from deepcontrol_cuda import reference

CONVS = {
    1: (dc.DeepControlConv1d, nn.Conv1d),
    2: (dc.DeepControlConv2d, nn.Conv2d),
    3: (dc.DeepControlConv3d, nn.Conv3d),
}
NORMS = {
    1: (dc.DeepControl1d, nn.BatchNorm1d),
    2: (dc.DeepControl2d, nn.BatchNorm2d),
    3: (dc.DeepControl3d, nn.BatchNorm3d),
}
MAPS = (7, 6, 5)
ranks = pytest.mark.parametrize("rank", [1, 2, 3], ids=("1d", "2d", "3d"))
modules = pytest.mark.parametrize(
    "build",
    [
        lambda **where: dc.DeepControl2d(4, activation="leaky_relu", negative_slope=0.2, **where),
        lambda **where: dc.DeepControl2d(4, gain=False, mean_scale=0.5, shared=True, **where),
        lambda **where: dc.DeepControlConv2d(4, 4, 3, padding=1, activation="silu", projection=0.9, **where),
        lambda **where: dc.DeepControlConv2d(4, 4, 3, padding="same", bias=False, shared=True, **where),
        lambda **where: dc.MeanShiftConv2d(4, 4, 3, padding=1, bias=True, activation="relu", **where),
        lambda **where: dc.MeanShiftConv2d(4, 4, 3, padding=1, scaling="linear", shared=True, projection=0.0, **where),
    ],
    ids=["center", "center-fixed", "conv", "conv-shared", "mean-shift", "mean-shift-linear"],
)


def shaken(module: nn.Module) -> nn.Module:
    """``module`` with parameters far from their initial values."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p))
    return module


def vectors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p for name, p in module.named_parameters() if name != "weight"}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_vectors_are_maps_of_one_pixel(backend):
    """As ``BatchNorm1d`` does, ``DeepControl1d`` takes (N, C), where it leaves the mean in."""
    norm = shaken(dc.DeepControl1d(4, mean_scale=0.0, activation="silu", backend=backend).double())
    x, residual = (torch.randn(5, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    got = norm(x, residual)
    torch.testing.assert_close(got, nn.functional.silu(x * norm.gain + norm.bias + residual))
    torch.testing.assert_close(got, norm(x.unsqueeze(-1), residual.unsqueeze(-1)).squeeze(-1), rtol=0, atol=0)
    assert torch.autograd.gradcheck(norm, (x, residual))
    assert norm(x[:0]).shape == (0, 4)


def test_vectors_have_no_mean():
    for mean_scale in (True, False, 0.5):
        with pytest.raises(ValueError, match=r"\(5, 4\), but vectors have no map.*\(N, 4, L\).*mean_scale=0\.0"):
            dc.DeepControl1d(4, mean_scale=mean_scale)(torch.ones(5, 4))
    with pytest.raises(ValueError, match=r"\(5, 3\), wanted \(N, 4, \*spatial\)"):
        dc.DeepControl1d(4, mean_scale=0.0)(torch.ones(5, 3))
    with pytest.raises(ValueError, match=r"\(5, 4\), wanted \(N, 4, \*spatial\) with 2"):
        dc.DeepControl2d(4, mean_scale=0.0)(torch.ones(5, 4))
    with pytest.raises(ValueError, match="residual: got shape"):
        dc.DeepControl1d(4, mean_scale=0.0)(torch.ones(5, 4), torch.ones(5, 3))


@ranks
def test_arguments_stand_where_torch_has_them(rank):
    conv, plain = CONVS[rank]
    wanted = list(inspect.signature(plain).parameters)
    positional = [p.name for p in inspect.signature(conv).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == wanted
    norm, batch_norm = NORMS[rank]
    assert next(iter(inspect.signature(norm).parameters)) == next(iter(inspect.signature(batch_norm).parameters))
    assert issubclass(conv, plain)
    mean_shift = (dc.MeanShiftConv1d, dc.MeanShiftConv2d, dc.MeanShiftConv3d)[rank - 1]
    positional = [
        p.name for p in inspect.signature(mean_shift).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    assert positional == wanted
    assert issubclass(mean_shift, plain)


@ranks
@pytest.mark.parametrize("padding_mode", ["zeros", "circular", "reflect", "replicate"])
def test_positional_arguments_mean_what_they_mean_in_torch(rank, padding_mode):
    conv, plain = CONVS[rank]
    arguments = (4, 6, 3, 2, 1, 1, 2, True, padding_mode, "cpu", torch.float64)
    layer, peer = shaken(conv(*arguments)), plain(*arguments[:7], False, *arguments[8:])
    peer.load_state_dict({"weight": layer.weight})
    x = torch.randn(2, 4, *MAPS[:rank], dtype=torch.float64)
    wanted = reference.deep_control(peer(x), layer.gain, layer.mean_scale, layer.bias)
    torch.testing.assert_close(layer(x), wanted)


@ranks
@pytest.mark.parametrize("mode", ["zeros", "circular"])
def test_same_padding_of_an_even_kernel(rank, mode):
    conv, plain = CONVS[rank]
    layer = conv(4, 6, 2, padding="same", padding_mode=mode)
    peer = plain(4, 6, 2, padding="same", padding_mode=mode, bias=False)
    peer.load_state_dict({"weight": layer.weight})
    x = torch.randn(2, 4, *MAPS[:rank])
    torch.testing.assert_close(layer(x), reference.deep_control(peer(x)), rtol=1e-5, atol=1e-5)


@ranks
def test_center_behind_any_layer(rank):
    layer = shaken(NORMS[rank][0](4, activation="relu6"))
    x, residual = torch.randn(2, 2, 4, *MAPS[:rank])
    wanted = reference.deep_control(x, layer.gain, layer.mean_scale, layer.bias, residual=residual, activation="relu6")
    torch.testing.assert_close(layer(x, residual), wanted)


@ranks
def test_initial_values(rank):
    """The vectors are neutral and the weight is what ``nn.ConvNd`` draws from the same seed."""
    conv, plain = CONVS[rank]
    torch.manual_seed(3)
    layer = conv(4, 6, 3, groups=2)
    torch.manual_seed(3)
    assert torch.equal(layer.weight, plain(4, 6, 3, groups=2, bias=False).weight)
    for module, size in ((layer, 6), (NORMS[rank][0](5), 5)):
        for name, value in (("gain", 1.0), ("mean_scale", 1.0), ("bias", 0.0)):
            assert torch.equal(getattr(module, name), torch.full((size,), value))
            assert getattr(module, name).requires_grad


@modules
def test_reset_parameters_returns_to_the_initial_values(build):
    torch.manual_seed(3)
    layer = build()
    before = copy.deepcopy(layer.state_dict())
    shaken(layer)
    torch.manual_seed(3)
    layer.reset_parameters()
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


@pytest.mark.parametrize(
    "build",
    [lambda **o: dc.DeepControl2d(4, **o), lambda **o: dc.DeepControlConv2d(3, 4, 3, **o)],
    ids=["center", "conv"],
)
@pytest.mark.parametrize(
    ("options", "sizes", "fixed"),
    [
        ({}, {"gain": 4, "mean_scale": 4, "bias": 4}, None),
        ({"gain": False}, {"mean_scale": 4, "bias": 4}, None),
        ({"bias": False}, {"gain": 4, "mean_scale": 4}, None),
        ({"mean_scale": False}, {"gain": 4, "bias": 4}, 1.0),
        ({"mean_scale": 0.0}, {"gain": 4, "bias": 4}, 0.0),
        ({"mean_scale": 1}, {"gain": 4, "bias": 4}, 1.0),
        ({"shared": True}, {"gain": 1, "mean_scale": 1, "bias": 4}, None),
        ({"gain": False, "mean_scale": 0.5, "bias": False}, {}, 0.5),
    ],
    ids=["all", "no-gain", "no-bias", "no-mean_scale", "zero", "int", "shared", "none"],
)
def test_options_decide_what_is_learned(build, options, sizes, fixed):
    layer = shaken(build(**options))
    assert {name: p.numel() for name, p in vectors(layer).items()} == sizes
    is_conv = isinstance(layer, nn.Conv2d)
    x = torch.randn(2, 3 if is_conv else 4, 6, 5, requires_grad=True)
    z = nn.functional.conv2d(x, layer.weight) if is_conv else x
    mean_scale = layer.mean_scale if fixed is None else fixed
    wanted = reference.deep_control(z, layer.gain, mean_scale, layer.bias)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-5)
    layer(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in layer.parameters())


@modules
def test_training_and_evaluation_are_the_same(build):
    layer = shaken(build())
    x = torch.randn(2, 4, 5, 5)
    before = copy.deepcopy(layer.state_dict())
    assert torch.equal(layer.train()(x), layer.eval()(x))
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())
    assert not list(layer.buffers())


def through_file(layer):
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def reloaded(layer, build):
    other = build()
    other.load_state_dict(through_file(layer))
    return other


@modules
@pytest.mark.parametrize(
    "copied",
    [
        reloaded,
        lambda layer, build: copy.deepcopy(layer),
        lambda layer, build: pickle.loads(pickle.dumps(layer)),
    ],
    ids=["state_dict", "deepcopy", "pickle"],
)
def test_copies_compute_the_same_and_share_nothing(build, copied):
    layer = shaken(build())
    other = copied(layer, build)
    x = torch.randn(2, 4, 5, 5)
    wanted = layer(x)
    assert torch.equal(other(x), wanted)
    assert repr(other) == repr(layer)
    shaken(other)
    assert torch.equal(layer(x), wanted)


def test_state_dict_of_other_options_is_refused():
    state = dc.DeepControlConv2d(4, 4, 3).state_dict()
    assert set(state) == {"weight", "gain", "mean_scale", "bias"}
    with pytest.raises(RuntimeError, match="gain"):
        dc.DeepControlConv2d(4, 4, 3, shared=True).load_state_dict(state)


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (lambda: dc.DeepControl1d(4), "DeepControl1d(4)"),
        (
            lambda: dc.DeepControl2d(4, bias=False, gain=False, mean_scale=0.5, shared=True, backend="reference"),
            "DeepControl2d(4, bias=False, gain=False, mean_scale=0.5, shared=True, backend='reference')",
        ),
        (
            lambda: dc.DeepControl3d(4, activation="leaky_relu", negative_slope=0.2),
            "DeepControl3d(4, activation='leaky_relu', negative_slope=0.2)",
        ),
        (
            lambda: dc.DeepControlConv2d(3, 8, 3, stride=2, padding=1, bias=False, activation="relu", projection=0.9),
            "DeepControlConv2d(3, 8, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), bias=False, activation='relu', "
            "projection=0.9)",
        ),
        (
            lambda: dc.MeanShiftConv2d(3, 8, 1, shared=True, scaling_noise=0.1, activation="relu", backend="cpu"),
            "MeanShiftConv2d(3, 8, kernel_size=(1, 1), stride=(1, 1), bias=False, scaling='exp', shared=True, "
            "scaling_noise=0.1, projection=0.9, activation='relu', backend='cpu')",
        ),
    ],
    ids=["plain", "options", "slope", "conv", "mean-shift"],
)
def test_extra_repr(layer, text):
    assert repr(layer()) == text


@modules
def test_meta_device(build):
    with torch.device("meta"):
        layer = build()
    assert all(p.is_meta for p in layer.parameters())
    layer.to_empty(device="cpu")
    torch.manual_seed(3)
    layer.reset_parameters()
    torch.manual_seed(3)
    wanted = build().state_dict()
    assert all(torch.equal(wanted[name], value) for name, value in layer.state_dict().items())
    assert torch.isfinite(layer(torch.randn(2, 4, 5, 5))).all()


@modules
def test_shapes_are_inferred_on_the_meta_device(build):
    layer = build(device="meta")
    assert layer(torch.empty(2, 4, 5, 5, device="meta")).shape == (2, 4, 5, 5)


@modules
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=("f64", "bf16"))
def test_device_and_dtype(build, dtype):
    layer = build(device="cpu", dtype=dtype)
    assert all(p.dtype == dtype for p in layer.parameters())
    x = torch.randn(2, 4, 5, 5)
    assert layer(x.to(dtype)).dtype == dtype
    assert layer.float()(x).dtype == torch.float32


def test_a_module_without_parameters_has_no_say_in_the_dtype():
    layer = dc.DeepControl2d(4, gain=False, mean_scale=False, bias=False)
    assert layer(torch.randn(2, 4, 3, 3, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("name", ["reference", "cpu"])
def test_the_backend_of_a_module(monkeypatch, name):
    called = []
    for place, function, what in (
        (dc.functional.reference, "deep_control_conv", "reference"),
        (dc.functional.autograd, "conv_center", "cpu"),
    ):
        original = getattr(place, function)
        monkeypatch.setattr(place, function, lambda *a, f=original, what=what, **k: called.append(what) or f(*a, **k))
    dc.DeepControlConv2d(3, 4, 3, backend=name)(torch.randn(1, 3, 5, 5))
    assert called == [name]


@modules
def test_a_few_steps_of_an_optimizer_lower_the_loss(backend, build):
    layer = build()
    head = nn.Conv2d(4, 1, 1)
    optimizer = torch.optim.SGD([*layer.parameters(), *head.parameters()], lr=0.1)
    x = torch.randn(4, 4, 5, 5)
    target = x.relu().mean(1, keepdim=True)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = (head(layer(x)) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    before = copy.deepcopy(layer.state_dict())
    optimizer.zero_grad()
    assert all(p.grad is None for p in layer.parameters())
    optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_projection_reaches_the_gradient_of_the_kernel(backend):
    """Full projection leaves kernel gradients of mean zero, and the other gradients as they are."""
    plain, projected = (dc.DeepControlConv2d(4, 6, 3, projection=p, backend=backend) for p in (0.0, 1.0))
    projected.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4, 7, 7)
    for layer in (plain, projected):
        layer(x).square().sum().backward()
    scale = plain.weight.grad.abs().max()
    assert projected.weight.grad.mean((2, 3)).abs().max() < 1e-5 * scale
    assert plain.weight.grad.mean((2, 3)).abs().max() > 1e-2 * scale
    assert all(torch.equal(vectors(plain)[name].grad, p.grad) for name, p in vectors(projected).items())
