"""Shared by the tests: backends, error budgets, poisoned memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from host_cuda import build

import deepcontrol_cuda as dc
from deepcontrol_cuda import backends

torch.set_num_threads(2)

ROOT = Path(__file__).resolve().parents[1]
_BEHIND = ["nice"] if shutil.which("nice") else []

# GPUs that the harness of tests/host_cuda plays: an H100 and an A100, and both with so little shared memory that even
# small tensors already need clusters, or sums and apply in two launches.
HARNESS_GPUS = {
    "host_cuda": {"capability": 90, "shared_memory": 227 * 1024},
    "host_cuda-80": {"capability": 80, "shared_memory": 163 * 1024},
    "host_cuda-90-small": {"capability": 90, "shared_memory": 32 * 1024},
    "host_cuda-80-small": {"capability": 80, "shared_memory": 32 * 1024},
}
# In a process of its own Triton interprets its kernels, slowly, on CPU tensors; all tests there are of them.
INTERPRETED = backends._INTERPRETED
ON_GPUS = [] if INTERPRETED else [name for name in ("cuda", "triton") if backends.available()[name] is None]
# Where no GPU can run them, the tests for it are not collected; `make gpu` refuses to call that a success.
GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ON_GPUS]
TRITON = ["triton"] if INTERPRETED else [param for name, param in zip(ON_GPUS, GPU) if name == "triton"]
collect_ignore = ([] if GPU else ["test_gpu.py"]) + ([] if TRITON else ["test_triton_kernels.py"])


def _on(*others: str):
    return pytest.mark.parametrize("backend", TRITON if INTERPRETED else [*others, *GPU], indirect=True)


# A test with neither decorator runs on "cpu" and GPUs: the harness plays every thread of a block, which takes long.
on_every_backend = _on("cpu", "host_cuda")
on_every_gpu = _on("cpu", *HARNESS_GPUS)
on_reference_too = _on("reference", "cpu")
on_triton = pytest.mark.parametrize("backend", TRITON, indirect=True)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=TRITON if INTERPRETED else ["cpu", *GPU])
def backend(request):
    """The name of a compiled backend; under those of a GPU tensors are made there where no device is named."""
    name = request.param
    if name in HARNESS_GPUS:
        harness().configure(**HARNESS_GPUS[name])
        # Also for calls that name no backend, such as those of a module. As on a GPU float32 is no TF32.
        with dc.backends.use("host_cuda"), torch.backends.cudnn.flags(allow_tf32=False):
            yield "host_cuda"
        harness().configure()
        return
    reason = dc.backends.available()[name]
    assert reason is None, f"{name}: {reason}"
    with ExitStack() as stack:
        if name in ON_GPUS:
            # Convolutions are cuDNN's for the reference too, so in TF32 both would be wrong, and each in its own way.
            cudnn = {"enabled": True, "benchmark": False, "deterministic": True, "allow_tf32": False}
            stack.enter_context(torch.backends.cudnn.flags(**cudnn))
            stack.enter_context(torch.device("cuda"))
        stack.enter_context(dc.backends.use(name))
        yield name


# Of the tests of every backend those whose launches are few and small: NumPy plays their programs one after the other.
_INTERPRETED = {
    "kernels": "test_triton_kernels",
    "ops": """
        test_ops and (
            test_center and f32 and not large or test_center and residual-silu or large_maps and relu and f32
            or test_window_mean and f32 and not 3d-contiguous
            or project or one_pixel or edge or strange or raw_ops or no_channels or squeezed
            or small_gains or in_place or bits_unpack or nan or bit_equal and contiguous and f32
            or a_sample_does_not
        )
        or test_autograd and (
            derivatives and silu and channels_last or one_operand or project or bytes_kept and contiguous
        )
    """,
}
# Processes that tests of the Triton backend wait for, by the file of the tests.
_TRITON_PROCESSES = {
    "test_triton.py": {
        name: ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", " ".join(chosen.split()), "tests"]
        for name, chosen in _INTERPRETED.items()
    },
    "test_triton_compiles.py": {f"sm_{n}": ["-m", "tests.triton_compile", f"{n}"] for n in (80, 90)},
}


@pytest.fixture(scope="session", autouse=True)
def triton_process(request, tmp_path_factory):
    """Waits for a process and returns its status, output and errors.

    All that the chosen tests need run from the beginning, behind the other tests: they are the last to be waited for.
    """
    folder = tmp_path_factory.mktemp("triton")
    running = {}
    for file in {item.path.name for item in request.session.items} & _TRITON_PROCESSES.keys():
        for name, arguments in _TRITON_PROCESSES[file].items():
            environment = os.environ | ({"TRITON_INTERPRET": "1"} if name in _INTERPRETED else {})
            with open(folder / name, "w") as output, open(folder / f"{name}.errors", "w") as errors:
                command = [*_BEHIND, sys.executable, *arguments]
                running[name] = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=errors)

    def wait(name: str) -> tuple[int, str, str]:
        return running[name].wait(), (folder / name).read_text(), (folder / f"{name}.errors").read_text()

    yield wait
    for process in running.values():
        process.kill()
        process.wait()


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
    return getattr(torch.ops, backends._compiled[backend].namespace)


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
