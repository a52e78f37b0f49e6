"""The machine and the software a measurement was made with."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch

from .. import __version__, backends


def conditions(device: torch.device | str = "cpu") -> dict[str, str]:
    """What a reader needs to judge or repeat a measurement on ``device``, in the order in which it should be read."""
    device = torch.device(device)
    gpu = {"GPU": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return gpu | {
        "CPU": f"{cpu_model()}, {torch.get_num_threads()} threads",
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "torch": str(torch.__version__),
        "deepcontrol_cuda": _version(),
        "Deep Control backend": _backend(device),
    }


def _backend(device: torch.device) -> str:
    try:
        return backends.explain(torch.empty(1, 1, 1, device=device))
    except RuntimeError as error:  # one is asked for that does not run there
        return str(error)


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or "unknown CPU"


def commit() -> tuple[str, bool] | None:
    """Commit of the checkout that this package runs from and whether tracked files differ from it; None elsewhere."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        # A package installed inside somebody else's repository is not part of that repository.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "--short=12", "HEAD"), bool(git("status", "--porcelain", "-uno"))
    except (OSError, subprocess.SubprocessError):
        return None


def _version() -> str:
    found = commit()
    if found is None:
        return __version__
    name, changed = found
    return f"{__version__}, commit {name}" + (" + changes" if changed else "")
