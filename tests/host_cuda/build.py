"""Builds the CUDA kernels for the CPU, as a shared library whose ops are ``torch.ops.deepcontrol_host_cuda``.

The sources are those of the product, read by a host compiler with language.h in front and include/ ahead of torch's
headers; emulator.cpp runs the kernels. What is built stays in build/host_cuda under a name made from all that it
depends on, and is built again when any of that changes.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build/host_cuda"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
NAMESPACE = "deepcontrol_host_cuda"
SANITIZED = "HOST_CUDA_SANITIZED"

FLAGS = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-g1", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
FLAGS += ["-fno-sanitize-recover=all"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize=vptr"]
# Where there is no sanitizer, emulator.cpp has what the check for alignment calls.
KERNEL = ["-O1", "-x", "c++", "-include", str(HERE / "language.h"), "-fsanitize=alignment"]


class Part(NamedTuple):
    """A source and how it is compiled."""

    source: Path
    flags: list[str]


HARNESS = [
    Part(HERE / "emulator.cpp", ["-O2"]),
    Part(HERE / "products.cpp", ["-O2"]),
    Part(HERE / "sm90.cpp", ["-O2"]),
    Part(HERE / "tma.cpp", ["-O2"]),
    # What it does the sanitizers take for errors. Its jumps need the frame pointer on some processors.
    Part(HERE / "fiber.cpp", ["-O2", "-fno-sanitize=all", "-fno-omit-frame-pointer"]),
]


def cuda_headers() -> list[Path]:
    """Folders with the headers of a CUDA toolkit: an installed one's, or Triton's copy of them."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(home) / "include" for home in homes if home]
    if nvcc := shutil.which("nvcc"):
        folders.append(Path(nvcc).resolve().parents[1] / "include")
    if triton := importlib.util.find_spec("triton"):
        folders.append(Path(triton.origin).parent / "backends/nvidia/include")
    return [
        folder
        for folder in folders
        if all((folder / name).exists() for name in ("cuda.h", "cuda_runtime.h", "cuda_bf16.h"))
    ]


def why_not() -> str | None:
    """What the harness cannot be built for, or None."""
    if shutil.which(COMPILER[0]) is None:
        return "there is no C++ compiler"
    if not cuda_headers():
        return "there are no CUDA headers: neither a toolkit nor Triton is installed"
    return None


@functools.cache
def compiler_version() -> str:
    return subprocess.run([*COMPILER, "--version"], capture_output=True, text=True, check=True).stdout


def run(command: list) -> None:
    # Without the sanitizers of this process.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    words = [str(word) for word in command]
    finished = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise RuntimeError(f"{shlex.join(words)}\n{finished.stdout}{finished.stderr}")


def digest(*contents) -> str:
    return hashlib.sha256(repr(contents).encode()).hexdigest()[:16]


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """One build at a time, of all processes."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make(name: str, parts: list[Part], link_flags: list[str], sanitize: bool, cuda: Path | None = None) -> Path:
    """The shared library ``lib<name>`` of ``parts``, built where it is not there already."""
    if reason := why_not():
        raise RuntimeError(f"the CUDA kernels cannot be built for the CPU: {reason}")
    cuda = cuda or cuda_headers()[0]
    headers = sorted(p for folder in ("csrc", "tests/host_cuda") for p in (ROOT / folder).rglob("*") if is_header(p))
    setting = (compiler_version(), torch.__version__, str(cuda), [(str(p), p.read_bytes()) for p in headers])
    sanitizers = [*SANITIZE, "-DHOST_CUDA_SANITIZED"] if sanitize else []
    general = [*FLAGS, *sanitizers, "-isystem", HERE / "include", "-isystem", cuda]
    kind = "-sanitized" if sanitize else ""

    def compile_one(part: Part) -> Path:
        command = [*COMPILER, *general, *part.flags, "-c", part.source]
        key = digest(setting, command, part.source.read_bytes())
        return produce(f"{name}-{part.source.stem}{kind}", ".o", command, key)

    with lock(CACHE), ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, parts))
        command = [*COMPILER, *sanitizers, "-shared", *objects, *link_flags]
        return produce(f"lib{name}{kind}", ".so", command, digest(setting, command))


def is_header(path: Path) -> bool:
    return path.is_file() and (path.suffix in (".h", ".cuh") or "include" in path.relative_to(ROOT).parts)


def produce(stem: str, suffix: str, command: list, key: str) -> Path:
    """Runs ``command`` for a file that has ``key`` in its name, and removes those that had another."""
    result = CACHE / f"{stem}-{key}{suffix}"
    if not result.exists():
        unfinished = result.with_suffix(".unfinished")
        run([*command, "-o", unfinished])
        for old in CACHE.glob(f"{stem}-{'?' * len(key)}{suffix}"):
            old.unlink()
        unfinished.rename(result)
    return result


def library(sanitize: bool = False) -> Path:
    """The library of the product's kernels and ops."""
    torch_headers = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    names = [f"-DDEEPCONTROL_LIBRARY={NAMESPACE}", "-DDEEPCONTROL_CUDA_KEY=CPU"]
    folder = ROOT / "csrc/cuda"
    parts = [Part(source, KERNEL) for source in sorted(folder.glob("*.cu"), key=size, reverse=True)]
    hosts = [*folder.glob("*.cpp"), *(ROOT / "csrc").glob("*.cpp")]
    parts += [Part(path, ["-O1", *torch_headers, *names]) for path in sorted(hosts) if path.name != "module.cpp"]
    torch_libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    return make("host_cuda", parts + HARNESS, torch_libraries, sanitize)


def faulty_library(sanitize: bool = False, cuda: Path | None = None) -> Path:
    """The library of the kernels in faulty.cu, which the harness is tried with."""
    parts = [Part(HERE / "faulty.cu", KERNEL), *HARNESS]
    return make(f"faulty-{digest(cuda)[:4]}" if cuda else "faulty", parts, [], sanitize, cuda)


def size(path: Path) -> int:
    return path.stat().st_size


class Count(NamedTuple):
    launches: int
    blocks: int
    cluster_launches: int


class Emulator:
    """Controls of a library that was loaded."""

    def __init__(self, path: Path):
        self.library = ctypes.CDLL(str(path))
        self.library.host_cuda_configure.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.c_int, ctypes.c_uint64]
        self.library.host_cuda_take_counts.restype = ctypes.c_char_p

    def configure(self, capability: int = 90, shared_memory: int = 227 * 1024, processors: int = 132, seed: int = 0):
        """The GPU to play from now on, with ``shared_memory`` bytes a block and ``processors`` multiprocessors.

        The order of threads, warps and blocks in the launches that follow depends on ``seed``.
        """
        self.library.host_cuda_configure(capability, shared_memory, processors, seed)

    def take_counts(self) -> dict[str, Count]:
        """What was launched since the last call, by the name of the kernel."""
        lines = self.library.host_cuda_take_counts().decode().splitlines()
        return {line.split(" ", 3)[3]: Count(*map(int, line.split(" ", 3)[:3])) for line in lines}


@functools.cache
def load() -> Emulator:
    """The product's library, with its ops registered; with sanitizers where the environment asks for them."""
    path = library(os.environ.get(SANITIZED) == "1")
    torch.ops.load_library(path)
    return Emulator(path)


def configure(**gpu: int) -> None:
    load().configure(**gpu)


def sanitizer_environment() -> dict[str, str]:
    """What a Python process needs in its environment for load() to get the library with sanitizers."""
    found = subprocess.run([*COMPILER, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    return {
        SANITIZED: "1",
        "LD_PRELOAD": found.stdout.strip(),
        # Python leaks at its end.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
