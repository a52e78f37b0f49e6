"""What counts as Batch Norm, and what it computes in evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_RANKS = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3, nn.SyncBatchNorm: None}


@dataclass(frozen=True)
class Norm:
    """A module that is Batch Norm, perhaps with an activation of its own behind it.

    Attributes:
        rank: spatial dimensions of the maps; 1 may also mean vectors (N, C); None is any.
        weight, bias, running_mean, running_var: (features,) or None.
        activation: a module, or None.
        frozen: the statistics are constants, also in training.
        obstacle: why it cannot be replaced, or None.
    """

    module: nn.Module
    features: int
    rank: int | None
    activation: nn.Module | None = None
    frozen: bool = False
    obstacle: str | None = None

    @property
    def weight(self) -> Tensor | None:
        return self.module.weight

    @property
    def bias(self) -> Tensor | None:
        return self.module.bias

    @property
    def has_statistics(self) -> bool:
        return self.module.running_var is not None

    def as_affine(self) -> tuple[Tensor, Tensor]:
        """(gain, bias) such that it computes ``gain * z + bias`` in evaluation, at least in float32."""
        module = self.module
        dtype = torch.promote_types(module.running_var.dtype, torch.float32)
        gain = (module.running_var.to(dtype) + module.eps).rsqrt()
        if module.weight is not None:
            gain = gain * module.weight.to(dtype)
        bias = -gain * module.running_mean.to(dtype)
        return gain, bias if module.bias is None else bias + module.bias.to(dtype)


def as_norm(module: nn.Module) -> Norm | None:
    """``module`` as a ``Norm``, or None if it is something else."""
    kind = type(module)
    if kind in _RANKS:
        return Norm(module, module.num_features, _RANKS[kind])
    if kind.__name__.startswith("FrozenBatchNorm"):
        return _with_activation(module, module.weight.shape[0], frozen=True)
    if not isinstance(module, nn.modules.batchnorm._BatchNorm):
        return None
    if kind.__name__ == "BatchNormAct2d":
        return _with_activation(module, module.num_features, frozen=False)
    if parametrize.is_parametrized(module):
        obstacle = "its parameters are computed (parametrized)"
    else:
        obstacle = f"a subclass of {kind.__mro__[1].__name__} that may compute something else"
    return Norm(module, module.num_features, None, obstacle=obstacle)


def _with_activation(module: nn.Module, features: int, frozen: bool) -> Norm:
    """Of torchvision and of timm, whose norms may drop and activate too."""
    drop, activation = module._modules.get("drop"), module._modules.get("act")
    obstacle = None
    if not isinstance(drop, (nn.Identity, type(None))):
        obstacle = f"it drops ({type(drop).__name__}) between norm and activation"
    if not hasattr(module, "eps"):
        obstacle = "it has no attribute eps to read"
    if type(activation) is nn.Identity:
        activation = None
    return Norm(module, features, 2, activation, frozen, obstacle)
