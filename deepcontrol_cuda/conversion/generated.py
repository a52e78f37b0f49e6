"""Classes whose forward is made from a graph. No module holds them, yet they can be copied and pickled."""

from __future__ import annotations

import importlib
import linecache
from types import CodeType, ModuleType
from typing import Any

from torch import fx, nn

# Name in the source, module, name in the module ("" is the module itself).
_Import = tuple[str, str, str]

_classes: dict[tuple[type, str, tuple[str, ...]], type] = {}


class NoSource(Exception):
    """A graph calls what cannot be imported by name."""


class Rewritten:
    """What all of them have in common.

    Attributes:
        _original: the class whose forward was written anew.
        _fused: paths, from the module, of layers that do what the original forward did by itself.
    """

    _original: type
    _fused: tuple[str, ...]
    _source: str
    _imports: tuple[_Import, ...]

    def __reduce_ex__(self, protocol):
        own = getattr(self._original, "__getstate__", None)
        state = self.__dict__.copy() if own is None else own(self)  # before Python 3.11 object has none
        return rebuild, (self._original, self._source, self._imports, self._fused), state


def subclass(original: type, graph: fx.Graph, fused: tuple[str, ...]) -> type:
    """A subclass of ``original``, which it looks like, whose forward does what the graph says."""
    code, imports = source(graph)
    return _subclass(original, code, imports, fused)


def rebuild(original: type, source: str, imports: tuple[_Import, ...], fused: tuple[str, ...]) -> nn.Module:
    """An empty module of such a class, for copies and unpickled ones."""
    kind = _subclass(original, source, imports, fused)
    return kind.__new__(kind)


def source(graph: fx.Graph) -> tuple[str, tuple[_Import, ...]]:
    """The text of a forward that does what the graph says, and what it imports; ``NoSource`` if it has none."""
    for node in graph.nodes:
        node.type = None  # annotations would need imports of their own
    code = graph.python_code("self")
    used = _names(compile(code.src, "<forward>", "exec"))
    return code.src, tuple(_locate(name, value) for name, value in code.globals.items() if name in used)


def _names(code: CodeType) -> set[str]:
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)


def _locate(name: str, value: Any) -> _Import:
    if isinstance(value, ModuleType):
        return name, value.__name__, ""
    module, path = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if isinstance(value, float):  # inf and nan
        module, path = "math", name
    try:
        found = _find(module, path)
    except (AttributeError, ImportError, ValueError, TypeError):
        found = None
    if found is not value and not isinstance(value, float):
        raise NoSource(f"it uses {path or name}, which no module has under this name")
    return name, module, path


def _find(module: str, path: str) -> Any:
    value = importlib.import_module(module)
    for part in filter(None, path.split(".")):
        value = getattr(value, part)
    return value


def _subclass(original: type, source: str, imports: tuple[_Import, ...], fused: tuple[str, ...]) -> type:
    key = (original, source, fused)
    if key not in _classes:
        namespace = {name: _find(module, path) for name, module, path in imports}
        file = f"<{original.__qualname__}.forward, rewritten {len(_classes)}>"
        linecache.cache[file] = (len(source), None, source.splitlines(True), file)  # for tracebacks
        exec(compile(source, file, "exec"), namespace)
        _classes[key] = type(
            original.__name__,
            (Rewritten, original),
            {
                "forward": namespace["forward"],
                "_original": original,
                "_source": source,
                "_imports": imports,
                "_fused": fused,
                "__module__": original.__module__,
                "__qualname__": original.__qualname__,
                "__doc__": original.__doc__,
            },
        )
    return _classes[key]
