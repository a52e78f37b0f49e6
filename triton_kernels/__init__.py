"""Triton kernels of deepcontrol_cuda; import them as ``deepcontrol_cuda.triton_kernels``. None are written yet."""
