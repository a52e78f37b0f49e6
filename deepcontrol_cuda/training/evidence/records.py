"""The file of all that was measured: JSON lines, each written when its run ends, so that nothing done is lost."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import TrainingError
from . import plan
from .costs import Cost
from .plan import Setting
from .runs import MeanShift, Run

# Rises when a run with the same setting would no longer be the same run: networks, budgets, schedule, methods, shapes.
VERSION = 1


@dataclass
class Records:
    """What a file holds.

    Args:
        plan: the settings that were asked for last; what of them has no run is missing.
        conditions: of each start of the command that did something, by name.
        counts: how many runs each of these starts did.
        runs: by their settings.
        costs: of each task.
        notes: what was found wrong with the file and what was done about it.
    """

    plan: list[Setting] = field(default_factory=list)
    conditions: list[dict[str, str]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    runs: dict[Setting, Run] = field(default_factory=dict)
    costs: dict[str, list[Cost]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def start(self, conditions: dict[str, str]) -> None:
        self.conditions.append(conditions)
        self.counts.append(0)

    def add(self, run: Run) -> None:
        self.runs[run.setting] = run
        if self.counts:
            self.counts[-1] += 1

    @property
    def missing(self) -> list[Setting]:
        return [setting for setting in self.plan if setting not in self.runs]

    @property
    def complete(self) -> bool:
        tasks = {setting.task for setting in self.plan}
        return bool(self.plan) and not self.missing and tasks <= self.costs.keys()


class File:
    """``path``, to which every ``add`` appends one line that is on the disk when it returns."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            new = not path.exists() or not path.stat().st_size
            # Without a buffer, which would be written again, and fail again, when the file is closed.
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115
            if new:
                self.add("version", VERSION)
            else:
                # A line that was cut off, by a kill or a full disk, must not take the next one with it.
                self._file.seek(-1, os.SEEK_END)
                if self._file.read(1) != b"\n":
                    self._write(b"\n")
        except OSError as error:
            raise TrainingError(f"cannot write {path}: {error.strerror}") from error

    def add(self, name: str, value: Any) -> None:
        self._write(json.dumps({name: value}, separators=(",", ":")).encode() + b"\n")

    def add_run(self, run: Run) -> None:
        value = asdict(run)
        value = value.pop("setting") | value
        if not run.mean_shifts:
            del value["mean_shifts"]
        self.add("run", value)

    def add_costs(self, task: str, costs: list[Cost]) -> None:
        self.add("costs", {task: [asdict(cost) for cost in costs]})

    def close(self) -> None:
        self._file.close()

    def _write(self, line: bytes) -> None:
        try:
            while line:
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise TrainingError(
                f"cannot write {self.path}: {error.strerror}; all runs that ended before are in it, and the same "
                "command goes on from them"
            ) from error


def read(path: Path) -> Records:
    """What is in the file at ``path``; nothing if there is none. Lines that cannot be read are left out and noted.

    Raises:
        TrainingError: it is no such file, or of another ``VERSION``.
    """
    records = Records()
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return records
    except OSError as error:
        raise TrainingError(f"cannot read {path}: {error.strerror}") from error
    if not lines:
        return records
    _check_version(path, lines[0])
    for number, line in enumerate(lines[1:], 2):
        if not line:
            continue
        try:
            ((name, value),) = json.loads(line).items()
            _READERS[name](records, value)
        except (ValueError, KeyError, TypeError, AttributeError):
            records.notes.append(f"line {number} of {path} cannot be read and counts for nothing")
    return records


def _check_version(path: Path, line: bytes) -> None:
    try:
        version = json.loads(line)["version"]
    except (ValueError, KeyError, TypeError):
        raise TrainingError(f"{path} was not written by this command; name another --output") from None
    if version != VERSION:
        raise TrainingError(
            f"{path} holds runs of version {version} of the comparison, this is version {VERSION}, and the two do not "
            "compare; name another --output"
        )


def _read_run(records: Records, value: dict[str, Any]) -> None:
    setting = Setting(**{name: value.pop(name) for name in Setting.__dataclass_fields__})
    shifts = [MeanShift(**shift) for shift in value.pop("mean_shifts", [])]
    records.add(Run(setting, **value, mean_shifts=shifts))


def _read_plan(records: Records, value: dict[str, Any]) -> None:
    records.plan = plan.settings(**value)


def _read_costs(records: Records, value: dict[str, list[dict[str, Any]]]) -> None:
    records.costs |= {task: [Cost(**cost) for cost in costs] for task, costs in value.items()}


_READERS: dict[str, Callable[[Records, Any], None]] = {
    "run": _read_run,
    "conditions": Records.start,
    "plan": _read_plan,
    "costs": _read_costs,
}
