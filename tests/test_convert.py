"""``replace_conv_bn`` replaces the norm and nothing else, and says what it left."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import deepcontrol_cuda as dc
from deepcontrol_cuda import replace_conv_bn
from deepcontrol_cuda.training.methods import METHODS


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


class ConvThenBN(nn.Module):
    """Attributes in torchvision's manner; ``relu`` is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


class BNThenConv(ConvThenBN):
    """Same attributes in the same order, called the other way round."""

    def forward(self, x):
        return self.conv2(self.relu(self.bn2(self.conv1(self.relu(self.bn1(x))))))


class ConvHasTwoUsers(ConvThenBN):
    def forward(self, x):
        z = self.conv1(x)
        return self.bn1(z) + z


class SharedConv(ConvThenBN):
    def forward(self, x):
        return self.bn1(self.conv1(x)) + self.bn2(self.conv1(x))


class Untraceable(ConvThenBN):
    def forward(self, x):
        return super().forward(x) if x.sum() > 1e9 else self.bn1(self.conv1(x))


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    model[0].register_forward_hook(lambda module, inputs, output: output + 1)
    return model


def test_folded_resnet_computes_what_batch_norm_computes_in_eval():
    model = trained(METHODS["batch_norm"].build("resnet10", channels=1, classes=10, seed=0))
    x = torch.randn(8, 1, 8, 8)
    report = replace_conv_bn(model, initialization="folded")
    assert len(report.replaced) == 10
    assert not report.left
    assert not any(isinstance(m, nn.BatchNorm2d) for m in report.model.modules())
    assert relative_error(report.model(x), model(x)) <= 1e-5


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"bias": True, "stride": 2, "padding": 1},
        {"bias": False, "groups": 2, "dilation": 2, "padding": "same"},
        {"bias": True, "padding": 1, "padding_mode": "reflect"},
    ],
    ids=["strided", "grouped", "reflected"],
)
def test_folded_keeps_the_geometry(rank, options):
    torch.manual_seed(0)
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1]
    model = trained(nn.Sequential(conv(4, 6, 3, **options), norm(6, eps=0.1), nn.LeakyReLU(0.3))).double()
    x = torch.randn(2, 4, *(7, 6, 5)[:rank], dtype=torch.float64)
    converted = replace_conv_bn(model, initialization="folded").model
    assert relative_error(converted(x), model(x)) <= 1e-13


def test_fresh_starts_from_the_same_kernels_with_neutral_vectors():
    torch.manual_seed(0)
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


def test_inplace_keeps_the_parameter_that_an_optimizer_may_hold():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))
    weight = model[0].weight
    report = replace_conv_bn(model, inplace=True)
    assert report.model is model
    assert model[0].weight is weight


def test_a_frozen_norm_stays_frozen():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5).requires_grad_(False))
    layer = replace_conv_bn(model).model[0]
    assert layer.weight.requires_grad
    assert not any(p.requires_grad for p in (layer.gain, layer.mean_scale, layer.bias))


def test_an_activation_that_is_called_twice_stays():
    torch.manual_seed(0)
    model = trained(ConvThenBN())
    x = torch.randn(2, 4, 6, 6)
    report = replace_conv_bn(model, initialization="folded")
    assert len(report.replaced) == 2
    assert type(report.model.relu) is nn.ReLU
    assert report.model.conv1.activation == "identity"
    assert relative_error(report.model(x.clone()), model(x.clone())) <= 1e-5


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
    torch.manual_seed(0)
    model = trained(nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), activation)).double()
    converted = replace_conv_bn(model, initialization="folded").model
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert converted[0].activation == (taken_in or "identity")
    assert type(converted[2]) is (nn.Identity if taken_in else type(activation))
    assert relative_error(converted(x), model(x)) <= 1e-13


@pytest.mark.parametrize(
    ("build", "left", "reason"),
    [
        (BNThenConv, "bn1", "no module directly in front"),
        (ConvHasTwoUsers, "bn1", "the output of conv1 goes elsewhere too"),
        (SharedConv, "bn1", "conv1 is called in 2 places"),
        (Untraceable, "bn1", "the forward of the model cannot be traced"),
        (hooked, "1", "0 has hooks"),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.SyncBatchNorm(4)), "1", "not exactly BatchNorm"),
        (lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4)), "1", "ConvTranspose2d in front"),
        (lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)), "1", "no running"),
    ],
    ids=["order", "two-users", "shared", "untraceable", "hooks", "sync", "transposed", "no-statistics"],
)
def test_what_is_left_is_reported_and_computes_the_same(build, left, reason):
    torch.manual_seed(0)
    model = trained(build())
    x = torch.randn(2, 4, 6, 6)
    report = replace_conv_bn(model, initialization="folded")
    row = next(row for row in report.left if row.module == left)
    assert reason in row.remark
    assert any(left in line and "(left)" in line and row.remark in line for line in str(report).splitlines())
    assert relative_error(report.model(x.clone()), model(x.clone())) <= 1e-5


def test_the_order_of_calls_decides_and_not_the_order_of_attributes():
    report = replace_conv_bn(BNThenConv())
    assert [(row.module, row.source) for row in report.replaced] == [("conv1", "Conv2d + BatchNorm2d")]
    assert type(report.model.bn2) is nn.Identity
    assert type(report.model.conv2) is nn.Conv2d


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(1),), TypeError, "model: got Tensor"),
        ((nn.ReLU(), "batch_norm"), ValueError, "method: got 'batch_norm'"),
        ((nn.ReLU(), "deep_control", "warm"), ValueError, "initialization: got 'warm'"),
    ],
    ids=["model", "method", "initialization"],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        replace_conv_bn(*arguments)
