"""``to_reference``: the same model in plain PyTorch modules, which needs this package neither to run nor to load."""

from __future__ import annotations

import copy
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import assert_within_budget
from torch import nn

import deepcontrol_cuda as dc

X1, X2, X3 = (
    torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0)) for size in ((9,), (7, 6), (4, 5, 3))
)

# Each layer in each of its options, and an input of it.
LAYERS = {
    "norm1d": (partial(dc.DeepControl1d, 4, mean_scale=False, activation="silu"), X1),
    "norm1d-no-mean": (partial(dc.DeepControl1d, 4, mean_scale=0.0, activation="relu"), X1),
    "vectors": (partial(dc.DeepControl1d, 4, mean_scale=0.0, activation="relu"), X1[..., 0]),
    "norm2d": (partial(dc.DeepControl2d, 4, activation="leaky_relu", negative_slope=0.3), X2),
    "norm2d-bare": (partial(dc.DeepControl2d, 4, gain=False, mean_scale=0.0, bias=False), X2),
    "norm3d-shared": (partial(dc.DeepControl3d, 4, shared=True, bias=False, activation="relu6"), X3),
    "conv1d": (partial(dc.DeepControlConv1d, 4, 6, 3, stride=2, groups=2, activation="gelu"), X1),
    "conv2d": (partial(dc.DeepControlConv2d, 4, 6, (3, 2), padding=(1, 0), projection=0.7, activation="relu"), X2),
    "conv2d-same-fixed": (partial(dc.DeepControlConv2d, 4, 4, 2, padding="same", mean_scale=0.3, gain=False), X2),
    "conv2d-no-mean": (
        partial(dc.DeepControlConv2d, 4, 6, 3, mean_scale=0.0, activation="leaky_relu", negative_slope=0.2),
        X2,
    ),
    "conv2d-no-bias": (partial(dc.DeepControlConv2d, 4, 6, 1, bias=False, activation="hardswish"), X2),
    "conv3d-shared": (partial(dc.DeepControlConv3d, 4, 2, 2, dilation=2, shared=True, activation="silu"), X3),
    "msr1d": (partial(dc.MeanShiftConv1d, 4, 6, 3, padding=1, padding_mode="reflect", activation="relu"), X1),
    "msr2d": (partial(dc.MeanShiftConv2d, 4, 6, 3, bias=True, padding="same", activation="relu6"), X2),
    "msr2d-linear": (partial(dc.MeanShiftConv2d, 4, 6, 3, scaling="linear", shared=True, projection=1.0), X2),
    "msr2d-no-scale": (partial(dc.MeanShiftConv2d, 4, 4, 1, scaling=None, activation="gelu"), X2),
    "msr3d": (partial(dc.MeanShiftConv3d, 4, 2, (2, 1, 3), stride=(1, 2, 1), activation="hardswish"), X3),
}
every_layer = pytest.mark.parametrize("name", LAYERS)


class Caller(nn.Module):
    """Passes a residual on, so that its layer must take one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        return self.layer(x, residual=residual)


def make(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    layer = LAYERS[name][0]().to(dtype)
    for parameter in layer.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, -1.5, 1.5)
    return layer


def results(model: nn.Module, *inputs: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Output and gradients of everything."""
    inputs = [None if x is None else x.clone().requires_grad_() for x in inputs]
    output = model(*inputs)
    leaves = {**dict(model.named_parameters()), **{f"input {i}": x for i, x in enumerate(inputs) if x is not None}}
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    gradients = torch.autograd.grad((output * weights).sum(), list(leaves.values()))
    return {"output": output.detach(), **dict(zip(leaves, gradients))}


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        # Sums of some hundred terms that may cancel.
        assert_within_budget(got[name], value, value, torch.float64, magnitude=10.0, what=name)


def is_plain(model: nn.Module) -> bool:
    return not any(type(m).__module__.startswith("deepcontrol") for m in model.modules())


@every_layer
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_values_and_gradients_are_the_layers(name, residual):
    model, x = Caller(make(name)), LAYERS[name][1].double()
    plain = dc.to_reference(model)
    assert is_plain(plain)
    r = torch.randn_like(model(x)) if residual else None
    with dc.backends.use("reference"):
        expected = results(model, x, r)
    assert_same(results(plain, x, r), expected)


@every_layer
def test_state_dicts_fit_both_ways_and_strictly(name):
    layer, other = make(name), make(name)
    plain = dc.to_reference(layer)
    assert list(plain.state_dict()) == [key for key, _ in layer.named_parameters()]
    for target, source in ((plain, other), (layer, dc.to_reference(other))):
        target.load_state_dict(source.state_dict())
        assert_same(dict(target.state_dict()), dict(other.state_dict()))
    state = other.state_dict()
    for model in (layer, plain):
        with pytest.raises(RuntimeError, match=r'Unexpected key.*"running_mean"'):
            model.load_state_dict(state | {"running_mean": torch.zeros(4)})
        for key, value in state.items():
            with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
                model.load_state_dict({k: v for k, v in state.items() if k != key})
            with pytest.raises(RuntimeError, match=f"size mismatch for {key}"):
                model.load_state_dict(state | {key: torch.zeros(*value.shape, 2)})


@every_layer
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_folded_values_are_the_layers(name, residual):
    model, x = Caller(make(name)), LAYERS[name][1].double()
    folded = dc.to_reference(model if residual else model.layer, fold=True)
    assert is_plain(folded)
    convolution = hasattr(model.layer, "weight")
    if convolution:
        assert not {"gain", "scale", "log_scale"} & {key.rpartition(".")[2] for key in folded.state_dict()}
    r = (torch.randn_like(model(x)),) if residual else ()
    with dc.backends.use("reference"):
        expected = model(x, *r)
    assert_same({"output": folded(x, *r).detach()}, {"output": expected.detach()})


@pytest.mark.parametrize(
    "name", ["conv2d-no-mean", "msr1d", "msr2d", "msr2d-linear", "msr2d-no-scale", "msr3d", "conv1d"]
)
def test_folded_layer_without_a_mean_is_a_convolution_and_an_activation(name):
    layer = make(name, torch.bfloat16).eval()
    if name == "conv1d":
        nn.init.zeros_(layer.mean_scale)
    layer.weight.requires_grad_(False)
    folded = dc.to_reference(nn.Sequential(layer), fold=True)[0]
    conv, *rest = folded if isinstance(folded, nn.Sequential) else [folded]
    assert type(conv) is getattr(nn, f"Conv{len(layer.kernel_size)}d")
    assert (conv.bias is None) == (layer.bias is None)
    for option in ("stride", "padding", "dilation", "groups", "padding_mode", "in_channels", "out_channels"):
        assert getattr(conv, option) == getattr(layer, option)
    for parameter in conv.parameters():
        assert parameter.dtype == torch.bfloat16
        assert parameter.requires_grad == (parameter is not conv.weight)
    assert not any(module.training for module in folded.modules())
    kinds = {"leaky_relu": nn.LeakyReLU, "relu": nn.ReLU, "relu6": nn.ReLU6, "gelu": nn.GELU, "hardswish": nn.Hardswish}
    assert [type(module) for module in rest] == ([kinds[layer.activation]] if layer.activation != "identity" else [])


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("name", ["conv2d", "msr2d", "norm2d"])
def test_dtype_memory_format_mode_and_requires_grad_stay(name, fold):
    layer = make(name, torch.float16).to(memory_format=torch.channels_last).eval()
    layer.bias.requires_grad_(False) if layer.bias is not None else None
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    plain = dc.to_reference(nn.Sequential(layer), fold)
    assert plain.training  # that of the Sequential
    for module in plain[0].modules():
        assert not module.training
    for key, parameter in plain.named_parameters():
        assert parameter.dtype == torch.float16
        assert parameter.requires_grad == (not key.endswith("bias"))
        if parameter.dim() == 4:
            assert parameter.is_contiguous(memory_format=torch.channels_last)
    assert_equal_states(layer.state_dict(), state)
    assert type(layer).__module__ == "deepcontrol_cuda.modules"


def assert_equal_states(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for key in expected:
        assert torch.equal(got[key], expected[key]), key


@pytest.mark.parametrize("fold", [False, True])
def test_under_autocast_the_dtype_is_the_layers(fold):
    net = nn.Sequential(make("conv2d", torch.float32), dc.MeanShiftConv2d(6, 4, 1), dc.DeepControl2d(4))
    plain = dc.to_reference(net, fold)
    oracle = copy.deepcopy(net).double()(X2.double())
    with torch.autocast("cpu", torch.bfloat16):
        got, low = plain(X2), net(X2)
    assert_within_budget(got, oracle, low, torch.bfloat16)


def test_16_bit_kernels_beside_vectors_of_32_bits():
    net = nn.Sequential(make("conv2d-no-mean", torch.float32), dc.DeepControlConv2d(6, 4, 3, activation="silu"))
    oracle = copy.deepcopy(net).double()(X2.double())
    for layer in net:
        layer.weight.data = layer.weight.data.bfloat16()
    x = X2.bfloat16()
    for fold in (False, True):
        assert_within_budget(dc.to_reference(net, fold)(x), oracle, net(x), torch.bfloat16, what=f"fold={fold}")


class Selective(nn.Module):
    """Layers that are called with, without and perhaps with a residual, and in a forward that cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        layer = partial(dc.MeanShiftConv2d, 4, 4, 1, activation="relu")
        self.without, self.with_one, self.with_none, self.shared = layer(), layer(), layer(), layer()
        self.listed = nn.ModuleList([layer(), layer()])
        self.hidden = Hidden(layer(), layer())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.with_none(self.with_one(self.without(x), x), residual=None)
        x = self.listed[1](self.listed[0](x), residual=x)
        return self.hidden(self.shared(x, self.shared(x)))


class Hidden(nn.Module):
    def __init__(self, layer: nn.Module, held: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.holder = nn.Module()
        self.holder.layer = held

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = x if x.sum() > 0 else None
        return self.holder.layer(self.layer(x, residual), residual)


def test_only_layers_that_may_get_a_residual_take_one():
    net = Selective().double()
    x = X2.double()
    for fold in (False, True):
        plain = dc.to_reference(net, fold)
        for sign in (1, -1):
            assert_same({"output": plain(sign * x).detach()}, {"output": net(sign * x).detach()})
    kinds = {name: type(plain.get_submodule(name)) for name in ("without", "listed.0", "with_none", "with_one")}
    assert kinds.pop("without") is kinds.pop("listed.0") is nn.Sequential
    assert plain.without[0].weight.shape == (4, 4, 1, 1)
    assert all(issubclass(kind, torch.fx.GraphModule) for kind in kinds.values())
    assert isinstance(plain.hidden.layer, torch.fx.GraphModule)
    assert isinstance(plain.hidden.holder.layer, torch.fx.GraphModule)


def test_shared_layers_and_tied_kernels_stay_so():
    layer, tied = make("msr2d-no-scale"), make("msr2d-no-scale")
    tied.weight = layer.weight
    net = nn.Sequential(layer, nn.Sequential(layer, tied))
    for fold in (False, True):
        plain = dc.to_reference(net, fold)
        assert plain[0] is plain[1][0]
        assert len(list(plain.parameters())) == 1
        assert_same({"output": plain(X2.double()).detach()}, {"output": net(X2.double()).detach()})


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.path = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.path(x) + x)


@pytest.mark.parametrize("method", ["deep_control", "mean_shift_rejection"])
@pytest.mark.parametrize("initialization", ["folded", "fresh"])
def test_converted_block_gets_its_own_class_back(method, initialization):
    net = dc.replace_conv_bn(nn.Sequential(Residual(), Residual()).double().eval(), method, initialization).model
    assert type(net[0])._fused == ("path.0",), "else the converter has merged nothing, and nothing is shown here"
    expected = {"output": net(X2.double()).detach()}
    for fold in (False, True):
        plain = dc.to_reference(net, fold)
        assert [type(block) for block in plain] == [Residual, Residual]
        assert is_plain(plain)
        assert_same({"output": plain(X2.double()).detach()}, expected)
    # The block adds and activates by itself again, so that where no mean is taken a convolution alone is left.
    no_mean = initialization == "folded" or method == "mean_shift_rejection"
    assert (type(plain[0].path[0]) is nn.Conv2d) == no_mean
    assert type(net[0]) is not Residual


@pytest.mark.parametrize("shape", [(64, 32), (64, 32, 5), (64, 32, 3, 2)], ids=str)
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_noise_is_drawn_per_map_in_training_and_absent_in_evaluation(shape, shift):
    noise = dc.to_reference(nn.Sequential(dc.MapNoise(0.1, shift)))
    x = torch.ones(shape, dtype=torch.float64, requires_grad=True)
    assert torch.equal(noise.eval()(x), x)
    y = noise.train()(x)
    flat = y.detach().view(*shape[:2], -1)
    assert torch.equal(flat, flat[..., :1].expand_as(flat))
    low, high = (0.9 * (1 - shift), 1.1 * (1 + shift))
    draws = flat[..., 0].flatten()
    assert low <= draws.min() < low + 0.2 * (high - low)
    assert high >= draws.max() > high - 0.2 * (high - low)
    # The standard deviation of a mean of 2048 draws is below (high - low) / 150.
    assert abs(draws.mean() - 1) < (high - low) / 30
    assert draws.unique().numel() > 2000
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert 0.9 <= gradient.min() < gradient.max() <= 1.1
    assert type(dc.to_reference(dc.MapNoise(0.1), fold=True)) is nn.Identity
    assert noise(x.detach().bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("scaling", ["exp", None])
def test_scaling_noise_is_drawn_per_filter_in_training_only(scaling):
    layer = dc.MeanShiftConv2d(4, 512, 1, scaling=scaling, shared=True, scaling_noise=0.2).double()
    plain = dc.to_reference(layer)
    x = X2.double()
    ratios = plain(x) / layer.eval()(x)
    per_filter = ratios.detach().transpose(0, 1).flatten(1)
    torch.testing.assert_close(per_filter, per_filter[:, :1].expand_as(per_filter), rtol=1e-9, atol=0)
    assert 0.8 <= per_filter.min() < 0.81
    assert 1.19 < per_filter.max() <= 1.2
    assert_same({"output": plain.eval()(x).detach()}, {"output": layer(x).detach()})


def test_model_without_our_layers_is_copied_unchanged():
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    for fold in (False, True):
        plain = dc.to_reference(net, fold)
        assert plain is not net
        assert plain[0].weight is not net[0].weight
        assert [type(module) for module in plain] == [type(module) for module in net]
        assert_equal_states(plain.state_dict(), net.state_dict())


def with_hook(layer: nn.Module) -> nn.Module:
    layer.register_forward_hook(lambda *_: None)
    return layer


def with_forward(layer: nn.Module) -> nn.Module:
    layer.forward = lambda x: x
    return layer


def with_child(layer: nn.Module) -> nn.Module:
    layer.extra = nn.ReLU()
    return layer


class Derived(dc.MeanShiftConv2d):
    pass


REFUSED = {
    "not-a-module": (lambda: 3, TypeError, "model: got int, wanted a torch.nn.Module"),
    "compiled": (lambda: torch.compile(make("msr2d")), TypeError, "model: got what torch.compile returned"),
    "hooks": (lambda: nn.Sequential(with_hook(make("conv2d"))), ValueError, "^0: has hooks"),
    "forward": (lambda: with_forward(make("conv2d")), ValueError, "model: has a forward of its own"),
    "child": (lambda: with_child(make("conv2d")), ValueError, "model: has extra registered on it"),
    "parametrized": (
        lambda: nn.utils.parametrizations.weight_norm(make("conv2d")),
        ValueError,
        "parametrizations.*remove_parametrizations",
    ),
    "derived": (lambda: Derived(4, 4, 3), ValueError, "a class of its own, Derived"),
    "generator": (lambda: dc.MapNoise(generator=torch.Generator()), ValueError, "a generator.*generator=None"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_plain_copy_would_lose_is_refused(case):
    make_model, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        dc.to_reference(make_model())


# Loads a model where the package cannot be imported, and saves what it computes, its code and itself, saved again.
ELSEWHERE = """
import sys

sys.modules["deepcontrol_cuda"] = None
import torch

torch.set_num_threads(2)
for name in ("plain", "again"):
    models, x, r = torch.load(name + ".pt", weights_only=False)
    outputs = [model(x) for model in models] + [models[0][0](x, r), models[0][0](x, residual=r)]
    torch.save([outputs, [model.state_dict() for model in models]], name + "_outputs.pt")
    torch.save((models, x, r), "again.pt")
"""


def test_saved_copy_loads_and_runs_without_the_package(tmp_path):
    layer = dc.DeepControlConv2d(4, 4, 3, padding=1, projection=0.5, activation="silu")
    taking = dc.to_reference(Caller(layer)).layer
    net = nn.Sequential(
        layer,
        dc.MapNoise(),
        dc.MeanShiftConv2d(4, 6, 3, padding_mode="circular", padding=1, scaling_noise=0.1, activation="gelu"),
        dc.DeepControl2d(6, mean_scale=0.3, activation="hardswish"),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        dc.DeepControl1d(6, mean_scale=0.0),
    ).eval()
    plain, folded = dc.to_reference(net), dc.to_reference(net, fold=True)
    plain[0] = taking
    r = torch.randn_like(X2)
    torch.save(([plain, folded], X2, r), tmp_path / "plain.pt")
    run = subprocess.run([sys.executable, "-c", ELSEWHERE], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    expected = [plain(X2), folded(X2), taking(X2, r), taking(X2, r)]
    for name in ("plain", "again"):
        outputs, states = torch.load(tmp_path / f"{name}_outputs.pt")
        for got, want in zip(outputs, expected, strict=True):
            assert torch.equal(got, want)
        assert_equal_states(states[0], net.state_dict())
        assert list(states[0]) == list(net.state_dict())
