"""The networks are those of the papers, and what they are trained with is what its name says."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import deepcontrol_cuda as dc
from deepcontrol_cuda.training.methods import METHODS
from deepcontrol_cuda.training.networks import Architecture, BasicBlock, Bottleneck

ZERO_MEAN_OFF = "mean_shift_rejection_zero_mean_off"
TINY = Architecture(BasicBlock, (4, 8), (1, 1))
UNIFORM = [ZERO_MEAN_OFF, "mean_shift_rejection_all_off"]
KAIMING = [name for name in METHODS if "mean_shift" not in name]
ZERO_MEAN = [name for name in METHODS if name not in (*KAIMING, *UNIFORM)]


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("network", "classes", "parameters"),
    [
        # arXiv 1512.03385, table 6, names 0.27 M and 1.7 M; its shortcuts without parameters save the two 1x1 layers.
        ("resnet20", 10, 269_722 + 16 * 32 + 32 * 64 + 2 * (32 + 64)),
        ("resnet110", 10, 1_727_962 + 16 * 32 + 32 * 64 + 2 * (32 + 64)),
        ("resnet50", 1000, 25_557_032),  # torchvision's
    ],
)
def test_parameters_are_as_many_as_known(network, classes, parameters):
    assert count(METHODS["batch_norm"].build(network, 3, classes, seed=0)) == parameters


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_shapes(name, block):
    images = torch.randn(3, 2, 33, 33)
    for large_images in (False, True):
        model = METHODS[name].build(Architecture(block, (4, 8), (1, 2), large_images), 2, 5, seed=0)
        seen = []
        model.blocks.register_forward_hook(lambda module, inputs, output, seen=seen: seen.append(output.shape))
        assert model(images).shape == (3, 5)
        size = 5 if large_images else 17
        assert seen == [(3, 8 * block.expansion, size, size)]


def kernels(name: str, seed: int) -> list[torch.Tensor]:
    model = METHODS[name].build(TINY, 1, 10, seed)
    return [parameter for parameter in model.parameters() if parameter.dim() > 1]


@pytest.mark.parametrize("names", [KAIMING, ZERO_MEAN, UNIFORM], ids=["kaiming", "zero-mean", "uniform"])
def test_one_seed_is_one_start_for_all_methods_of_one_initialisation(names):
    starts = [kernels(name, 3) for name in names]
    for start in starts[1:]:
        assert all(torch.equal(a, b) for a, b in zip(starts[0], start, strict=True))
    assert not torch.equal(starts[0][0], kernels(names[0], 4)[0])


def test_ingredients_of_mean_shift_rejection():
    def spatial(name: str) -> list[nn.Module]:
        model = METHODS[name].build(TINY, 3, 10, seed=0)
        return [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]

    full = spatial("mean_shift_rejection")
    for module in (*full, *spatial(ZERO_MEAN_OFF)):
        torch.testing.assert_close(module.weight.flatten(1).norm(dim=1), torch.ones(module.out_channels))
    assert max(module.weight.mean((2, 3)).abs().max() for module in full) < 1e-7
    assert min(module.weight.mean((2, 3)).abs().max() for module in spatial(ZERO_MEAN_OFF)) > 1e-3
    assert [module.projection for module in full] == [0.0] + [0.9] * (len(full) - 1)
    assert [module.bias is not None for module in full] == [True] + [False] * (len(full) - 1)
    assert not any(module.projection for module in spatial("mean_shift_rejection_projection_off"))
    assert not any(module.scaling for module in spatial("mean_shift_rejection_scaling_off"))


def test_noise_is_at_the_input_of_each_block_while_training():
    model = METHODS["mean_shift_rejection"].build(TINY, 3, 10, seed=0)
    images = torch.randn(2, 3, 8, 8)
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))
    assert sum(isinstance(m, dc.MapNoise) for m in model.modules()) == len(model.blocks)
    quiet = METHODS["mean_shift_rejection_noise_off"].build(TINY, 3, 10, seed=0)
    assert torch.equal(quiet(images), quiet(images))


def test_rates_and_decay_of_mean_shift_rejection():
    method = METHODS["mean_shift_rejection"]
    model = method.build(TINY, 3, 10, seed=0)
    group_of = {id(p): g for g in method.parameter_groups(model, 0.4, weight_decay=0.01) for p in g["params"]}
    got = {name: (group_of[id(p)]["lr"], group_of[id(p)]["weight_decay"]) for name, p in model.named_parameters()}
    assert got.pop("classifier.weight") == (0.1, 0.01)
    assert got.pop("classifier.bias") == got.pop("input.bias") == (0.1, 0.0)
    assert set(got.values()) == {(0.4, 0.0)}
    assert method.penalty(model).item() == pytest.approx(0, abs=1e-9)
    with torch.no_grad():
        model.input.weight *= 2
    assert method.penalty(model).item() == pytest.approx(5e-4 * model.input.out_channels, rel=1e-4)


@pytest.mark.parametrize("name", ["deep_control", "mean_shift_rejection_calibrated"])
def test_calibration_is_part_of_the_method(name):
    model = METHODS[name].build(TINY, 3, 10, seed=0)
    images = torch.randn(16, 3, 8, 8)
    METHODS[name].prepare(model, images)
    first = model.input
    first.activation = "identity"
    torch.testing.assert_close(first(images).std((0, 2, 3), correction=0), torch.ones(first.out_channels))


def test_building_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    METHODS["none"].build(TINY, 1, 10, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_gradient_centralization_acts_on_gradients_until_removed():
    method = METHODS["gradient_centralization"]
    model = method.build(TINY, 1, 10, seed=0)
    optimizer = torch.optim.SGD(method.parameter_groups(model, 0.1))
    handles = method.attach(model, optimizer)

    def step() -> list[torch.Tensor]:
        model(torch.randn(2, 1, 8, 8)).square().sum().backward()
        optimizer.step()
        return [p.grad.flatten(1).mean(1).abs().max() for p in model.parameters() if p.dim() > 1]

    assert max(step()) < 1e-6
    for handle in handles:
        handle.remove()
    assert min(step()) > 1e-4


def test_only_weights_decay():
    method = METHODS["batch_norm"]
    model = method.build(TINY, 1, 10, seed=0)
    groups = method.parameter_groups(model, 0.1, weight_decay=0.01)
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert {group["lr"] for group in groups} == {0.1}
    assert all(decays.pop(id(p)) == (0.01 if p.dim() > 1 else 0) for p in model.parameters())
    assert not decays
