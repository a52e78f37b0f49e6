"""What layers should take on a GPU: the counts, and that the documents have what they give."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import predict
from deepcontrol_cuda.timing import Shape

pytest.importorskip("triton")


def test_bytes_and_operations_of_a_layer():
    slow = predict.Ceilings("one byte and one operation a second", 1.0, 1.0)
    layer = predict.predict(Shape(16, 32, 1, 4), batch=2, ceilings=slow)
    x, w, z = 2 * 16 * 16 * 2, 16 * 32 * 2, 2 * 32 * 16 * 2
    assert layer.convolution == 2 * 2 * 16 * 16 * 32  # operations
    assert layer.two_passes == layer.convolution + 2 * z + z / 16
    memory = predict.Ceilings("one byte a second", 1.0, 1e9)
    layer = predict.predict(Shape(16, 32, 1, 4), batch=2, ceilings=memory)
    assert layer.convolution == x + w + z
    assert layer.two_passes == x + w + 3 * z + z / 16
    assert layer.fused == 2 * x + w + z + z / 16 + 2 * 4 * 2 * 16 + w
    assert layer.chosen == "fused"
    assert layer.ours == layer.fused


@pytest.mark.parametrize(
    ("shape", "taken"),
    [
        (Shape(64, 256, 1, 56), "fused"),
        (Shape(64, 64, 3, 56), "fused"),
        (Shape(512, 512, 3, 7), "two passes"),
        (Shape(256, 64, 1, 56), "two passes"),
        (Shape(128, 128, 3, 56, stride=2), "two passes"),
        (Shape(144, 144, 3, 56, groups=144), "direct"),
    ],
    ids=str,
)
def test_what_moves_the_fewest_bytes_is_taken(shape, taken):
    layer = predict.predict(shape)
    assert layer.chosen == taken
    if taken != "direct":
        assert layer.ours == min(layer.two_passes, layer.fused)


def test_the_document_has_the_table():
    text = (Path(__file__).parents[1] / "docs/hardware.md").read_text(encoding="utf-8")
    assert predict.table() in text, "put what `python -m bench predict` prints into docs/hardware.md"
