"""The package builds and installs in every way it offers, finds its extension, and says why where it has none."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import deepcontrol_cuda

ROOT = Path(__file__).resolve().parents[1]
OFFLINE_PIP = ("-m", "pip", "install", "--no-index", "--no-deps", "--ignore-installed", "--no-build-isolation")
LEFTOVERS = ("_C.so", "_build_info.json")
# Registers the ops without their kernels and compiles in seconds: enough where only the way to the extension is tested.
STAND_IN_MODULE = """
#include <pybind11/pybind11.h>
PYBIND11_MODULE(_C, m) {
  m.def("info", [] {
    pybind11::dict info;
    info["isa"] = "none";
    info["cuda"] = false;
    return info;
  });
  m.def("set_costs_cpu", [](pybind11::object) {});
}
"""


def run(*command, cwd, **variables) -> str:
    """What the command prints, run with nothing of this package in its environment but ``variables``."""
    foreign = {name: value for name, value in os.environ.items() if not name.startswith(("DEEPCONTROL_", "PYTHON"))}
    finished = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=foreign | variables,
        text=True,
        stdout=-1,
        stderr=subprocess.STDOUT,
    )
    assert finished.returncode == 0, finished.stdout
    return finished.stdout


def make_environment(folder: Path) -> Path:
    """The Python of a new virtual environment that borrows torch, pip and the rest from the one of this test."""
    venv.create(folder, symlinks=True)
    lender = {path for path in sys.path if path.endswith("-packages")}
    own = Path(sysconfig.get_path("purelib", scheme="posix_prefix", vars={"base": str(folder)}))
    (own / "borrowed.pth").write_text("\n".join(sorted(lender)))
    return folder / "bin" / "python"


def copy_source(destination: Path) -> Path:
    """A copy of what is in version control, without what was built in place."""
    destination.mkdir()
    built = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json")
    for entry in ("csrc", "deepcontrol_cuda", "tests", "triton_kernels"):
        shutil.copytree(ROOT / entry, destination / entry, ignore=built)
    for entry in ROOT.iterdir():
        if entry.is_file() and not entry.name.startswith("."):
            shutil.copy(entry, destination)
    return destination


@pytest.fixture(scope="module")
def build_script():
    """setup.py as a module; importing it runs nothing."""
    spec = importlib.util.spec_from_file_location("build_script", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def used_checkout(tmp_path_factory) -> Path:
    """A checkout in which the extension was built in place, for some other torch."""
    checkout = copy_source(tmp_path_factory.mktemp("used") / "checkout")
    for name in LEFTOVERS:
        (checkout / "deepcontrol_cuda" / name).write_text("{}")
    return checkout


@pytest.fixture(scope="module")
def unpacked_sdist(used_checkout, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "setup.py", "--quiet", "sdist", "-d", folder, cwd=used_checkout)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data") if hasattr(tarfile, "data_filter") else file.extractall(folder)
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(unpacked_sdist, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = ("-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", folder, ".")
    # Not optimised, since that takes minutes; every other build is.
    run(sys.executable, *build, cwd=unpacked_sdist, CXXFLAGS="-O0")
    (file,) = folder.glob("*.whl")
    return file


BUILDABLE = {
    "wanted": None,
    "no_extension": None,
    "kernels": ["center.cu"],
    "torch_cuda": "13.0",
    "nvcc": "/cuda/bin/nvcc",
    "nvcc_version": "13.0",
}


@pytest.mark.parametrize(
    ("change", "built", "reason"),
    [
        ({}, True, "torch is built for CUDA 13.0 and /cuda/bin/nvcc is there"),
        ({"wanted": "1"}, True, "torch is built for CUDA 13.0"),
        ({"wanted": ""}, True, "torch is built for CUDA 13.0"),
        ({"wanted": "0"}, False, "DEEPCONTROL_CUDA=0"),
        ({"no_extension": "no compiler"}, False, "the extension is left out: no compiler"),
        ({"kernels": []}, False, "no kernels"),
        ({"torch_cuda": None}, False, "torch is built without CUDA"),
        ({"nvcc": None}, False, "nvcc is not found"),
        ({"nvcc_version": "13.4"}, True, "torch is built for CUDA 13.0"),
        ({"nvcc_version": None}, True, "torch is built for CUDA 13.0"),
        ({"nvcc_version": "12.8"}, False, "/cuda/bin/nvcc is of CUDA 12.8 and torch is built for 13.0"),
    ],
)
def test_cuda_decision(build_script, change, built, reason):
    decision, why = build_script.decide_cuda(**(BUILDABLE | change))
    assert decision is built
    assert reason in why


@pytest.mark.parametrize(
    "lack",
    [{"no_extension": "no compiler"}, {"kernels": []}, {"torch_cuda": None}, {"nvcc": None}, {"nvcc_version": "12.8"}],
)
def test_cuda_asked_for_but_impossible(build_script, lack):
    with pytest.raises(ValueError, match="DEEPCONTROL_CUDA=1, but "):
        build_script.decide_cuda(**(BUILDABLE | {"wanted": "1"} | lack))


def test_cuda_neither_on_nor_off(build_script):
    with pytest.raises(ValueError, match="got 'yes', wanted 0 or 1"):
        build_script.decide_cuda(**(BUILDABLE | {"wanted": "yes"}))


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("sm_75 sm_80 sm_86 sm_90 sm_100 sm_120 compute_120", "8.0;8.6;10.0;12.0+PTX;9.0a"),
        ("sm_80 sm_90 compute_90", "8.0+PTX;9.0a"),
        ("sm_86", "8.6+PTX"),
        ("sm_90", "8.0+PTX;9.0a"),
        ("sm_70", "8.0+PTX"),
        ("", "8.0+PTX;9.0a"),
    ],
)
def test_architectures(build_script, flags, wanted):
    assert build_script.architectures(flags) == wanted


@pytest.mark.parametrize(
    ("cuda", "wanted", "told"),
    [
        (False, "", []),
        (True, "8.0;9.0+PTX", ["DEEPCONTROL_CUDA"]),
        (True, "8.0+PTX;9.0a", ["DEEPCONTROL_CUDA", "DEEPCONTROL_SM90A"]),
        (True, "9.0a+PTX 12.0", ["DEEPCONTROL_CUDA", "DEEPCONTROL_SM90A"]),
        (True, "9.0;9.0a", ["DEEPCONTROL_CUDA"]),
    ],
)
def test_what_sources_are_told(build_script, cuda, wanted, told):
    assert [name for name, _ in build_script.macros(cuda, wanted)] == told


@pytest.mark.parametrize(("cores", "gibibytes", "jobs"), [(2, 24, 2), (64, 24, 11), (4, 1, 1), (4, None, 4)])
def test_compile_jobs(build_script, cores, gibibytes, jobs):
    assert build_script.compile_jobs(cores, gibibytes and gibibytes * 2**30) == jobs


def test_extension_is_for_any_processor(build_script):
    flags = build_script.extension(cuda=False).extra_compile_args
    assert not [flag for kind in flags.values() for flag in kind if flag.startswith(("-march", "-mtune", "-mcpu"))]


def test_build_without_torch_says_what_to_do():
    # -S hides everything that is installed.
    finished = subprocess.run([sys.executable, "-S", "setup.py", "--version"], cwd=ROOT, text=True, capture_output=True,
                              env={}, check=False)  # fmt: skip
    assert finished.returncode != 0
    assert "Install torch first, then use: pip install --no-build-isolation" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_extension_for_another_torch(tmp_path):
    copy_source(tmp_path / "checkout")
    info = tmp_path / "checkout/deepcontrol_cuda/_build_info.json"
    info.write_text(f'{{"torch": "1.0.0", "version": "{deepcontrol_cuda.__version__}", "cuda": null}}')
    script = "import deepcontrol_cuda as dc; print(dc.backends.available()['cpu'])"
    reason = run(sys.executable, "-c", script, cwd=tmp_path / "checkout")
    assert f"was built for torch 1.0.0 and this is {torch.__version__}" in reason
    assert "make build" in reason
    assert "pip install --no-build-isolation" in reason


@pytest.mark.slow
def test_sdist_holds_no_build(unpacked_sdist):
    assert not [name for name in LEFTOVERS if (unpacked_sdist / "deepcontrol_cuda" / name).exists()]
    assert (unpacked_sdist / "csrc/ops.cpp").exists()


@pytest.mark.slow
def test_wheel_from_sdist(wheel, unpacked_sdist, tmp_path):
    names = zipfile.ZipFile(wheel).namelist()
    top_level = {name.split("/")[0] for name in names}
    assert top_level == {"deepcontrol_cuda", f"deepcontrol_cuda-{deepcontrol_cuda.__version__}.dist-info"}
    tables = ("costs.json", "measured.json", "proven.json")
    own = {f"deepcontrol_cuda/{name}" for name in ("_build_info.json", *tables, "py.typed")}
    assert own <= set(names)

    python = make_environment(tmp_path / "venv")
    run(python, *OFFLINE_PIP, wheel, cwd=tmp_path)
    script = """if True:
        import torch
        import deepcontrol_cuda as dc
        import deepcontrol_cuda.triton_kernels
        assert dc.backends.available()["cpu"] is None, dc.backends.available()["cpu"]
        x = torch.randn(2, 3, 4, 5)
        results = [dc.functional.deep_control(x, mean_scale=1.0, backend=name) for name in ("cpu", "reference")]
        torch.testing.assert_close(*results)
        print(dc.__file__, dc._ops.extension.__file__)
    """
    package, extension = map(Path, run(python, "-c", script, cwd=tmp_path).split())
    assert package.parent == extension.parent
    assert package.is_relative_to(tmp_path)

    # In the source's own folder Python imports the package from there, and that copy has no extension beside it.
    shadowing, same_extension = map(Path, run(python, "-c", script, cwd=unpacked_sdist).split())
    assert shadowing.is_relative_to(unpacked_sdist)
    assert same_extension == extension


@pytest.mark.slow
def test_compiler_was_not_told_of_this_processor(wheel, unpacked_sdist):
    (commands,) = unpacked_sdist.glob("build/temp*/build.ninja")
    assert "-O3" in commands.read_text()
    assert "-march" not in commands.read_text()


@pytest.mark.slow
def test_editable_install(tmp_path):
    checkout = copy_source(tmp_path / "checkout")
    shutil.rmtree(checkout / "csrc/cpu")
    (checkout / "csrc/module.cpp").write_text(STAND_IN_MODULE)
    python = make_environment(tmp_path / "venv")
    run(python, *OFFLINE_PIP, "-e", checkout, cwd=tmp_path)
    script = """if True:
        import deepcontrol_cuda as dc
        import deepcontrol_cuda.triton_kernels
        assert dc.backends.available()["cpu"] is None, dc.backends.available()["cpu"]
        print(dc.__file__, dc._ops.extension.__file__, dc.triton_kernels.__file__)
    """
    for cwd in (tmp_path, checkout):
        assert all(Path(file).is_relative_to(checkout) for file in run(python, "-c", script, cwd=cwd).split())


@pytest.mark.slow
@pytest.mark.parametrize(
    "variables", [{"DEEPCONTROL_EXTENSION": "0"}, {"PATH": "", "CXX": "c++"}], ids=["asked", "no-compiler"]
)
def test_install_without_extension(variables, used_checkout, tmp_path):
    python = make_environment(tmp_path / "venv")
    run(python, *OFFLINE_PIP, used_checkout, cwd=tmp_path, **variables)
    script = """if True:
        import warnings
        import torch
        import deepcontrol_cuda as dc
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                y = dc.functional.deep_control(torch.randn(2, 3, 4, 5), mean_scale=1.0)
        torch.testing.assert_close(y.mean((2, 3)), torch.zeros(2, 3))
        (warning,) = caught
        print(warning.message)
    """
    assert "runs its slow reference: the compiled extension is not built" in run(python, "-c", script, cwd=tmp_path)
