"""One JSON file per run: the machine, the versions, the conditions and every number."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from deepcontrol_cuda import __version__, _ops
from deepcontrol_cuda.training.conditions import commit, cpu_model

_THREADS = ("GOMP_", "KMP_", "MKL_", "OMP_")
_ALLOCATION = ("GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_")
_KERNELS = ("DEEPCONTROL_", "DNNL_", "ONEDNN_")


def machine() -> dict[str, object]:
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": cpu_model(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "cores_allowed": len(affinity(0)) if affinity else None,
        "caches": _caches(),
        "memory_gib": _memory_gib(),
    }


def _caches() -> dict[str, str]:
    """Sizes as the kernel tells them, of one core; empty where it does not."""
    sizes = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        sizes[f"L{level} {kind.lower()}"] = size
    return sizes


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None


def gpu() -> dict[str, object]:
    """The current GPU and what drives it."""
    properties = torch.cuda.get_device_properties("cuda")
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (IndexError, OSError, subprocess.SubprocessError):
        driver = None
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_bytes": properties.L2_cache_size,
        "driver": driver,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def versions() -> dict[str, object]:
    onednn = re.search(r"MKL-DNN v(\S+)", torch.__config__.show())
    extension = _ops.extension.info() if _ops.extension else {}
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onednn": onednn.group(1) if onednn else None,
        "deepcontrol_cuda": __version__,
        "extension_compiler": extension.get("compiler"),
        "extension_isa": extension.get("isa"),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
    }


def environment() -> dict[str, str]:
    """Variables that change threads, allocation or the choice of kernels; preloaded libraries without their folders."""
    names = sorted(name for name in os.environ if name.startswith(_THREADS + _ALLOCATION + _KERNELS))
    found = {name: os.environ[name] for name in names}
    if "LD_PRELOAD" in found:
        found["LD_PRELOAD"] = ":".join(Path(word).name for word in re.split(r"[:\s]+", found["LD_PRELOAD"]))
    return found


def collect(command: str, **conditions: object) -> dict[str, object]:
    """Everything about a run but its results; to be called before it, for the machine's load."""
    found = commit()
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "commit": None if found is None else {"hash": found[0], "dirty": found[1]},
        "conditions": {
            **conditions,
            "threads": torch.get_num_threads(),
            "load_average_before": [round(load, 2) for load in os.getloadavg()],
            "environment": environment(),
        },
    }


def write(record: dict[str, object], folder: Path) -> Path:
    """Write ``record`` under a name made of its date, GPU or processor, and command; no earlier run is overwritten."""
    kind, name = ("gpu", record["gpu"]["name"]) if "gpu" in record else ("cpu", record["machine"]["cpu"])
    name = re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")
    stem = f"{record['date']}_{kind}_{name}_{record['command']}"
    text = json.dumps(record, indent=1) + "\n"
    number = 1
    while True:
        path = folder / (f"{stem}.json" if number == 1 else f"{stem}_{number}.json")
        try:
            with path.open("x") as file:
                file.write(text)
            return path
        except FileExistsError:
            number += 1
