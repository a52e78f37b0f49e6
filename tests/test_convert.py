"""``replace_conv_bn`` replaces the norm and nothing else: the function, its gradient and all around it stay."""

from __future__ import annotations

import copy
import io
import json
import pickle
import traceback

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import deepcontrol_cuda as dc
from deepcontrol_cuda import modules, replace_conv_bn
from deepcontrol_cuda.training.methods import METHODS

METHOD_NAMES = ("deep_control", "mean_shift_rejection")
both_methods = pytest.mark.parametrize("method", METHOD_NAMES)


def trained(model: nn.Module) -> nn.Module:
    """``model`` in ``eval()``, its BatchNorms with statistics and parameters that are far from their initial values."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for norm in (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
            for tensor in (norm.weight, norm.bias, norm.running_mean):
                if tensor is not None:
                    tensor.normal_(generator=generator)
            if norm.running_var is not None:
                norm.running_var.uniform_(0.5, 2.0, generator=generator)
    return model.eval()


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


def assert_same_function(model: nn.Module, converted: nn.Module, x: torch.Tensor) -> None:
    """Outputs and gradients for the input are those of ``model``; all in float64."""
    if isinstance(model, NotDifferentiable):
        with torch.no_grad():
            assert relative_error(converted(x.clone()), model(x.clone())) <= 1e-13
        return
    results = []
    for module in (model, converted):
        leaf = x.clone().requires_grad_()
        # A forward may change its argument in place, which a leaf does not allow.
        output = module(leaf * 1)
        (grad,) = torch.autograd.grad(output.square().sum(), leaf)
        results.append((output.detach(), grad))
    (wanted, wanted_grad), (got, got_grad) = results
    assert relative_error(got, wanted) <= 1e-13
    assert relative_error(got_grad, wanted_grad) <= 1e-12


class Block(nn.Module):
    """Attributes in torchvision's manner; forwards are in the subclasses. Maps keep their shape."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(4)
        self.downsample = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Identity())


class Basic(Block):
    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class Downsampled(Block):
    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        x = self.downsample(x)
        out += x
        return self.relu(out)


class SumOfBranches(Block):
    def forward(self, x):
        return F.relu(self.downsample(x) + self.branch(x))


class AfterTheSum(Block):
    def forward(self, x):
        return torch.add(x, self.branch(x))


class Functional(Block):
    def forward(self, x):
        x = F.leaky_relu(self.bn1(self.conv1(x)), 0.2)
        return torch.sigmoid(F.hardswish(self.bn2(self.conv2(x)), inplace=True)) * x


class Method(Block):
    def forward(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x)).relu_())).relu()


class SumIsUsedTwice(Block):
    def forward(self, x):
        out = self.bn1(self.conv1(x)) + x
        return self.relu(out.clone()) + out


class NormIsUsedTwice(Block):
    def forward(self, x):
        out = self.bn1(self.conv1(x))
        return F.relu(out) + out


class ConvIsUsedTwice(Block):
    def forward(self, x):
        z = self.conv1(x)
        return self.bn1(z) + z


class SharedConv(Block):
    def forward(self, x):
        return self.bn1(self.conv1(x)) * self.bn2(self.conv1(x))


class SharedNorm(Block):
    def forward(self, x):
        return self.bn1(self.conv2(self.relu(self.bn1(self.conv1(x)))))


class PreActivation(Block):
    def forward(self, x):
        return self.conv2(self.relu(self.bn2(self.conv1(self.relu(self.bn1(x)))))) + x


class NotDifferentiable(Block):
    """Overwrites what the convolution needs for backward."""


class InputChangesBehindTheConvolution(NotDifferentiable):
    """What the convolution reads is overwritten before its norm and before the sum."""

    def forward(self, x):
        x = x.clone()
        z = self.conv1(x)
        x *= 2
        a = F.relu(self.bn1(z))
        z = self.conv2(x)
        x -= 1
        return F.relu(self.bn2(z) + a) + x


class SumOverwritesTheShortcut(Block):
    def forward(self, x):
        shortcut = x * 1
        alias = shortcut
        shortcut += self.bn1(self.conv1(x))
        return self.relu(shortcut) * alias


class SumOverwritesTheArgument(NotDifferentiable):
    def forward(self, x):
        y = x * 1
        inner = self._add(y)
        return inner * y

    def _add(self, y):
        y += self.bn1(self.conv1(y))
        return y


class SameOperands(Block):
    def forward(self, x):
        out = self.bn1(self.conv1(x))
        return self.relu(out + out)


class NormOfAnother(nn.Module):
    """A forward that is written anew calls a norm that is registered under another module first."""

    def __init__(self) -> None:
        super().__init__()
        self.owner = nn.ModuleList([nn.BatchNorm2d(4)])
        self.block = Functional()
        self.block.bn1 = self.owner[0]

    def forward(self, x):
        return self.block(x)


class ModuleNamedAdd(Block):
    def __init__(self) -> None:
        super().__init__()
        self.add = nn.Bilinear(6, 6, 6)

    def forward(self, x):
        return self.relu(self.add(self.bn1(self.conv1(x)), x))


class Scaled(Block):
    def forward(self, x):
        return torch.add(x, self.bn1(self.conv1(x)), alpha=2) + (self.bn2(self.conv2(x)) + 1.0)


class Keywords(Block):
    def forward(self, x):
        return self.relu(input=self.bn1(input=self.conv1(input=x)) + x)


class AsksForTheType(Block):
    def forward(self, x):
        if isinstance(x, torch.Tensor):
            x = x + 1
        return F.relu(self.bn1(self.conv1(x)) + x)


class DependsOnTraining(Block):
    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)) + x)
        return out if self.training else out * 2


class Counts(Block):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return F.relu(self.bn1(self.conv1(x)) + x) * self.calls


class MakesATensor(Block):
    def forward(self, x):
        return F.relu(self.bn1(self.conv1(x)) + x) * torch.ones(1, dtype=torch.float64).cumsum(0)


class Optional(Block):
    def forward(self, x, scale=None):
        out = F.relu(self.bn1(self.conv1(x)) + x)
        return out if scale is None else out * scale


class Untraceable(Block):
    def forward(self, x):
        out = self.bn1(self.conv1(x))
        if out.sum() > 1e9:
            out = self.conv2(out)
        return self.bn2(self.relu(out) + x)


class Nested(nn.Module):
    """Residual sums whose last layer is in a module within a module."""

    def __init__(self) -> None:
        super().__init__()
        inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.layers = nn.Sequential(inner, nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)))
        self.act = nn.ReLU6()

    def forward(self, x):
        return self.act(x + self.layers(x))


class ShortcutChangesBehindTheSum(NotDifferentiable):
    def forward(self, x):
        x = x * 1
        out = self.bn1(self.conv1(x)) + x
        x.mul_(2)
        return F.relu(out) + x


class SumIntoAView(Block):
    def forward(self, x):
        whole = x * 1
        view = whole[:, :4]
        view += self.bn1(self.conv1(x))
        return self.relu(whole * 2)


class WithoutGradient(Block):
    def forward(self, x):
        with torch.no_grad():
            shortcut = self.branch(x)
        return F.relu(self.bn1(self.conv1(x)) + shortcut)


class GivesTheConvolution(Block):
    """Cannot be traced, and what the convolution gives is one of its outputs."""

    def forward(self, x):
        z = self.conv1(x)
        y = self.bn1(z)
        if y.sum() > 1e9:
            y = self.conv2(y)
        return {"normed": y, "raw": z}


class Head(Block):
    def __init__(self) -> None:
        super().__init__()
        self.body = GivesTheConvolution()

    def forward(self, x):
        found = self.body(x)
        return found["normed"] * found["raw"]


class CallsWhatIsInASequence(Block):
    """Cannot be traced, and calls the modules of a container one by one."""

    def forward(self, x):
        z = self.downsample[0](x)
        y = self.downsample[1](z)
        return y * z if y.sum() < 1e9 else y


class OptionalBranch(Block):
    def forward(self, x, alone=None):
        z = self.conv1(x)
        return self.bn1(z) * z if alone is None else self.bn1(z)


class HeldInAList(Block):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = [self.conv1]

    def forward(self, x):
        return self.bn1(self.hidden[0](x))


class UsesTheConvolutionsTensors(Block):
    def forward(self, x):
        y = self.bn1(self.conv1(x)) * self.conv1.bias.view(1, -1, 1, 1)
        return F.conv_transpose2d(self.bn2(self.conv2(y)), self.conv2.weight, padding=1)


class ForwardOnTheInstance(Block):
    def __init__(self) -> None:
        super().__init__()
        self.conv1.forward = lambda x: F.avg_pool2d(x, 3, 1, 1)

    def forward(self, x):
        return self.bn1(self.conv1(x))


class AddsAParameter(Block):
    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 4, 6, 6))

    def forward(self, x):
        return self.bn1(self.conv1(x)) + self.position


BLOCKS = [
    Basic, Downsampled, SumOfBranches, AfterTheSum, Functional, Method, SumIsUsedTwice, NormIsUsedTwice,
    ConvIsUsedTwice, SharedConv, SharedNorm, PreActivation, InputChangesBehindTheConvolution, SumOverwritesTheShortcut,
    SumOverwritesTheArgument, SameOperands, Scaled, Keywords, AsksForTheType, DependsOnTraining, MakesATensor,
    Optional, Untraceable, Nested, ModuleNamedAdd, NormOfAnother,
    ShortcutChangesBehindTheSum, SumIntoAView, WithoutGradient, Head,
    CallsWhatIsInASequence, OptionalBranch, HeldInAList, UsesTheConvolutionsTensors, ForwardOnTheInstance,
    AddsAParameter,
]  # fmt: skip


@both_methods
@pytest.mark.parametrize("with_example", [False, True], ids=["", "example"])
@pytest.mark.parametrize("build", BLOCKS)
def test_folded_is_the_same_function(build, with_example, method):
    model = trained(build()).double()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    report = replace_conv_bn(model, method, "folded", example=x.clone() if with_example else None)
    assert not report.left
    assert not any(isinstance(module, nn.BatchNorm2d) for module in report.model.modules())
    assert_same_function(model, report.model, x)
    # A second call finds nothing more to do.
    assert "holds no BatchNorm" in str(replace_conv_bn(report.model))


@pytest.mark.parametrize(
    ("build", "sources"),
    [
        (Basic, {"conv1": "Conv2d + BatchNorm2d + relu", "conv2": "Conv2d + BatchNorm2d + residual + relu"}),
        (Downsampled, {"conv2": "Conv2d + BatchNorm2d + residual + relu", "downsample.0": "Conv2d + BatchNorm2d"}),
        (SumOfBranches, {"downsample.0": "Conv2d + BatchNorm2d", "branch.0": "Conv2d + BatchNorm2d + residual + relu"}),
        (AfterTheSum, {"branch.0": "Conv2d + BatchNorm2d + residual"}),
        (Functional, {"conv1": "Conv2d + BatchNorm2d + leaky_relu", "conv2": "Conv2d + BatchNorm2d + hardswish"}),
        (SumIsUsedTwice, {"conv1": "Conv2d + BatchNorm2d + residual"}),
        (NormIsUsedTwice, {"conv1": "Conv2d + BatchNorm2d"}),
        (ConvIsUsedTwice, {"bn1": "BatchNorm2d + residual"}),
        (SharedNorm, {"bn1": "BatchNorm2d"}),
        (PreActivation, {"bn1": "BatchNorm2d + relu", "conv1": "Conv2d + BatchNorm2d + relu"}),
        (InputChangesBehindTheConvolution, {"conv1": "Conv2d + BatchNorm2d + relu", "conv2": "Conv2d + BatchNorm2d"}),
        (SumOverwritesTheShortcut, {"conv1": "Conv2d + BatchNorm2d"}),
        (AsksForTheType, {"conv1": "Conv2d + BatchNorm2d"}),
        (DependsOnTraining, {"conv1": "Conv2d + BatchNorm2d"}),
        (Counts, {"conv1": "Conv2d + BatchNorm2d"}),
        (MakesATensor, {"conv1": "Conv2d + BatchNorm2d"}),
        (Optional, {"conv1": "Conv2d + BatchNorm2d"}),
        (Nested, {"layers.1.0": "Conv2d + BatchNorm2d + residual + relu6"}),
    ],
)
def test_what_becomes_one_layer(build, sources):
    report = replace_conv_bn(build())
    found = {row.module: row.source for row in report.replaced}
    assert {name: found.get(name) for name in sources} == sources


def test_a_norm_that_follows_its_convolution_in_one_mode_alone():
    class RawInTraining(Block):
        def forward(self, x):
            z = self.conv1(x)
            return self.bn1(z) * z if self.training else self.bn1(z)

    model = trained(RawInTraining()).double()
    converted = replace_conv_bn(model, initialization="folded").model
    model.training = converted.training = True
    assert_same_function(model, converted, torch.randn(2, 4, 6, 6).double())


@pytest.mark.parametrize("how", ["forward", "held"])
def test_norms_that_no_other_module_can_stand_for_are_left(how):
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    if how == "forward":
        model[1].forward = torch.tanh
    else:
        model.held = [model[1]]
    report = replace_conv_bn(model)
    assert [row.norm for row in report.left] == ["1"]
    assert type(report.model[1]) is nn.BatchNorm2d


def test_a_method_that_a_forward_calls_stays_right():
    class Features(Block):
        def features(self, x):
            return F.silu(self.bn1(self.conv1(x)) + x)

        def forward(self, x):
            return self.features(x).mean((2, 3))

    model = trained(Features())
    converted = replace_conv_bn(model, initialization="folded").model
    x = torch.randn(2, 4, 6, 6)
    assert relative_error(converted.features(x), model.features(x)) <= 1e-6


def test_what_a_forward_keeps_stays_what_it_was():
    class Keeps(Block):
        def forward(self, x):
            self.kept = self.conv1(x)
            return self.bn1(self.kept)

    model = trained(Keeps()).requires_grad_(False)
    converted = replace_conv_bn(model, initialization="folded").model
    x = torch.randn(2, 4, 6, 6)
    assert relative_error(converted(x), model(x)) <= 1e-6
    assert relative_error(converted.kept, model.kept) <= 1e-6


def test_what_a_forward_appends_to_a_list_it_still_appends():
    class Collects(Block):
        def __init__(self) -> None:
            super().__init__()
            self.collected = []

        def forward(self, x):
            self.collected.append(len(self.collected))
            return F.relu(self.bn1(self.conv1(x)) + x)

    converted = replace_conv_bn(Collects()).model
    already = len(converted.collected)
    converted(torch.randn(1, 4, 6, 6))
    assert len(converted.collected) == already + 1


def test_a_module_that_is_called_twice_with_other_sizes():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Basic()
            self.head = nn.Conv2d(4, 4, 6)

        def forward(self, x):
            return self.head(self.block(x)) + self.head(self.block(x[:, :, :6, :6]))

    model = trained(Twice()).double()
    x = torch.randn(1, 4, 9, 9).double()
    assert_same_function(model, replace_conv_bn(model, initialization="folded", example=x).model, x)


def test_a_sum_along_one_side_is_seen_with_an_example():
    class Strip(Block):
        def forward(self, x):
            return x + self.branch(x.mean(3, keepdim=True))

    model = trained(Strip()).double()
    x = torch.randn(2, 4, 6, 6).double()
    assert_same_function(model, replace_conv_bn(model, initialization="folded", example=x).model, x)


def test_graph_modules():
    model = torch.fx.symbolic_trace(trained(Basic()).double())
    converted = replace_conv_bn(model, initialization="folded").model
    x = torch.randn(2, 4, 6, 6).double()
    assert_same_function(model, converted, x)
    assert torch.equal(copy.deepcopy(converted)(x.clone()), converted(x.clone()))


def test_a_model_that_refuses_to_train_on_the_example():
    class Detects(Block):
        def forward(self, x):
            assert not self.training, "targets are wanted"
            return self.bn1(self.conv1(x))

    report = replace_conv_bn(Detects().eval(), example=torch.randn(1, 4, 6, 6))
    assert "not measured: AssertionError: targets are wanted" in str(report)


def test_layers_that_the_example_does_not_reach_are_named():
    class Auxiliary(Block):
        def forward(self, x):
            x = x.mul_(2)
            y = self.bn1(self.conv1(x))
            return self.bn2(self.conv2(y)) if self.training else y

    x = torch.randn(2, 4, 6, 6)
    example = x.clone()
    report = replace_conv_bn(Auxiliary(), initialization="calibrated", example=example)
    assert "not calibrated, for the example does not reach them: " in str(report)
    assert torch.equal(example, x)


def test_inplace_does_not_go_through_hooks_on_state_dicts():
    model = trained(Basic()).double()
    model.register_state_dict_post_hook(lambda module, state, prefix, metadata: state.clear())
    wanted = copy.deepcopy(model)
    replace_conv_bn(model, initialization="folded", inplace=True)
    assert_same_function(wanted, model, torch.randn(2, 4, 6, 6).double())


def test_an_optimizer_of_named_and_tied_parameters():
    model = Block()
    model.bn2.weight = model.bn1.weight
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    replace_conv_bn(model, select="bn1", inplace=True, optimizer=optimizer)
    group = optimizer.param_groups[0]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {id(parameter) for parameter in group["params"]} == set(names)
    assert len(group["param_names"]) == len(set(group["param_names"])) == len(names)


def test_a_norm_without_any_tensor():
    norm = nn.BatchNorm2d(4, affine=False, track_running_stats=False)
    assert type(replace_conv_bn(nn.Sequential(nn.Tanh(), norm)).model[1]) is dc.DeepControl2d


def test_a_frozen_norm_whose_eps_is_not_known_is_left():
    class FrozenBatchNorm2d(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, torch.ones(4))

    report = replace_conv_bn(nn.Sequential(nn.Conv2d(4, 4, 3), FrozenBatchNorm2d()), initialization="folded")
    assert "no attribute eps" in report.left[0].remark


def test_a_convolution_that_holds_more_than_its_kernel():
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    model[0].register_buffer("mask", torch.ones(1))
    assert hasattr(replace_conv_bn(model).model[0], "mask")


def test_folded_resnet_computes_what_batch_norm_computes_in_eval():
    model = trained(METHODS["batch_norm"].build("resnet10", channels=1, classes=10, seed=0))
    x = torch.randn(8, 1, 8, 8)
    report = replace_conv_bn(model, initialization="folded")
    assert len(report.replaced) == 10
    assert not report.left
    assert relative_error(report.model(x), model(x)) <= 1e-5


@both_methods
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"bias": True, "stride": 2, "padding": 1},
        {"bias": False, "groups": 2, "dilation": 2, "padding": "same"},
        {"bias": True, "groups": 4, "out_channels": 8},
        {"bias": True, "padding": 1, "padding_mode": "reflect"},
    ],
    ids=["strided", "grouped", "depthwise", "reflected"],
)
def test_folded_keeps_the_geometry(rank, options, method):
    out_channels = options.get("out_channels", 6)
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1]
    layers = conv(4, kernel_size=3, **{"out_channels": 6, **options}), norm(out_channels, eps=0.1), nn.LeakyReLU(0.3)
    model = trained(nn.Sequential(*layers)).double()
    x = torch.randn(2, 4, *(7, 6, 5)[:rank], dtype=torch.float64)
    report = replace_conv_bn(model, method, "folded")
    assert report.replaced[0].module == "0"
    assert_same_function(model, report.model, x)


def parametrized() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Conv2d(4, 4, 3)), nn.BatchNorm2d(4))


def hooked(place: int) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model[place].register_forward_hook(lambda module, inputs, output: output + 1)
    return model


class ConvSubclass(nn.Conv2d):
    def forward(self, input):
        return super().forward(input) + 1


class NormSubclass(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input) + 1


@both_methods
@pytest.mark.parametrize(
    ("build", "remark"),
    [
        (lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), "ConvTranspose2d in front"),
        (lambda: nn.Sequential(ConvSubclass(4, 4, 3), nn.BatchNorm2d(4)), "ConvSubclass in front"),
        (parametrized, "ParametrizedConv2d in front"),
        (lambda: hooked(0), "0 has hooks"),
        (lambda: hooked(1), "1 has hooks"),
        (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Tanh()), "no module directly in front"),
        (ConvIsUsedTwice, "the output of conv1 goes elsewhere too"),
        (SharedConv, "conv1 is called in 2 places"),
        (SharedNorm, "bn1 is called in 2 places"),
        (lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU()), "Linear in front"),
    ],
    ids=[
        "transposed", "subclass", "parametrized", "hook-on-conv", "hook-on-norm", "no-conv", "two-users", "shared-conv",
        "shared-norm", "linear",
    ],
)  # fmt: skip
def test_where_no_convolution_can_be_merged_the_norm_alone_is_replaced(build, remark, method):
    model = trained(build()).double()
    x = torch.randn(5, 6) if remark.startswith("Linear") else torch.randn(2, 4, 6, 6)
    report = replace_conv_bn(model, method, "folded")
    row = next(row for row in report.replaced if remark in row.remark)
    assert row.module == row.norm
    layer = report.model.get_submodule(row.module)
    assert isinstance(layer, modules._DeepControl)
    if method == "mean_shift_rejection":
        assert layer.fixed_mean_scale == 0.0
    assert_same_function(model, report.model, x.double())


def test_hooks_of_a_norm_go_along_and_can_be_removed():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())
    calls = []
    handle = model[0].register_forward_hook(lambda module, inputs, output: calls.append(type(module)))
    replace_conv_bn(model, inplace=True)
    model(torch.randn(1, 4, 3, 3))
    assert calls == [dc.DeepControl2d]
    handle.remove()
    model(torch.randn(1, 4, 3, 3))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("build", "left", "reason"),
    [
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), "1", "no running"),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 3), NormSubclass(4)), "1", "a subclass of BatchNorm2d"),
        (lambda: nn.Sequential(nn.Tanh(), nn.BatchNorm1d(4)), "1", "without an example the rank"),
    ],
    ids=["no-statistics", "subclass", "unknown-rank"],
)
def test_what_is_left_is_named_with_the_reason(build, left, reason):
    model = build()
    report = replace_conv_bn(model, initialization="folded")
    (row,) = report.left
    assert row.module == left
    assert reason in row.remark
    assert any(left in line and "(left)" in line and row.remark in line for line in str(report).splitlines())
    assert [type(m) for m in report.model] == [type(m) for m in model]


def test_an_example_tells_vectors_from_maps():
    model = trained(nn.Sequential(nn.Tanh(), nn.BatchNorm1d(4))).double()
    for x in (torch.randn(3, 4).double(), torch.randn(3, 4, 5).double()):
        report = replace_conv_bn(model, initialization="folded", example=x)
        assert_same_function(model, report.model, x)
        assert (report.model[1].fixed_mean_scale == 0.0) == (x.dim() == 2)
    vectors = replace_conv_bn(model, example=x[..., 0])
    assert "vectors have no map" in str(vectors)


@pytest.mark.parametrize("kind", [nn.SyncBatchNorm, nn.BatchNorm2d])
def test_synchronized_norms(kind):
    model = trained(nn.Sequential(nn.Conv2d(4, 4, 3), kind(4), nn.ReLU())).double()
    plain = nn.Sequential(model[0], nn.BatchNorm2d(4).double(), model[2]).eval()
    plain[1].load_state_dict(model[1].state_dict())
    report = replace_conv_bn(model, initialization="folded")
    assert report.replaced[0].source == f"Conv2d + {kind.__name__} + relu"
    assert_same_function(plain, report.model, torch.randn(2, 4, 6, 6).double())


def test_without_a_trace_norms_are_replaced_alone_and_an_example_shows_their_convolutions():
    model = trained(Untraceable()).double()
    x = torch.randn(2, 4, 6, 6).double()
    blind = replace_conv_bn(model, initialization="folded", select="bn*")
    assert [(row.module, row.norm) for row in blind.replaced] == [("bn1", "bn1"), ("bn2", "bn2")]
    assert all("the forward of the model cannot be traced" in row.remark for row in blind.replaced)
    seen = replace_conv_bn(model, initialization="folded", select="bn*", example=x)
    assert [(row.module, row.norm) for row in seen.replaced] == [("conv1", "bn1"), ("bn2", "bn2")]
    assert_same_function(model, seen.model, x)


@both_methods
def test_maps_of_one_pixel_keep_their_mean(method):
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    shrunk = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 4), nn.BatchNorm2d(4))
    x = torch.randn(2, 4, 6, 6)
    by_trace = replace_conv_bn(pooled, method).model[1]
    by_example = replace_conv_bn(shrunk, method, example=x).model
    if method == "deep_control":
        assert by_trace.fixed_mean_scale == by_example[2].fixed_mean_scale == 0.0
        assert by_example[0].mean_scale.requires_grad
        assert "a map of one pixel is its own mean" in str(replace_conv_bn(pooled))
    assert by_example(x).std(0).min() > 0


def test_a_sum_that_broadcasts_is_seen_with_an_example():
    class Gate(Block):
        def forward(self, x):
            return x + self.bn1(self.conv1(x.mean((2, 3), keepdim=True)))

    model = trained(Gate()).double()
    x = torch.randn(2, 4, 6, 6).double()
    report = replace_conv_bn(model, initialization="folded", example=x)
    assert_same_function(model, report.model, x)


def test_fresh_starts_from_the_same_kernels_with_neutral_vectors():
    model = nn.Sequential(nn.Conv2d(3, 5, 3, bias=True), nn.BatchNorm2d(5), nn.ReLU()).bfloat16()
    model = trained(model.to(memory_format=torch.channels_last)).train()
    before = copy.deepcopy(model.state_dict())
    converted = replace_conv_bn(model).model
    layer = converted[0]
    assert type(layer) is dc.DeepControlConv2d
    assert layer.activation == "relu"
    assert layer.training
    assert torch.equal(layer.weight, model[0].weight)
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    for vector, value in ((layer.gain, 1.0), (layer.mean_scale, 1.0), (layer.bias, 0.0)):
        assert vector.dtype == torch.bfloat16
        assert vector.requires_grad
        assert torch.equal(vector, torch.full_like(vector, value))
    assert [type(m) for m in converted] == [dc.DeepControlConv2d, nn.Identity, nn.Identity]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_fresh_mean_shift_rejection_follows_the_recipe_of_its_authors():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 6, 3), nn.BatchNorm2d(6))
    first, second = (m for m in replace_conv_bn(model, "mean_shift_rejection").model if type(m) is not nn.Identity)
    assert type(first) is type(second) is dc.MeanShiftConv2d
    assert (first.projection, second.projection) == (0.0, 0.9)
    assert torch.equal(first.bias, torch.zeros(5))
    assert second.bias is None
    for layer in (first, second):
        assert torch.allclose(layer.log_scale.exp(), torch.tensor(0.8))
        assert layer.weight.sum((2, 3)).abs().max() < 1e-5
        assert torch.allclose(layer.weight.flatten(1).norm(dim=1), torch.tensor(1.0))


def test_kernels_behind_a_norm_are_projected_too_in_pre_activation_nets():
    report = replace_conv_bn(PreActivation(), "mean_shift_rejection")
    row = next(row for row in report.replaced if row.module == "conv2")
    assert (row.norm, row.source, row.target) == ("", "Conv2d", "MeanShiftConv2d")
    assert "takes the output of bn2" in row.remark
    assert report.model.conv2.projection == 0.9


def test_folded_mean_shift_rejection_has_unit_kernels_unless_they_are_shared():
    model = trained(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))).double()
    layer = replace_conv_bn(model, "mean_shift_rejection", "folded").model[0]
    assert torch.allclose(layer.weight.flatten(1).norm(dim=1), torch.tensor(1.0, dtype=torch.float64))
    model[2].weight = model[0].weight
    converted = replace_conv_bn(model, "mean_shift_rejection", "folded").model
    assert converted[2].weight is converted[0].weight
    assert torch.equal(converted[0].weight, model[0].weight)
    assert_same_function(model, converted, torch.randn(2, 4, 7, 7).double())


@both_methods
def test_calibrated_meets_the_deviation_and_mean_of_each_norm(method):
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)))
    x = 2 + torch.randn(16, 3, 9, 9)
    report = replace_conv_bn(model, method, "calibrated", example=x)
    outputs = {}
    for place in ("0", "2"):
        report.model.get_submodule(place).register_forward_hook(lambda m, i, y, p=place: outputs.update({p: y}))
    report.model(x)
    for place, norm in (("0", model[1]), ("2", model[3])):
        y = outputs[place]
        assert torch.allclose(y.std((0, 2, 3), correction=0), norm.weight.abs(), rtol=1e-4)
        assert torch.allclose(y.mean((0, 2, 3)), norm.bias, atol=1e-4)
    if method == "mean_shift_rejection":
        # Nothing is taken out of a map, so this is Batch Norm in training.
        assert relative_error(outputs["2"], model.train()(x)) <= 1e-4


def test_inplace_keeps_the_parameter_that_an_optimizer_may_hold():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))
    weight = model[0].weight
    report = replace_conv_bn(model, inplace=True)
    assert report.model is model
    assert model[0].weight is weight


@both_methods
def test_inplace_gives_what_a_copy_gives(method):
    model = trained(nn.Sequential(Basic(), Nested())).double()
    x = torch.randn(2, 4, 6, 6).double()
    copied = replace_conv_bn(model, method, "calibrated", example=x).model
    assert replace_conv_bn(model, method, "calibrated", example=x, inplace=True).model is model
    assert torch.equal(model(x), copied(x))


def test_an_optimizer_keeps_its_groups():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4))
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.SGD([{"params": decayed, "weight_decay": 0.1}, {"params": others}], lr=0.1, momentum=0.9)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    momentum = optimizer.state[model[0].weight]["momentum_buffer"]
    replace_conv_bn(model, inplace=True, optimizer=optimizer)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(model[0].weight), id(model[2].weight)}
    vectors = {id(p) for p in model.parameters() if p.dim() == 1}
    assert {id(p) for p in optimizer.param_groups[1]["params"]} == vectors
    assert len(optimizer.param_groups[1]["params"]) == 6
    assert optimizer.state[model[0].weight]["momentum_buffer"] is momentum
    assert len(optimizer.state) == 2
    before = model[0].gain.clone()
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].gain, before)
    assert len(optimizer.state_dict()["state"]) == 8


def test_a_frozen_norm_stays_frozen():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5).requires_grad_(False))
    layer = replace_conv_bn(model).model[0]
    assert layer.weight.requires_grad
    assert not any(p.requires_grad for p in (layer.gain, layer.mean_scale, layer.bias))


@pytest.mark.parametrize(
    ("activation", "taken_in"),
    [
        (nn.ReLU6(), "relu6"),
        (nn.SiLU(), "silu"),
        (nn.GELU(), "gelu"),
        (nn.Hardswish(), "hardswish"),
        (nn.GELU(approximate="tanh"), None),
        (nn.Tanh(), None),
    ],
    ids=str,
)
def test_activations_in_sequence(activation, taken_in):
    model = trained(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Identity(), activation)).double()
    converted = replace_conv_bn(model, initialization="folded").model
    assert converted[0].activation == (taken_in or "identity")
    assert type(converted[3]) is (nn.Identity if taken_in else type(activation))
    assert_same_function(model, converted, torch.randn(2, 3, 6, 6).double())


def test_a_rewritten_module_is_still_what_it_was():
    model = trained(nn.Sequential(Basic(), Basic())).double()
    calls = []
    model[0].register_forward_hook(lambda module, inputs, output: calls.append(output))
    x = torch.randn(2, 4, 6, 6).double()
    converted = replace_conv_bn(model, initialization="folded").model
    wanted = converted(x)
    assert calls
    assert isinstance(converted[0], Basic)
    assert repr(converted[0]).startswith("Basic(")
    assert type(converted[0]) is type(converted[1])
    vectors = ("weight", "gain", "mean_scale", "bias")
    layers = ("conv1", "conv2", "downsample.0", "branch.0")
    assert set(converted[0].state_dict()) == {f"{layer}.{name}" for layer in layers for name in vectors}
    converted[0]._forward_hooks.clear()  # one of a test cannot be pickled
    saved = io.BytesIO()
    torch.save(converted, saved)
    saved.seek(0)
    loaded = torch.load(saved, weights_only=False)
    for other in (loaded, copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert torch.equal(other(x), wanted)
        assert isinstance(other[0], Basic)
    with pytest.raises(ValueError, match="wanted 0, the channels of input") as caught:
        converted(torch.randn(2, 3, 6, 6).double()[:, :0])
    assert "self.conv1(x)" in "".join(traceback.format_exception(caught.value))


def test_select():
    model = nn.Sequential(Basic(), Basic())
    by_name = replace_conv_bn(model, select="0.*")
    assert {row.norm for row in by_name.replaced} == {"0.bn1", "0.bn2", "0.downsample.1", "0.branch.1"}
    assert {row.norm for row in by_name.left} == {"1.bn1", "1.bn2", "1.downsample.1", "1.branch.1"}
    assert all(row.remark == "not selected" for row in by_name.left)
    by_conv = replace_conv_bn(model, select=["*.conv1", "1.conv2"])
    assert {row.norm for row in by_conv.replaced} == {"0.bn1", "1.bn1", "1.bn2"}
    by_rule = replace_conv_bn(model, select=lambda name, norm: name == "0.bn2" and norm.num_features == 4)
    assert [row.norm for row in by_rule.replaced] == ["0.bn2"]
    rest = replace_conv_bn(by_rule.model)
    assert len(rest.replaced) == 7
    assert "1 layers are Deep Control" in str(rest)


def test_dry_run_changes_nothing_and_reports_the_same():
    model = trained(nn.Sequential(Basic(), nn.Flatten(), nn.Linear(144, 2)))
    before = copy.deepcopy(model.state_dict())
    kinds = [type(m) for m in model.modules()]
    x = torch.randn(2, 4, 6, 6)
    dry = replace_conv_bn(model, example=x, dry_run=True, inplace=True)
    assert dry.model is model
    assert [type(m) for m in model.modules()] == kinds
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert dry.to_json() == replace_conv_bn(model, example=x).to_json()
    for ask in (dry.key_map, lambda: dry.translate(before)):
        with pytest.raises(ValueError, match="report: got one of dry_run=True"):
            ask()


def test_the_report_counts_parameters_and_bytes():
    layers = [nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()] + [
        layer for _ in range(3) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    ]
    report = replace_conv_bn(nn.Sequential(*layers), example=torch.randn(2, 4, 16, 16))
    content = json.loads(report.to_json())
    row = content["replaced"][1]
    assert (row["parameters_before"], row["parameters_after"]) == (8 * 8 * 9 + 8 + 16, 8 * 8 * 9 + 24)
    plane = 2 * 8 * 16 * 16 * 4
    # Batch Norm keeps what it is given and the activation what it gives; ours keeps its input and a bit an element.
    assert 2 * plane <= row["activation_bytes_before"] <= 2.1 * plane
    assert plane <= row["activation_bytes_after"] <= 1.1 * plane
    assert sum(r["activation_bytes_after"] for r in content["replaced"]) <= content["activation_bytes_after"]
    assert content["activation_bytes_after"] < 0.6 * content["activation_bytes_before"]
    assert f"{row['parameters_before']} -> {row['parameters_after']}" in str(report)


def test_the_report_says_why_a_sum_or_an_activation_stays():
    remarks = {row.module: row.remark for row in replace_conv_bn(nn.Sequential(DependsOnTraining())).replaced}
    assert remarks["0.conv1"] == (
        "the sum behind it stays in 0, whose forward is not written anew: it differs between training and evaluation"
    )
    assert remarks["0.downsample.0"] == ""


@both_methods
@pytest.mark.parametrize("initialization", ["folded", "calibrated"])
def test_a_checkpoint_of_the_old_model_goes_into_the_new_one(method, initialization):
    build = lambda: nn.Sequential(Basic(), Nested(), nn.ConvTranspose2d(4, 3, 2), nn.BatchNorm2d(3)).double()  # noqa: E731
    torch.manual_seed(1)
    old = trained(build())
    x = torch.randn(2, 4, 6, 6).double()
    torch.manual_seed(2)
    report = replace_conv_bn(build(), method, initialization, example=x)
    state = {f"module.{key}": value for key, value in old.state_dict().items()}
    report.model.load_state_dict(report.translate(state))
    assert_same_function(old, report.model, x)
    keys = report.key_map()
    assert set(keys) == set(old.state_dict())
    assert set(keys.values()) - {""} <= set(report.model.state_dict())
    assert keys["0.bn1.running_mean"] == "0.conv1.bias"
    assert keys["0.bn1.num_batches_tracked"] == ""
    assert keys["2.weight"] == "2.weight"


def test_scales_that_are_exponentials_take_checkpoints_but_zeros():
    old = trained(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))).double()
    report = replace_conv_bn(old, "mean_shift_rejection")
    report.model.load_state_dict(report.translate(old.state_dict()))
    assert_same_function(old, report.model, torch.randn(2, 4, 6, 6).double())
    old[1].weight.data[0] = 0
    with pytest.raises(ValueError, match=r"0: an exponential cannot hold its scales; convert with initialization='fol"):
        report.translate(old.state_dict())


def test_a_checkpoint_of_a_model_whose_own_name_is_module():
    model = nn.Sequential()
    model.add_module("module", nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    assert replace_conv_bn(model).translate(model.state_dict())


def test_a_checkpoint_of_another_architecture_is_refused():
    report = replace_conv_bn(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    other = nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="state_dict: got one of another architecture") as caught:
        report.translate(other.state_dict())
    assert "2.weight" in str(caught.value)
    with pytest.raises(ValueError, match="another architecture"):
        report.translate({})


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.zeros(1),), {}, TypeError, "model: got Tensor"),
        ((nn.ReLU(), "batch_norm"), {}, ValueError, "method: got 'batch_norm'"),
        ((nn.ReLU(), "deep_control", "warm"), {}, ValueError, "initialization: got 'warm'"),
        ((nn.ReLU(), "deep_control", "calibrated"), {}, ValueError, "example: got None"),
        ((nn.BatchNorm2d(2),), {"inplace": True}, ValueError, "inplace: got True"),
        ((Basic(),), {"select": "bn3"}, ValueError, "select: got 'bn3', which no norm"),
        ((Basic(),), {"select": 3}, TypeError, "select: got 3"),
        (
            (Basic(),),
            {"optimizer": torch.optim.SGD(Basic().parameters(), 0.1)},
            ValueError,
            "optimizer: got one with in",
        ),
        (
            (Basic(),),
            {"optimizer": torch.optim.SGD(Basic().parameters(), 0.1), "inplace": True},
            ValueError,
            "optimizer: got one with no parameter",
        ),
        ((nn.DataParallel(Basic()),), {}, TypeError, "DataParallel; convert its .module"),
        ((torch.compile(Basic()),), {}, TypeError, "model: it is what torch.compile returned"),
        ((nn.Sequential(torch.compile(Basic())),), {}, TypeError, "model: 0 is what torch.compile returned"),
        ((nn.Sequential(nn.LazyConv2d(4, 3), nn.BatchNorm2d(4)),), {}, TypeError, "model: 0.weight is lazy"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        replace_conv_bn(*arguments, **options)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_and_quantized_modules_are_refused():
    with pytest.raises(TypeError, match="model: 0 is TorchScript"):
        replace_conv_bn(nn.Sequential(torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))))
    with pytest.raises(TypeError, match="model: 0 is quantized"):
        replace_conv_bn(nn.Sequential(torch.ao.nn.quantized.Conv2d(4, 4, 3)))


def test_after_an_error_the_model_is_as_it_was():
    model = trained(nn.Sequential(Basic(), Nested()))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="not finite"):
        replace_conv_bn(model, initialization="calibrated", example=torch.full((1, 4, 6, 6), torch.nan), inplace=True)
    assert isinstance(model[0].bn1, nn.BatchNorm2d)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_norm_that_is_the_whole_model():
    norm = trained(nn.BatchNorm3d(4)).double()
    report = replace_conv_bn(norm, initialization="folded")
    assert type(report.model) is dc.DeepControl3d
    assert_same_function(norm, report.model, torch.randn(2, 4, 3, 3, 3).double())
