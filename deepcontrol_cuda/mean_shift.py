"""Mean Shift Rejection (arXiv 1911.13173) for models of plain convolutions: gradients, optimizers, decay.

The mean of a kernel over its taps is how far it answers to the mean of its input; while it is zero, a shift of the
input's mean does not reach the output. Kernels start with mean zero (``init.zero_mean_unit_``), and their gradients are
kept from building one up. ``modules.MeanShiftConv1d / 2d / 3d`` do both on their own, inside backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from . import backends, functional, reference

__all__ = ["MeanShiftRejection", "project_kernel_gradients_", "spatial_kernels", "unity_decay"]

# Of the command line that the authors recorded, in pytorch_resnet_cifar10.pyproj.
_WEIGHT = 0.9
_UNITY_DECAY = 5e-4


def project_kernel_gradients_(parameters: Iterable[Tensor] | Tensor, weight: float = _WEIGHT) -> None:
    """Subtract from each kernel's gradient ``weight`` times its mean over the kernel's taps, in place.

    ``grad[o, c] -= weight * grad[o, c].mean()`` for every parameter (O, C / groups, *kernel) that has a gradient and
    more than one tap; all others are left alone. Call it between backward and the optimizer's step. The operation is
    linear, so it may stand before or after sums over micro-batches or machines. Gradients that FSDP2 has sharded along
    filters or channels are projected where they are. Sources: arXiv 1911.13173, abstract; the default weight and the
    scope from the authors' code (taylorkangbeck/mean-shift-rejection).

    Args:
        parameters: one tensor or several, for instance ``model.parameters()``; their ``.grad`` changes.
        weight: from 0 to 1.

    Raises:
        ValueError: ``weight`` out of range, or a gradient sharded along the taps.
        TypeError: something in ``parameters`` is not a tensor, or a gradient is sparse or not of a floating dtype.
    """
    functional.check_fraction("weight", weight)
    kernels = [p for p in _distinct(parameters) if p.grad is not None and _has_taps(p)]
    _project([_local(p.grad, "gradient") for p in kernels], weight)


class MeanShiftRejection:
    """Projects the gradients of an optimizer's kernels ahead of each of its steps.

    ``g <- g - weight * mean(g)`` over the taps of each (filter, input channel), or, amplified,
    ``g <- g + m * (g - mean(g))``, which is the plain form of weight ``m / (1 + m)`` times ``1 + m``. It works through
    the hooks of ``torch.optim.Optimizer``, so with any of them, ``foreach`` and ``fused`` ones included, with closures,
    several parameter groups and groups added later. It runs once a step: after gradients were accumulated, reduced
    over machines and clipped, and ahead of the optimizer's own weight decay. A ``GradScaler`` unscales before it, or,
    in fused optimizers, after it, which is the same. A norm that clipping takes is that of the gradient as it was
    before; to clip what is left, call ``project_kernel_gradients_`` yourself in place of this class. A copy of the
    optimizer has no hooks. Sources: arXiv 1911.13173, abstract; ``ZeroMeanNormaliseGrads`` in ``trainer.py``
    of the authors' code (taylorkangbeck/mean-shift-rejection).

    Args:
        optimizer: holds the kernels.
        weight: from 0 to 1; None is 0.9, as the authors recorded.
        amplification: m, positive, in place of ``weight``; a comment in the authors' code advises 10. The learning rate
            of the kernels is in effect ``1 + m`` times larger, but for their means.
        scope: the kernels to treat, best ``spatial_kernels(model)``. None is, at each step, every parameter of
            ``optimizer`` whose shape can be (O, C / groups, *kernel) with more than one tap: the first convolution's
            too, which the authors leave out, and whatever else has three dimensions, such as position embeddings.
        recenter: subtract, after each step, what mean the kernels in scope have that have a gradient. Optimizers that
            rescale gradients element by element, as Adam does, give kernels a mean though no gradient has one; with
            this the mean stays zero to rounding. Kernels loaded later lose the mean they came with.

    Raises:
        TypeError, ValueError: an argument does not fit, no kernel is in scope, one in ``scope`` has a single tap (its
            whole gradient would be its mean) or is not in ``optimizer``, or ``recenter`` is asked for with kernels
            whose mean is not zero. At a step, errors of ``project_kernel_gradients_``.

    Layers that project in backward themselves (``MeanShiftConv2d``, or ``projection=`` of any) need none of this; with
    it they would be projected twice.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        weight: float | None = None,
        *,
        amplification: float | None = None,
        scope: Iterable[Parameter] | None = None,
        recenter: bool = False,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer: got {type(optimizer).__name__}, wanted a torch.optim.Optimizer")
        if amplification is not None:
            if weight is not None:
                raise ValueError("amplification: got weight too, wanted one of them: weight = m / (1 + m)")
            if not isinstance(amplification, (int, float)) or not 0 < amplification < math.inf:
                raise ValueError(f"amplification: got {amplification!r}, wanted a positive number")
            weight = amplification / (1 + amplification)
        self.weight = _WEIGHT if weight is None else weight
        functional.check_fraction("weight", self.weight)
        self.amplification = amplification
        self.recenter = recenter
        self.optimizer = optimizer
        self._scope = None if scope is None else _checked_scope(scope, optimizer)
        kernels = self.kernels()
        if not kernels:
            raise ValueError(
                "optimizer: none of its parameters is a kernel (O, C / groups, *kernel) with more than one tap, "
                "wanted at least one; a module that flattens its parameters, such as FSDP1, hides them"
            )
        if recenter:
            _check_means(kernels)
        self._hooks = [optimizer.register_step_pre_hook(self._before_step)]
        if recenter:
            self._hooks.append(optimizer.register_step_post_hook(self._after_step))

    def kernels(self) -> list[Parameter]:
        """The parameters in scope now."""
        if self._scope is not None:
            return self._scope
        return [p for p in _held(self.optimizer) if _has_taps(p)]

    def remove(self) -> None:
        """Take the hooks off the optimizer again; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def __reduce__(self):
        raise TypeError("a MeanShiftRejection cannot be copied: make one for the copy of its optimizer")

    def __repr__(self) -> str:
        form = f"weight={self.weight:g}" if self.amplification is None else f"amplification={self.amplification:g}"
        return f"MeanShiftRejection({form}, recenter={self.recenter}, {len(self.kernels())} kernels)"

    def _before_step(self, optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        # An optimizer that is given a closure has no gradients yet: it calls the closure for them, once or often.
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._project()
            return None
        if len(args) > 1:
            return (args[0], self._projected(closure), *args[2:]), kwargs
        return args, kwargs | {"closure": self._projected(closure)}

    def _projected(self, closure: Callable[[], object]) -> Callable[[], object]:
        def evaluate():
            loss = closure()
            self._project()
            return loss

        return evaluate

    def _project(self) -> None:
        gradients = [_local(p.grad, "gradient") for p in self.kernels() if p.grad is not None]
        _project(gradients, self.weight)
        if self.amplification is not None and gradients:
            with torch.no_grad():
                torch._foreach_mul_(gradients, 1 + self.amplification)

    def _after_step(self, optimizer, args: tuple, kwargs: dict) -> None:
        moved = [p.detach() for p in self.kernels() if p.requires_grad and p.grad is not None]
        _project([_local(p, "kernel") for p in moved], 1.0)


def spatial_kernels(model: nn.Module, input_convolution: bool = False) -> list[Parameter]:
    """The kernels that the authors' code projects: those with more than one tap, but for the first convolution's.

    The convolution that sees the input, by order of registration, is left out unless ``input_convolution``; so are
    layers that project in backward themselves (``projection`` above 0), frozen weights (``requires_grad`` False), and
    weights that are computed (parametrized). A weight that several layers share is listed once.
    Source: arXiv 1911.13173; ``trainer.py`` and ``ResnetBiasScaling.py`` of the authors' code
    (taylorkangbeck/mean-shift-rejection).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, wanted a torch.nn.Module")
    convolutions = [m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    weights = {id(w): w for m in convolutions if (w := m._parameters.get("weight")) is not None and w.requires_grad}
    for index, module in enumerate(convolutions):
        if getattr(module, "projection", 0.0) or (index == 0 and not input_convolution):
            weights.pop(id(module._parameters.get("weight")), None)
    return [w for w in weights.values() if _has_taps(w)]


def unity_decay(parameters: Iterable[Tensor] | Tensor, weight: float = _UNITY_DECAY) -> Tensor:
    """``weight * sum over filters of (norm(filter) - 1)^2``: a loss that draws filters to norm 1, in place of L2.

    With scaled kernels (``MeanShiftConv2d``) the scale holds a filter's magnitude, and decay towards zero would only
    change the learning rate in effect; this keeps it. Source: ``-filterl2scaleloss`` and ``-filterscalelossanchor`` in
    ``trainer.py`` of the authors' code (taylorkangbeck/mean-shift-rejection).

    Args:
        parameters: those with two or more dimensions count, once each, filters along the first: kernels
            (O, C / groups, *kernel) and linear weights (O, C). Of those sharded along filters the filters here count.
        weight: factor, at least 0.

    Returns:
        A scalar to add to the loss, float32, or float64 if a kernel is.

    Raises:
        TypeError, ValueError: ``weight`` out of range, no filters in ``parameters``, or filters torn apart by sharding.
    """
    if not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
        raise ValueError(f"weight: got {weight!r}, wanted a number of at least 0")
    total = None
    for parameter in _distinct(parameters):
        if parameter.dim() < 2:
            continue
        kernel = _local(parameter, "kernel", shards=("filters",))
        dtype = torch.promote_types(kernel.dtype, torch.float32)
        norms = torch.linalg.vector_norm(kernel, dim=tuple(range(1, kernel.dim())), dtype=dtype)
        part = (norms - 1).square().sum()
        total = part if total is None else total + part
    if total is None:
        raise ValueError("parameters: got none with two or more dimensions, wanted kernels or linear weights")
    return weight * total


def _has_taps(tensor: Tensor) -> bool:
    return tensor.dim() > 2 and math.prod(tensor.shape[2:]) > 1


def _distinct(parameters: Iterable[Tensor] | Tensor) -> list[Tensor]:
    """Each once: layers may share a kernel."""
    found = {}
    if isinstance(parameters, nn.Module):
        raise TypeError(f"parameters: got the module {type(parameters).__name__}, wanted its parameters()")
    for parameter in [parameters] if isinstance(parameters, Tensor) else parameters:
        if not isinstance(parameter, Tensor):
            raise TypeError(f"parameters: got {type(parameter).__name__}, wanted tensors")
        found[id(parameter)] = parameter
    return list(found.values())


def _held(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return _distinct(p for group in optimizer.param_groups for p in group["params"])


def _local(tensor: Tensor, what: str, shards: tuple[str, ...] = ("filters", "channels")) -> Tensor:
    """The part of a kernel or its gradient that is on this machine; ``shards``: dimensions that may be torn apart."""
    if tensor.layout != torch.strided:
        raise TypeError(f"parameters: got a {what} of layout {tensor.layout}, wanted a dense one")
    if not tensor.is_floating_point():
        raise TypeError(f"parameters: got a {what} of {tensor.dtype}, wanted a floating dtype")
    placements = getattr(tensor, "placements", None)
    if placements is None:
        return tensor
    if any(p.is_partial() or (p.is_shard() and p.dim >= len(shards)) for p in placements):
        raise ValueError(
            f"parameters: got a {what} placed as {placements}, wanted it whole or sharded along {' or '.join(shards)}"
        )
    return tensor.to_local()


def _project(tensors: list[Tensor], weight: float) -> None:
    groups: dict[tuple[str, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            backend = backends.choose(tensor, None, "project_kernel_gradients_")
            groups.setdefault((backend, tensor.device), []).append(tensor)
    with torch.no_grad():
        for (backend, _), group in groups.items():
            if backend == "reference":
                for tensor in group:
                    tensor.copy_(reference.project(tensor, weight))
            else:
                backends.ops[backend].project_kernel_gradients_(group, weight)


def _checked_scope(scope: Iterable[Parameter], optimizer: torch.optim.Optimizer) -> list[Parameter]:
    if isinstance(scope, nn.Module):
        raise TypeError(f"scope: got the module {type(scope).__name__}, wanted kernels: spatial_kernels(model)")
    held = {id(p) for p in _held(optimizer)}
    kernels = {}
    for kernel in scope:
        kernels[id(kernel)] = kernel
        if not isinstance(kernel, Tensor):
            raise TypeError(f"scope: got {type(kernel).__name__}, wanted parameters of the optimizer")
        if id(kernel) not in held:
            raise ValueError(f"scope: got a tensor {tuple(kernel.shape)} that the optimizer does not hold")
        if not _has_taps(kernel):
            raise ValueError(
                f"scope: got a kernel {tuple(kernel.shape)} with one tap, wanted more: "
                "its whole gradient would be taken for a mean and vanish"
            )
    return list(kernels.values())


@torch.no_grad()
def _check_means(kernels: list[Parameter]) -> None:
    for kernel in kernels:
        local = _local(kernel.detach(), "kernel")
        if not local.numel():
            continue
        dtype = torch.promote_types(local.dtype, torch.float32)
        mean = local.mean(reference.spatial(local), dtype=dtype).abs().max().item()
        largest = local.abs().max().item()
        if mean > 8 * torch.finfo(local.dtype).eps * largest:
            raise ValueError(
                f"recenter: got a kernel {tuple(kernel.shape)} whose mean over the taps reaches {mean:.3g}, wanted "
                "kernels of mean zero: initialise them with init.zero_mean_unit_, or leave recenter out"
            )
