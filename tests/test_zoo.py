"""Every network of the zoo converts, computes what it computed, and trains."""

from __future__ import annotations

import copy

import pytest
import torch
from zoo import METHODS, PAGE, ZOO, Case, case, head_lines, line, norms, parameters, row, tensors

# What is promised of ResNet-50 and MobileNetV2, from end to end in float32; the others keep it too.
FOLDED_ERROR = 1e-5


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On maps as small as these a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    rows = [*report.replaced, *report.left]
    # The others are convolutions without a norm.
    assert sorted(row.norm for row in rows if row.norm) == sorted(net.norms)
    reasons = dict(net.entry.left)
    assert {row.norm for row in report.left} == reasons.keys()
    assert all(reasons[row.norm] in row.remark for row in report.left)
    assert norms(report.model).keys() == reasons.keys()
    added = sum(row.parameters_after - row.parameters_before for row in report.replaced)
    assert parameters(report.model) == parameters(net.model) + added


@on_both
@torch.no_grad()
def test_folded_equals_batch_norm_in_evaluation(net, method):
    error = relative_error(net.evaluated(method)[0], net.oracle)
    own_error = relative_error(net.model(net.x), net.oracle)
    assert error <= FOLDED_ERROR, f"error {error:.2e}, and Batch Norm's own in float32 {own_error:.2e}"


@on_both
def test_fresh_trains_a_step(net, method):
    step = net.fresh_step(method)
    assert step.without_gradient == net.before.without_gradient
    assert not step.not_finite


@on_both
@torch.no_grad()
def test_state_dict_goes_round_and_is_the_translation_of_batch_norms(net, method):
    report = net.report(method, "folded")
    state = report.model.state_dict()
    other = copy.deepcopy(report.model)
    for value in other.state_dict().values():
        value.zero_()
    other.load_state_dict(state)
    assert list(other.state_dict()) == list(state)
    for got, wanted in zip(tensors(other(net.x)), tensors(net.evaluated(method)[0]), strict=True):
        assert torch.equal(got, wanted)
    translated = report.translate(net.model.state_dict())
    assert translated.keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in translated.items())


def test_both_methods_find_the_same(net):
    assert net.evaluated("mean_shift_rejection")[1] == net.evaluated("deep_control")[1]


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


def of_these_versions() -> list[str]:
    """The page's table; skips where it was made with others of the packages."""
    head, table = head_lines() + "\n", PAGE.read_text(encoding="utf-8")
    assert table.startswith(head.partition("Versions: ")[0])
    if not table.startswith(head):
        pytest.skip("the page was written with other versions of the networks' packages")
    return table.removeprefix(head).splitlines()


def test_the_page_has_what_was_found(net):
    assert line(row(net.name)) in of_these_versions()


def test_the_page_has_all_networks():
    assert len(of_these_versions()) == 2 + len(ZOO)
