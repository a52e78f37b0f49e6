"""Which implementations can run here, why the others cannot, and which one a call gets."""

from __future__ import annotations

import hashlib
import importlib
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import _ops, costs, measured, proven, tuning

BACKENDS = ("reference", "cpu", "cuda", "triton")
"""``reference`` is plain PyTorch on any device; ``cpu`` and ``cuda`` are the compiled extension's kernels; ``triton``
are kernels that Triton compiles when they are first needed."""

ROUND_WEIGHTS = ("cpu",)
"""Their convolutions take a float32 weight beside a 16-bit input, round it themselves and return a float32 gradient."""

_ON, _OFF = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")


def _switch(variable: str) -> bool:
    given = os.environ.get(variable, "")
    if given.lower() not in _ON + _OFF:
        raise ValueError(f"{variable}: got {given!r}, wanted {', '.join(_ON)}, or {', '.join(_OFF[:-1])} or nothing")
    return given.lower() in _ON


tune: bool = _switch("DEEPCONTROL_TUNE")
"""Whether the first call of each layer times the algorithms that take it and keeps the fastest (``tuning``); here on
CPUs. What was timed holds until the process ends."""

_VARIABLE = "DEEPCONTROL_BACKEND"
_LEAST_CAPABILITY = (8, 0)
_LEAST_TRITON = (3, 5)
# Triton's own switch: its kernels are then played by NumPy, on CPU tensors.
_INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
# The first that is proven is chosen.
_ON_GPUS = ("cuda", "triton")
# What forward and backward of each function of the package run, by the names of csrc/ops.cpp.
_PARTS = {
    "center": ("center", "center_backward"),
    "conv_center": ("conv_center", "conv_center_backward"),
    "project_kernel_gradients_": ("project_kernel_gradients_",),
}


Geometry = tuple[Sequence[int], Sequence[int], Sequence[int], int]
"""Stride, padding and dilation of each spatial dimension, and groups."""


@dataclass(frozen=True)
class _Compiled:
    device: str
    """Type of the devices whose tensors it takes."""
    namespace: str
    """Of its ops in ``torch.ops``."""
    unavailable: Callable[[], str | None]
    """Why it cannot run in this process, or None."""
    unfit: Callable[[int | None], str | None]
    """Why it cannot run on the device of that index, or None."""
    describe: Callable[[str, Tensor, Tensor | None, Geometry], str]
    """What it does for an op of ``_PARTS``, an input, and of a convolution the weight and geometry, in words."""
    kernels: Callable[[], str]
    """Digest of the sources of its kernels, for proofs."""


ops: dict[str, _ops.Ops] = {}
"""The ops of every compiled backend that is loaded."""
_compiled: dict[str, _Compiled] = {}
# Pairs of backend and device index that were found to run.
_able: set[tuple[str, int | None]] = set()


def _register(
    name: str,
    device: str,
    namespace: str,
    unavailable: Callable[[], str | None] = lambda: None,
    unfit: Callable[[int | None], str | None] = lambda index: None,
    describe: Callable[[str, Tensor, Tensor | None, Geometry], str] = lambda *_: "",
    kernels: Callable[[], str] = lambda: "",
) -> None:
    """Make a backend of the ops in ``namespace``, which have the schemas of ``csrc/ops.cpp``."""
    _compiled[name] = _Compiled(device, namespace, unavailable, unfit, describe, kernels)
    if hasattr(getattr(torch.ops, namespace), "center"):
        ops[name] = _ops.bind(namespace)


class _Gpu(NamedTuple):
    name: str
    capability: tuple[int, int]


def _gpu(index: int) -> _Gpu:
    return _Gpu(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index))


_TORCH_WITHOUT_CUDA = "this torch is built without CUDA; install one that has it (https://pytorch.org)"
_NO_GPU = "torch.cuda.is_available() is False: there is no GPU, no driver, or CUDA_VISIBLE_DEVICES hides it"


def _built_with_cuda() -> bool:
    return _ops.extension.info()["cuda"]


def _why_no_extension() -> str | None:
    return _ops.unavailable


def _why_no_cuda() -> str | None:
    if _ops.unavailable is not None:
        return _ops.unavailable
    if torch.version.cuda is None:
        return f"{_TORCH_WITHOUT_CUDA} and this package again"
    if not _built_with_cuda():
        return (
            "the extension is built without CUDA kernels; where nvcc and a torch for CUDA are, build it with: "
            "DEEPCONTROL_CUDA=1 pip install --no-build-isolation --no-deps --force-reinstall . "
            "(in a checkout: DEEPCONTROL_CUDA=1 make build)"
        )
    return None if torch.cuda.is_available() else _NO_GPU


def _why_no_triton() -> str | None:
    # Triton takes a second to import, so where there is no GPU it is left alone.
    if not _INTERPRETED:
        if torch.version.cuda is None:
            return _TORCH_WITHOUT_CUDA
        if not torch.cuda.is_available():
            return _NO_GPU
    return _load_triton()


@cache
def _load_triton() -> str | None:
    """Makes the ops of triton_kernels, or tells why it cannot."""
    wanted = _dotted(_LEAST_TRITON)
    try:
        found = importlib.import_module("triton").__version__
    except ImportError as error:
        return f"triton cannot be imported ({error}); install it with: pip install 'triton>={wanted}'"
    if tuple(int(number) for number in found.split(".")[:2]) < _LEAST_TRITON:
        return f"triton {found} is too old, wanted {wanted} or newer: pip install -U 'triton>={wanted}'"
    namespace = importlib.import_module(".triton_kernels", __package__).NAMESPACE
    ops["triton"] = _ops.bind(namespace)
    return None


def _why_not_this_gpu(index: int | None) -> str | None:
    if index is None:  # a CPU that Triton interprets its kernels on
        return None
    gpu = _gpu(index)
    if gpu.capability < _LEAST_CAPABILITY:
        return (
            f"{gpu.name} has compute capability {_dotted(gpu.capability)}, wanted {_dotted(_LEAST_CAPABILITY)} or "
            "higher; backend='reference' runs there"
        )
    return None


def _dotted(capability: tuple[int, int]) -> str:
    return "{}.{}".format(*capability)


ALGORITHMS = {
    "cuda": {
        "fused sm90": "a short pass for the means and one fused pass by TMA and wgmma",
        "held sm90": "one fused pass by TMA and wgmma that holds each map",
        "fused sm80": "a short pass for the means and one fused pass by mma.sync",
        "held sm80": "one fused pass by mma.sync that holds each map",
        "direct": "one direct pass",
        "two passes": "two passes, cuDNN's convolution and then center",
    },
    "cpu": {
        "product": "a matrix product with the centring on its way",
        "direct": "one direct pass that holds each map",
        "winograd": "a convolution of transformed tiles (Winograd) and then center",
        "two passes": "two passes, oneDNN's convolution and then center",
    },
}
"""What a backend may do for the forward pass of a convolution, by name (``conv_plan.h`` in ``csrc/cuda`` and
``csrc/cpu``); on a CPU for the backward pass too."""


def _describe_cpu(op: str, input: Tensor, weight: Tensor | None, geometry: Geometry) -> str:
    kernels = f"{_ops.extension.info()['isa']} kernels"
    return f"{kernels}, convolutions by them or by oneDNN" if op == "conv_center" else kernels


def _case_cpu(input: Tensor, weight: Tensor, geometry: Geometry):
    """``_C.ConvCase`` of a layer."""
    return _ops.extension.ConvCase(
        *_sizes(input, weight, geometry),
        _name(input.dtype),
        _layout(input, weight) == "channels_last",
        torch.get_num_threads(),
    )


def _sizes(input: Tensor, weight: Tensor, geometry: Geometry) -> tuple:
    """Spatial dimensions, samples, channels, filters, groups, and triples: maps, kernel, stride, padding, dilation."""
    stride, padding, dilation, groups = geometry
    rank = input.dim() - 2
    ones, zeros = [1] * (3 - rank), [0] * (3 - rank)
    triples = ([*ones, *sizes] for sizes in (input.shape[2:], weight.shape[2:], stride))
    return (
        rank, input.shape[0], input.shape[1], weight.shape[0], groups,
        *triples, [*zeros, *padding], [*ones, *dilation],
    )  # fmt: skip


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_PREDICTED = "predicted fastest from bytes and operations, not timed"


def _describe_cuda(op: str, input: Tensor, weight: Tensor | None, geometry: Geometry) -> str:
    if op != "conv_center" or weight is None:
        return "one pass" if op != "conv_center" else "one pass for convolutions that its kernels take"
    chosen = _algorithm_on_gpu(input, weight, geometry)
    why = "preferred" if "cuda" in _algorithms else _PREDICTED
    if "cuda" not in _algorithms:
        *place, layer = _key(input, op, weight, geometry[0])
        timed = measured.fastest(_measured_times(), _place(place[0], *place[2:], layer), ("cuda",))
        if timed is not None and timed.algorithm == chosen:
            why = f"the fastest that {timed.result} has for this layer"
    return f"{ALGORITHMS['cuda'][chosen]} ({why})"


def _algorithm_on_gpu(input: Tensor, weight: Tensor, geometry: Geometry) -> str:
    return torch.ops.deepcontrol.conv_algorithm(input, weight, *geometry)


def _describe_triton(op: str, input: Tensor, weight: Tensor | None, geometry: Geometry) -> str:
    if op != "conv_center" or weight is None:
        return "one pass" if op != "conv_center" else "one pass for convolutions that its kernels take"
    return importlib.import_module(".triton_kernels.conv_center", __package__).describe(input, weight, *geometry)


@cache
def _triton_digest() -> str:
    folder = Path(importlib.import_module(".triton_kernels", __package__).__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


_register("cpu", "cpu", "deepcontrol", _why_no_extension, describe=_describe_cpu)
_register("cuda", "cuda", "deepcontrol", _why_no_cuda, _why_not_this_gpu, _describe_cuda, lambda: _ops.kernels)
_register(
    "triton",
    "cpu" if _INTERPRETED else "cuda",
    "deepcontrol_triton",
    _why_no_triton,
    _why_not_this_gpu,
    _describe_triton,
    _triton_digest,
)


_costs: tuple[costs.Cost, ...] = ()


def _read_costs() -> None:
    """Makes the table of costs what the extension chooses by."""
    global _costs
    if _ops.extension is None:
        return
    try:
        isa = _ops.extension.info()["isa"]
    except RuntimeError:  # DEEPCONTROL_ISA names another processor's; the first call says so
        return
    _costs = tuple(cost for cost in costs.read_or_warn(costs.FILE) if (cost.backend, cost.hardware) == ("cpu", isa))
    costs.tell_extension(_costs, ALGORITHMS["cpu"])


_read_costs()


def _checked(name: str, origin: str) -> str:
    if name != "reference" and name not in _compiled:
        raise ValueError(f"{origin}: got {name!r}, wanted one of {', '.join(BACKENDS)}, or None for automatic choice")
    return name


_preferred: str | None = _checked(os.environ[_VARIABLE], _VARIABLE) if os.environ.get(_VARIABLE) else None
# Those that are preferred, by backend.
_algorithms: dict[str, str] = {}
_warned = False
_proofs: dict[tuple[str, str, str, str, str], proven.Proof] | None = None
_times: tuple[measured.Time, ...] | None = None
# Of a convolution: the weight's shape, stride and groups.
_Layer = tuple[tuple[int, ...], tuple[int, ...], int]
# What was decided for (device index, op, dtype, layout, layer).
_choices: dict[tuple[int, str, torch.dtype, str, _Layer | None], str] = {}


def available() -> dict[str, str | None]:
    """Every backend with None if it can run here, else the reason why it cannot."""
    return {"reference": None} | {name: backend.unavailable() for name, backend in _compiled.items()}


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


@contextmanager
def prefer(algorithm: str, backend: str | None = None) -> Iterator[None]:
    """One of ``ALGORITHMS`` for every convolution of its backend inside, though another be taken for faster.

    A convolution that the algorithm does not take raises ``RuntimeError`` with the reason, in the forward pass. A
    backward pass that it does not take is that of "two passes"; on a GPU "two passes" leaves the weight gradient to the
    library, all others take this package's own where it has one. The preference is one for the whole process.
    ``ValueError`` for an unknown name, ``RuntimeError`` where no backend that has the algorithm can run.

    Args:
        backend: "cpu" or "cuda", or None for each of them that has an algorithm of that name and can run.
    """
    with ExitStack() as stack:
        for name in _with_algorithm(algorithm) if backend is None else (_checked_algorithm(algorithm, backend),):
            before = _algorithms.get(name)
            _prefer(algorithm, name)
            stack.callback(_prefer, before, name)
        yield


def _with_algorithm(algorithm: str) -> list[str]:
    """The backends that have an algorithm and can run."""
    having = [backend for backend, known in ALGORITHMS.items() if isinstance(algorithm, str) and algorithm in known]
    if not having:
        wanted = ", or ".join(f"{backend}'s {', '.join(map(repr, known))}" for backend, known in ALGORITHMS.items())
        raise ValueError(f"algorithm: got {algorithm!r}, wanted one of {wanted}")
    reasons = {backend: _compiled[backend].unavailable() for backend in having}
    if all(reasons.values()):
        raise RuntimeError("; ".join(f"backend {backend!r}: {reason}" for backend, reason in reasons.items()))
    return [backend for backend, reason in reasons.items() if reason is None]


def _checked_algorithm(algorithm: str, backend: str) -> str:
    if backend not in _compiled or backend == "triton":
        raise ValueError(
            f"backend: got {backend!r}, wanted 'cpu' or 'cuda', or None for all that have the algorithm; others have "
            "none to prefer"
        )
    known = ALGORITHMS["cpu" if backend == "cpu" else "cuda"]
    if not isinstance(algorithm, str) or algorithm not in known:
        raise ValueError(f"algorithm: got {algorithm!r}, wanted one of {', '.join(map(repr, known))}")
    if backend in ALGORITHMS and (reason := _compiled[backend].unavailable()):
        raise RuntimeError(f"backend {backend!r}: {reason}")
    return backend


def _prefer(algorithm: str | None, backend: str) -> None:
    if backend == "cpu":
        _ops.extension.prefer_algorithm_cpu(algorithm or "")
    else:
        getattr(torch.ops, _compiled[backend].namespace).prefer_algorithm(algorithm or "")
    _algorithms.pop(backend, None)
    if algorithm is not None:
        _algorithms[backend] = algorithm


# The next two ask torch itself. To what torch.compile traces, torch before 2.13 says that an export goes on, and every
# torch that no ONNX export does, also when that uses it.
@torch.compiler.assume_constant_result
def is_exporting() -> bool:
    """``torch.compiler.is_exporting``, false under torch.compile."""
    return torch.compiler.is_exporting()


@torch.compiler.assume_constant_result
def recorder() -> str | None:
    """What is recording the calls made now into a program that may run without this package, or None.

    One of "torch.jit.trace", "torch.onnx.export" and "torch.export". The program is for inference.
    """
    exporting = torch.compiler.is_exporting()
    if not exporting and not torch.jit.is_tracing():
        return None
    if torch.onnx.is_in_onnx_export():
        return "torch.onnx.export"
    return "torch.export" if exporting else "torch.jit.trace"


def choose(
    input: Tensor,
    requested: str | None = None,
    op: str = "conv_center",
    weight: Tensor | None = None,
    stride: int | Sequence[int] = 1,
) -> str:
    """The backend that a call on ``input`` gets.

    A backend asked for, by argument, ``use`` or DEEPCONTROL_BACKEND, is returned or refused with ``RuntimeError``. Else
    a CPU tensor gets "cpu" if the extension is loaded, and a CUDA tensor one of "cuda" and "triton" that has kernels
    for this dtype and layout that are proven on GPUs of this compute capability: the faster one where ``make gpu`` has
    timed the layer by both, else the first. What ``recorder`` names gets plain PyTorch's ops, "reference".

    Args:
        op: "center", "conv_center" or "project_kernel_gradients_".
        weight: of the convolution; where it is channels_last, so is the output.
        stride: of the convolution, one integer for each spatial dimension or one for all.
    """
    name = requested if requested is not None else _preferred
    device = input.device
    recording = recorder()
    if recording is not None:
        if name is None:
            return "reference"
        if name != "reference" and recording != "torch.export":
            raise RuntimeError(
                f"backend {name!r}: {recording} cannot record its ops; ask for no backend or for 'reference', "
                "or take the model that to_reference makes"
            )
    if name is None:
        if device.type == "cpu":
            return _automatic_on_cpu()
        if device.type == "cuda":
            return _automatic_on_gpu(*_key(input, op, weight, stride))
        return "reference"
    _checked(name, "backend")
    if name == "reference":
        return name
    wanted = _compiled[name].device
    if device.type == wanted:
        reason = _obstacle(name, device.index)
    else:
        reason = _compiled[name].unavailable()
        reason = reason or f"input is on {device}, wanted a {wanted.upper()} tensor or backend='reference'"
    if reason is not None:
        raise RuntimeError(f"backend {name!r}: {reason}")
    return name


def _automatic_on_cpu() -> str:
    global _warned
    if _ops.unavailable is None:
        return "cpu"
    if not _warned:
        _warned = True
        warnings.warn(f"deepcontrol_cuda runs its slow reference: {_ops.unavailable}", stacklevel=5)
    return "reference"


# What was timed or looked up in this process.
_timed: dict[str, tuning.Timed | None] = {}
_cache: tuning.Cache | None = None


def time_layer(input: Tensor, weight: Tensor, geometry: Geometry) -> None:
    """Find the fastest algorithms of a layer on a CPU, unless they are known or nothing may be timed now."""
    possible = _untimed(input, weight, geometry)
    if possible is not None:
        timed = tuning.time_on_cpu(input, weight, geometry, possible)
        _timed_before().add(_layer_text(input, weight, geometry), timed)
        _keep(timed, input, weight, geometry)


def _untimed(input: Tensor, weight: Tensor, geometry: Geometry) -> dict[str, list[str]] | None:
    """By pass the algorithms of a layer that its next call times, or None where it times nothing.

    What an earlier process timed is from here on what the layer takes.
    """
    if not isinstance(tune, bool):
        raise TypeError(f"backends.tune: got {tune!r}, wanted True or False")
    if input.device.type != "cpu" or "cpu" in _algorithms or not tuning.may_time(input, weight):
        return None
    layer = _layer_text(input, weight, geometry)
    if layer in _timed:
        return None
    plan = _ops.extension.plan_conv_cpu(_case_cpu(input, weight, geometry))
    possible = {
        name: [algorithm for algorithm, obstacle in plan[name]["obstacles"].items() if obstacle is None]
        for name in tuning.PASSES
    }
    if all(len(algorithms) == 1 for algorithms in possible.values()):
        _timed[layer] = None
        return None
    timed = _timed_before().known.get(layer)
    if timed is None or any(getattr(timed, name).keys() != set(possible[name]) for name in possible):
        return possible
    _keep(timed, input, weight, geometry)
    return None


def _keep(timed: tuning.Timed, input: Tensor, weight: Tensor, geometry: Geometry) -> None:
    _timed[_layer_text(input, weight, geometry)] = timed
    case = _case_cpu(input, weight, geometry)
    for name in tuning.PASSES:
        _ops.extension.remember_fastest_cpu(case, name, timed.fastest(name))


def _timed_before() -> tuning.Cache:
    global _cache
    if _cache is None:
        _cache = tuning.Cache(tuning.folder(), tuning.situation())
    return _cache


def _layer_text(input: Tensor, weight: Tensor, geometry: Geometry) -> str:
    sizes = ("x".join(map(str, values)) for values in (input.shape, weight.shape, *geometry[:3]))
    names = ("input", "weight", "stride", "padding", "dilation")
    parts = [f"{name} {size}" for name, size in zip(names, sizes)]
    threads = torch.get_num_threads()
    head = f"{_name(input.dtype)}, {_layout(input, weight)}, {threads} {'thread' if threads == 1 else 'threads'}"
    return ", ".join([head, *parts, f"groups {geometry[3]}"])


# The next two ask the driver and read a file, which torch.compile cannot trace: it takes their results for constants.
@torch.compiler.assume_constant_result
def _obstacle(name: str, index: int | None) -> str | None:
    """Why a compiled backend cannot run on the device ``index`` of its type, or None."""
    if (name, index) in _able:
        return None
    reason = _compiled[name].unavailable() or _compiled[name].unfit(index)
    if reason is None:
        _able.add((name, index))
        _measured_times()
    return reason


@torch.compiler.assume_constant_result
def _automatic_on_gpu(index: int, op: str, dtype: torch.dtype, layout: str, layer: _Layer | None) -> str:
    key = (index, op, dtype, layout, layer)
    if key not in _choices:
        _measured_times()
        able = [name for name in _ON_GPUS if _why_not_chosen(name, index, op, dtype, layout) is None]
        time = _fastest(able, *key)
        _choices[key] = time.backend if time else able[0] if able else "reference"
    return _choices[key]


def _key(
    input: Tensor, op: str, weight: Tensor | None, stride: int | Sequence[int]
) -> tuple[int, str, torch.dtype, str, _Layer | None]:
    layer = None
    if weight is not None:
        layer = (tuple(weight.shape), _each(stride, input), input.shape[1] // weight.shape[1])
    return input.device.index, op, input.dtype, _layout(input, weight), layer


def _each(values: int | Sequence[int], input: Tensor) -> tuple[int, ...]:
    """One for each spatial dimension."""
    values = (values,) if isinstance(values, int) else tuple(values)
    return values * (input.dim() - 2) if len(values) == 1 else values


def _fastest(
    names: Sequence[str], index: int, op: str, dtype: torch.dtype, layout: str, layer: _Layer | None
) -> measured.Time | None:
    """The least time of a layer where more than one backend can run it and each of them was timed."""
    if layer is None or len(names) < 2:
        return None
    return measured.fastest(_measured_times(), _place(index, dtype, layout, layer), names)


def _place(index: int, dtype: torch.dtype, layout: str, layer: _Layer) -> tuple[str, str, str, str]:
    """As in ``measured.Time``."""
    (filters, channels, *kernel), stride, groups = layer
    text = measured.layer(kernel, channels * groups, filters, stride, groups)
    return _dotted(_gpu(index).capability), _name(dtype), layout, text


def _measured_times() -> tuple[measured.Time, ...]:
    """All there are; of those of backend "cuda" its kernels are told which algorithm was the fastest."""
    global _times
    if _times is None:
        _times = measured.read_or_warn(measured.FILE)
        for time in _times:
            if time.backend == "cuda" and time.layout == "channels_last" and _why_no_cuda() is None:
                _remember_fastest(time)
    return _times


def _remember_fastest(time: measured.Time) -> None:
    if time.algorithm not in ALGORITHMS["cuda"]:  # of a version that had others
        return
    torch.ops.deepcontrol.remember_fastest_algorithm(time.capability, time.dtype, time.layer, time.algorithm)


def _why_not_chosen(name: str, index: int, op: str, dtype: torch.dtype, layout: str) -> str | None:
    """Why the automatic choice does not take a backend for ``op`` on the GPU ``index``, or None."""
    backend = _compiled[name]
    reason = backend.unavailable() or backend.unfit(index)
    if reason is None and not isinstance(found := _proof(name, index, op, dtype, layout), proven.Proof):
        reason = found
    return reason


def _layout(input: Tensor, weight: Tensor | None) -> str:
    format = _ops.memory_format(input) if weight is None else _ops.conv_memory_format(input, weight)
    return "contiguous" if format is torch.contiguous_format else "channels_last"


def _proof(backend: str, index: int, op: str, dtype: torch.dtype, layout: str) -> proven.Proof | str:
    """The proof that ``op`` of a backend runs right on a GPU like this one, or what is missing."""
    global _proofs
    if _proofs is None:
        _proofs = {proof.key: proof for proof in proven.read_or_warn(proven.FILE)}
    capability = _dotted(_gpu(index).capability)
    name = _name(dtype)
    found = [_proofs.get((backend, part, name, layout, capability)) for part in _PARTS[op]]
    if None in found:
        return f"not proven on compute capability {capability} for {name}, {layout} yet: run make gpu"
    if any(proof.kernels != _compiled[backend].kernels() for proof in found):
        return f"{found[0]}, but the kernels have changed since: run make gpu"
    return found[0]


def explain(
    input: Tensor,
    requested: str | None = None,
    op: str = "conv_center",
    weight: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> str:
    """What would run for ``input`` and why, in words; ``op`` and ``weight`` as for ``choose``.

    With a weight, "cpu" and "cuda" have a line for each algorithm: what it costs, or why it does not take the layer. On
    a CPU that is as ``tune`` timed it, here or in an earlier process, or as the table of costs predicts it; on a GPU it
    is counted from bytes and operations. Nothing is run or timed.

    Args:
        stride, padding, dilation, groups: of the convolution, as the op takes them.

    Raises:
        TypeError, ValueError: what the op raises for an input, weight and geometry that do not fit each other.
        RuntimeError: the backend asked for cannot run.
    """
    if op not in _PARTS:
        raise ValueError(f"op: got {op!r}, wanted one of {', '.join(_PARTS)}")
    functional = _functional()
    functional._check_tensors(input=input)
    geometry: Geometry = ((), (), (), groups)
    if op == "conv_center" and weight is not None:
        input, weight, geometry = _as_called(input, weight, stride, padding, dilation, groups)
    elif op != "project_kernel_gradients_":
        functional._check_input(input, None)
    name = choose(input, requested, op, weight, geometry[0])
    why = _why(name, input, requested, op, weight, geometry[0])
    if name not in _compiled:
        return f"{name}: {why}"
    detail = _compiled[name].describe(op, input, weight, geometry)
    lines = [f"{name}, {detail}: {why}" if detail else f"{name}: {why}"]
    if op == "conv_center" and weight is not None and name in _CANDIDATES:
        lines += _CANDIDATES[name](input, weight, geometry)
    return "\n".join(lines)


def _functional() -> ModuleType:
    """The module of the ops, which imports this one."""
    return importlib.import_module(".functional", __package__)


def _as_called(
    input: Tensor,
    weight: Tensor,
    stride: int | Sequence[int],
    padding: str | int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
) -> tuple[Tensor, Tensor, Geometry]:
    """Input, weight and geometry as the op has them behind autocast and its checks, which raise here too."""
    f = _functional()
    f._check_tensors(input=input, weight=weight)
    if f._autocasting(input):
        input, weight = f._autocast(input), f._autocast(weight)
    # Of a wrong pair the input is the one that is more often wrong: a single image.
    rank = weight.dim() - 2
    f._check_input(input, rank if 1 <= rank <= 3 else None)
    rank = input.dim() - 2
    stride, dilation = f._tuple("stride", stride, rank, 1), f._tuple("dilation", dilation, rank, 1)
    f._check_weight(input, weight, rank, groups, input.dtype)
    input, padding = f._resolve_padding(input, weight, padding, stride, dilation, rank)
    f._output_shape(input, weight, stride, padding, dilation)
    return input, weight, (stride, padding, dilation, groups)


_SOURCES = {
    "preferred": "preferred",
    "timed": "the fastest that was timed here",
    "predicted": "predicted to be the fastest",
    "rule": "by rule",
}


def _candidates_on_cpu(input: Tensor, weight: Tensor, geometry: Geometry) -> list[str]:
    """A line for each pass and algorithm: what it costs and from where that is known, or why it does not take it."""
    untimed = None if tune is False else _untimed(input, weight, geometry)
    plan = _ops.extension.plan_conv_cpu(_case_cpu(input, weight, geometry))
    timed = _timed.get(_layer_text(input, weight, geometry))
    width = max(map(len, ALGORITHMS["cpu"]))
    lines = []
    for mode in tuning.PASSES:
        of_pass = plan[mode]
        for algorithm, obstacle in of_pass["obstacles"].items():
            head = f"  {mode:8}  {algorithm:{width}}  "
            if obstacle is not None:
                lines.append(f"{head}does not take it: {obstacle}")
                continue
            if timed is not None:
                cost = f"{_duration(getattr(timed, mode)[algorithm])}, timed here"
            elif (seconds := of_pass["seconds"][algorithm]) is not None:
                cost = f"{_duration(seconds)}, predicted {_origin(input, weight, plan['kind'], mode, algorithm)}"
            else:
                cost = "cost unknown"
            chosen = f"; chosen, {_SOURCES[of_pass['source']]}" if algorithm == of_pass["chosen"] else ""
            lines.append(head + cost + chosen)
    if untimed is not None:
        lines.append("  not timed yet: the first call times those that take it, and the fastest is chosen from then on")
    return lines


def _candidates_on_gpu(input: Tensor, weight: Tensor, geometry: Geometry) -> list[str]:
    """The same of the forward pass by backend "cuda"."""
    gpu = torch.cuda.get_device_properties(input.device)
    plan = _ops.extension.plan_conv(
        *_sizes(input, weight, geometry)[1:],
        dtype=_name(input.dtype),
        channels_innermost=_layout(input, weight) == "channels_last",
        tf32=torch.backends.cudnn.allow_tf32,
        capability=10 * gpu.major + gpu.minor,
        processors=gpu.multi_processor_count,
        shared_memory=gpu.shared_memory_per_block_optin,
    )
    chosen = _algorithm_on_gpu(input, weight, geometry)
    width = max(map(len, ALGORITHMS["cuda"]))
    lines = []
    for algorithm, way in plan["algorithms"].items():
        found = f"does not take it: {way}" if isinstance(way, str) else f"{_duration(way['seconds'])}, predicted"
        lines.append(f"  forward   {algorithm:{width}}  {found}{'; chosen' if algorithm == chosen else ''}")
    return lines


_CANDIDATES = {"cpu": _candidates_on_cpu, "cuda": _candidates_on_gpu}


def _origin(input: Tensor, weight: Tensor, kind: str, mode: str, algorithm: str) -> str:
    """Of a predicted cost: how far off it is, and the measurements that it is fitted to."""
    place = (_name(input.dtype), _layout(input, weight), kind, mode, algorithm)
    rows = [cost for cost in _costs if (cost.dtype, cost.layout, cost.kind, cost.mode, cost.algorithm) == place]
    # As in nearest_table of csrc/cpu/conv_plan.cpp.
    row = min(rows, key=lambda row: abs(math.log(row.threads / torch.get_num_threads())))
    threads = "" if row.threads == torch.get_num_threads() else f" with {row.threads} threads"
    return f"(median error {row.error:.0%}, from {row.results}{threads})"


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def _why(name: str, input: Tensor, requested: str | None, op: str, weight: Tensor | None, stride: Sequence[int]) -> str:
    asked = None
    if requested is not None:
        asked = "asked for by the call"
    elif _preferred is not None:
        asked = f"asked for by backends.use or {_VARIABLE}"
    device = input.device
    if device.type == "cuda" and (asked is None or name in _ON_GPUS):
        *key, layer = _key(input, op, weight, stride)
        obstacles = {backend: _why_not_chosen(backend, *key) for backend in _ON_GPUS}
        if name not in _ON_GPUS:
            return "; ".join(f"{backend}: {reason}" for backend, reason in obstacles.items())
        found = str(_proof(name, *key))
        if asked is not None:
            return f"{asked}; {found}"
        time = _fastest([backend for backend, reason in obstacles.items() if reason is None], *key, layer)
        return found if time is None else f"{found}; the fastest that {time.result} has for this layer"
    if asked is not None:
        return asked
    if device.type == "cpu":
        return _ops.unavailable or "the input is a CPU tensor and the extension is loaded"
    return f"no kernels of this package run on {device.type} tensors yet"
