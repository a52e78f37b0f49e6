"""The machine and the software a measurement was made with."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch

from .. import __version__, backends


def conditions() -> dict[str, str]:
    """What a reader needs to judge or repeat a measurement on the CPU, in the order in which it should be read."""
    return {
        "CPU": f"{_cpu_model()}, {torch.get_num_threads()} threads",
        "system": f"{platform.system()} {platform.machine()}",
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "deepcontrol_cuda": __version__ + (f", commit {commit}" if (commit := _commit()) else ""),
        "Deep Control backend": backends.explain(torch.empty(1, 1, 1)),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or "unknown CPU"


def _commit() -> str | None:
    """Commit of the checkout that this package runs from, with "+ changes" if tracked files differ, or None."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        # A package installed inside somebody else's repository is not part of that repository.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "--short=12", "HEAD") + (" + changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
