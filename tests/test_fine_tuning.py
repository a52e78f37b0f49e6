"""A network trained with Batch Norm goes on from where it was when it is converted with its weights and trained on."""

from __future__ import annotations

import json
from dataclasses import replace
from statistics import mean

import pytest
import torch
from torch import nn

pytest.importorskip("sklearn")

from bench.__main__ import main
from deepcontrol_cuda.conversion import replace_conv_bn
from deepcontrol_cuda.training import fine_tuning
from deepcontrol_cuda.training.data import digits
from deepcontrol_cuda.training.loop import Setting

CONVERTED = [network for network, method in fine_tuning.NETWORKS.items() if method is not None]
SEED = 0


@pytest.fixture(scope="module")
def data():
    return digits()


@pytest.fixture(scope="module")
def trained(data) -> nn.Module:
    return fine_tuning.pretrain(fine_tuning.PLAN, SEED, data)


@pytest.mark.parametrize("network", CONVERTED)
def test_accuracy_is_kept_and_then_gained(data, trained, network):
    run = fine_tuning.fine_tune(trained, network, fine_tuning.PLAN, SEED, data)
    assert run.diverged_at is None
    assert len(run.losses) == fine_tuning.PLAN.then.steps
    assert run.deviation <= 1e-5
    assert run.converted == run.before > 0.9
    # The first step is one of the warm-up, and moves no image over a boundary.
    assert run.first_step >= run.before
    assert run.end >= run.before


@pytest.mark.parametrize("network", CONVERTED)
def test_everything_is_converted_and_learned(data, trained, network):
    model = replace_conv_bn(trained, fine_tuning.NETWORKS[network], "folded").model
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    scales = [parameter for name, parameter in model.named_parameters() if name.endswith("mean_scale")]
    assert bool(scales) == (network == "Deep Control")
    assert all((scale == 0).all() for scale in scales)
    loss = nn.functional.cross_entropy(model(data.normalise(data.train.images[:64])), data.train.labels[:64])
    loss.backward()
    assert all(parameter.grad.any() for parameter in model.parameters())


def test_a_conversion_that_forgets_the_weights_is_seen(data, trained, monkeypatch):
    def fresh(model, method, initialization):
        return replace_conv_bn(model, method, "fresh")

    monkeypatch.setattr(fine_tuning, "replace_conv_bn", fresh)
    plan = replace(fine_tuning.PLAN, then=Setting(64, 0.005, 1))
    run = fine_tuning.fine_tune(trained, "Deep Control", plan, SEED, data)
    assert run.deviation > 0.1
    assert run.converted < run.before


def test_a_run_that_diverges_says_where(data, trained):
    plan = replace(fine_tuning.PLAN, then=Setting(64, 1e6, 30))
    run = fine_tuning.fine_tune(trained, "Deep Control", plan, SEED, data)
    assert run.diverged_at == len(run.losses) < 30
    assert run.end is None
    assert run.converted == run.before


def test_a_seed_gives_the_same_run_again_and_the_network_is_left_as_it_was(data, trained):
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    plan = replace(fine_tuning.PLAN, then=Setting(64, 0.005, 3))
    first, again, other = (fine_tuning.fine_tune(trained, "Deep Control", plan, seed, data) for seed in (0, 0, 1))
    assert first == again
    assert first.losses != other.losses
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())


def test_the_benchmark_writes_what_it_prints(tmp_path, capsys):
    pytest.importorskip("tqdm")
    assert main(["fine-tuning", "--quick", "--seeds", "2", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    (path,) = tmp_path.glob("*_fine-tuning.json")
    runs = json.loads(path.read_text())["runs"]
    assert [(run["seed"], run["network"]) for run in runs] == [(s, n) for s in (0, 1) for n in fine_tuning.NETWORKS]
    for network in fine_tuning.NETWORKS:
        row = next(line for line in out.splitlines() if network in line)
        assert f"{mean(run['end'] for run in runs if run['network'] == network):.4f}" in row
