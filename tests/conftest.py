"""Shared by the tests: backends, error budgets, poisoned memory."""

from __future__ import annotations

import pytest
import torch
from host_cuda import build

import deepcontrol_cuda as dc

torch.set_num_threads(2)

# GPUs that the harness of tests/host_cuda plays: an H100 and an A100, and both with so little shared memory that even
# small tensors already need clusters, or sums and apply in two launches.
HARNESS_GPUS = {
    "host_cuda": {"capability": 90, "shared_memory": 227 * 1024},
    "host_cuda-80": {"capability": 80, "shared_memory": 163 * 1024},
    "host_cuda-90-small": {"capability": 90, "shared_memory": 32 * 1024},
    "host_cuda-80-small": {"capability": 80, "shared_memory": 32 * 1024},
}
# Where no GPU can run them, the tests for it are not collected; `make gpu` refuses to call that a success.
GPU = [pytest.param("cuda", marks=pytest.mark.gpu)] if dc.backends.available()["cuda"] is None else []
collect_ignore = [] if GPU else ["test_gpu.py"]
# A test with neither decorator runs on "cpu" and "cuda": the harness plays every thread of a block, which takes long.
on_every_backend = pytest.mark.parametrize("backend", ["cpu", "host_cuda", *GPU], indirect=True)
on_every_gpu = pytest.mark.parametrize("backend", ["cpu", *HARNESS_GPUS, *GPU], indirect=True)


def runnable_backends() -> list[str]:
    return [name for name, reason in dc.backends.available().items() if reason is None]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", *GPU])
def backend(request):
    """The name of a compiled backend; under "cuda" tensors are made on the GPU where no device is named."""
    name = request.param
    if name in HARNESS_GPUS:
        harness().configure(**HARNESS_GPUS[name])
        # Also for calls that name no backend, such as those of a module.
        with dc.backends.use("host_cuda"):
            yield "host_cuda"
        harness().configure()
    elif name == "cuda":
        # The convolutions are cuDNN's for the reference too, so in TF32 both would be wrong, and each in its own way.
        cudnn = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        with cudnn, torch.device("cuda"), dc.backends.use("cuda"):
            yield name
    else:
        reason = dc.backends.available()[name]
        assert reason is None, f"{name}: {reason}"
        yield name


def harness():
    """The controls of tests/host_cuda, with its ops as the backend "host_cuda"; skips where it cannot be built."""
    if reason := build.why_not():
        pytest.skip(reason)
    emulator = build.load()
    if "host_cuda" not in dc.backends.ops:
        dc.backends._register("host_cuda", "cpu", build.NAMESPACE)
    return emulator


def library(backend: str):
    """The namespace of ``torch.ops`` that holds the ops of a backend."""
    return torch.ops.deepcontrol_host_cuda if backend == "host_cuda" else torch.ops.deepcontrol


@pytest.fixture
def poisoned_memory():
    """Fresh tensors hold NaN, so that a kernel which leaves an element unwritten shows."""
    # Only warned of: where the reference has no deterministic way on a GPU, its rounding is in the budget.
    torch.use_deterministic_algorithms(True, warn_only=True)
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
