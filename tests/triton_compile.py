"""Compiles all that the Triton backend would launch on a GPU, without one: ``python tests/triton_compile.py 90``.

The host functions of triton_kernels ask PyTorch and Triton for a GPU and are told of one that is not there. They get
meta tensors, on which PyTorch computes nothing. What Triton would then hand to its compiler (kernel, specialisation and
options) is kept, and compiled for that GPU. On standard output comes JSON: the kernels that there are, and what became
of each compilation.
"""

from __future__ import annotations

import inspect
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from deepcontrol_cuda.triton_kernels import conv_center, library, tuning
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from bench.cases import SETS
from bench.kernels import RESNET50_KERNELS, RESNET50_MAPS
from deepcontrol_cuda import triton_kernels
from deepcontrol_cuda._ops import memory_format
from deepcontrol_cuda.timing import Shape

# An A100 and an H100: multiprocessors, and bytes of shared memory that one block may have.
GPUS = {80: (108, 163 * 1024), 90: (132, 227 * 1024)}
_CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass
class Kernel:
    """One specialisation: what it was for, what it takes, in bytes and registers a thread, and its PTX."""

    name: str
    call: str
    """The op that launched it first."""
    aligned: bool
    """Whether whole vectors of 16 bytes make up the rows of its maps and weights."""
    constants: dict[str, int | bool | str]
    registers: int
    stack: int
    local: int
    shared: int
    seconds: float
    ptx: str


@dataclass
class Compilation:
    call: str
    aligned: bool
    source: ASTSource
    target: GPUTarget
    options: dict[str, object]


class _Driver:
    """What Triton asks of its driver before a launch."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self) -> Callable[..., list[float]]:
        """For the tuner: launches everything once."""
        return lambda call, quantiles: [call() or 1.0] * len(quantiles)


class _Launched:
    """In the place of a compiled kernel."""

    function = packed_metadata = None

    def launch_metadata(self, *_: object) -> None:
        return None

    def run(self, *_: object) -> None:
        pass


class PretendedGpu:
    """Keeps what launches would have compiled, each specialisation once."""

    def __init__(self, capability: int):
        processors, shared_memory = GPUS[capability]
        properties = SimpleNamespace(
            major=capability // 10,
            minor=capability % 10,
            multi_processor_count=processors,
            shared_memory_per_block_optin=shared_memory,
            name=f"sm_{capability}",
        )
        torch.cuda.get_device_properties = lambda index: properties
        torch.cuda.current_device = lambda: None  # the index of a meta tensor
        torch.cuda.is_current_stream_capturing = lambda: False
        triton.runtime.driver.set_active(_Driver(capability))
        triton.compiler.compile = self._keep
        self.call, self.aligned = "", True
        self.compilations: list[Compilation] = []

    def _keep(self, source: ASTSource, target: GPUTarget, options: dict[str, object], **_: object) -> _Launched:
        self.compilations.append(Compilation(self.call, self.aligned, source, target, options))
        return _Launched()


def entry_kernels() -> list[str]:
    """The kernels of the package that no other one calls."""
    texts = {}
    for info in pkgutil.iter_modules(triton_kernels.__path__):
        module = import_module(f"{triton_kernels.__name__}.{info.name}")
        for name, value in vars(module).items():
            while not isinstance(value, JITFunction) and hasattr(value, "fn"):  # beneath its tuner
                value = value.fn
            if isinstance(value, JITFunction) and value.module == module.__name__:
                texts[name] = inspect.getsource(value.fn)
    called = {name for name in texts for other in texts if name != other and re.search(rf"\b{name}\(", texts[other])}
    return sorted(texts.keys() - called)


class Ops:
    """Calls the ops on meta tensors, forward and backward."""

    def __init__(self, gpu: PretendedGpu):
        self.gpu = gpu
        self.functions = {function.__name__: function for function, _ in library._OPS}

    def __getattr__(self, name: str) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            self.gpu.call = f"{name}({', '.join(map(_describe, arguments))})"
            self.gpu.aligned = all(map(_aligned, arguments))
            return self.functions[name](*arguments)

        return call

    def center(self, shape, dtype, channels_last=True, activation="relu", residual=True) -> None:
        x = maps(shape, dtype, channels_last)
        arguments = (x, *vectors(x), 1.0, vectors(x)[0], x if residual else None, activation, 0.1, True)
        _, mean, saved = self.__getattr__("center")(*arguments)
        if activation == "relu":
            self.center_with_mean(*arguments)
            # Behind a convolution.
            mask = [True, False, True, True, False]
            self.center_backward(x, x, *vectors(x), 1.0, mean, saved, activation, 0.1, mask)
        mask = [True, True, True, True, residual]
        self.center_backward(x, x, *vectors(x), 1.0, mean, saved, activation, 0.1, mask)

    def conv(self, shape: Shape, dtype, channels_last=True, activation="relu", batch=64) -> None:
        x = maps((batch, shape.in_channels, shape.size, shape.size), dtype, channels_last)
        w = maps(
            (shape.out_channels, shape.in_channels // shape.groups, shape.kernel_size, shape.kernel_size), dtype,
            channels_last,
        )  # fmt: skip
        y = maps((batch, shape.out_channels, shape.out_size, shape.out_size), dtype, channels_last)
        geometry = ([shape.stride] * 2, [shape.kernel_size // 2] * 2, [1, 1], shape.groups)
        # An expanding convolution has the residual in ResNet-50.
        residual = y if shape.out_channels > shape.in_channels and not shape.reads_image else None
        scaled = (*vectors(y), 1.0)
        _, mean, saved = self.conv_center(x, w, *scaled, vectors(y)[0], residual, *geometry, activation, 0.1, True)
        mask = [not shape.reads_image, True, True, True, True, residual is not None]
        self.conv_center_backward(y, x, w, *scaled, mean, saved, *geometry, activation, 0.1, 0.9, mask)


def maps(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool = True) -> Tensor:
    format = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(shape)) if channels_last else None
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=format or torch.contiguous_format)


def vectors(x: Tensor) -> tuple[Tensor, Tensor]:
    """gain and mean_scale"""
    wide = torch.float32 if x.dtype.itemsize == 2 else x.dtype
    return torch.empty(x.shape[1], dtype=wide, device="meta"), torch.empty(x.shape[1], dtype=wide, device="meta")


def _describe(argument: object) -> str:
    if not isinstance(argument, Tensor):
        return str(argument)
    layout = "" if memory_format(argument) is torch.contiguous_format or argument.dim() == 1 else ", channels_last"
    return f"{'x'.join(map(str, argument.shape))} {str(argument.dtype).removeprefix('torch.')}{layout}"


def _aligned(argument: object) -> bool:
    if not isinstance(argument, Tensor) or argument.dim() < 3 or argument.dtype == torch.uint8:
        return True
    contiguous = memory_format(argument) is torch.contiguous_format
    return (argument.shape[2:].numel() if contiguous else argument.shape[1]) % 8 == 0


BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


def call_everything(ops: Ops) -> None:
    """The maps and convolutions of ResNet-50 in bfloat16, some in float32, then what else there is, once each."""
    for dtype, (channels, size) in (*product((BF16,), RESNET50_MAPS), *product((F32,), RESNET50_MAPS[::3])):
        ops.center((64, channels, size, size), dtype, residual=size < 56)
    others = [(F64, True, "relu"), (BF16, False, "relu"), (torch.float16, True, "silu")]
    others += [(BF16, True, activation) for activation in ("leaky_relu", "gelu", "hardswish")]
    for setting in others:
        ops.center((64, 256, 14, 14), *setting)
    ops.center((2, 8, 700, 701), BF16)
    ops.center((2, 8, 700, 701), BF16, False)
    for rank in (1, 2, 3):
        x = maps((16, 64, *(28,) * rank), BF16)
        steps = [[value] * rank for value in (3, 1, 1, 1)]
        ops.window_mean(x, *steps)

    small, wide, image = Shape(64, 64, 3, 56), Shape(64, 256, 1, 56), Shape(3, 64, 7, 224, 2)
    with conv_center.prefer("fused"):
        # Every tile that a GPU has room for, in bfloat16; elsewhere the best of them, as far as one can count.
        tuning._TRIED = len(tuning.FORWARD_TILES)
        ops.conv(small, BF16)
        tuning._TRIED = 1
        for shape in (wide, image):
            ops.conv(shape, BF16)
        strided = Shape(128, 128, 3, 56, stride=2), Shape(256, 512, 1, 56, stride=2), Shape(2048, 512, 1, 7)
        for shape in (*SETS["resnet50"], *strided):
            ops.conv(shape, BF16)
        for shape in (small, wide, image):
            ops.conv(shape, F32)
        for setting in others[:3]:
            ops.conv(small, *setting)
        ops.conv(Shape(64, 128, 3, 28, groups=2), BF16)
        ops.conv(Shape(19, 33, 3, 9), BF16)
    with conv_center.prefer("held"):
        tuning._TRIED = len(tuning.FORWARD_TILES)
        ops.conv(Shape(256, 1024, 1, 14), BF16)
        tuning._TRIED = 1
        ops.conv(Shape(512, 512, 3, 7), BF16)
        ops.conv(Shape(256, 1024, 1, 14), F32)
        ops.conv(Shape(512, 2048, 1, 7), BF16, activation="silu")
        ops.conv(Shape(19, 33, 3, 9), BF16)
    with conv_center.prefer("direct"):
        for stride, dtype in ((1, BF16), (2, BF16), (1, F32), (1, F64)):
            ops.conv(Shape(96, 96, 3, 56, stride, groups=96), dtype)
        ops.conv(Shape(32, 64, 3, 28, groups=8), BF16)
        # A map of one pixel, and the kernels of ConvNeXt.
        ops.conv(Shape(64, 64, 3, 1, groups=64), BF16)
        for size in (56, 14):
            ops.conv(Shape(96, 96, 7, size, groups=96), BF16, activation="gelu")
    # As many taps as there can be in a line.
    x, w = maps((2, 32, 1, 80), BF16), maps((32, 32, 1, 64), BF16)
    with conv_center.prefer("fused"):
        ops.conv_center(x, w, None, None, 1.0, None, None, [1, 1], [0, 32], [1, 1], 1, "relu", 0.0, True)

    for dtype in (BF16, F32):
        gradients = [maps((o, c, k, k), dtype) for o, c, k, count in RESNET50_KERNELS for _ in range(count)]
        ops.project_kernel_gradients_(gradients, 0.9)
        for gradient in gradients:
            ops.finish_weight_grad_(gradient, gradient, vectors(gradient.transpose(0, 1))[0], None, 0.9)


def compile_one(compilation: Compilation, compile: Callable[..., object], folder: Path) -> Kernel:
    start = time.perf_counter()
    options = compilation.options
    kernel = compile(compilation.source, target=compilation.target, options=options)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    report = subprocess.run([_CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    constants = {
        compilation.source.fn.arg_names[path[0]]: value if isinstance(value, int) else str(value)
        for path, value in compilation.source.constants.items()
        if value is not None
    }
    return Kernel(
        name=compilation.source.fn.fn.__name__,
        call=compilation.call,
        aligned=compilation.aligned,
        constants=constants | {name: options[name] for name in ("num_warps", "num_stages")},
        registers=usage["REG"],
        stack=usage["STACK"],
        local=usage["LOCAL"],
        shared=kernel.metadata.shared,
        seconds=time.perf_counter() - start,
        ptx=kernel.asm["ptx"],
    )


def main(capability: int) -> None:
    compile = triton.compiler.compile
    gpu = PretendedGpu(capability)
    with tempfile.TemporaryDirectory() as folder:
        # What the tuner finds on a GPU that is not there must not be kept.
        triton.knobs.cache.dir = folder
        call_everything(Ops(gpu))
        kernels = [compile_one(compilation, compile, Path(folder)) for compilation in gpu.compilations]
    json.dump({"entries": entry_kernels(), "kernels": [asdict(kernel) for kernel in kernels]}, sys.stdout)


if __name__ == "__main__":
    main(int(sys.argv[1]))
