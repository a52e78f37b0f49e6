"""Replaces convolution + BatchNorm (+ activation) by one Deep Control convolution inside an existing model."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import Parameter

from . import modules

_CONVS = {
    nn.Conv1d: modules.DeepControlConv1d,
    nn.Conv2d: modules.DeepControlConv2d,
    nn.Conv3d: modules.DeepControlConv3d,
}
_BATCH_NORM = nn.modules.batchnorm._BatchNorm
_PLAIN_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_ACTIVATIONS = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Hardswish: "hardswish",
}
_INITIALIZATIONS = ("fresh", "folded")


@dataclass(frozen=True)
class Row:
    """One line of a report: the name of a module, what it was, what it became ("" if it was left) and a remark."""

    module: str
    source: str
    target: str
    remark: str


@dataclass
class Report:
    """What ``replace_conv_bn`` did. ``model`` is the converted model; ``str()`` prints the rows as a table."""

    model: nn.Module
    replaced: list[Row] = field(default_factory=list)
    left: list[Row] = field(default_factory=list)

    def __str__(self) -> str:
        head = Row("module", "from", "to", "remark")
        rows = [head, *self.replaced, *(Row(r.module, r.source, "(left)", r.remark) for r in self.left)]
        cells = [(r.module or "(the model)", r.source, r.target, r.remark) for r in rows]
        widths = [max(map(len, column)) for column in zip(*cells)]
        table = ["  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in cells]
        return "\n".join([f"{len(self.replaced)} replaced, {len(self.left)} left", *table])


def replace_conv_bn(
    model: nn.Module, method: str = "deep_control", initialization: str = "fresh", inplace: bool = False
) -> Report:
    """Replace every convolution + BatchNorm of ``model`` by a Deep Control convolution.

    The forward of every module is traced with ``torch.fx``, its children as black boxes. A pair is replaced where the
    trace shows that the BatchNorm, and nothing else, takes the convolution's output; an activation module behind it is
    taken in under the same rule if it is called in no other place. So the order of calls decides, not the order or the
    names of attributes. The convolution's place gets the new module, which holds the very Parameter ``weight``; the
    places of BatchNorm and activation get ``nn.Identity``, so names and indices stay.

    Left as they are, and named in the report: a BatchNorm with no convolution directly in front, subclasses
    (SyncBatchNorm, lazy or parametrised modules), modules with hooks, modules called or registered in several places,
    and everything in a forward that cannot be traced. Forwards are traced in the model's present mode; a call from a
    forward that cannot be traced into a module further down goes unseen.

    Args:
        model: any module; Conv1d/2d/3d with BatchNorm1d/2d/3d are handled, of any floating dtype, on any device.
        method: "deep_control", the only one so far.
        initialization: "fresh" sets gain 1, mean_scale 1 and bias 0, to train anew. "folded" takes the trained
            statistics over, ``gain = gamma / sigma, mean_scale = 0, bias = beta + gamma (conv.bias - mu) / sigma``, so
            that the result computes what the model computes in ``eval()``. Either way all three are learned, unless
            the BatchNorm's weight is frozen.
        inplace: change ``model`` itself rather than a copy.

    Returns:
        A ``Report``; its ``model`` is the converted one.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, wanted a torch.nn.Module")
    if method != "deep_control":
        raise ValueError(f"method: got {method!r}, wanted 'deep_control'")
    if initialization not in _INITIALIZATIONS:
        raise ValueError(f"initialization: got {initialization!r}, wanted one of {', '.join(_INITIALIZATIONS)}")
    calls = _Calls(model)
    report = Report(model if inplace else copy.deepcopy(model))
    for name, norm in [(n, m) for n, m in report.model.named_modules() if isinstance(m, _BATCH_NORM)]:
        conv_name = calls.input_of(name)
        conv = None if conv_name is None else report.model.get_submodule(conv_name)
        reason = calls.obstacle(name) or _misfit(conv, norm, initialization) or calls.obstacle(conv_name)
        if reason is None and calls.only_user(conv_name) != name:
            reason = f"the output of {conv_name} goes elsewhere too"
        if reason is not None:
            report.left.append(Row(name, type(norm).__name__, "", reason))
            continue
        act_name = calls.only_user(name)
        act = None if act_name is None else report.model.get_submodule(act_name)
        if type(act) not in _ACTIVATIONS or calls.obstacle(act_name) or getattr(act, "approximate", "none") != "none":
            act_name = act = None
        new = _deep_control(conv, norm, act, initialization)
        for place, old, module in ((conv_name, conv, new), (name, norm, nn.Identity()), (act_name, act, nn.Identity())):
            if old is not None:
                report.model.set_submodule(place, module.train(old.training))
        source = " + ".join(type(m).__name__ for m in (conv, norm, act) if m is not None)
        report.replaced.append(Row(conv_name, source, type(new).__name__, f"{name} is now Identity"))
    return report


class _Calls:
    """Which module's output goes into which, over all forwards of a model. Modules by name; None for anything else."""

    def __init__(self, model: nn.Module) -> None:
        # A forward may keep what it is given in an attribute, so a copy is traced.
        self.root = copy.deepcopy(model)
        self.names = {id(module): name for name, module in self.root.named_modules()}
        self.owners = Counter(id(child) for module in self.root.modules() for child in module._modules.values())
        self.count: Counter[str] = Counter()
        self.edges: list[tuple[str | None, str | None]] = []
        self.failures: dict[str, str] = {}
        for name, module in self.root.named_modules():
            if module._modules and type(module).forward is not nn.Module.forward:
                self._trace(name, module)

    def _trace(self, name: str, module: nn.Module) -> None:
        if "forward" in module.__dict__:
            self.failures[name] = "is replaced on the instance"
            return
        try:
            graph = _ChildrenAreLeaves().trace(module)
        except Exception as error:  # a forward may raise anything when it meets a proxy
            self.failures[name] = f"cannot be traced ({type(error).__name__}: {str(error).splitlines()[0][:80]})"
            return
        called = {n: self.names[id(module.get_submodule(n.target))] for n in graph.nodes if n.op == "call_module"}
        self.count.update(called.values())
        self.edges += [(called.get(node), called.get(user)) for node in graph.nodes for user in node.users]

    def input_of(self, name: str) -> str | None:
        """The module whose output is the one input of module ``name``."""
        sources = [source for source, user in self.edges if user == name]
        return sources[0] if len(sources) == 1 else None

    def only_user(self, name: str) -> str | None:
        """The module that the output of module ``name`` goes into, if nothing else takes it."""
        users = [user for source, user in self.edges if source == name]
        return users[0] if len(users) == 1 else None

    def obstacle(self, name: str) -> str | None:
        """Why module ``name`` must stay, as far as calls and registration go."""
        module = self.root.get_submodule(name)
        if self.count[name] != 1:
            path = name.split(".")
            for ancestor in (".".join(path[:i]) for i in reversed(range(len(path)))):
                if ancestor in self.failures:
                    return f"the forward of {ancestor or 'the model'} {self.failures[ancestor]}"
            return f"{name} is called in {self.count[name]} places, wanted one"
        if self.owners[id(module)] > 1:
            return f"{name} is registered in several places"
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        return f"{name} has hooks" if any(hooks) else None


class _ChildrenAreLeaves(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True


def _misfit(conv: nn.Module | None, norm: nn.Module, initialization: str) -> str | None:
    """Why the pair cannot become one Deep Control convolution, as far as the two modules go."""
    if type(norm) not in _PLAIN_BATCH_NORMS:
        return "not exactly BatchNorm1d, BatchNorm2d or BatchNorm3d"
    if conv is None:
        return "no module directly in front"
    if type(conv) not in _CONVS:
        return f"{type(conv).__name__} in front, wanted exactly Conv1d, Conv2d or Conv3d"
    if conv.out_channels != norm.num_features:
        return f"{norm.num_features} features behind {conv.out_channels} filters"
    if not conv.weight.is_floating_point():
        return f"kernel of dtype {conv.weight.dtype}"
    if initialization == "folded" and norm.running_var is None:
        return "no running statistics to fold"
    return None


@torch.no_grad()
def _deep_control(conv: nn.Module, norm: nn.Module, activation: nn.Module | None, initialization: str) -> nn.Module:
    new = _CONVS[type(conv)](
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups,
        padding_mode=conv.padding_mode, device="meta", activation=_ACTIVATIONS.get(type(activation), "identity"),
        negative_slope=getattr(activation, "negative_slope", 0.01),
    )  # fmt: skip
    like = conv.weight if norm.weight is None else norm.weight
    ones = torch.ones(conv.out_channels, dtype=like.dtype, device=like.device)
    zeros = torch.zeros_like(ones)
    if initialization == "folded":
        gain, bias = _folded(norm, conv.bias)
        vectors = {"gain": gain.to(like.dtype), "mean_scale": zeros, "bias": bias.to(like.dtype)}
    else:
        vectors = {"gain": ones, "mean_scale": ones.clone(), "bias": zeros}
    new.weight = conv.weight
    for name, value in vectors.items():
        setattr(new, name, Parameter(value, requires_grad=norm.weight is None or norm.weight.requires_grad))
    return new


def _folded(norm: nn.Module, conv_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The factor and the constant that BatchNorm in ``eval()`` applies to ``conv(x, w)``, at least in float32."""
    dtype = torch.promote_types(norm.running_var.dtype, torch.float32)
    gain = (norm.running_var.to(dtype) + norm.eps).rsqrt()
    if norm.weight is not None:
        gain = gain * norm.weight.to(dtype)
    shift = -norm.running_mean.to(dtype)
    if conv_bias is not None:
        shift = shift + conv_bias.to(dtype)
    bias = gain * shift
    return gain, bias if norm.bias is None else bias + norm.bias.to(dtype)
