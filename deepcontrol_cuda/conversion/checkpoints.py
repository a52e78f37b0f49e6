"""State dicts of Batch Norm models as state dicts of the models they were converted to."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .layers import fold_, vector_names
from .norms import as_norm


@dataclass(frozen=True)
class Source:
    """Where the values of one layer come from.

    Attributes:
        layer: name of the layer in the converted model.
        conv, norm: names of what it replaced, None where there was none.
        exclusive: nothing else uses the convolution's kernel.
    """

    layer: str
    conv: str | None
    norm: str | None
    exclusive: bool


def key_map(old: nn.Module, new: nn.Module, sources: list[Source]) -> dict[str, str]:
    """Each key of ``old`` to the key of ``new`` that holds its value, or that it went into; "" for what is dropped."""
    found = {key: key if key in new.state_dict() else "" for key in old.state_dict()}
    for source in sources:
        gain, bias = vector_names(new.get_submodule(source.layer))
        goes = {"weight": gain, "running_var": gain, "running_mean": bias, "bias": bias}
        goes = {f"{source.norm}.{name}": f"{source.layer}.{vector}" for name, vector in goes.items()}
        goes |= {f"{source.conv}.weight": f"{source.layer}.weight", f"{source.conv}.bias": f"{source.layer}.bias"}
        found |= {key: value for key, value in goes.items() if key in found}
    return found


@torch.no_grad()
def translate(
    old: nn.Module, new: nn.Module, sources: list[Source], state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A state dict of ``old`` as one of ``new``; see ``Report.translate``.

    ``old`` is on the meta device.
    """
    prefixed = [all(key.startswith("module.") for key in keys) for keys in (state_dict, old.state_dict())]
    if prefixed == [True, False]:
        state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    old = copy.deepcopy(old)
    try:
        old.load_state_dict(state_dict, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"state_dict: got one of another architecture: {_summary(error)}") from None
    translated = {key: state_dict[key] for key in new.state_dict() if key in state_dict}
    for source in sources:
        layer = copy.deepcopy(new.get_submodule(source.layer))
        conv = None if source.conv is None else old.get_submodule(source.conv)
        if conv is not None:
            layer.weight.copy_(conv.weight)
        norm = None if source.norm is None else as_norm(old.get_submodule(source.norm))
        try:
            fold_(layer, None if conv is None else conv.bias, norm, source.exclusive)
        except ValueError as error:
            raise ValueError(f"{source.layer}: {error}") from None
        prefix = f"{source.layer}." if source.layer else ""
        translated |= {f"{prefix}{key}": value for key, value in layer.state_dict().items()}
    return translated


def _summary(error: RuntimeError) -> str:
    """The first three lines of what ``load_state_dict`` says, each cut short."""
    lines = [line.strip() for line in str(error).splitlines()[1:]]
    more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
    return " ".join(line if len(line) <= 200 else f"{line[:200]} ..." for line in lines[:3]) + more
