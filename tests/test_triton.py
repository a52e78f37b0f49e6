"""The Triton backend in Triton's interpreter, in processes of their own: Triton asks for that when it is imported."""

from __future__ import annotations

import importlib.util

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no triton"),
]


@pytest.mark.parametrize("which", ["kernels", "ops"])
def test_interpreted(triton_process, which):
    """test_triton_kernels.py, and the tests of every backend's values and gradients that ``conftest`` picks."""
    status, output, errors = triton_process(which)
    assert status == 0, f"{output[-6000:]}\n{errors[-2000:]}"
    assert " passed" in output
