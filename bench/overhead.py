"""What one tiny layer costs, so small that its time is Python's and the dispatcher's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from deepcontrol_cuda.timing import Shape

from .runner import MODES, Row, Setting, measure

SHAPE = Shape(16, 16, 3, 4)
LAYERS = ("conv_relu", "conv_bn_relu", "ours")


def run(dtypes: Sequence[str], layouts: Sequence[str], repeats: int) -> Iterator[Row]:
    for dtype in dtypes:
        for layout in layouts:
            for mode in MODES:
                yield measure(SHAPE, Setting(dtype, layout, mode), 1, LAYERS, repeats)
