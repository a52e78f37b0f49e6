"""Builds deepcontrol_cuda; its metadata is in pyproject.toml.

The compiled extension fits only the torch it is built with, so install that torch first and build in its environment:
``pip install --no-build-isolation .``. Environment variables:

DEEPCONTROL_EXTENSION=0  leaves the extension out; the package then runs through its PyTorch reference.
DEEPCONTROL_CUDA=0|1     leaves the CUDA kernels out, or refuses to build without them.
TORCH_CUDA_ARCH_LIST     names the GPUs to build for ("8.0;9.0a"), else torch's from 8.0 up; on an H100 the fused
                         convolution by TMA and wgmma needs 9.0a, without 9.0 beside it.
MAX_JOBS=n               is the number of compilers at a time, else chosen from cores and free memory.
CXX=name                 is the C++ compiler.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

try:
    import torch
    from torch.utils import cpp_extension
except ModuleNotFoundError as error:
    sys.exit(
        f"deepcontrol_cuda: {error}. Install torch first, then use: pip install --no-build-isolation . "
        "(the compiled extension fits only the torch it is built with)"
    )

from setuptools import Extension, find_packages, setup

ROOT = Path(__file__).resolve().parent
EXTENSION = "deepcontrol_cuda._C"
GIBIBYTE = 2**30
# Compute capability 9.0 with the instructions that no other has.
SM90A = "9.0a"
# -g0: CPython's own flags may ask for debug information, which makes the extension ten times as large.
# Of an optimisation level in CXXFLAGS, which comes ahead of these, the level here would make nothing.
_LEVELS = [flag for flag in os.environ.get("CXXFLAGS", "").split() if flag.startswith("-O")]
CXX_FLAGS = [*(_LEVELS or ["-O3"]), "-fopenmp", "-fvisibility=hidden", "-Wall", "-g0"]
NVCC_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fvisibility=hidden"]


def why_no_extension() -> str | None:
    """What the extension cannot be built for, or None."""
    if os.environ.get("DEEPCONTROL_EXTENSION") == "0":
        return "DEEPCONTROL_EXTENSION=0"
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(shlex.split(compiler)[0]) is None:
        return f"there is no C++ compiler (looked for {compiler}; CXX names another)"
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        return f"there is no {headers / 'Python.h'} (Debian and Ubuntu: apt install python3-dev)"
    return None


def decide_cuda(
    wanted: str | None,
    no_extension: str | None,
    kernels: list[str],
    torch_cuda: str | None,
    nvcc: str | None,
    nvcc_version: str | None,
) -> tuple[bool, str]:
    """Whether the CUDA kernels are built, and why.

    ``wanted`` is DEEPCONTROL_CUDA. No GPU is looked for, because the machine that builds often has none.
    """
    if wanted not in (None, "", "0", "1"):
        raise ValueError(f"DEEPCONTROL_CUDA: got {wanted!r}, wanted 0 or 1")
    if wanted == "0":
        return False, "DEEPCONTROL_CUDA=0"
    if no_extension is not None:
        obstacle = f"the extension is left out: {no_extension}"
    elif not kernels:
        obstacle = "csrc/cuda holds no kernels"
    elif torch_cuda is None:
        obstacle = "this torch is built without CUDA"
    elif nvcc is None:
        obstacle = "nvcc is not found (CUDA_HOME names the CUDA toolkit)"
    elif nvcc_version is not None and nvcc_version.split(".")[0] != torch_cuda.split(".")[0]:
        obstacle = (
            f"{nvcc} is of CUDA {nvcc_version} and torch is built for {torch_cuda} (CUDA_HOME names another toolkit)"
        )
    else:
        return True, f"torch is built for CUDA {torch_cuda} and {nvcc} is there"
    if wanted == "1":
        raise ValueError(f"DEEPCONTROL_CUDA=1, but {obstacle}")
    return False, obstacle


def find_nvcc() -> str | None:
    if cpp_extension.CUDA_HOME is None:
        return None
    return shutil.which(os.path.join(cpp_extension.CUDA_HOME, "bin", "nvcc"))


def version_of(nvcc: str | None) -> str | None:
    """As in "13.0", or None where it does not say."""
    if nvcc is None:
        return None
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    return found and found[1]


def architectures(flags: str) -> str:
    """What TORCH_CUDA_ARCH_LIST is set to where the user has not: those that torch itself runs on, from 8.0 up.

    ``flags`` is how torch was built, for instance "sm_75 sm_80 sm_90 compute_90". 9.0 gets code with the instructions
    that it alone has, the newest of the others also PTX, for GPUs that come after it.
    """
    found = {int(word[3:]) for word in flags.split() if word.startswith("sm_") and word[3:].isdigit()}
    general = sorted(number for number in found if number >= 80 and number != 90) or [80]
    names = [f"{number // 10}.{number % 10}" for number in general]
    names[-1] += "+PTX"
    return ";".join([*names, SM90A]) if 90 in found or not found else ";".join(names)


def compile_jobs(cores: int, free_bytes: int | None) -> int:
    """One compiler a core while each has 2 GiB and 2 GiB are left to everything else."""
    if free_bytes is None:
        return cores
    return max(1, min(cores, (free_bytes - 2 * GIBIBYTE) // (2 * GIBIBYTE)))


def free_memory() -> int | None:
    try:
        rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None


def kernels_digest() -> str:
    """Changes with the CUDA kernels and with the host code that launches them."""
    digest = hashlib.sha256()
    for path in sorted(p for pattern in ("csrc/*.*", "csrc/cuda/*.*") for p in ROOT.glob(pattern)):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def macros(cuda: bool, wanted: str) -> list[tuple[str, None]]:
    """What the sources are told; ``wanted`` is TORCH_CUDA_ARCH_LIST."""
    names = wanted.replace("+PTX", "").replace(" ", ";").split(";")
    # With code for both, which one an H100 gets is the driver's choice.
    has_sm90a = SM90A in names and "9.0" not in names
    return [(name, None) for name, told in (("DEEPCONTROL_CUDA", cuda), ("DEEPCONTROL_SM90A", has_sm90a)) if told]


def extension(cuda: bool) -> Extension:
    # Plans are made without a GPU.
    patterns = [
        "csrc/*.cpp",
        "csrc/autograd/*.cpp",
        "csrc/cpu/*.cpp",
        *(["csrc/cuda/*.cpp", "csrc/cuda/*.cu"] if cuda else ["csrc/cuda/*plan*.cpp"]),
    ]
    kind = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    return kind(
        EXTENSION,
        sources=sorted(source for pattern in patterns for source in glob(pattern, root_dir=ROOT)),
        depends=sorted(
            header for end in ("h", "cuh") for header in glob(f"csrc/**/*.{end}", root_dir=ROOT, recursive=True)
        ),
        include_dirs=[str(ROOT / "csrc")],
        define_macros=macros(cuda, os.environ.get("TORCH_CUDA_ARCH_LIST", "")),
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": NVCC_FLAGS},
        extra_link_args=["-fopenmp"],
    )


class BuildExtension(cpp_extension.BuildExtension):
    def run(self):
        """Builds, then writes beside the extension what it fits, so that the package can tell before it loads it.

        Without an extension an older one must not stay in use, as it could in a checkout.
        """
        super().run()
        info_file = Path(self.get_ext_fullpath(EXTENSION)).with_name("_build_info.json")
        if not self.extensions:
            info_file.unlink(missing_ok=True)
            return
        cuda = any(source.endswith(".cu") for source in self.extensions[0].sources)
        info = {
            "torch": torch.__version__,
            "version": self.distribution.get_version(),
            "cuda": torch.version.cuda if cuda else None,
            "kernels": kernels_digest() if cuda else None,
        }
        info_file.write_text(json.dumps(info) + "\n")


def main() -> None:
    no_extension = why_no_extension()
    kernels = glob("csrc/cuda/*.cu", root_dir=ROOT)
    nvcc = find_nvcc()
    try:
        cuda, reason = decide_cuda(
            os.environ.get("DEEPCONTROL_CUDA"), no_extension, kernels, torch.version.cuda, nvcc, version_of(nvcc)
        )
    except ValueError as error:
        sys.exit(f"deepcontrol_cuda: {error}")
    if no_extension is None:
        print(f"deepcontrol_cuda: CUDA kernels: {'yes' if cuda else 'no'}, {reason}")
        if cuda:
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", architectures(torch._C._cuda_getArchFlags()))
            wanted_gpus = os.environ["TORCH_CUDA_ARCH_LIST"]
            print(f"deepcontrol_cuda: TORCH_CUDA_ARCH_LIST={wanted_gpus}")
            if "9.0" in wanted_gpus and len(macros(True, wanted_gpus)) == 1:
                print("deepcontrol_cuda: WITHOUT the fused convolution of an H100, which needs 9.0a in place of 9.0")
        os.environ.setdefault("MAX_JOBS", str(compile_jobs(len(os.sched_getaffinity(0)), free_memory())))
        # pip installs ninja beside Python, which is not on PATH where the environment is not activated.
        os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    else:
        print(f"deepcontrol_cuda: WITHOUT the compiled extension, so the slow reference will run: {no_extension}")

    setup(
        packages=[
            *find_packages(include=["deepcontrol_cuda", "deepcontrol_cuda.*"]),
            "deepcontrol_cuda.triton_kernels",
        ],
        # The bare name triton_kernels belongs to another project's package.
        package_dir={"deepcontrol_cuda.triton_kernels": "triton_kernels"},
        package_data={"deepcontrol_cuda": ["costs.json", "measured.json", "proven.json", "py.typed"]},
        ext_modules=[] if no_extension else [extension(cuda)],
        cmdclass={"build_ext": BuildExtension},
    )


if __name__ == "__main__":
    main()
