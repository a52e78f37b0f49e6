"""Every network of the zoo converts, computes what it computed, and trains."""

from __future__ import annotations

import pytest
import torch
from zoo import METHODS, PAGE, ZOO, Case, case, head_lines, norms, page, parameters, tensors

# The bound that is promised for these two; the others are held to it or to what float32 costs the original itself.
PROMISED = ("torchvision resnet50", "torchvision mobilenet_v2")
FOLDED_ERROR = 1e-5


# Tests of one network run one after the other, so that it is built and converted once.
@pytest.fixture(scope="module", params=ZOO)
def net(request) -> Case:
    return case(request.param)


on_both = pytest.mark.parametrize("method", METHODS)


def relative_error(got, oracle) -> float:
    """The largest deviation of any output, relative to the largest value of that output."""
    pairs = list(zip(tensors(got), tensors(oracle), strict=True))
    assert all(a.shape == b.shape for a, b in pairs)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


@on_both
def test_every_norm_is_in_the_report_once(net, method):
    report = net.report(method, "folded")
    named = [row.norm for row in (*report.replaced, *report.left)]
    assert sorted(named) == sorted(net.norms)
    assert norms(report.model).keys() == {row.norm for row in report.left}
    reasons = dict(net.entry.left)
    assert {row.norm for row in report.left} == reasons.keys()
    assert all(reasons[row.norm] in row.remark for row in report.left)
    added = sum(row.parameters_after - row.parameters_before for row in report.replaced)
    assert parameters(report.model) == parameters(net.model) + added


@on_both
@torch.no_grad()
def test_folded_equals_batch_norm_in_evaluation(net, method, request):
    oracle = net.oracle
    own_error = relative_error(net.model(net.x), oracle)
    budget = FOLDED_ERROR
    if net.name not in PROMISED:
        # float32 rounds differently in another order of the same operations, in deep networks by more than the bound.
        budget = max(budget, 2 * (own_error + torch.finfo(torch.float32).eps))
    error = relative_error(net.report(method, "folded").model(net.x), oracle)
    assert error <= budget, f"error {error:.2e}, budget {budget:.2e} (Batch Norm's own error {own_error:.2e})"


@on_both
def test_fresh_trains_a_step(net, method):
    step = net.fresh_step(method)
    assert step.without_gradient == net.before.without_gradient
    assert not step.not_finite


@on_both
def test_state_dict_goes_round_and_takes_a_batch_norm_checkpoint(net, method):
    fresh, folded = (net.report(method, initialization) for initialization in ("fresh", "folded"))
    kept = {key: value.clone() for key, value in fresh.model.state_dict().items()}
    wanted = folded.model.state_dict()
    assert list(kept) == list(wanted)
    for source in (wanted, fresh.translate(net.model.state_dict())):
        fresh.model.load_state_dict(source)
        assert all(torch.equal(value, wanted[key]) for key, value in fresh.model.state_dict().items())
        fresh.model.load_state_dict(kept)


def test_both_methods_find_the_same(net):
    assert net.counts("mean_shift_rejection") == net.counts("deep_control")


def test_a_network_without_batch_norm_is_told_so_and_stays():
    net = case("timm convnext_atto")
    for method in METHODS:
        report = net.report(method, "folded")
        assert not report.replaced
        assert not report.left
        assert "nothing to replace" in str(report)
        assert [(name, type(m)) for name, m in report.model.named_modules()] == [
            (name, type(m)) for name, m in net.model.named_modules()
        ]
        assert all(torch.equal(value, report.model.state_dict()[key]) for key, value in net.model.state_dict().items())


def test_the_page_has_what_was_found():
    written = PAGE.read_text(encoding="utf-8")
    if not written.startswith(head_lines()):
        assert written.partition("Versions: ")[0] == head_lines().partition("Versions: ")[0]
        pytest.skip("the page was written with other versions of the networks' packages")
    assert written == page()
