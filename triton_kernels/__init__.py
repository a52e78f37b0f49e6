"""Triton kernels of deepcontrol_cuda; import them as ``deepcontrol_cuda.triton_kernels``.

One file per op. Importing the package defines ``torch.ops.deepcontrol_triton`` with the schemas of ``csrc/ops.cpp``, on
CUDA tensors, or on CPU tensors where Triton interprets its kernels (TRITON_INTERPRET=1).
"""

from .library import NAMESPACE

__all__ = ["NAMESPACE"]
