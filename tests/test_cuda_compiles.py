"""nvcc compiles every kernel, and what it makes of them keeps to the budgets: no GPU is needed to see that."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from host_cuda.build import COMPILER
from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parents[1]
KERNELS = sorted((ROOT / "csrc/cuda").glob("*.cu"))
NVCC = shutil.which("nvcc") or shutil.which(f"{cpp_extension.CUDA_HOME}/bin/nvcc")
CUOBJDUMP = shutil.which("cuobjdump") or (
    (spec := importlib.util.find_spec("triton"))
    and shutil.which(Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump")
)
# The oldest that is supported, the one with clusters that is tuned for, and the newest that this nvcc knows.
ARCHITECTURES = ("sm_80", "sm_90a", "newest")

# Matrix products, which take longest to compile: not for the newest, which gets the instructions of the oldest.
PRODUCTS = ("conv_center_sm80.cu", "conv_center_sm90.cu", "conv_means.cu", "conv_weight_grad.cu")

# Two blocks of 256 threads a multiprocessor, and four for the kernels that most calls get. A matrix product has
# what there is: accumulators are what registers are for.
REGISTERS = 128
REGISTERS_OF_FREQUENT = 64
REGISTERS_OF_PRODUCTS = 255
STATIC_SHARED_MEMORY = 48 * 1024

pytestmark = pytest.mark.slow
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)


@dataclass
class Kernel:
    """What ptxas reports of a kernel, in bytes, and its PTX."""

    name: str
    registers: int
    stack: int
    spills: int
    static_shared: int
    ptx: str
    file: str
    cubin: Path


def run(*command: object) -> str:
    """What the command says, on both channels."""
    words = [str(word) for word in command]
    finished = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    assert finished.returncode == 0, f"{' '.join(words)}\n{finished.stdout}"
    return finished.stdout


def nvcc_flags() -> list[str]:
    """Those of setup.py, and those that torch adds to them."""
    spec = importlib.util.spec_from_file_location("build_script", ROOT / "setup.py")
    build_script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build_script)
    return [*cpp_extension.COMMON_NVCC_FLAGS, *build_script.NVCC_FLAGS]


def newest_architecture() -> str:
    return max(run(NVCC, "--list-gpu-code").split(), key=lambda name: int(re.search(r"\d+", name)[0]))


def numbers(pattern: str, text: str) -> int:
    return sum(int(number) for number in re.findall(pattern, text))


def read_kernels(source: Path, report: str, ptx: str, cubin: Path) -> list[Kernel]:
    """The kernels of one source. What ptxas says of functions that it did not inline goes to the kernel before them."""
    entry = r"^(?:\.visible )?\.entry "
    bodies = dict(re.findall(rf"{entry}(\w+)\((.*?)(?={entry}|\Z)", ptx, re.DOTALL | re.MULTILINE))
    mangled = re.findall(r"Compiling entry function '(\w+)'", report)
    plain = run("c++filt", *mangled).splitlines() if mangled else []
    kernels = []
    for symbol, name, text in zip(mangled, plain, re.split(r"Compiling entry function ", report)[1:]):
        kernels.append(
            Kernel(
                # Of "void space::(anonymous namespace)::f<int>(int)" only "f<int>".
                name=f"{source.name}: " + re.search(r"(?:\(anonymous namespace\)::)?(\w+(?:<.*?>)?)\(", name)[1],
                registers=max(int(number) for number in re.findall(r"Used (\d+) registers", text)),
                stack=numbers(r"(\d+) bytes stack frame", text),
                spills=numbers(r"(\d+) bytes spill", text),
                static_shared=numbers(r"(\d+) bytes smem", text),
                ptx=bodies[symbol],
                file=source.name,
                cubin=cubin,
            )
        )
    return kernels


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, list[Kernel]]:
    """All kernels of each architecture; two compilers at a time."""
    folder = tmp_path_factory.mktemp("cubins")
    flags = nvcc_flags()

    def compile_one(job: tuple[str, Path]) -> tuple[str, list[Kernel]]:
        architecture, source = job
        real = newest_architecture() if architecture == "newest" else architecture
        kept = folder / f"{architecture}-{source.stem}"
        kept.mkdir()
        cubin = kept / "kernel.cubin"
        report = run(
            NVCC, *flags, f"-arch={real}", "-Xptxas", "-v", "-cubin", "-o", cubin, "--keep", "--keep-dir", kept, source
        )
        # Where ptxas finds products that it cannot leave under way it says so, and waits for each.
        assert "wgmma" not in report or "serializ" not in report, report
        return architecture, read_kernels(source, report, (kept / f"{source.stem}.ptx").read_text(), cubin)

    # Those that take longest first.
    sources = sorted(KERNELS, key=lambda path: path.stat().st_size, reverse=True)
    result = {architecture: [] for architecture in ARCHITECTURES}
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            (architecture, source)
            for source in sources
            for architecture in ARCHITECTURES
            if architecture != "newest" or source.name not in PRODUCTS
        ]
        for architecture, kernels in pool.map(compile_one, jobs):
            assert kernels
            result[architecture] += kernels
    return result


def is_center(kernel: Kernel) -> bool:
    return kernel.name.startswith("center_") and "fold_parts" not in kernel.name


def is_frequent(kernel: Kernel) -> bool:
    """center and its backward in 16 bits for relu and identity, `rectified` in the template."""
    return is_center(kernel) and kernel.name.endswith(", true>") and not re.search("<double|<float", kernel.name)


def is_product(kernel: Kernel) -> bool:
    """Not the small kernels that stand behind a product in its file."""
    return kernel.file in PRODUCTS and ("mma" in kernel.ptx or "trap;" in kernel.ptx)


def vectorized_centers(kernels: list[Kernel]) -> list[Kernel]:
    """Those that move more than one element at a time: the number of them is the second argument of the template."""
    return [kernel for kernel in kernels if is_center(kernel) and int(re.search(r"<\w+, (\d+)", kernel.name)[1]) > 1]


def check(kernels: list[Kernel], describe: Callable[[Kernel], str | None]) -> None:
    """``describe`` says what is wrong with a kernel, if anything."""
    wrong = [f"{kernel.name}: {text}" for kernel in kernels if (text := describe(kernel))]
    assert not wrong, "\n".join(["", *wrong])


@needs_nvcc
@architectures
def test_nothing_spills(compiled, architecture):
    def describe(kernel):
        if kernel.stack or kernel.spills:
            return f"{kernel.stack} bytes of stack, {kernel.spills} bytes of spills"

    check(compiled[architecture], describe)


@needs_nvcc
@architectures
def test_registers(compiled, architecture):
    assert any(is_frequent(kernel) for kernel in compiled[architecture])

    def describe(kernel):
        budget = REGISTERS_OF_FREQUENT if is_frequent(kernel) else REGISTERS
        if is_product(kernel):
            budget = REGISTERS_OF_PRODUCTS
        if kernel.registers > budget:
            return f"{kernel.registers} registers, budget {budget}"

    check(compiled[architecture], describe)


@needs_nvcc
@architectures
def test_static_shared_memory(compiled, architecture):
    def describe(kernel):
        if kernel.static_shared > STATIC_SHARED_MEMORY:
            return f"{kernel.static_shared} bytes of static shared memory, budget {STATIC_SHARED_MEMORY}"

    check(compiled[architecture], describe)


@needs_nvcc
@architectures
@pytest.mark.parametrize(
    "instruction",
    [
        pytest.param(r"st\.global\.v4\.\w?32\s", id="store"),
        pytest.param(r"cp\.async\.cg\.shared\.global \[%\w+\], \[%\w+\], 16;", id="copy"),
    ],
)
def test_center_moves_sixteen_bytes_at_a_time(compiled, architecture, instruction):
    kernels = vectorized_centers(compiled[architecture])
    assert kernels
    check(kernels, lambda kernel: None if re.search(instruction, kernel.ptx) else f"no {instruction}")


@needs_nvcc
@architectures
def test_no_sum_depends_on_the_order_of_threads(compiled, architecture):
    """No atomics on floating-point numbers."""
    check(compiled[architecture], lambda kernel: ", ".join(re.findall(r"\b(?:atom|red)\.[\w.:]*\.b?f\d+", kernel.ptx)))


def cuda_runtime_headers() -> Path | None:
    folders = [Path(cpp_extension.CUDA_HOME or "/usr/local/cuda") / "include"]
    return next((folder for folder in folders if (folder / "cuda_runtime_api.h").exists()), None)


@pytest.mark.skipif(cuda_runtime_headers() is None, reason="there are no headers of a CUDA toolkit")
@pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("source", sorted((ROOT / "csrc/cuda").glob("*.cpp")), ids=lambda path: path.name)
def test_host_code_fits_the_headers_of_torch_and_cuda(source):
    """A torch for the CPU brings the headers too, all but one that its build would have made."""
    torch_headers = Path(torch.__file__).parent / "include"
    folders = [torch_headers, torch_headers / "torch/csrc/api/include", cuda_runtime_headers()]
    flags = ["-std=c++17", "-Wall", "-Werror", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE", "-DDEEPCONTROL_CUDA"]
    includes = [f"-isystem{folder}" for folder in folders]
    run(*COMPILER, *flags, *includes, "-fsyntax-only", source)


@needs_nvcc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(
    "instruction",
    [
        pytest.param(r"mma\.sync\.aligned\.m16n8k(16|8)\.", id="product"),
        pytest.param(r"cp\.async\.cg\.shared\.global \[%\w+\], \[%\w+\], 16, %\w+;", id="copy"),
    ],
)
def test_products_run_on_tensor_cores(compiled, architecture, instruction):
    """Fed by copies that fill up with zeros; the loader of single elements has none."""
    names = ("conv_center_sm80.cu", "conv_weight_grad.cu")
    kernels = [k for k in compiled[architecture] if k.file in names and is_product(k)]
    assert {kernel.file for kernel in kernels} == set(names)
    for name in names:
        assert any(re.search(instruction, kernel.ptx) for kernel in kernels if kernel.file == name)


@needs_nvcc
@pytest.mark.skipif(CUOBJDUMP is None, reason="there is no cuobjdump")
def test_products_of_the_h100_are_its_own(compiled):
    """Every instance is fed by the TMA and multiplies by HGMMA, several of them in a row."""
    kernels = [kernel for kernel in compiled["sm_90a"] if kernel.file == "conv_center_sm90.cu"]
    assert kernels
    functions = re.split(r"Function : ", run(CUOBJDUMP, "-sass", kernels[0].cubin))[1:]
    assert len(functions) == len(kernels)
    for text in functions:
        name = text.split()[0]
        assert text.count("HGMMA") >= 4, name
        assert "UTMALDG" in text, name
        assert "USETMAXREG" in text, name
    # What its warpgroups hand over and take presumes this.
    assert {kernel.registers for kernel in kernels} == {168}
