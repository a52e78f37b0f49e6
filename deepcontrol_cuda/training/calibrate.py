"""Sets the gains of a Deep Control network from one batch, before training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..modules import DeepControlConv2d


@torch.no_grad()
def unit_deviation_(model: nn.Module, images: Tensor) -> None:
    """Divide every gain, in the order of calls, so that maps ahead of the activation have deviation 1 over ``images``.

    Taking the mean out of a map takes signal energy with it, so with all gains at 1 the signal fades from layer to
    layer. ``images`` (N, C, H, W). Changes ``model`` in place.
    """

    def calibrate(module: DeepControlConv2d, inputs: tuple[Tensor, ...], _) -> Tensor:
        activation, module.activation = module.activation, "identity"
        module.gain /= module.forward(*inputs).std((0, 2, 3))
        module.activation = activation
        return module.forward(*inputs)

    hooks = [m.register_forward_hook(calibrate) for m in model.modules() if isinstance(m, DeepControlConv2d)]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
