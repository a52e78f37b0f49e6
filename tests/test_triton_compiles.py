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
PRODUCTS = {80: r"mma\.sync", 90: r"wgmma\.mma_async"}


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
        f"{kernel['name']}({kernel['options']}) for {kernel['call']}: {text}"
        for kernel in kernels
        if (text := describe(kernel))
    ]
    assert not wrong, "\n".join(["", *wrong])


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
