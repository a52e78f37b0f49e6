"""Mean Shift Rejection (arXiv 1911.13173): the projection of kernel gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from . import backends, functional, reference

__all__ = ["project_kernel_gradients_"]


def project_kernel_gradients_(parameters: Iterable[Tensor] | Tensor, weight: float = 0.9) -> None:
    """Subtract from each kernel's gradient ``weight`` times its mean over the kernel's taps, in place.

    ``grad[o, c] -= weight * grad[o, c].mean()`` for every parameter (O, C / groups, *kernel) that has a gradient and
    more than one tap; all others are left alone. Call it between backward and the optimizer's step. Sources: arXiv
    1911.13173, abstract; the default weight and the scope from the authors' code (taylorkangbeck/mean-shift-rejection).

    Args:
        parameters: one tensor or several, for instance ``model.parameters()``; their ``.grad`` changes.
        weight: from 0 to 1.

    Raises:
        ValueError: ``weight`` out of range.
        TypeError: something in ``parameters`` is not a tensor, or a gradient is not floating.
    """
    functional.check_fraction("weight", weight)
    gradients: dict[tuple[str, torch.device], list[Tensor]] = {}
    for parameter in [parameters] if isinstance(parameters, Tensor) else parameters:
        if not isinstance(parameter, Tensor):
            raise TypeError(f"parameters: got {type(parameter).__name__}, wanted tensors")
        grad = parameter.grad
        if grad is None or grad.dim() < 3 or grad.shape[2:].numel() <= 1 or grad.numel() == 0:
            continue
        if not grad.is_floating_point():
            raise TypeError(f"parameters: got a gradient of {grad.dtype}, wanted a floating dtype")
        backend = backends.choose(grad, None, "project_kernel_gradients_")
        gradients.setdefault((backend, grad.device), []).append(grad)
    with torch.no_grad():
        for (backend, _), tensors in gradients.items():
            if backend == "reference":
                for grad in tensors:
                    grad.copy_(reference.project(grad, weight))
            else:
                backends.ops[backend].project_kernel_gradients_(tensors, weight)
