"""Replaces Batch Norm in a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only

from .. import calibrate, modules
from . import layers, measure, optimizers, rewrite
from .checkpoints import Source
from .flow import Flow
from .norms import as_norm
from .report import Report, Row
from .sites import Finder, Left, Site

_OURS = (modules._DeepControl, modules._FusedConv)
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)

Selection = str | Sequence[str] | Callable[[str, nn.Module], bool]


def replace_conv_bn(
    model: nn.Module,
    method: str = "deep_control",
    initialization: str = "fresh",
    *,
    select: Selection | None = None,
    example: Tensor | Sequence | Mapping | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    inplace: bool = False,
    dry_run: bool = False,
) -> Report:
    """Replace Batch Norm in ``model`` by Deep Control or Mean Shift Rejection.

    A BatchNorm becomes one layer with the convolution whose output it alone takes, with the activation that alone
    takes its own, and with a residual sum between the two: ``DeepControlConv*`` or ``MeanShiftConv*`` at the
    convolution's place, ``nn.Identity`` at the norm's. Where no convolution can be merged (none directly in front, a
    transposed one, a subclass, one with hooks, computed weights or other uses), the norm alone becomes a
    ``DeepControl*``, under Mean Shift Rejection one with ``mean_scale=0.0``; a plain convolution with several taps
    that takes the output of such a norm then becomes a ``MeanShiftConv*`` too. BatchNorm1d/2d/3d, SyncBatchNorm,
    timm's BatchNormAct2d and frozen norms are replaced; other subclasses stay and are named in the report.

    What is called with what comes from ``torch.fx`` traces of each module's forward. Where one adds or activates by
    itself (``out += x``, ``F.relu``, an activation module called twice), the module gets a generated subclass of its
    class whose forward lets the layer do it; it keeps the branches and constants that the forward has now. Forwards
    with optional arguments, that ask for types or for ``training``, set ``no_grad``, autocast or checkpoints, change
    attributes or call public methods of their module, are not written anew; nor is any other method, so that one that
    calls the layers but is not called by the forward finds them doing more. A forward that cannot be traced is watched
    in one run of ``example``; without one its norms are replaced alone.

    Names, devices, dtypes, memory formats, training modes and hooks stay; the layer holds the very kernel of the
    convolution. Convert before ``torch.compile``, DDP or FSDP, and load state dicts of the old model with
    ``report.translate``.

    Args:
        model: any module.
        method: "deep_control" or "mean_shift_rejection".
        initialization: "fresh", neutral: gain 1, mean_scale 1, bias 0, kernels as they are, after which
            ``calibrate_gain_`` sets the gains; or Mean Shift Rejection's own kernels, scales of 0.8 and a bias at the
            input alone. "folded", for trained models, computes
            what the model computes in ``eval()``: ``gain = gamma / sigma, mean_scale = 0, bias = beta + gamma
            (conv.bias - mu) / sigma``. "calibrated": kernels as they are, means taken out (``mean_scale = 1``), gain
            and bias such that over ``example`` every channel has the deviation ``gamma`` and the mean ``beta``, as
            behind Batch Norm in training. In all cases gain, mean_scale and bias are learned, unless the norm's weight
            was frozen. Vectors and maps of one pixel are their own mean and keep it: mean_scale is fixed at 0.
        select: which norms: a glob pattern or several for the name of the norm or of its convolution, or a function of
            the norm's name and module. None: all.
        example: the model's argument, a tuple or list of arguments or a mapping of keyword arguments. "calibrated"
            needs it. It also tells the sizes of maps, forwards that cannot be traced, and bytes kept for backward.
        optimizer: of ``model``. New parameters join the groups of the ones that they stand for. Needs ``inplace``.
        inplace: change ``model`` itself rather than a copy.
        dry_run: change nothing and report what would be done.

    Returns:
        A ``Report``; its ``model`` is the converted one, with ``dry_run`` the one given.

    Raises:
        TypeError, ValueError: an argument does not fit, or the model is scripted, quantized, compiled or wrapped. The
            model is as it was then.
    """
    _check(model, method, initialization, example, optimizer, inplace)
    flow = Flow(model, example)
    plan = _plan(flow, method, initialization, select)
    result = copy.deepcopy(model)
    result, _ = _apply(result, plan, method, initialization)
    unreached = _set_values(result, flow, plan, initialization, example)
    report = Report(result, method, initialization, notes=_notes(plan, model), _sources=plan.sources())
    if unreached:
        report.notes.append(f"not calibrated, for the example does not reach them: {', '.join(unreached)}")
    _fill(report, flow, plan, example)
    if dry_run:
        report.model = model
        return report
    report._old = flow.root.to("meta")
    if inplace:
        changed, changes = _apply(model, plan, method, initialization)
        _copy_values(changed, result, plan)
        report.model = changed
        if optimizer is not None and (homeless := optimizers.apply(optimizer, changes, changed)):
            report.notes.append(
                f"{len(homeless)} new parameters are in no group of the optimizer: what they stand for was in none"
            )
    return report


@dataclass(frozen=True)
class _Plan:
    """All that will be done, by the names of modules.

    Attributes:
        sites, left: what each norm becomes part of, or why it stays.
        behind: convolutions without a norm behind them that change too, with the norm in front.
        rewritings: forwards that change.
        first: the convolution that sees the input.
        exclusive: convolutions whose kernels nothing else uses.
    """

    sites: list[Site]
    left: list[Left]
    behind: dict[str, str]
    rewritings: list[rewrite.Rewriting]
    first: str | None
    exclusive: set[str | None]

    def layer_name(self, site: Site) -> str:
        """Where the layer is: within a Sequential, if the norm's own activation had to stay behind it."""
        wrapped = site.conv_name is None and site.own_activation is not None
        return f"{site.place}.0".removeprefix(".") if wrapped else site.place

    def sources(self) -> list[Source]:
        found = [
            Source(self.layer_name(site), site.conv_name, site.norm_name, site.conv_name in self.exclusive)
            for site in self.sites
        ]
        return found + [Source(name, name, None, name in self.exclusive) for name in self.behind]


def _check(model, method, initialization, example, optimizer, inplace) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, wanted a torch.nn.Module")
    if method not in layers.METHODS:
        raise ValueError(f"method: got {method!r}, wanted {' or '.join(map(repr, layers.METHODS))}")
    if initialization not in layers.INITIALIZATIONS:
        wanted = ", ".join(map(repr, layers.INITIALIZATIONS))
        raise ValueError(f"initialization: got {initialization!r}, wanted one of {wanted}")
    if initialization == "calibrated" and example is None:
        raise ValueError("example: got None, wanted a batch for initialization='calibrated'")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise TypeError(f"model: got a {type(model).__name__}; convert its .module, then wrap")
    if any(hasattr(parameter, "placements") for parameter in model.parameters()):
        raise TypeError("model: got one with sharded parameters (DTensor); convert, then shard")
    for name, module in model.named_modules():
        where = f"model: {name or 'it'} is"
        if "_orig_mod" in module._modules:
            raise TypeError(f"{where} what torch.compile returned; convert the module that it was given, then compile")
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"{where} TorchScript, which cannot be changed; convert first, then torch.jit.trace")
        kind = type(module).__module__
        if ".quantized" in kind or ".intrinsic" in kind or ".nn.qat" in kind:
            raise TypeError(f"{where} quantized ({type(module).__name__}); convert the float model, then quantize it")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise TypeError(f"model: {name} is lazy and has no values yet; run a batch through the model first")
    if inplace and as_norm(model) is not None:
        raise ValueError(
            f"inplace: got True for a {type(model).__name__} alone, which cannot change its class; use False"
        )
    if optimizer is not None:
        if not inplace:
            raise ValueError(
                "optimizer: got one with inplace=False, wanted inplace=True: it holds this model's parameters"
            )
        optimizers.check(optimizer, model.parameters())


def _plan(flow: Flow, method: str, initialization: str, select: Selection | None) -> _Plan:
    finder = Finder(flow)
    sites, left = [], []
    for found in _selected(finder.norms(), select):
        if initialization == "folded" and isinstance(found, Site) and not found.norm.has_statistics:
            found = Left(found.norm_name, found.norm, "no running statistics to fold")
        (sites if isinstance(found, Site) else left).append(found)
    finder.extend(sites)
    behind = finder.behind(sites) if method == "mean_shift_rejection" else {}
    convolutions = [n for n, m in flow.root.named_modules() if isinstance(m, nn.modules.conv._ConvNd)]
    holders: dict[int, int] = {}
    for module in flow.root.modules():
        for parameter in module._parameters.values():
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    kernels = {n: getattr(flow.root.get_submodule(n), "weight", None) for n in convolutions}
    exclusive = {name for name, kernel in kernels.items() if holders.get(id(kernel)) == 1}
    first = next(iter(convolutions), None)
    return _Plan(sites, left, behind, rewrite.plan(flow, sites), first, exclusive)


def _selected(found: list[Site | Left], select: Selection | None) -> list[Site | Left]:
    if select is None:
        return found
    if callable(select):
        keep = [bool(select(item.norm_name, item.norm.module)) for item in found]
    else:
        patterns = [select] if isinstance(select, str) or not isinstance(select, Sequence) else list(select)
        names = [{item.norm_name, getattr(item, "conv_name", None) or item.norm_name} for item in found]
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise TypeError(f"select: got {pattern!r}, wanted a glob pattern, several, or a function")
            if not any(fnmatchcase(name, pattern) for each in names for name in each):
                some = ", ".join(item.norm_name for item in found[:3]) or "none"
                raise ValueError(
                    f"select: got {pattern!r}, which no norm or its convolution matches; norms are {some} ..."
                )
        keep = [any(fnmatchcase(name, pattern) for name in each for pattern in patterns) for each in names]
    return [f if kept else Left(f.norm_name, f.norm, "not selected") for f, kept in zip(found, keep)]


def _apply(
    model: nn.Module, plan: _Plan, method: str, initialization: str
) -> tuple[nn.Module, list[optimizers.Change]]:
    """Put the layers into ``model``, without their values; returns it, or what took its place."""
    rewritten = {rewriting.forward.name for rewriting in plan.rewritings}
    swaps: list[tuple[nn.Module, nn.Module]] = []
    changes = []
    for site in plan.sites:
        norm = as_norm(model.get_submodule(site.norm_name))
        conv = None if site.conv_name is None else model.get_submodule(site.conv_name)
        layer = layers.make(site, conv, norm, method, initialization, site.conv_name == plan.first)
        changes.append(_change(layer, conv, norm))
        behind = nn.Identity() if site.own_activation is None else norm.activation
        if conv is not None:
            swaps += [(conv, layer), (norm.module, behind.train(norm.module.training))]
        else:
            new = layer if site.own_activation is None else nn.Sequential(layer, behind).train(norm.module.training)
            for name in _HOOKS:
                setattr(new, name, getattr(norm.module, name))
            swaps.append((norm.module, new))
        if site.activation_name is not None and site.forward.name not in rewritten:
            activation = model.get_submodule(site.activation_name)
            swaps.append((activation, nn.Identity().train(activation.training)))
    for name in plan.behind:
        conv = model.get_submodule(name)
        layer = layers.make_kernel(conv, initialization)
        changes.append(optimizers.Change([], [(layer.get_parameter(layers.vector_names(layer)[0]), [conv.weight])]))
        swaps.append((conv, layer))
    model = _swap(model, swaps)
    for rewriting in plan.rewritings:
        rewrite.apply(model, rewriting)
    return model, changes


def _swap(model: nn.Module, swaps: list[tuple[nn.Module, nn.Module]]) -> nn.Module:
    new = {id(old): replacement for old, replacement in swaps}
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if id(child) in new:
                parent._modules[key] = new[id(child)]
    return new.get(id(model), model)


def _change(layer: nn.Module, conv: nn.Module | None, norm) -> optimizers.Change:
    weight, bias = ([p for p in (q,) if isinstance(p, nn.Parameter)] for q in (norm.weight, norm.bias))
    kernel = [] if conv is None else [conv.weight]
    conv_bias = [] if conv is None or conv.bias is None else [conv.bias]
    like = {"bias": [*bias, *conv_bias, *weight, *kernel]}
    vectors = [(n, p) for n, p in layer.named_parameters(recurse=False) if n != "weight"]
    return optimizers.Change([*weight, *bias, *conv_bias], [(p, like.get(n, [*weight, *kernel])) for n, p in vectors])


@torch.no_grad()
def _set_values(model: nn.Module, flow: Flow, plan: _Plan, initialization: str, example: Any) -> list[str]:
    """Returns the names of layers that were to be calibrated and that the example did not reach."""
    targets = {}
    for source in plan.sources():
        layer = model.get_submodule(source.layer)
        conv = None if source.conv is None else flow.root.get_submodule(source.conv)
        norm = None if source.norm is None else as_norm(flow.root.get_submodule(source.norm))
        if initialization == "folded":
            layers.fold_(layer, None if conv is None else conv.bias, norm, source.exclusive)
            continue
        layers.start_(layer, initialization, source.exclusive)
        if norm is not None:
            targets[layer] = calibrate.Target(norm.weight, norm.bias)
    if initialization != "calibrated" or not targets:
        return []
    done = calibrate.calibrate_(model, tree_map_only(Tensor, torch.clone, example), targets)
    return [name for name, module in model.named_modules() if module in targets and name not in done]


@torch.no_grad()
def _copy_values(model: nn.Module, result: nn.Module, plan: _Plan) -> None:
    # By hand: hooks on a state dict may change it.
    for source in plan.sources():
        found = result.get_submodule(source.layer).named_parameters()
        for name, parameter in found:
            model.get_submodule(source.layer).get_parameter(name).copy_(parameter)


def _notes(plan: _Plan, model: nn.Module) -> list[str]:
    notes = []
    if converted := sum(isinstance(module, _OURS) for module in model.modules()):
        notes.append(f"{converted} layers are Deep Control or Mean Shift Rejection already")
    if not plan.sites and not plan.left:
        notes.append("the model holds no BatchNorm: nothing to replace")
    if plan.rewritings:
        kinds = sorted({type(model.get_submodule(r.forward.name)).__name__ for r in plan.rewritings})
        notes.append(f"{len(plan.rewritings)} forwards written anew, of {', '.join(kinds)}")
    return notes


def _fill(report: Report, flow: Flow, plan: _Plan, example: Any) -> None:
    """The rows of the report."""
    before: dict[str, str] = {}
    after: dict[str, str] = {}
    for site in plan.sites:
        before |= {n: site.place for n in (site.conv_name, site.norm_name, site.activation_name) if n is not None}
        after[plan.layer_name(site)] = site.place
    kept = [None, None]
    if example is not None and plan.sites:
        try:
            kept = [measure.kept_bytes(m, example, o) for m, o in ((flow.root, before), (report.model, after))]
            report.activation_bytes_before, report.activation_bytes_after = (sum(k.values()) for k in kept)
        except Exception as error:  # a forward may refuse to train on arguments for evaluation
            report.notes.append(
                f"bytes kept for backward were not measured: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            )
            kept = [None, None]
    for site in plan.sites:
        old = [flow.root.get_submodule(name) for name in (site.conv_name, site.norm_name) if name is not None]
        layer = report.model.get_submodule(plan.layer_name(site))
        names = [type(module).__name__ for module in old]
        if site.sum is not None:
            names.append("residual")
        if site.activation.name != "identity":
            names.append(site.activation.name)
        report.replaced.append(
            Row(
                site.place, site.norm_name, " + ".join(names), type(layer).__name__, report.initialization,
                _parameters(*old), _parameters(layer), *(None if k is None else k[site.place] for k in kept),
                _remark(site, report.method),
            )
        )  # fmt: skip
    for name, norm_name in plan.behind.items():
        conv, layer = flow.root.get_submodule(name), report.model.get_submodule(name)
        report.replaced.append(
            Row(
                name, "", type(conv).__name__, type(layer).__name__, report.initialization, _parameters(conv),
                _parameters(layer), remark=f"takes the output of {norm_name}",
            )
        )  # fmt: skip
    for left in plan.left:
        kind = type(left.norm.module).__name__
        report.left.append(
            Row(
                left.norm_name,
                left.norm_name,
                kind,
                "",
                parameters_before=_parameters(left.norm.module),
                remark=left.reason,
            )
        )


def _parameters(*found: nn.Module) -> int:
    return sum(
        p.numel() for module in found for p in module.parameters() if not isinstance(p, nn.UninitializedParameter)
    )


def _remark(site: Site, method: str) -> str:
    remarks = [site.remark] if site.remark else []
    if method == "deep_control" and (site.rank == 0 or site.one_pixel):
        what = "vectors have no map" if site.rank == 0 else "a map of one pixel is its own mean"
        remarks.append(f"{what}: mean_scale is fixed at 0")
    if site.own_activation is not None:
        remarks.append(f"{type(site.own_activation).__name__} stays behind it")
    return "; ".join(remarks)
