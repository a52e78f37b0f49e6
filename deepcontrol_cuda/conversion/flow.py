"""What a model's forwards do with its modules: one ``torch.fx`` graph for each forward, its children as black boxes."""

from __future__ import annotations

import contextlib
import copy
import inspect
import operator
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from . import generated
from .norms import as_norm

# Attributes that every module has.
_OWN = frozenset(vars(nn.Module()))


@dataclass
class Forward:
    """The forward of one module.

    Attributes:
        name: the module's.
        graph: what it does. If a run was watched it holds modules alone.
        fixed: why the forward cannot be written anew, None if it can.
        called: the name of the module that a node calls.
        shapes: what each node gave in the run of the example, where it was one tensor.
        variants: what it does in the other mode and with its optional arguments left out, where that differs.
    """

    name: str
    graph: fx.Graph
    fixed: str | None
    called: dict[fx.Node, str] = field(default_factory=dict)
    shapes: dict[fx.Node, torch.Size] = field(default_factory=dict)
    variants: list[Forward] = field(default_factory=list)


class Flow:
    """All forwards of ``model``, which stays as it is.

    Args:
        model: any module.
        example: its argument, or a tuple or list of them, or a mapping of keyword arguments; or None. Forwards that
            ``torch.fx`` cannot trace are watched in one run with it.
    """

    def __init__(self, model: nn.Module, example: Any = None) -> None:
        # A forward may keep what it is given in an attribute, so a copy is traced and run.
        self.root = copy.deepcopy(model)
        self.names = {id(module): name for name, module in self.root.named_modules()}
        self.registrations: dict[int, int] = defaultdict(int)
        for module in self.root.modules():
            for child in module._modules.values():
                self.registrations[id(child)] += child is not None
        # Held in a plain attribute as well, where no other can take its place.
        self.held = {self.names[id(held)] for m in self.root.modules() for held in _held(m) if id(held) in self.names}
        # Their parameters are used by the forward of another.
        self.read: set[str] = set()
        self.failures: dict[str, str] = {}
        # By failed forward, the modules that it called until its trace ended.
        self.reached: dict[str, set[str]] = {}
        self.forwards: dict[str, Forward] = {}
        self.sizes: dict[str, torch.Size] = {}
        for name, module in self.root.named_modules():
            # A norm that brings its own activation has children too, but is one thing here.
            if module._modules and type(module).forward is not nn.Module.forward and as_norm(module) is None:
                self._trace(name, module)
        if example is not None:
            self._watch(example)
        self.calls: dict[str, list[tuple[Forward, fx.Node]]] = defaultdict(list)
        for forward in self.forwards.values():
            for node, called in forward.called.items():
                self.calls[called].append((forward, node))

    def _trace(self, name: str, module: nn.Module) -> None:
        if "forward" in module.__dict__:
            self.failures[name] = "is replaced on the instance"
            return
        try:
            tracer = _Tracer()
            graph, fixed, variants = _trace(module, tracer)
        except Exception as error:  # a forward may raise anything when it meets a proxy
            what = str(error).splitlines()[0][:80] if str(error) else ""
            self.failures[name] = f"cannot be traced ({type(error).__name__}: {what})"
            nodes = [node for node in getattr(tracer, "graph", fx.Graph()).nodes if node.op == "call_module"]
            self.reached[name] = {self.names[id(module.get_submodule(node.target))] for node in nodes}
            return
        self._add(Forward(name, graph, fixed, variants=[Forward(name, variant, fixed) for variant in variants]), module)

    def _add(self, forward: Forward, module: nn.Module) -> None:
        for each in (forward, *forward.variants):
            for node in each.graph.nodes:
                if node.op == "call_module":
                    each.called[node] = self.names[id(module.get_submodule(node.target))]
                elif node.op == "get_attr" and (owner := node.target.rpartition(".")[0]):
                    self.read.add(self.names[id(module.get_submodule(owner))])
        self.forwards[forward.name] = forward

    @torch.no_grad()
    def _watch(self, example: Any) -> None:
        """Run the example, for the sizes of maps and for what no trace could tell."""
        watch = _Watch(self.root, self.names, set(self.failures))
        inputs: dict[str, tuple] = {}
        hooks = []

        def keep(module: nn.Module, args: tuple) -> None:
            # Copied: a forward may change its arguments in place.
            inputs.setdefault(self.names[id(module)], tree_map_only(Tensor, torch.clone, args))

        for name, forward in self.forwards.items():
            if forward.fixed is None and any(
                node.op in ("call_function", "call_method") for node in forward.graph.nodes
            ):
                module = self.root.get_submodule(name)
                hooks.append(module.register_forward_pre_hook(keep))
        modes = {module: module.training for module in self.root.modules()}
        self.root.eval()
        try:
            with watch:
                call(self.root, example)
            for hook in hooks:
                hook.remove()
            for name, arguments in inputs.items():
                self._shapes(self.forwards[name], arguments)
        finally:
            for module, mode in modes.items():
                module.training = mode
        self.sizes = watch.sizes
        self.read |= watch.read
        for name in self.failures:
            if (graph := watch.graph(name)) is not None:
                self._add(Forward(name, graph, self.failures[name]), self.root.get_submodule(name))
                self.reached.pop(name, None)

    def _shapes(self, forward: Forward, arguments: tuple) -> None:
        module = self.root.get_submodule(forward.name)
        try:
            ShapeProp(fx.GraphModule(module, forward.graph)).propagate(*arguments)
        except Exception:  # what a trace made of a forward need not run on what the forward is really given
            return
        for node in forward.graph.nodes:
            meta = node.meta.get("tensor_meta")
            if hasattr(meta, "shape"):
                forward.shapes[node] = meta.shape


def call(model: nn.Module, example: Any) -> Any:
    """``model`` on an example: its argument, a tuple or list of arguments, or a mapping of keyword arguments.

    It gets a copy, which its forward may change in place.
    """
    example = tree_map_only(Tensor, torch.clone, example)
    if isinstance(example, Mapping):
        return model(**example)
    return model(*(example if isinstance(example, (tuple, list)) else (example,)))


def _trace(module: nn.Module, tracer: _Tracer) -> tuple[fx.Graph, str | None, list[fx.Graph]]:
    """The graph of a forward in the present mode; why one made from it might not be the same, and then variants."""
    training = module.training
    state = _state(module)
    graph = tracer.trace(module)
    fixed = tracer.doubt
    if fixed is None and _state(module) != state:
        fixed = "it changes attributes or makes tensors of its own"
    if fixed is None and isinstance(module, fx.GraphModule):
        fixed = "it is a GraphModule, whose class is its own"
    if fixed is None and any(_optional(node) for node in graph.nodes if node.op == "placeholder"):
        fixed = "it has optional arguments"
    variants = []
    try:
        module.training = not training
        other = _Tracer().trace(module)
        if fixed is None and generated.source(other) != generated.source(graph):
            fixed = "it differs between training and evaluation"
        variants.append(other)
    except generated.NoSource as error:
        fixed = str(error)
    except Exception:  # a forward may raise anything when it meets a proxy
        fixed = "it differs between training and evaluation"
    finally:
        module.training = training
    if fixed is None:
        return graph, None, []
    with contextlib.suppress(Exception):  # likewise
        variants.append(_Tracer().trace(module, _defaults(module)))
    # The graph itself is not to be run: what the forward keeps in attributes counts as given away.
    if kept := [leaf.node for leaf in tree_leaves(list(vars(module).values())) if isinstance(leaf, fx.Proxy)]:
        for each in (graph, *variants):
            output = next(node for node in each.nodes if node.op == "output")
            output.args = ([*output.args, *(node for node in kept if node.graph is each)],)
    return graph, fixed, variants


def _defaults(module: nn.Module) -> dict[str, Any]:
    parameters = inspect.signature(module.forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def _held(module: nn.Module) -> list[nn.Module]:
    """Modules in plain attributes, or in lists and the like there."""
    values = [value for name, value in vars(module).items() if name not in _OWN]
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, nn.Module)]


def _optional(placeholder: fx.Node) -> bool:
    return bool(placeholder.args) or placeholder.target.startswith("*")


def _state(module: nn.Module) -> tuple:
    plain = {
        name: [id(leaf) for leaf in tree_leaves(value)] for name, value in vars(module).items() if name != "training"
    }
    buffers = [(name, id(b), b._version) for name, b in module.named_buffers(recurse=False) if b is not None]
    return plain, sorted(module._modules), buffers


class _Proxy(fx.Proxy):
    """Notices who asks for its type, and keeps operators that work in place apart from those that do not."""

    @property
    def __class__(self):
        if not sys._getframe(1).f_globals.get("__name__", "").startswith("torch."):
            self.tracer.doubt = "it asks for the type of its arguments"
        return _Proxy


def _in_place(function):
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _function in (operator.iadd, operator.isub, operator.imul, operator.itruediv):
    setattr(_Proxy, f"__{_function.__name__}__", _in_place(_function))


def _modes() -> tuple:
    """What a call depends on besides its arguments, and no graph tells."""
    autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    saving = torch._C._autograd._top_saved_tensors_default_hooks(True)  # torch.utils.checkpoint has some
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, saving


class _Tracer(fx.Tracer):
    """Children are black boxes."""

    doubt: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self.modes = _modes()

    def create_node(self, *args, **kwargs) -> fx.Node:
        if _modes() != self.modes:
            self.doubt = "it sets no_grad, autocast or checkpoints"
        frame = sys._getframe(1)
        while frame is not None and frame.f_code is not fx.Tracer.trace.__code__:
            name = frame.f_code.co_name
            if frame.f_locals.get("self") is self.root and not name.startswith("_") and name != "forward":
                self.doubt = f"it calls {name}, which others may call too"
            frame = frame.f_back
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


def _elsewhere(*values: Any) -> None:
    """What stands in a graph for everything that a watched forward did with tensors outside of its modules."""


_QUESTIONS = ("__get__", "__len__", "dim", "is_contiguous", "is_floating_point", "numel", "size", "stride")


class _Watch(TorchFunctionMode):
    """Records the sizes of what norms are given and, for the forwards in ``watched``, which tensor went where."""

    def __init__(self, root: nn.Module, names: dict[int, str], watched: set[str]) -> None:
        super().__init__()
        self.root = root
        self.names = names
        self.watched = watched
        self.sizes: dict[str, torch.Size] = {}
        self.stack: list[str] = []
        # For each watched forward what it did, in order: (name of the called module or None, inputs, output). The
        # tensors are held, so that no two have the same id.
        self.events: dict[str, list[tuple[str | None, list[Tensor], Any]]] = {name: [] for name in watched}
        # What it gave or kept, which others then have.
        self.given: dict[str, list[Tensor]] = {}
        self.read: set[str] = set()
        self.owners = {
            id(p): name for name, m in root.named_modules() for p in (*m._parameters.values(), *m._buffers.values())
        }
        self.runs: dict[str, int] = defaultdict(int)
        self.hooks: list = []

    def __enter__(self):
        for module in self.root.modules():
            self.hooks.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
            self.hooks.append(module.register_forward_hook(self._after, with_kwargs=True, always_call=True))
        return super().__enter__()

    def __exit__(self, *exception):
        for hook in self.hooks:
            hook.remove()
        return super().__exit__(*exception)

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        name = self.names[id(module)]
        if as_norm(module) is not None and args:
            self.sizes.setdefault(name, args[0].shape)
        self.runs[name] += 1
        self.stack.append(name)

    def _after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        name = self.stack.pop()
        if name in self.watched and self.runs[name] == 1:
            attributes = [value for key, value in vars(module).items() if key not in _OWN]
            parts = [
                vars(leaf) for leaf in tree_leaves(output) if hasattr(leaf, "__dict__") and not isinstance(leaf, Tensor)
            ]
            self.given[name] = _tensors((output, attributes, parts))
        if self.stack and self.stack[-1] in self.watched and self.runs[self.stack[-1]] == 1:
            self.events[self.stack[-1]].append((name, _tensors((args, kwargs)), output))

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        # To ask for a shape is no use of a tensor.
        asks = getattr(function, "__name__", "") in _QUESTIONS and not _tensors(output)
        if not asks and self.stack and self.stack[-1] in self.watched and self.runs[self.stack[-1]] == 1:
            inputs = _tensors((args, kwargs))
            self.read |= {self.owners[id(t)] for t in inputs if id(t) in self.owners} - {self.stack[-1]}
            self.events[self.stack[-1]].append((None, inputs, output))
        return output

    def graph(self, name: str) -> fx.Graph | None:
        """What the first run of the forward ``name`` did; None if it never ran."""
        if not self.runs[name]:
            return None
        prefix = f"{name}." if name else ""
        graph = fx.Graph()
        made: dict[int, fx.Node] = {}
        for called, inputs, output in self.events[name]:
            sources = [made[id(tensor)] for tensor in inputs if id(tensor) in made]
            if called is not None and called.startswith(prefix):
                node = graph.call_module(called.removeprefix(prefix), tuple(sources))
            else:
                node = graph.call_function(_elsewhere, tuple(sources))
            for tensor in _tensors(output):
                made[id(tensor)] = node
        graph.output(tuple(made[id(tensor)] for tensor in self.given.get(name, []) if id(tensor) in made))
        return graph


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]
