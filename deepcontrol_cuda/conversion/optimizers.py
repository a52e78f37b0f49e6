"""Keeps the parameter groups of an optimizer right when parameters come and go."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parameter import Parameter


@dataclass(frozen=True)
class Change:
    """Parameters that take the places of others.

    Attributes:
        old: those that are gone.
        new: each that has come, with those whose group it may join, the first that has one.
    """

    old: list[Parameter]
    new: list[tuple[Parameter, list[Parameter]]]


def check(optimizer: torch.optim.Optimizer, parameters: Iterable[Parameter]) -> None:
    """Raise unless ``optimizer`` has one of ``parameters``."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: got {type(optimizer).__name__}, wanted a torch.optim.Optimizer")
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in held for parameter in parameters):
        raise ValueError("optimizer: got one with no parameter of the model, wanted the model's own")


def apply(optimizer: torch.optim.Optimizer, changes: list[Change], model: nn.Module) -> list[Parameter]:
    """Change the groups, and drop the state of what is gone from ``model``, which has changed.

    Returns:
        New parameters whose likes have no group.
    """
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    homeless = []
    for change in changes:
        for parameter, likes in change.new:
            group = next((groups[id(like)] for like in likes if id(like) in groups), None)
            if group is not None:
                group["params"].append(parameter)
            elif parameter.requires_grad:
                homeless.append(parameter)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    gone = {id(parameter) for change in changes for parameter in change.old} - names.keys()
    for group in optimizer.param_groups:
        old = {id(p): name for p, name in zip(group["params"], group.get("param_names", ()))}
        group["params"][:] = [parameter for parameter in group["params"] if id(parameter) not in gone]
        if "param_names" in group:
            group["param_names"] = [old.get(id(p)) or names[id(p)] for p in group["params"]]
    for parameter in [p for p in optimizer.state if id(p) in gone]:
        del optimizer.state[parameter]
    return homeless
