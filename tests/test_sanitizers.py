"""The CPU kernels stay inside of their memory: under the address and undefined-behaviour sanitizers of the compiler."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
# avx512 is linked and not checked: but for the product of bfloat16 its source is that of avx512_bf16.
ISAS = ("avx512_bf16", "avx2", "portable")
UNCHECKED = ("kernels_avx512",)
MEMORY = ("heap", "guard")  # sanitize/driver.cpp says what each notices
# Without optimisation, which takes minutes here, and the check for undefined behaviour, which costs as much time again,
# in two instruction sets only: what is undefined is so in the source that all of them share.
ADDRESS = ["-std=c++17", "-O0", "-g1", "-fsanitize=address"]
UNDEFINED = ["-fsanitize=undefined", "-fno-sanitize=null,alignment,object-size,vptr", "-fno-sanitize-recover=all"]
CHECKED_FOR_UNDEFINED = ("kernels_portable", "kernels_avx512_bf16")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="there is no C++ compiler"),
]


def run(*command, **variables) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(word) for word in command], env=os.environ | variables, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Path:
    """The program of sanitize/driver.cpp, linked with the kernels of every instruction set."""
    folder = tmp_path_factory.mktemp("sanitize")
    flags = [*ADDRESS, f"-I{Path(torch.__file__).parent / 'include'}", f"-I{ROOT / 'csrc/cpu'}"]
    if "clang" not in run(*COMPILER, "--version").stdout:
        flags += ["--param", "asan-instrumentation-with-call-threshold=0"]  # smaller code compiles faster

    def compile_one(source: Path) -> Path:
        result = folder / f"{source.stem}.o"
        undefined = UNDEFINED if source.stem in CHECKED_FOR_UNDEFINED else []
        optimise = ["-O1"] if source.stem == "driver" else []
        if source.stem in UNCHECKED:
            optimise = ["-fno-sanitize=all"]
        finished = run(*COMPILER, *flags, *undefined, *optimise, "-c", source, "-o", result)
        assert finished.returncode == 0, finished.stderr
        return result

    # Those that take longest first.
    names = [*(f"kernels_{isa}" for isa in reversed(ISAS)), *UNCHECKED]
    sources = [ROOT / "csrc/cpu" / f"{name}.cpp" for name in names]
    sources += [ROOT / "tests/sanitize/driver.cpp", ROOT / "csrc/cpu/kernels.cpp"]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    linked = run(*COMPILER, "-fsanitize=address,undefined", *objects, "-o", folder / "driver")
    assert linked.returncode == 0, linked.stderr
    return folder / "driver"


@pytest.fixture(scope="module")
def here(driver) -> list[str]:
    """The instruction sets of this processor."""
    return run(driver, "isas").stdout.strip().split(", ")


@pytest.fixture(scope="module")
def runs(driver, here) -> dict:
    """All cases in each instruction set and each sort of memory, two runs at a time."""
    combinations = [(isa, memory) for isa in here if isa in ISAS for memory in MEMORY]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(combinations, pool.map(lambda c: run(driver, "run", c[1], DEEPCONTROL_ISA=c[0]), combinations)))


@pytest.fixture
def isa(request, here) -> str:
    if request.param not in here:
        pytest.skip(f"this processor cannot run {request.param}")
    return request.param


every_isa = pytest.mark.parametrize("isa", ISAS, indirect=True)


@every_isa
@pytest.mark.parametrize("memory", MEMORY)
def test_kernels_stay_inside_and_compute_what_plain_loops_compute(runs, isa, memory):
    finished = runs[isa, memory]
    assert finished.returncode == 0, finished.stderr[:3000]
    assert finished.stdout == f"{isa} passed\n"


@every_isa
@pytest.mark.parametrize("buffer", ["input", "output", "bits", "map_mean", "gain"])
def test_a_buffer_one_element_too_small_is_noticed(driver, isa, buffer):
    """What the test above says is worth something: the same run ends badly as soon as there is something to find."""
    finished = run(driver, "run", "guard", buffer, DEEPCONTROL_ISA=isa)
    assert finished.returncode != 0
    assert "AddressSanitizer: SEGV" in finished.stderr


@pytest.mark.parametrize("isa", ["portable"], indirect=True)
@pytest.mark.parametrize("buffer", ["input", "output", "bits", "map_mean", "gain"])
def test_the_address_sanitizer_is_awake(driver, isa, buffer):
    finished = run(driver, "run", "heap", buffer, DEEPCONTROL_ISA=isa)
    assert finished.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in finished.stderr
