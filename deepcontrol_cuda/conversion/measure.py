"""The bytes that a training forward keeps for backward, by the modules that made them."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from .flow import call


def kept_bytes(model: nn.Module, example: Any, owners: dict[str, str]) -> Counter[str | None]:
    """Bytes by owner, each storage once, parameters and buffers not counted; None owns what no other does.

    A storage belongs to the module that gave it, or else to the one that was called last when it was kept.

    Args:
        model: runs in ``train()``; a copy of it does.
        example: the model's argument or arguments.
        owners: module name to the owner's name.
    """
    model = copy.deepcopy(model).train()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: Counter[str | None] = Counter()
    made: dict[int, str] = {}
    counted: set[int] = set()
    held: list[Tensor] = []  # no storage is freed meanwhile, so none returns at the address of another
    last: list[str | None] = [None]

    def before(owner: str) -> None:
        last[0] = owner

    def after(owner: str, output: Any) -> None:
        if isinstance(output, Tensor):
            held.append(output.detach())
            made[output.untyped_storage().data_ptr()] = owner

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.data_ptr() not in counted:
            counted.add(storage.data_ptr())
            held.append(tensor.detach())
            kept[made.get(storage.data_ptr(), last[0])] += storage.nbytes()
        return tensor

    for name, owner in owners.items():
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda module, args, owner=owner: before(owner))
        module.register_forward_hook(lambda module, args, output, owner=owner: after(owner, output))
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(model, example)
    return kept
