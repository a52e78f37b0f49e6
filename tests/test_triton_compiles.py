"""Triton compiles every kernel for GPUs that are not here, and what it makes of them keeps to the budgets."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no triton"),
    pytest.mark.parametrize("capability", [80, 90], ids=("sm_80", "sm_90")),
]
# Bytes that one block may have, of an A100 and an H100.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
PRODUCTS = ("_convolve", "_weight_grad")


@pytest.fixture
def compiled(triton_process, capability) -> dict[str, list]:
    """What triton_compile.py reports: the names of the kernels that there are, and all that was compiled."""
    status, output, errors = triton_process(f"sm_{capability}")
    assert status == 0, errors[-3000:]
    return json.loads(output)


def check(kernels: list[dict], describe: Callable[[dict], str | None]) -> None:
    """``describe`` says what is wrong with a kernel, if anything."""
    assert kernels
    wrong = [
        f"{kernel['name']} {_tile(kernel['constants'])} for {kernel['call']}: {text}"
        for kernel in kernels
        if (text := describe(kernel))
    ]
    assert not wrong, "\n".join(["", *wrong])


def _tile(constants: dict) -> str:
    geometry = ("KERNEL", "STRIDE", "PADDING", "DILATION")
    return ", ".join(f"{name}={value}" for name, value in constants.items() if not name.startswith(geometry))


def test_every_kernel_is_compiled(compiled):
    assert {kernel["name"] for kernel in compiled["kernels"]} == set(compiled["entries"])


def test_nothing_spills(compiled):
    def describe(kernel):
        if kernel["stack"] or kernel["local"]:
            return f"{kernel['registers']} registers, {kernel['stack']} + {kernel['local']} bytes of local memory"

    check(compiled["kernels"], describe)


def test_shared_memory(compiled, capability):
    def describe(kernel):
        if kernel["shared"] > SHARED_MEMORY[capability]:
            return f"{kernel['shared']} bytes of shared memory"

    check(compiled["kernels"], describe)


def test_no_sum_depends_on_the_order_of_threads(compiled):
    """No atomics on floating-point numbers."""
    check(compiled["kernels"], lambda kernel: ", ".join(re.findall(r"\b(?:atom|red)\.[\w.:]*\.b?f\d+", kernel["ptx"])))


def test_products_run_on_tensor_cores(compiled, capability):
    """Those of newer GPUs need four warps and 64 rows, and transpose no operand of 32 bits."""

    def describe(kernel):
        large = kernel["constants"]["BLOCK_M"] >= 64 and kernel["constants"]["num_warps"] >= 4
        transposes = kernel["name"] == "_weight_grad" and "float32, channels_last" in kernel["call"]
        newer = capability >= 90 and large and not transposes
        wanted = r"wgmma\.mma_async" if newer else r"mma\.sync"
        if not re.search(wanted, kernel["ptx"]):
            return f"no {wanted}"

    check([kernel for kernel in compiled["kernels"] if kernel["name"] in PRODUCTS], describe)


@pytest.mark.parametrize(
    "instruction",
    [
        pytest.param(
            r"ld\.global[\w.:]*\.(v4\.b32|v2\.b64)|cp\.async\.cg\.shared\.global [^;]*\], (16|0x10)", id="load"
        ),
        pytest.param(r"st\.global[\w.:]*\.(v4\.b32|v2\.b64)", id="store"),
    ],
)
def test_sixteen_bytes_move_at_a_time(compiled, capability, instruction):
    names = (*PRODUCTS, "_center", "_center_backward")
    kernels = [kernel for kernel in compiled["kernels"] if kernel["name"] in names and kernel["aligned"]]
    check(kernels, lambda kernel: None if re.search(instruction, kernel["ptx"]) else f"no {instruction}")
