"""Runs the kernels of faulty.cu, right or with a mistake; as a program, one of them for a sanitizer to look at."""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

import torch

from . import build

SOURCE = build.HERE / "faulty.cu"
MISTAKES = re.search(r"enum class Mistake {[^\n]*\n(.*?)}", SOURCE.read_text(), re.DOTALL)[1].replace(",", " ").split()
TILE = 512
THREADS = 128


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

    def sum_cluster(self, mistake: str = "none", clusters: int = 3, cluster: int = 4) -> bool:
        """Whether each block has the sum of its cluster."""
        blocks = clusters * cluster
        numbers = torch.arange(blocks * THREADS, dtype=torch.float32)
        wanted = numbers.view(clusters, -1).sum(1).repeat_interleave(cluster)
        sums = torch.full((blocks,), torch.nan)
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (numbers, sums)]
        self._check(self._library.run_sum_cluster(*pointers, blocks, cluster, MISTAKES.index(mistake)))
        return torch.equal(sums, wanted)

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
