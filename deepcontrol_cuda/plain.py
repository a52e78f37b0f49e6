"""Copies of models in plain PyTorch modules, for places where this package is not installed."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.parameter import Parameter
from torch.nn.utils import parametrize

from . import activations, modules

__all__ = ["to_reference"]

_NORMS = (modules.DeepControl1d, modules.DeepControl2d, modules.DeepControl3d)
_CONVS = (
    modules.DeepControlConv1d,
    modules.DeepControlConv2d,
    modules.DeepControlConv3d,
    modules.MeanShiftConv1d,
    modules.MeanShiftConv2d,
    modules.MeanShiftConv3d,
)
_LAYERS = (*_NORMS, *_CONVS, modules.MapNoise)
_ACTIVATIONS = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
}
_HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks")]


def to_reference(model: nn.Module, fold: bool = False) -> nn.Module:
    """A copy of ``model`` in plain PyTorch modules: it runs, and ``torch.save(copy)`` loads, without this package.

    Every layer of this package becomes a ``torch.fx.GraphModule`` of PyTorch's own functions, with the same parameters
    under the same names, so that state dicts fit both ways, and values and gradients are the same to rounding; the
    projection of gradients that ``projection`` asks for is kept too, while ``MeanShiftRejection`` projects those of
    plain convolutions. ``print(copy.get_submodule(name).code)`` shows what a layer computes. Noise in training
    (``MapNoise``, ``scaling_noise``) is drawn by ``nn.RReLU``: distributed as before, but from another stream. A module
    whose class ``replace_conv_bn`` made gets its own class back, and adds and activates by itself. Modules that are
    shared stay shared; a model without layers of this package comes back as a mere copy. Classes of other packages, the
    model's own among them, must be importable where a saved copy is loaded.

    Args:
        model: any module, on any device, of any dtype; it is left as it is.
        fold: for deployment: gains and scales are multiplied into the kernels, and what only training needs is left
            out (noise, projection), so keys of the state dict differ. A convolution that takes no mean (one of Mean
            Shift Rejection, or with a mean_scale of 0.0 or that is all zeros) becomes an ``nn.Conv1d / 2d / 3d``,
            followed by its activation in an ``nn.Sequential``; where its callers may pass a residual, which those do
            not take, a GraphModule.

    Returns:
        The copy, in the training mode, dtype, memory format and ``requires_grad`` of ``model``.

    Raises:
        TypeError, ValueError: ``model`` is no module or compiled, or a layer of this package has hooks,
            parametrizations, a generator, a forward or attributes of its own, which a plain module cannot keep.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, wanted a torch.nn.Module")
    for name, module in model.named_modules():
        if "_orig_mod" in module._modules:
            raise TypeError(f"{name or 'model'}: got what torch.compile returned, wanted the module that it was given")
        if isinstance(module, _LAYERS):
            _check(name or "model", module)
    model = copy.deepcopy(model)
    bare = set(_restored(model))
    with_residual = _with_residual(model)
    plain: dict[nn.Module, nn.Module] = {}
    for module in list(model.modules()):
        if isinstance(module, _LAYERS):
            plain[module] = _plain(module, fold, module in bare, module in with_residual)
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child in plain:
                module._modules[name] = plain[child]
    return plain.get(model, model)


def _check(name: str, layer: nn.Module) -> None:
    """Raise if the layer has anything that its plain form would lose."""
    problem = None
    if parametrize.is_parametrized(layer):
        problem = "parametrizations; torch.nn.utils.parametrize.remove_parametrizations makes parameters of them"
    elif type(layer) not in _LAYERS:
        problem = f"a class of its own, {type(layer).__name__}, wanted exactly a class of deepcontrol_cuda"
    elif any(getattr(layer, hooks) for hooks in _HOOKS):
        problem = "hooks (torch.nn.utils.prune and weight_norm set some too), wanted none: remove them first"
    elif "forward" in vars(layer):
        problem = "a forward of its own, set on the instance, wanted that of its class"
    elif layer._modules or layer._buffers:
        problem = f"{', '.join([*layer._modules, *layer._buffers])} registered on it, wanted its own parameters only"
    elif getattr(layer, "generator", None) is not None:
        problem = "a generator, which plain modules do not take, wanted generator=None"
    if problem is not None:
        raise ValueError(f"{name}: has {problem}")


def _restored(model: nn.Module) -> Iterator[nn.Module]:
    """Gives modules their own class back; the layers whose activation and residual sum their forward then does."""
    for module in model.modules():
        made = vars(type(module))
        if "_original" in made and "_fused" in made:
            module.__class__ = made["_original"]
            yield from (module.get_submodule(path) for path in made["_fused"])


def _with_residual(model: nn.Module) -> set[nn.Module]:
    """The layers that the model's forwards may pass a residual: all but those that are seen to be passed none."""
    # A forward may keep what it is given in an attribute, so a copy is traced, which shares the tensors.
    tensors = [*model.parameters(), *model.buffers()]
    traced = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    layers = {copied: layer for copied, layer in zip(traced.modules(), model.modules()) if isinstance(layer, _LAYERS)}
    passed: dict[nn.Module, list[bool]] = defaultdict(list)
    for module in traced.modules():
        if module in layers or type(module).forward is nn.Module.forward or layers.keys().isdisjoint(module.modules()):
            continue
        try:
            calls = [node for node in _ChildrenAreLeaves().trace(module).nodes if node.op == "call_module"]
        except Exception:  # a forward may raise anything when it meets a proxy
            for layer in _called_by(module):
                passed[layer].append(True)
            continue
        for call in calls:
            passed[module.get_submodule(call.target)].append(len(call.args) > 1 or bool(call.kwargs))
    return {
        layer
        for copied, layer in layers.items()
        if layer is not model and (copied not in passed or any(passed[copied]))
    }


def _called_by(module: nn.Module) -> Iterator[nn.Module]:
    """The children whose calls, as a rule, stand in the forward of ``module``; lists and dicts have no forward."""
    for child in module.children():
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _called_by(child)
        else:
            yield child


class _ChildrenAreLeaves(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True


def _plain(layer: nn.Module, fold: bool, bare: bool, with_residual: bool) -> nn.Module:
    if isinstance(layer, modules.MapNoise):
        if fold or layer.scale == layer.shift == 0:
            return nn.Identity().train(layer.training)
        return _graph_module(_Noise(layer), layer)
    if with_residual and not bare:
        return _graph_module(_FormulaWithResidual(layer, fold, bare), layer)
    formula = _Formula(layer, fold, bare)
    if fold and formula.is_conv and not formula.takes_mean:
        return _conv(layer, formula)
    return _graph_module(formula, layer)


def _graph_module(formula: nn.Module, layer: nn.Module) -> fx.GraphModule:
    graph = fx.Tracer().trace(formula)
    for node in graph.nodes:
        node.type = None  # annotations, which as strings cannot be saved
    return fx.GraphModule(formula, graph, class_name=f"Plain{type(layer).__name__}").train(layer.training)


def _conv(layer: nn.Module, formula: _Formula) -> nn.Module:
    """PyTorch's own convolution with the formula's weight and bias, and the activation."""
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[formula.rank - 1](
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
        layer.groups, bias=False, padding_mode=layer.padding_mode, device="meta",
    )  # fmt: skip
    conv.weight = formula.weight
    if formula.bias is not None:
        bias = formula.bias
        fits = bias.shape == (layer.out_channels,) and bias.dtype == conv.weight.dtype
        conv.bias = bias if fits else Parameter(bias.detach().expand(layer.out_channels).to(conv.weight.dtype))
    if formula.activation == "identity":
        return conv.train(layer.training)
    options = {"negative_slope": layer.negative_slope} if formula.activation == "leaky_relu" else {}
    return nn.Sequential(conv, _ACTIVATIONS[formula.activation](**options)).train(layer.training)


class _Formula(nn.Module):
    """What a layer computes, in PyTorch's functions and for ``fx`` to trace; with the layer's very parameters.

    Where a convolution has a gain, it is multiplied into the kernels.
    """

    def __init__(self, layer: nn.Module, fold: bool, bare: bool) -> None:
        super().__init__()
        for name, parameter in layer._parameters.items():
            self.register_parameter(name, parameter)
        # Not a child, so that its parameters have no second name.
        self.__dict__["layer"] = layer
        self.is_conv = isinstance(layer, _CONVS)
        self.rank = len(layer.kernel_size) if self.is_conv else layer.spatial_rank
        self.maps = tuple(range(2, self.rank + 2))
        self.activation = "identity" if bare else layer.activation
        self.fixed_mean_scale = getattr(layer, "fixed_mean_scale", 0.0)
        if fold and self.fixed_mean_scale is None and not self.mean_scale.any():
            self.fixed_mean_scale, self.mean_scale = 0.0, None
        if fold and self.is_conv:
            self._fold()
        elif getattr(layer, "scaling_noise", 0.0):
            self.noise = _uniform(1.0, layer.scaling_noise)
        self.projection = 0.0
        if self.is_conv and not fold and self.weight[0, 0].numel() > 1:
            self.projection = layer.projection
        self.mixed = len({p.dtype for p in self.parameters()}) > 1

    @property
    def takes_mean(self) -> bool:
        return self.fixed_mean_scale != 0.0

    @torch.no_grad()
    def _fold(self) -> None:
        scale = self._scale()
        if scale is not None:
            dtype = torch.promote_types(self.weight.dtype, torch.float32)
            weight = (self.weight.to(dtype) * self._per_filter(scale.to(dtype))).to(self.weight.dtype)
            self.weight = Parameter(weight, self.weight.requires_grad)
        for name in ("gain", "scale", "log_scale"):
            self._parameters.pop(name, None)

    def forward(self, input: Tensor) -> Tensor:
        return self._compute(input, None)

    def _compute(self, input: Tensor, residual: Tensor | None) -> Tensor:
        # fx takes over parameters in the order of their first use, and optimizers' state dicts go by that order.
        for name in self._parameters:
            getattr(self, name)
        if self.is_conv:
            output, like = self._convolved(input, residual)
        elif self.rank == 1 and not self.takes_mean:
            output, like = self._controlled_vectors(input, residual), input
        else:
            output, like = self._controlled(input, residual), input
        # Vectors, or under autocast a residual, may be of a wider dtype.
        return activations.apply(output, self.activation, self.layer.negative_slope).type_as(like)

    def _convolved(self, input: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the activation takes, and the bare convolution's output."""
        layer, weight, scale, padding = self.layer, self.weight, self._scale(), self.layer.padding
        if layer.padding_mode != "zeros":
            input = F.pad(input, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
            padding = 0
        if self.projection:
            mean = self.projection * weight.mean(self.maps, keepdim=True)
            # Nothing is subtracted in forward; in backward the gradient's mean is.
            weight = weight - (mean - mean.detach())
        if scale is not None:
            weight = self._of_kernels_dtype(weight * self._per_filter(scale))
        conv = (F.conv1d, F.conv2d, F.conv3d)[self.rank - 1]
        geometry = (layer.stride, padding, layer.dilation, layer.groups)
        if residual is None and not self.takes_mean:
            z = conv(input, weight, self._of_kernels_dtype(self.bias), *geometry)
            return z, z
        z = conv(input, weight, None, *geometry)
        # What is small is added up first, so that the maps are passed over once.
        return self._sum(z, self._sum(self._sum(self._per_map(self.bias), self._minus_mean(z)), residual)), z

    def _controlled(self, input: Tensor, residual: Tensor | None) -> Tensor:
        output = self._sum(input, self._minus_mean(input))
        if self.gain is not None:
            output = output * self._per_map(self.gain)
        return self._sum(output, self._sum(self._per_map(self.bias), residual))

    def _controlled_vectors(self, input: Tensor, residual: Tensor | None) -> Tensor:
        """For (N, C) as for (N, C, L)."""
        output = input.transpose(1, -1)
        if self.gain is not None:
            output = output * self.gain
        return self._sum(self._sum(output, self.bias).transpose(1, -1), residual)

    def _minus_mean(self, maps: Tensor) -> Tensor | None:
        if not self.takes_mean:
            return None
        mean = -maps.mean(self.maps, keepdim=True)
        if self.fixed_mean_scale is None:
            return self._per_map(self.mean_scale) * mean
        return mean if self.fixed_mean_scale == 1.0 else self.fixed_mean_scale * mean

    def _sum(self, first: Tensor | None, second: Tensor | None) -> Tensor | None:
        if first is None or second is None:
            return second if first is None else first
        return first + second

    def _scale(self) -> Tensor | None:
        """What the kernels of a convolution are multiplied by, (O,) or (1,)."""
        named = self._parameters
        scale = self.log_scale.exp() if "log_scale" in named else self.scale if "scale" in named else None
        scale = self.gain if "gain" in named else scale
        if not hasattr(self, "noise"):
            return scale
        noise = _draw(self.noise, self.weight, self.layer.out_channels).type_as(self.weight)
        return noise if scale is None else scale * noise

    def _per_filter(self, vector: Tensor) -> Tensor:
        return vector.view(-1, *(1,) * (self.rank + 1))

    def _per_map(self, vector: Tensor | None) -> Tensor | None:
        return None if vector is None else vector.view(1, -1, *(1,) * self.rank)

    def _of_kernels_dtype(self, tensor: Tensor | None) -> Tensor | None:
        return tensor.type_as(self.weight) if self.mixed and tensor is not None else tensor


class _FormulaWithResidual(_Formula):
    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        # Neither fx nor a traced program can ask whether there is a residual, but a tensor has a real part and None has
        # none. A call that is marked as wrapped is kept when the saved code is traced again.
        present = residual.tracer.create_proxy("call_function", getattr, (residual, "real", 0.0), {})
        present.node.meta["is_wrapped"] = True
        return self._compute(input, present)


class _Noise(nn.Module):
    """``MapNoise`` in PyTorch's functions, for input of any rank."""

    def __init__(self, layer: modules.MapNoise) -> None:
        super().__init__()
        self.factor = _uniform(1.0, layer.scale) if layer.scale else None
        self.offset = _uniform(0.0, layer.shift) if layer.shift else None

    def forward(self, input: Tensor) -> Tensor:
        size = (input.size(0), input.size(1))
        maps = input.movedim((0, 1), (-2, -1))
        if self.offset is not None:
            maps = maps - _draw(self.offset, input, *size)
        if self.factor is not None:
            maps = maps * _draw(self.factor, input, *size)
        return maps.movedim((-2, -1), (0, 1)).type_as(input)


def _uniform(centre: float, width: float) -> nn.RReLU:
    """On minus ones: minus draws from U(centre - width, centre + width) in training, minus ``centre`` in evaluation."""
    return nn.RReLU(centre - width, centre + width)


def _draw(uniform: nn.RReLU, like: Tensor, *size: int) -> Tensor:
    """Draws of ``_uniform`` of that size, in float32: uniform draws in 16 bits have ties and can reach the open end."""
    return -uniform(like.new_full(size, -1.0, dtype=torch.float32))
