"""Takes a model with Batch Norm and makes it one with Deep Control or Mean Shift Rejection.

``flow`` finds what is called with what, ``sites`` decides what becomes one layer, ``layers`` makes the layers,
``rewrite`` gives forwards that add or activate by themselves a subclass that lets the layer do it, ``replace`` does it
all, ``report`` tells.
"""

from .replace import replace_conv_bn
from .report import Report, Row

__all__ = ["Report", "Row", "replace_conv_bn"]
