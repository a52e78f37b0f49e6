"""Sets the gains of a network from one batch, before training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import modules

__all__ = ["calibrate_gain_"]

_LAYERS = (modules._DeepControl, modules._DeepControlConv, modules._MeanShiftConv)


@dataclass(frozen=True)
class Target:
    """What a layer's output shall have ahead of residual and activation, each (C,) or None for 1 and 0.

    Attributes:
        deviation: may be negative, which turns the sign of the output around.
        mean: goes into the bias.
    """

    deviation: Tensor | None
    mean: Tensor | None


def calibrate_gain_(model: nn.Module, batch: Tensor | tuple | list | Mapping) -> list[str]:
    """Set every gain, in the order of calls, so that what it scales has standard deviation 1 over ``batch``.

    ``gain_c <- gain_c / std(gain_c * (z - mean_scale * mean(z)))`` for ``DeepControl*`` and ``DeepControlConv*``, and
    ``s_c <- s_c / std(s_c * conv(x, w))`` for ``MeanShiftConv*``: over samples and pixels, per channel, or over all
    channels where the gain is shared, ahead of bias, residual and activation. One forward does it: each layer is set
    before the next sees its output. Taking the mean out of a map takes signal energy with it, so with gains of 1 the
    signal fades from layer to layer; the method's papers do not say how they start.

    The forward runs in ``eval()``, so without dropout and noise, and without recording gradients. Modes are restored.
    Channels whose deviation is nothing but rounding (dead ones, maps of one pixel) and layers without a learned gain,
    or with one that is computed (parametrized), keep what they have. On several machines calibrate ahead of wrapping
    the model, with the same batch on each.

    Args:
        model: holds at least one layer with a learned gain. A layer called several times is set by its first call.
        batch: the model's argument, a tuple or list of them, or a mapping of keyword arguments.

    Returns:
        The names of the layers that were set, in the order of calls.

    Raises:
        TypeError: ``batch`` holds tuples or lists.
        ValueError: no layer was called that has a learned gain, or an output is not finite. After any error the gains
            are as they were.
    """
    model = getattr(model, "_orig_mod", model)  # hooks inside a compiled graph would not be called
    return calibrate_(model, batch, {module: None for module in model.modules() if isinstance(module, _LAYERS)})


def calibrate_(
    model: nn.Module, batch: Tensor | tuple | list | Mapping, targets: Mapping[nn.Module, Target | None]
) -> list[str]:
    """``calibrate_gain_`` of the layers in ``targets``; None is deviation 1 and leaves the bias alone."""
    names = {module: name for name, module in model.named_modules() if module in targets}
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else [batch]
    if any(isinstance(part, (tuple, list)) for part in parts):
        raise TypeError("batch: got pairs, as of a data loader, wanted the model's argument or arguments: images alone")
    before: dict[nn.Parameter, Tensor] = {}
    training = {module: module.training for module in model.modules()}
    done: list[str] = []

    # Ahead of the forward, so that the layer's own call, with all its hooks, already has the new gain.
    def calibrate(module: nn.Module, args: tuple, kwargs: dict) -> None:
        gain = _gain(module)
        if gain is None or names[module] in done:
            return
        for parameter in (gain, module.bias):
            if parameter is not None:
                before.setdefault(parameter, parameter.clone())
        input = args[0] if args else kwargs["input"]
        _divide_by_deviation_(module, gain, input, names[module])
        if targets[module] is not None:
            _meet_(module, gain, input, targets[module])
        done.append(names[module])

    hooks = [module.register_forward_pre_hook(calibrate, with_kwargs=True) for module in names]
    try:
        with torch.no_grad():
            model.eval()
            if isinstance(batch, Mapping):
                model(**batch)
            else:
                model(*(batch if isinstance(batch, (tuple, list)) else (batch,)))
            if not done:
                raise ValueError("model: got no call of a DeepControl or MeanShiftConv layer with a learned gain")
    except BaseException:
        for parameter, value in before.items():
            parameter.data.copy_(value)
        raise
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    return done


def _gain(module: nn.Module) -> nn.Parameter | None:
    """The parameter that holds the gain, or its logarithm."""
    name = module._scale_name if isinstance(module, modules._MeanShiftConv) else "gain"
    return module._parameters.get(name)


def _divide_by_deviation_(module: nn.Module, gain: nn.Parameter, input: Tensor, name: str) -> None:
    with _bare(module):
        scaled = module.forward(input)
    with _bare(module, fixed_mean_scale=0.0, mean_scale=None):
        whole = module.forward(input)
    axes = (0, *range(2, scaled.dim()))
    variance = scaled.float().var(axes, correction=0)
    size = whole.float().square().mean(axes)
    if gain.shape[0] == 1:
        variance, size = variance.mean(0, keepdim=True), size.mean(0, keepdim=True)
    if not variance.isfinite().all():
        layer = name or "the model"
        raise ValueError(f"batch: the output of {layer} is not finite, wanted finite images and parameters")
    # Of a map that is its own mean, rounding is left, which no gain should raise.
    rounding = 8 * torch.finfo(scaled.dtype).eps * size.sqrt()
    deviation = variance.sqrt()
    deviation = torch.where(deviation > rounding, deviation, 1.0)
    if isinstance(module, modules._MeanShiftConv) and module.scaling == "exp":
        gain -= deviation.log()
    else:
        gain /= deviation


def _meet_(module: nn.Module, gain: nn.Parameter, input: Tensor, target: Target) -> None:
    """Of a layer whose gain is learned as it is, not as a logarithm, and whose output has deviation 1."""
    if target.deviation is not None:
        gain *= target.deviation
    with _bare(module):
        scaled = module.forward(input)
    mean = scaled.double().mean((0, *range(2, scaled.dim())))
    module.bias.copy_(-mean if target.mean is None else target.mean - mean)


@contextmanager
def _bare(module: nn.Module, **others) -> Iterator[None]:
    """``module`` without bias and activation, and with ``others`` in place of what it has by these names."""
    replaced = {"activation": "identity", "bias": None, **others}
    saved = {name: getattr(module, name) for name in replaced if hasattr(module, name)}
    try:
        for name in saved:
            setattr(module, name, replaced[name])
        yield
    finally:
        for name, value in saved.items():
            setattr(module, name, value)
