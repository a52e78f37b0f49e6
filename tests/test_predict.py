"""What layers should take on a GPU: the counts, and that the documents have what they give."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path

import pytest
import torch

from bench import predict
from bench.cases import SETS
from deepcontrol_cuda.timing import Shape

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="there is no triton")


@needs_triton
def test_bytes_and_operations_of_a_layer():
    costs = pytest.importorskip("deepcontrol_cuda.triton_kernels.costs")
    geometry, tensors = (
        importlib.import_module(f"deepcontrol_cuda.triton_kernels.{name}") for name in ("geometry", "tensors")
    )
    x, w = torch.empty(2, 16, 4, 4, dtype=torch.bfloat16), torch.empty(32, 16, 1, 1, dtype=torch.bfloat16)
    layer = geometry.Layer(2, 16, 32, 1, tensors.conv_windows(x, w, (1, 1), (0, 0), (1, 1), 1), 2)
    x, w, z = x.nbytes, w.nbytes, 2 * 32 * 16 * 2

    slow = costs.seconds(layer, costs.Ceilings("one byte and one operation a second", 1.0, 1.0, 1.0))
    assert slow["convolution"] == 2 * 2 * 16 * 16 * 32  # operations
    assert slow["two passes"] == slow["convolution"] + 2 * z + z / 16
    # A tile holds maps of sixteen pixels without padding.
    assert slow["held"] == slow["convolution"]
    moved = costs.seconds(layer, costs.Ceilings("one byte a second", 1.0, 1.0, 1e9))
    assert moved["convolution"] == x + w + z
    assert moved["two passes"] == x + w + 3 * z + z / 16
    assert moved["fused"] == 2 * x + w + z + z / 16 + 2 * 4 * 2 * 16 + w
    assert moved["held"] == x + w + z + z / 16


BACKENDS = [pytest.param("cuda"), pytest.param("triton", marks=needs_triton)]


@needs_triton
@pytest.mark.parametrize(
    ("shape", "taken"),
    [
        (Shape(64, 256, 1, 56), "fused"),
        (Shape(256, 1024, 1, 14), "held"),
        (Shape(64, 64, 3, 56), "fused"),
        (Shape(512, 512, 3, 7), "two passes"),
        (Shape(256, 64, 1, 56), "two passes"),
        (Shape(128, 128, 3, 56, stride=2), "two passes"),
        (Shape(144, 144, 3, 56, groups=144), "direct"),
    ],
    ids=str,
)
def test_the_shortest_way_of_triton_is_taken(shape, taken):
    layer = predict.predict(shape, "triton")
    assert layer.taken == taken
    if taken != "direct":
        assert layer.ours == min(layer.seconds[way] for way in ("two passes", "fused", "held"))


@pytest.mark.parametrize(
    ("shape", "taken"),
    [
        (Shape(64, 256, 1, 56), "fused sm90"),
        (Shape(512, 1024, 1, 28, stride=2), "held sm90"),
        (Shape(256, 64, 1, 56), "two passes"),
        (Shape(3, 64, 7, 224, stride=2), "two passes"),
        (Shape(144, 144, 3, 56, groups=144), "direct"),
    ],
    ids=str,
)
def test_the_shortest_way_of_cuda_is_taken(shape, taken):
    layer = predict.predict(shape, "cuda")
    assert layer.taken == taken
    assert layer.ours == min(layer.seconds.values())
    assert layer.ours >= layer.convolution


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("set", ["resnet50_all", "mobilenet_v2"])
def test_the_document_has_the_table(backend, set):
    if (backend, set) == ("triton", "mobilenet_v2"):
        pytest.skip("its depthwise kernels are predicted only where they are taken")
    shapes = [shape for shape in SETS[set] if set == "resnet50_all" or shape.groups > 1]
    text = (Path(__file__).parents[1] / "docs/hardware.md").read_text(encoding="utf-8")
    assert predict.table(backend, shapes) in text, f"docs/hardware.md has another table of {backend}, {set}"
