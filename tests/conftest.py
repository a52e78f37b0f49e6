"""Shared by the tests: backends, error budgets, poisoned memory."""

from __future__ import annotations

import pytest
import torch

import deepcontrol_cuda as dc

torch.set_num_threads(2)


def runnable_backends() -> list[str]:
    return [name for name, reason in dc.backends.available().items() if reason is None]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=[name for name in dc.backends.BACKENDS if name != "reference"])
def backend(request):
    reason = dc.backends.available()[request.param]
    assert reason is None, f"{request.param}: {reason}"
    return request.param


@pytest.fixture
def poisoned_memory():
    """Fresh tensors hold NaN, so that a kernel which leaves an element unwritten shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def memory_format(tensor: torch.Tensor, channels_last: bool) -> torch.memory_format:
    if not channels_last:
        return torch.contiguous_format
    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim(), torch.contiguous_format)


def assert_within_budget(got, oracle, low, dtype, magnitude=None, what=""):
    """``got`` is as near to the float64 ``oracle`` as twice what the reference in the same dtype is, plus rounding.

    ``low`` is the reference run in ``dtype``. The rounding band is one unit in the last place, in ``dtype``, of
    ``magnitude``: the largest result, or more where the result is a sum of terms that cancel. In float64 the reference
    is the oracle itself, so there the band must hold the rounding of both: eight units.
    """
    assert got.shape == oracle.shape, what
    assert got.dtype == low.dtype, what
    if oracle.numel() == 0:
        return
    assert torch.isfinite(oracle).all(), f"{what}: the oracle is not finite"
    assert torch.isfinite(got).all(), f"{what}: not finite"
    error = (got.double() - oracle).abs().max().item()
    reference_error = (low.double() - oracle).abs().max().item()
    band = torch.finfo(dtype).eps * max(oracle.abs().max().item(), magnitude or 0.0)
    budget = 2 * (reference_error + band * (8 if dtype == torch.float64 else 1))
    assert error <= budget, f"{what}: error {error:.3e}, budget {budget:.3e} (reference's error {reference_error:.3e})"
