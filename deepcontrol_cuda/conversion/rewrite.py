"""Gives a module whose forward adds or activates by itself a subclass of its class, whose forward lets a layer do it.

The object stays the same one, and so do its attributes, hooks, methods and type: ``isinstance`` still holds. Only the
forward is another, made from the graph of the old one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx, nn

from . import generated
from .flow import Flow, Forward
from .sites import Site


@dataclass
class Rewriting:
    """What changes in one forward.

    Attributes:
        merged: sites whose calls become one.
        summed: calls of modules that take the residual of a sum in this forward.
        handed_on: the call that gets the residual that this module itself is given.
        fused: paths, from this module, of layers that now do what this forward did by itself.
    """

    forward: Forward
    merged: list[Site] = field(default_factory=list)
    summed: list[Site] = field(default_factory=list)
    handed_on: fx.Node | None = None
    fused: list[str] = field(default_factory=list)


def plan(flow: Flow, sites: list[Site]) -> list[Rewriting]:
    """The forwards that must change for ``sites``."""
    found: dict[str, Rewriting] = {}

    def of(forward: Forward) -> Rewriting:
        return found.setdefault(forward.name, Rewriting(forward))

    for site in sites:
        if site.sum is not None:
            outer = of(site.sum.forward)
            outer.fused.append(_relative(site.place, outer.forward.name))
            if site.sum.through:
                outer.summed.append(site)
            for forward, call in site.sum.through:
                of(forward).handed_on = call
        elif site.activates and site.activation_name is None:
            of(site.forward)
    for site in sites:
        if site.forward is not None and site.forward.name in found:
            rewriting = found[site.forward.name]
            rewriting.merged.append(site)
            if site.activates and site.sum is None:
                rewriting.fused.append(_relative(site.place, site.forward.name))
    return list(found.values())


def _relative(name: str, root: str) -> str:
    return name.removeprefix(f"{root}.") if root else name


def apply(model: nn.Module, rewriting: Rewriting) -> None:
    """Give the module of ``model`` its new class; the modules that it calls are in their places already."""
    module = model.get_submodule(rewriting.forward.name)
    kind = type(module)
    original, fused = getattr(kind, "_original", kind), {*getattr(kind, "_fused", ()), *rewriting.fused}
    module.__class__ = generated.subclass(original, _graph(rewriting), tuple(sorted(fused)))


def _graph(rewriting: Rewriting) -> fx.Graph:
    old = rewriting.forward.graph
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(old, copies)
    graph.output(output)
    residual = None
    if rewriting.handed_on is not None:
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        with graph.inserting_after(inputs[-1]):
            residual = graph.placeholder("residual", default_value=None)
    new: dict[fx.Node, fx.Node] = {}

    def replace(nodes: list[fx.Node], at: fx.Node, target: str, added: fx.Node | None) -> None:
        chain = [copies[node] for node in nodes]
        new[nodes[-1]] = _replace(graph, chain, copies[at], target, added)

    def added_to(site: Site) -> fx.Node:
        residual = site.sum.residual
        return new.get(residual, copies[residual])

    for site in rewriting.merged:
        target = site.nodes[0].target  # the layer is where the first of the modules was
        if site.sum is not None and site.sum.forward is rewriting.forward:
            nodes = [*site.nodes, *site.sum.nodes]
            replace(nodes, site.sum.place, target, added_to(site))
        else:
            # Where the convolution was: what it reads may change before the next call.
            replace(site.nodes, site.nodes[0], target, residual if site.nodes[0] is rewriting.handed_on else None)
    for site in rewriting.summed:
        nodes = [site.sum.call, *site.sum.nodes]
        replace(nodes, site.sum.place, site.sum.call.target, added_to(site))
    if rewriting.handed_on is not None and rewriting.handed_on not in [site.nodes[0] for site in rewriting.merged]:
        node = copies[rewriting.handed_on]
        node.kwargs = {**node.kwargs, "residual": residual}
    return graph


def _replace(graph: fx.Graph, nodes: list[fx.Node], at: fx.Node, target: str, residual: fx.Node | None) -> fx.Node:
    """One call of ``target`` in place of a chain of calls, where ``at`` is."""
    first, last = nodes[0], nodes[-1]
    kwargs = first.kwargs if residual is None else {**first.kwargs, "residual": residual}
    with graph.inserting_before(at):
        node = graph.call_module(target, first.args, kwargs)
    last.replace_all_uses_with(node)
    for old in reversed(nodes):
        graph.erase_node(old)
    return node
