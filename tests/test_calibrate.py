"""calibrate_gain_: after one forward every layer's scaled output has deviation 1, whatever the model looks like."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import deepcontrol_cuda as dc


class Block(nn.Module):
    """Registered in another order than called; one layer has a residual, one is called twice, one never."""

    def __init__(self, conv) -> None:
        super().__init__()
        self.unused = conv(8, 8, 1)
        self.last = conv(8, 8, 3, padding=1, activation="relu")
        self.twice = conv(8, 8, 3, padding=1, activation="silu")
        self.first = conv(3, 8, 3, 2, 1, bias=True)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        return self.last(self.twice(self.twice(x)), residual=x)


def deviations(model: nn.Module, *args) -> dict[str, Tensor]:
    """Per channel, over samples and pixels, of what each layer computes ahead of residual and activation."""
    found: dict[str, Tensor] = {}

    def look(name):
        def hook(module, args, kwargs, output):
            bare = copy.deepcopy(module)
            bare.activation = "identity"
            z = bare.forward(args[0])
            found.setdefault(name, z.std((0, *range(2, z.dim())), correction=0))

        return hook

    hooks = []
    for name, m in model.named_modules():
        if isinstance(m, (dc.DeepControl2d, dc.DeepControlConv2d, dc.MeanShiftConv2d)):
            hooks.append(m.register_forward_hook(look(name), with_kwargs=True))
    with torch.no_grad():
        model.eval()(*args)
    for hook in hooks:
        hook.remove()
    return found


CONVS = {
    "deep_control": dc.DeepControlConv2d,
    "fixed-mean_scale": lambda *a, **k: dc.DeepControlConv2d(*a, mean_scale=0.5, **k),
    "exp": dc.MeanShiftConv2d,
    "linear": lambda *a, **k: dc.MeanShiftConv2d(*a, scaling="linear", **k),
    "noisy": lambda *a, **k: dc.MeanShiftConv2d(*a, scaling_noise=0.9, **k),
}


@pytest.mark.parametrize("conv", CONVS.values(), ids=CONVS.keys())
def test_every_channel_gets_deviation_1(conv):
    model, images = Block(conv), 5 * torch.randn(6, 3, 12, 12) + 2
    with torch.no_grad():
        model.first.bias.normal_()
    unused = copy.deepcopy(model.unused.state_dict())
    model.last.eval()
    assert dc.calibrate_gain_(model, images) == ["first", "twice", "last"]
    assert model.training
    assert not model.last.training
    assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(value, unused[name]) for name, value in model.unused.state_dict().items())
    for name, deviation in deviations(model, images).items():
        torch.testing.assert_close(deviation, torch.ones(8), rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("conv", [dc.DeepControlConv2d, dc.MeanShiftConv2d], ids=["deep_control", "mean_shift"])
def test_a_shared_gain_gives_the_layer_deviation_1(conv):
    model = nn.Sequential(conv(3, 16, 3, shared=True, bias=True))
    with torch.no_grad():
        model[0].bias.normal_()
    images = torch.randn(6, 3, 12, 12)
    dc.calibrate_gain_(model, images)
    deviation = deviations(model, images)["0"]
    assert deviation.square().mean().item() == pytest.approx(1, rel=1e-4)
    assert deviation.std() > 1e-3


def test_norm_modules_and_other_layers_between():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), dc.DeepControl2d(8, activation="relu"), nn.Dropout(0.9), dc.MapNoise(1.0))
    model.append(dc.MeanShiftConv2d(8, 4, 3))
    model.append(dc.DeepControl2d(4, gain=False))
    images = torch.randn(6, 3, 12, 12)
    assert dc.calibrate_gain_(model, images) == ["1", "4"]
    found = deviations(model, images)
    torch.testing.assert_close(found["1"], torch.ones(8), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["4"], torch.ones(4), rtol=1e-4, atol=1e-4)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = dc.DeepControlConv2d(3, 4, 3)

    def forward(self, image: Tensor, scale: float = 1.0) -> Tensor:
        return self.layer(input=image * scale)


def test_batches_of_several_arguments():
    images = torch.randn(6, 3, 12, 12)
    gains = []
    for batch in (3 * images, (images, 3.0), [images, 3.0], {"image": images, "scale": 3.0}):
        torch.manual_seed(0)
        model = Two()
        dc.calibrate_gain_(model, batch)
        gains.append(model.layer.gain.detach())
    for gain in gains[1:]:
        torch.testing.assert_close(gain, gains[0])


def test_channels_without_deviation_keep_their_gain():
    model = nn.Sequential(dc.DeepControlConv2d(3, 4, 1))
    with torch.no_grad():
        model[0].weight[1] = 0
    dc.calibrate_gain_(model, torch.randn(6, 3, 12, 12))
    assert model[0].gain[1] == 1
    assert (model[0].gain[[0, 2, 3]] != 1).all()
    # A map of one pixel is its own mean.
    model = nn.Sequential(dc.DeepControlConv2d(3, 4, 3))
    dc.calibrate_gain_(model, torch.randn(6, 3, 3, 3))
    assert (model[0].gain == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("conv", [dc.DeepControlConv2d, dc.MeanShiftConv2d], ids=["deep_control", "mean_shift"])
def test_rounding_is_no_deviation(conv, dtype):
    """Maps that are constant but for the rounding of their mean."""
    model = conv(3, 4, 1, dtype=dtype)
    before = copy.deepcopy(model.state_dict())
    images = torch.rand(1, 3, 1, 1).expand(8, 3, 16, 16).to(dtype)
    dc.calibrate_gain_(model, images)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_hooks_of_others_keep_acting():
    model = nn.Sequential(dc.DeepControlConv2d(3, 4, 3), dc.DeepControlConv2d(4, 4, 3))
    model[0].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model[0].register_forward_hook(lambda module, args, output: 100 * output)
    images, seen = torch.randn(6, 3, 12, 12), []
    model[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].std().item()))
    dc.calibrate_gain_(model, images)
    model(images)
    assert seen[-1] == pytest.approx(100, rel=1e-3)
    assert seen[0] == pytest.approx(seen[-1])


def test_a_gain_of_two_layers_and_one_that_is_computed():
    model = nn.Sequential(dc.DeepControlConv2d(3, 4, 3), dc.DeepControlConv2d(4, 4, 3), dc.DeepControlConv2d(9, 4, 3))
    model[1].gain = model[0].gain
    with pytest.raises(ValueError, match="input channels"):
        dc.calibrate_gain_(model, torch.randn(6, 3, 12, 12))
    assert (model[0].gain == 1).all()
    del model[2]
    nn.utils.parametrize.register_parametrization(model[1], "gain", nn.Tanh())
    assert dc.calibrate_gain_(model, torch.randn(6, 3, 12, 12)) == ["0"]


def test_no_gradient_is_recorded_and_none_is_needed():
    model = Block(dc.DeepControlConv2d)
    for p in model.parameters():
        p.requires_grad_(False)
    with torch.inference_mode(False):
        dc.calibrate_gain_(model, torch.randn(2, 3, 12, 12))
    assert all(p.grad is None and p.is_leaf for p in model.parameters())


def test_a_compiled_model_is_calibrated_like_the_eager_one():
    images = torch.randn(2, 3, 12, 12)
    model = Block(dc.DeepControlConv2d)
    twin = copy.deepcopy(model)
    dc.calibrate_gain_(torch.compile(model, backend="eager"), images)
    dc.calibrate_gain_(twin, images)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))


@pytest.mark.parametrize(
    ("model", "value", "message"),
    [
        (lambda: nn.Conv2d(3, 4, 3), 1.0, "got no call of a DeepControl or MeanShiftConv layer"),
        (lambda: dc.DeepControlConv2d(3, 4, 3, gain=False), 1.0, "got no call of a DeepControl"),
        (lambda: Block(dc.DeepControlConv2d), float("nan"), "batch: the output of first is not finite"),
    ],
    ids=["none", "no-gain", "nan"],
)
def test_bad_input(model, value, message):
    with pytest.raises(ValueError, match=message):
        dc.calibrate_gain_(model(), torch.full((1, 3, 12, 12), value))


def test_after_an_error_the_model_is_as_it_was():
    model = nn.Sequential(dc.DeepControlConv2d(3, 4, 3), dc.DeepControlConv2d(5, 4, 3)).train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="input channels"):
        dc.calibrate_gain_(model, torch.randn(2, 3, 12, 12))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks for m in model.modules())
