"""Decides which modules and which parts of a forward become one layer."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import fx, nn

from .flow import Flow, Forward
from .norms import Norm, as_norm

CONVOLUTIONS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_MODULES = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Hardswish: "hardswish",
}
_FUNCTIONS = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.leaky_relu: "leaky_relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.gelu: "gelu",
    F.hardswish: "hardswish",
}
_METHODS = {"relu": "relu", "relu_": "relu"}
_SUMS = {"call_function": (operator.add, operator.iadd, torch.add), "call_method": ("add", "add_")}
_IN_PLACE_SUMS = (operator.iadd, "add_")
_KEEP_SHAPE = (nn.Dropout, *_MODULES)
_POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_POOL_FUNCTIONS = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
_STATE_HOOKS = [name for name in vars(nn.Module()) if name.endswith("_hooks") and "state_dict" in name]


@dataclass(frozen=True)
class Activation:
    """One of ``activations.ACTIVATIONS`` and the slope that leaky_relu has."""

    name: str = "identity"
    negative_slope: float = 0.01


@dataclass
class Sum:
    """A sum that a layer does, ahead of its activation.

    Attributes:
        forward: where the sum is.
        call: whose output is summed: the site's own first call, or that of a module around it.
        place: the sum itself. What is added may change behind it.
        place: the sum itself, where the layer is called from now on.
        nodes: the calls behind ``call`` that it takes in, in order.
        residual: the other operand.
        through: where the residual is handed on, from the outside to the inside: (forward, the call that gets it).
    """

    forward: Forward
    call: fx.Node
    place: fx.Node
    nodes: list[fx.Node]
    residual: fx.Node
    through: list[tuple[Forward, fx.Node]]


@dataclass
class Site:
    """A norm and what becomes one layer with it.

    Attributes:
        rank: spatial dimensions of the maps, 0 for vectors (N, C).
        conv_name: None where the norm alone is replaced.
        forward: where it is called, if that is known and one place.
        nodes: the calls in it that become one, in order; identities among them.
        activation: what the layer does last.
        own_activation: the norm's own, where no layer can do it.
        activation_name: a module that nothing else calls and that the layer stands in for.
        sum: what is added ahead of the activation.
        one_pixel: each map has one pixel and so is its own mean.
        remark: for the report.
    """

    norm_name: str
    norm: Norm
    rank: int
    conv_name: str | None = None
    forward: Forward | None = None
    nodes: list[fx.Node] = field(default_factory=list)
    activation: Activation = Activation()
    own_activation: nn.Module | None = None
    activation_name: str | None = None
    sum: Sum | None = None
    one_pixel: bool = False
    remark: str = ""

    @property
    def place(self) -> str:
        """The name of the new layer."""
        return self.norm_name if self.conv_name is None else self.conv_name

    @property
    def activates(self) -> bool:
        """Whether the layer stands in for an activation that the forward calls."""
        return self.activation.name != "identity" and (self.norm.activation is None or self.sum is not None)


@dataclass(frozen=True)
class Left:
    """A norm that stays, and why."""

    norm_name: str
    norm: Norm
    reason: str


class Finder:
    """Finds what can become one layer, by what ``flow`` says is called with what."""

    def __init__(self, flow: Flow) -> None:
        self.flow = flow

    def norms(self) -> list[Site | Left]:
        """Every norm, with the convolution in front of it if they can be one; without what comes behind."""
        named = ((name, as_norm(module)) for name, module in self.flow.root.named_modules())
        return [self._site(name, norm) for name, norm in named if norm is not None]

    def extend(self, sites: list[Site]) -> None:
        """Take in what comes behind each norm: an activation, or a sum and perhaps an activation behind that."""
        ends = {}
        for site in sites:
            if site.forward is not None:
                self._take_activation(site)
                ends[site.nodes[-1]] = site
        for forward in self.flow.forwards.values():
            if forward.fixed is None:
                for node in forward.graph.nodes:
                    self._take_sum(forward, node, ends)
        for site in sites:
            if site.forward is not None and site.forward.fixed is not None and not site.activates:
                self._remark_on_what_stays(site)

    def _remark_on_what_stays(self, site: Site) -> None:
        forward = site.forward
        node = self._next(forward, site.nodes[-1])[1]
        if node is None:
            return
        what = (
            "sum" if node.target in _SUMS.get(node.op, ()) else "activation" if self._activation(forward, node) else ""
        )
        if what:
            where = f"{forward.name or 'the model'}, whose forward is not written anew: {forward.fixed}"
            site.remark = "; ".join(filter(None, [site.remark, f"the {what} behind it stays in {where}"]))

    def behind(self, sites: list[Site]) -> dict[str, str]:
        """Convolutions with more than one tap that take a site's output and are in none: name and the norm's name."""
        taken = {site.conv_name for site in sites}
        found = {}
        for site in sites:
            if site.forward is None or site.sum is not None:
                continue
            node = self._next(site.forward, site.nodes[-1])[1]
            if node is not None and not site.activates and self._activation(site.forward, node) is not None:
                node = self._next(site.forward, node)[1]
            name = site.forward.called.get(node)
            if name is None or name in taken or self._why_not_mergeable(site.forward, name) is not None:
                continue
            if self._module(name).weight.shape[2:].numel() > 1:
                found[name] = site.norm_name
        return found

    def _module(self, name: str) -> nn.Module:
        return self.flow.root.get_submodule(name)

    def _site(self, name: str, norm: Norm) -> Site | Left:
        if norm.obstacle is not None:
            return Left(name, norm, norm.obstacle)
        if (reason := self._why_not_replaced(name)) is not None:
            return Left(name, norm, reason)
        calls = self.flow.calls[name]
        site = Site(name, norm, -1)
        if len(calls) == 1:
            site.forward, node = calls[0]
            site.nodes = [node]
            site.remark = self._take_convolution(site)
        else:
            site.remark = self._why_not_one_call(name)
        size = self.flow.sizes.get(name)
        if site.conv_name is not None:
            site.rank = CONVOLUTIONS[type(self._module(site.conv_name))]
        elif size is not None:
            site.rank = len(size) - 2
        elif norm.rank in (2, 3):
            site.rank = norm.rank
        elif (rank := self._rank_in_front(site)) is not None:
            site.rank = rank
        else:
            return Left(name, norm, f"{site.remark}; without an example the rank of its maps is not known")
        site.one_pixel = self._has_one_pixel(site) if size is None else len(size) > 2 and size[2:].numel() == 1
        return site

    def _why_not_one_call(self, name: str) -> str:
        if calls := self.flow.calls[name]:
            return f"{name} is called in {len(calls)} places"
        path = name.split(".")
        for ancestor in (".".join(path[:i]) for i in reversed(range(len(path)))):
            if ancestor in self.flow.failures:
                return f"the forward of {ancestor or 'the model'} {self.flow.failures[ancestor]}"
        return f"no call of {name} was found"

    def _take_convolution(self, site: Site) -> str:
        """Take in the convolution in front, and return a remark; else why it stays."""
        forward, node = site.forward, site.nodes[0]
        identities, source = self._previous(forward, node)
        name = forward.called.get(source)
        if name is None:
            return "no module directly in front"
        reason = self._why_not_mergeable(forward, name)
        if reason is None and self._next(forward, source)[1] is not node:
            reason = f"the output of {name} goes elsewhere too"
        if reason is None and self._why_not_alone(site.norm_name) is not None:
            reason = self._why_not_alone(site.norm_name)
        if reason is None and not self._always_follows(forward, name, site.norm_name):
            reason = f"{site.norm_name} does not always follow {name}: {forward.fixed}"
        if reason is None and self._module(name).out_channels != site.norm.features:
            reason = f"{site.norm.features} features behind the {self._module(name).out_channels} filters of {name}"
        if reason is not None:
            return reason
        site.conv_name = name
        site.nodes = [source, *identities, node]
        return ""

    def _why_not_mergeable(self, forward: Forward, name: str) -> str | None:
        conv = self._module(name)
        if type(conv) not in CONVOLUTIONS:
            return f"{type(conv).__name__} in front, and only Conv1d, Conv2d and Conv3d are merged"
        if (reason := self._why_not_alone(name)) is not None:
            return reason
        if conv._buffers or conv._modules or any(getattr(conv, hooks) for hooks in _STATE_HOOKS):
            return f"{name} has buffers, modules or hooks on its state dict"
        if not conv.weight.is_floating_point():
            return f"{name} has a kernel of dtype {conv.weight.dtype}"
        return None

    def _why_not_alone(self, name: str) -> str | None:
        """Why the module cannot give its place to another that does more."""
        module = self._module(name)
        if len(self.flow.calls[name]) != 1:
            return self._why_not_one_call(name)
        for caller, reached in self.flow.reached.items():
            if name in reached:
                return f"the forward of {caller or 'the model'}, which {self.flow.failures[caller]}, calls {name} too"
        if self.flow.registrations[id(module)] > 1:
            return f"{name} is registered in several places"
        if (reason := self._why_not_replaced(name)) is not None:
            return reason
        return f"{name} has hooks" if _has_hooks(module) else None

    def _why_not_replaced(self, name: str) -> str | None:
        """What another module at this place would not have."""
        if "forward" in vars(self._module(name)):
            return f"the forward of {name} is replaced on the instance"
        if name in self.flow.held:
            return f"{name} is held in a plain attribute too"
        return f"a forward uses the tensors of {name} by itself" if name in self.flow.read else None

    def _always_follows(self, forward: Forward, first: str, second: str) -> bool:
        """Whether ``second`` alone takes what ``first`` gives in all variants of the forward that call either."""
        for variant in forward.variants:
            called = list(variant.called.values())
            if first not in called and second not in called:
                continue
            if called.count(first) != 1 or called.count(second) != 1:
                return False
            behind = self._next(variant, next(node for node, name in variant.called.items() if name == first))[1]
            if variant.called.get(behind) != second:
                return False
        return True

    def _rank_in_front(self, site: Site) -> int | None:
        if site.forward is None:
            return None
        module, source = None, site.nodes[0]
        while module is None or isinstance(module, _KEEP_SHAPE):
            source = self._previous(site.forward, source)[1]
            if (name := site.forward.called.get(source)) is None:
                return None
            module = self._module(name)
        if isinstance(module, (nn.Linear, nn.Flatten)):
            return 0
        return len(module.kernel_size) if isinstance(module, nn.modules.conv._ConvNd) else None

    def _has_one_pixel(self, site: Site) -> bool:
        if site.forward is None:
            return False
        source = self._previous(site.forward, site.nodes[0])[1]
        if source is None:
            return False
        name = site.forward.called.get(source)
        if name is not None and isinstance(self._module(name), _POOLS):
            size = self._module(name).output_size
        elif source.target in _POOL_FUNCTIONS:
            size = source.args[1] if len(source.args) > 1 else source.kwargs.get("output_size")
        else:
            return False
        return all(s == 1 for s in size) if isinstance(size, (tuple, list)) else size == 1

    def _take_activation(self, site: Site) -> None:
        if site.norm.activation is not None:
            found = _activation_of(site.norm.activation)
            if found is None:
                site.own_activation = site.norm.activation
            else:
                site.activation = found
            return
        forward = site.forward
        identities, node = self._next(forward, site.nodes[-1])
        found = None if node is None else self._activation(forward, node)
        # A hook on the norm expects what the norm gave.
        if found is None or self._why_not_alone(site.norm_name) is not None:
            return
        name = forward.called.get(node)
        alone = name is not None and self._why_not_alone(name) is None
        if alone and self._always_follows(forward, site.norm_name, name):
            site.activation_name = name
        elif forward.fixed is not None:
            return
        site.activation = found
        site.nodes += [*identities, node]

    def _activation(self, forward: Forward, node: fx.Node) -> Activation | None:
        """The activation that a call is, if a layer can do it."""
        if (name := forward.called.get(node)) is not None:
            module = self._module(name)
            return None if _has_hooks(module) else _activation_of(module)
        if node.target is F.leaky_relu:
            slope = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", 0.01)
            return Activation("leaky_relu", slope) if isinstance(slope, float) else None
        if node.op == "call_function" and node.target is F.gelu and node.kwargs.get("approximate", "none") != "none":
            return None
        names = {"call_function": _FUNCTIONS, "call_method": _METHODS}.get(node.op, {})
        return Activation(names[node.target]) if node.target in names else None

    def _take_sum(self, forward: Forward, node: fx.Node, ends: dict[fx.Node, Site]) -> None:
        if node.target not in _SUMS.get(node.op, ()):
            return
        if node.kwargs or len(node.args) != 2 or len(node.all_input_nodes) != 2:  # scaled, or of a tensor and a number
            return
        order = {n: i for i, n in enumerate(forward.graph.nodes)}
        found = []
        for operand in node.args:
            residual = node.args[operand is node.args[0]]
            if residual is node.args[0] and node.target in _IN_PLACE_SUMS:
                # What no layer gave may have aliases, through which others see that it is overwritten.
                source = self._back_to_call(forward, residual, node)[1]
                if self._summand(forward, source, ends)[0] is None:
                    continue
            identities, source = self._back_to_call(forward, operand, node)
            site, call, through = self._summand(forward, source, ends)
            if site is None or not self._fits(forward, node):
                continue
            if any(order[call] < order[n] < order[node] for i in call.all_input_nodes for n in self._users(forward, i)):
                continue  # between its old place and the new one something may change what it reads
            found.append((site, Sum(forward, call, node, [*identities, node], residual, through)))
        if not found:
            return
        # A layer called here rather than in another forward, and of two the later one.
        site, site.sum = min(found, key=lambda pair: (bool(pair[1].through), -order[pair[1].call]))
        identities, after = self._next(forward, node)
        if after is not None and (activation := self._activation(forward, after)) is not None:
            site.activation = activation
            site.sum.nodes += [*identities, after]

    def _back_to_call(self, forward: Forward, operand: fx.Node, node: fx.Node) -> tuple[list[fx.Node], fx.Node | None]:
        """``operand`` without identities, if only ``node`` takes it."""
        identities, source = [], operand
        while self._is_identity(forward, source):
            identities.insert(0, source)
            source = source.args[0]
        alone = all(len(n.users) == 1 for n in (source, *identities))
        return (identities, source) if alone else ([], None)

    def _summand(
        self, forward: Forward, source: fx.Node | None, ends: dict[fx.Node, Site]
    ) -> tuple[Site | None, fx.Node | None, list[tuple[Forward, fx.Node]]]:
        """The site that ends in ``source``, here or within the module called; its call; where the residual goes on."""
        site = ends.get(source)
        if site is not None:
            able = site.sum is None and site.activation.name == "identity" and site.own_activation is None
            able = able and not site.one_pixel and site.rank > 0 and not _has_hooks(site.norm.module)
            return (site, site.nodes[0], []) if able else (None, None, [])
        name = forward.called.get(source)
        inner = self.flow.forwards.get(name)
        if inner is None or inner.fixed is not None or self._why_not_alone(name) is not None:
            return None, None, []
        if any(node.target == "residual" for node in inner.graph.nodes):
            return None, None, []
        output = next(node for node in inner.graph.nodes if node.op == "output")
        if not isinstance(output.args[0], fx.Node):
            return None, None, []
        site, call, through = self._summand(inner, self._back_to_call(inner, output.args[0], output)[1], ends)
        return (None, None, []) if site is None else (site, source, [(inner, call), *through])

    def _fits(self, forward: Forward, node: fx.Node) -> bool:
        """Whether both operands have the shape of the sum; without an example that is assumed of all but parameters."""
        if node not in forward.shapes:
            return all(operand.op != "get_attr" for operand in node.args)
        return all(forward.shapes.get(operand) == forward.shapes[node] for operand in node.args)

    def _users(self, forward: Forward, node: fx.Node) -> list[fx.Node]:
        """What takes the output of ``node``, and in place of identities what takes theirs."""
        users = ([n] if not self._is_identity(forward, n) else self._users(forward, n) for n in node.users)
        return [user for found in users for user in found]

    def _is_identity(self, forward: Forward, node: fx.Node | None) -> bool:
        if forward.called.get(node) is None:
            return False
        module = self._module(forward.called[node])
        return type(module) is nn.Identity and not _has_hooks(module) and len(node.args) == 1

    def _previous(self, forward: Forward, node: fx.Node) -> tuple[list[fx.Node], fx.Node | None]:
        """The call that gives ``node`` its first argument, behind identities, which come too, in order."""
        identities: list[fx.Node] = []
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        while self._is_identity(forward, source):
            identities.insert(0, source)
            source = source.args[0]
        return identities, source

    def _next(self, forward: Forward, node: fx.Node) -> tuple[list[fx.Node], fx.Node | None]:
        """The one call that takes the output of ``node``, behind identities, which come too; None if there are more."""
        identities: list[fx.Node] = []
        while len(node.users) == 1:
            node = next(iter(node.users))
            if not self._is_identity(forward, node):
                return identities, None if node.op == "output" else node
            identities.append(node)
        return [], None


def _has_hooks(module: nn.Module) -> bool:
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def _activation_of(module: nn.Module) -> Activation | None:
    name = _MODULES.get(type(module))
    if name is None or _has_hooks(module) or getattr(module, "approximate", "none") != "none":
        return None
    return Activation(name, float(getattr(module, "negative_slope", 0.01)))
