"""Which implementations can run here, why the others cannot, and which one a call gets."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from . import _ops

BACKENDS = ("reference", "cpu")
"""``reference`` is plain PyTorch on any device, ``cpu`` the compiled extension's CPU kernels."""

_VARIABLE = "DEEPCONTROL_BACKEND"


def _checked(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin}: got {name!r}, wanted one of {', '.join(BACKENDS)}, or None for automatic choice")
    return name


_preferred: str | None = _checked(os.environ[_VARIABLE], _VARIABLE) if os.environ.get(_VARIABLE) else None
_warned = False


def available() -> dict[str, str | None]:
    """Every backend with None if it can run here, else the reason why it cannot."""
    return {"reference": None, "cpu": _ops.unavailable}


@contextmanager
def use(name: str | None) -> Iterator[None]:
    """Prefer backend ``name`` for every call inside that names none itself; None returns to automatic choice.

    The preference is one for the whole process. ``ValueError`` for an unknown name.
    """
    global _preferred
    before = _preferred
    _preferred = None if name is None else _checked(name, "backend")
    try:
        yield
    finally:
        _preferred = before


def choose(input: Tensor, requested: str | None = None) -> str:
    """The backend that a call on ``input`` gets.

    A backend asked for, by argument, ``use`` or DEEPCONTROL_BACKEND, is returned or refused with ``RuntimeError``.
    """
    global _warned
    name = requested if requested is not None else _preferred
    if name is None:
        if input.device.type == "cpu":
            if _ops.unavailable is None:
                return "cpu"
            if not _warned:
                _warned = True
                warnings.warn(f"deepcontrol_cuda runs its slow reference: {_ops.unavailable}", stacklevel=4)
        return "reference"
    _checked(name, "backend")
    if name == "cpu":
        if _ops.unavailable is not None:
            raise RuntimeError(f"backend 'cpu': {_ops.unavailable}")
        if input.device.type != "cpu":
            raise RuntimeError(f"backend 'cpu': input is on {input.device}, wanted a CPU tensor or backend='reference'")
    return name


def explain(input: Tensor, requested: str | None = None) -> str:
    """What would run for ``input`` and why, in words."""
    name = choose(input, requested)
    if requested is not None:
        why = "asked for by the call"
    elif _preferred is not None:
        why = f"asked for by backends.use or {_VARIABLE}"
    elif name == "cpu":
        why = "the input is a CPU tensor and the extension is loaded"
    elif input.device.type == "cpu":
        why = _ops.unavailable
    else:
        why = f"no kernels of this package run on {input.device.type} tensors yet"
    detail = f", {_ops.extension.info()['isa']} kernels around oneDNN" if name == "cpu" else ""
    return f"{name}{detail}: {why}"
