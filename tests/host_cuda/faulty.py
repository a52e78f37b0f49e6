"""Runs the kernels of faulty.cu, right or with a mistake; as a program, one of them for a sanitizer to look at."""

from __future__ import annotations

import ctypes
import functools
import re
import sys
from pathlib import Path

import torch

from . import build

SOURCE = build.HERE / "faulty.cu"
MISTAKES = re.search(r"enum class Mistake {[^\n]*\n(.*?)}", SOURCE.read_text(), re.DOTALL)[1].replace(",", " ").split()
TILE = 512
THREADS = 128


def round_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """Of positive numbers."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@functools.cache
def convolution(dtype, samples, channels, size, taps, stride, padding, dilation) -> tuple[torch.Tensor, ...]:
    """Input and weight, both with the channels innermost, and output."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, *size, channels, generator=generator).to(dtype)
    weight = torch.randn(16, *taps, channels, generator=generator).to(dtype)
    function = torch.nn.functional.conv2d if len(size) == 2 else torch.nn.functional.conv3d
    channels_first = [tensor.double().movedim(-1, 1) for tensor in (x, weight)]
    return x, weight, function(*channels_first, None, stride, padding, dilation).movedim(1, -1)


class Faulty:
    def __init__(self, path: Path):
        self.emulator = build.Emulator(path)
        self._library = self.emulator.library
        self._library.last_error.restype = ctypes.c_char_p

    def _check(self, error: int) -> None:
        if error != 0:
            raise RuntimeError(self._library.last_error().decode())

    def sum_block(self, mistake: str = "none", blocks: int = 3, repeat: int = 2) -> bool:
        """Whether the kernel's sums, of ``repeat`` tiles a block, are right."""
        numbers = torch.arange(blocks * repeat * TILE, dtype=torch.float32)
        wanted = numbers.view(blocks, -1).sum(1)
        sums = torch.full((blocks,), torch.nan)
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (numbers, sums)]
        self._check(self._library.run_sum_block(*pointers, blocks, repeat, MISTAKES.index(mistake)))
        return torch.equal(sums, wanted)

    def sum_cluster(self, mistake: str = "none", clusters: int = 3, cluster: int = 4, told: bool = False) -> bool:
        """Whether each block has the sum of its cluster."""
        blocks = clusters * cluster
        numbers = torch.arange(blocks * THREADS, dtype=torch.float32)
        wanted = numbers.view(clusters, -1).sum(1).repeat_interleave(cluster)
        sums = torch.full((blocks,), torch.nan)
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (numbers, sums)]
        self._check(self._library.run_sum_cluster(*pointers, blocks, cluster, told, MISTAKES.index(mistake)))
        return torch.equal(sums, wanted)

    def sum_told(self, mistake: str = "none") -> bool:
        """The same where blocks tell each other that their sums are there."""
        return self.sum_cluster(mistake, told=True)

    def multiply_tile(
        self, mistake: str = "none", dtype: torch.dtype = torch.float32, transposed: bool = False, there: int = 64
    ) -> bool:  # fmt: skip
        """Whether a product of 16 x 16 of 64 bytes along K, of which ``there`` are not zero, is right."""
        generator = torch.Generator().manual_seed(0)
        rows = [torch.rand(16, 64 // dtype.itemsize, generator=generator).to(dtype) for _ in range(2)]
        sums = torch.full((16, 16), torch.nan)
        brought = [part.t().contiguous() if transposed else part for part in rows]
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (*brought, sums)]
        kind = [torch.bfloat16, torch.float16, torch.float32].index(dtype)
        self._check(self._library.run_multiply_tile(*pointers, kind, there, transposed, MISTAKES.index(mistake)))
        if dtype == torch.float32:
            rows = [round_to_tf32(part) for part in rows]
        a, b = (part[:, : there // dtype.itemsize].double() for part in rows)
        return torch.allclose(sums.double(), a @ b.t(), rtol=1e-6, atol=0)

    def convolve(
        self, mistake: str = "none", dtype: torch.dtype = torch.bfloat16, samples: int = 2, channels: int = 72,
        size: tuple = (9, 8), taps: tuple = (3, 2), stride: tuple = (2, 1), padding: tuple = (1, 2),
        dilation: tuple = (1, 2),
    ) -> bool:  # fmt: skip
        """Whether a convolution to 16 filters is right."""
        x, weight, wanted = convolution(dtype, samples, channels, size, taps, stride, padding, dilation)
        x = x.clone()  # a mistake writes to it
        y = torch.full(wanted.shape, torch.nan)
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, weight, y)]
        given = [(size, 1), (taps, 1), (stride, 1), (padding, 0), (dilation, 1)]
        triples = [(ctypes.c_int * 3)(*reversed(values), *[none] * (3 - len(size))) for values, none in given]
        arguments = [dtype == torch.float16, len(size), samples, channels, *triples, MISTAKES.index(mistake)]
        self._check(self._library.run_convolve(*pointers, *arguments))
        return torch.allclose(y.double(), wanted, rtol=1e-5, atol=1e-3)

    def encode(
        self, dtype: str = "bf16", address: int = 1 << 20, sizes: tuple = (72, 9, 8, 2),
        strides: tuple = (144, 144 * 9, 144 * 72), corners: tuple | None = None, box: tuple = (64, 4, 2, 1),
        steps: tuple = (1, 1, 1, 1), interleave: int = 0, swizzle: int = 3, fill: int = 0,
    ) -> int:  # fmt: skip
        """What the driver says to a tensor map, of im2col where there are ``corners``; 0 for nothing."""

        def array(kind, numbers):
            return None if numbers is None else (kind * len(numbers))(*numbers)

        lower, upper = corners or (None, None)
        return self._library.run_encode(
            {"u8": 0, "i32": 3, "bf16": 9, "u4": 13}[dtype], len(sizes), ctypes.c_uint64(address),
            array(ctypes.c_uint64, sizes), array(ctypes.c_uint64, strides), array(ctypes.c_int, lower),
            array(ctypes.c_int, upper), array(ctypes.c_uint32, box), array(ctypes.c_uint32, steps), interleave, swizzle,
            fill,
        )  # fmt: skip

    def launch(
        self, blocks: int = 1, threads: int = 32, shared: int = 0, cluster: int = 1, ask: bool = False,
        default_stream: bool = False,
    ) -> None:  # fmt: skip
        """An empty kernel; ``ask`` calls cudaFuncSetAttribute before."""
        self._check(self._library.run_nothing(blocks, threads, shared, cluster, ask, default_stream))


if __name__ == "__main__":
    kernels = Faulty(build.faulty_library(sanitize=True))
    right = getattr(kernels, sys.argv[1])(sys.argv[2])
    print("right" if right else "wrong")
