"""One JSON file per run: the machine, the versions, the conditions and every number, as ``rows.Run`` has them."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from deepcontrol_cuda import __version__, _ops
from deepcontrol_cuda.training.conditions import commit, cpu_model

from . import report
from .rows import FORMAT, Ceilings, Row, Run, Setting, Verdict

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
        "format": FORMAT,
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


class Recording:
    """A run that is written when it ends, however it ends, if there is something to write.

    Attributes:
        rows, ceilings, content: to be filled, as in ``rows.Run``.
        wrong: what was refused because its results are wrong.
    """

    def __init__(
        self,
        command: str,
        output: Path,
        verdicts: Callable[[Sequence[Row]], Sequence[Verdict]] = lambda rows: (),
        device: str = "cpu",
        **conditions: object,
    ) -> None:
        self.output = output
        self.rows: list[Row] = []
        self.ceilings: list[Ceilings] = []
        self.content: dict[str, object] = {}
        self.wrong: list[str] = []
        self.verdicts: Sequence[Verdict] = ()
        self._judge = verdicts
        self._skipped: dict[tuple[str, str], list[tuple[str, Setting]]] = {}
        self._head = collect(command, device=device, **conditions) | ({"gpu": gpu()} if device == "cuda" else {})

    def skip(self, peer: str, reason: str, case: str, setting: Setting) -> bool:
        """Keep the reason why a peer has no time; False where it is known from other rows."""
        cells = self._skipped.setdefault((peer, reason), [])
        cells.append((case, setting))
        return len(cells) == 1

    @property
    def skipped(self) -> dict[str, str]:
        """By peer where it has no times at all, else by "peer: case" or, where that says too much, with the setting."""
        timed = {(peer, row.case) for row in self.rows for peer in row.seconds}
        found = {}
        for (peer, reason), cells in self._skipped.items():
            for case, setting in cells:
                if not any(name == peer for name, _ in timed):
                    where = ""
                else:
                    where = f": {case}" if (peer, case) not in timed else f": {case}, {setting}"
                found.setdefault(peer + where, reason)
        return found

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.verdicts = self._judge(self.rows) if self.rows else self.verdicts
        if not (self.rows or self.content):
            return
        head = dict(self._head)
        head.pop("format")
        content = self.content | ({"gpu": head.pop("gpu")} if "gpu" in head else {})
        complete = kind is None and not self.wrong
        run = Run(
            **head, complete=complete, skipped=self.skipped, ceilings=tuple(self.ceilings), rows=tuple(self.rows),
            verdicts=tuple(self.verdicts), content=content,
        )  # fmt: skip
        path = write(run.to_json(), self.output)
        if self.verdicts:
            print(f"\n{report.verdicts_table(self.verdicts)}\n")
        print(f"Written to {path}" + ("" if complete else ", incomplete"))


def write(record: dict[str, object], folder: Path) -> Path:
    """Write ``record`` under a name made of its date, GPU or processor, and command; no earlier run is overwritten."""
    kind, name = ("gpu", record["gpu"]["name"]) if "gpu" in record else ("cpu", record["machine"]["cpu"])
    name = re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")
    stem = f"{record['date']}_{kind}_{name}_{record['command']}"
    # A list of numbers is a line.
    text = re.sub(r"\[[^][{}\"]+\]", lambda found: " ".join(found[0].split()), json.dumps(record, indent=1)) + "\n"
    number = 1
    while True:
        path = folder / (f"{stem}.json" if number == 1 else f"{stem}_{number}.json")
        try:
            with path.open("x") as file:
                file.write(text)
            return path
        except FileExistsError:
            number += 1
