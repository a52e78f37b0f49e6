"""The ops as the dispatcher sees them: what ``csrc/ops.cpp`` and the registrations of a backend are in C++.

The schemas are those of ``csrc/ops.cpp``, word for word; they stand here too because this backend works without the
extension.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch

from .center import center, center_backward, center_with_mean
from .conv_center import conv_center, conv_center_backward
from .kernel_gradients import finish_weight_grad_, project_kernel_gradients_
from .launch import INTERPRETED
from .window_mean import window_mean

NAMESPACE = "deepcontrol_triton"

_CENTER = (
    "(Tensor input, Tensor? gain, Tensor? mean_scale, float constant, Tensor? bias, Tensor? residual, "
    "str activation, float slope, bool save) -> (Tensor output, Tensor map_mean, Tensor saved"
)
_GEOMETRY = "SymInt[] stride, SymInt[] padding, SymInt[] dilation, SymInt groups"

_OPS = (
    (center, f"center{_CENTER})"),
    (center_with_mean, f"center_with_mean{_CENTER}, Tensor output_mean)"),
    (
        center_backward,
        "center_backward(Tensor grad_output, Tensor? input, Tensor? gain, Tensor? mean_scale, float constant, "
        "Tensor map_mean, Tensor saved, str activation, float slope, bool[5] mask) "
        "-> (Tensor grad_input, Tensor grad_gain, Tensor grad_mean_scale, Tensor grad_bias, Tensor grad_residual)",
    ),
    (
        conv_center,
        "conv_center(Tensor input, Tensor weight, Tensor? gain, Tensor? mean_scale, float constant, Tensor? bias, "
        f"Tensor? residual, {_GEOMETRY}, str activation, float slope, bool save) "
        "-> (Tensor output, Tensor map_mean, Tensor saved)",
    ),
    (
        conv_center_backward,
        "conv_center_backward(Tensor grad_output, Tensor input, Tensor weight, Tensor? gain, Tensor? mean_scale, "
        f"float constant, Tensor map_mean, Tensor saved, {_GEOMETRY}, str activation, float slope, float projection, "
        "bool[6] mask) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_gain, Tensor grad_mean_scale, "
        "Tensor grad_bias, Tensor grad_residual)",
    ),
    (
        window_mean,
        "window_mean(Tensor input, SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation) "
        "-> Tensor",
    ),
    (project_kernel_gradients_, "project_kernel_gradients_(Tensor(a!)[] gradients, float weight) -> ()"),
    (
        finish_weight_grad_,
        "finish_weight_grad_(Tensor(a!) grad_weight, Tensor weight, Tensor? gain, Tensor? scale, float projection) "
        "-> Tensor",
    ),
)

_IN_PLACE = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)


def _below_autograd(function: Callable[..., object]) -> Callable[..., object]:
    """What an op is made of in PyTorch must not be recorded: its gradient is another op."""

    @wraps(function)
    def run(*arguments: object) -> object:
        with torch._C._AutoDispatchBelowAutograd(), torch._C._ExcludeDispatchKeyGuard(_IN_PLACE):
            return function(*arguments)

    return run


_library = torch.library.Library(NAMESPACE, "DEF")
for _function, _schema in _OPS:
    _library.define(_schema)
    _library.impl(_function.__name__, _below_autograd(_function), "CPU" if INTERPRETED else "CUDA")
