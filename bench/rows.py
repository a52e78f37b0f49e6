"""What a run's file holds, and how it is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import bootstrap
from .bootstrap import Interval

FORMAT = 2


class UnknownFormatError(ValueError):
    """A file is none of this program's, or of another version."""


@dataclass(frozen=True)
class Setting:
    """``mode`` is "forward", without recording for backward, or "training", forward and backward timed together."""

    dtype: str
    layout: str
    mode: str
    batch: int
    threads: int
    """Of the CPU; on a GPU they only launch."""

    def __str__(self) -> str:
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{self.dtype}, {self.layout}, {self.mode}, batch {self.batch}, {threads}"


@dataclass(frozen=True)
class Accuracy:
    """Relative error of one result of ours against float64 and the largest that is let pass."""

    error: float
    budget: float


@dataclass(frozen=True)
class Row:
    """What one case gave under one setting.

    Attributes:
        case: a layer, block, model or kernel, in words.
        baseline: the peer that ratios are to.
        seconds: by peer, one for each round, all in the same rounds; a peer may have the first of them only.
        accuracies: by peer that is ours and by result.
        bytes, operations: least that a call must move and compute (a product and a sum are two); None where uncounted.
        kept_bytes: by peer, what forward keeps for backward.
        peak_bytes: by peer, most that tensors of a step hold at a time.
    """

    case: str
    setting: Setting
    baseline: str
    seconds: Mapping[str, tuple[float, ...]]
    accuracies: Mapping[str, Mapping[str, Accuracy]] = field(default_factory=dict)
    bytes: int | None = None
    operations: int | None = None
    kept_bytes: Mapping[str, int] = field(default_factory=dict)
    peak_bytes: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Row:
        return cls(
            **row
            | {
                "setting": Setting(**row["setting"]),
                "seconds": {peer: tuple(seconds) for peer, seconds in row["seconds"].items()},
                "accuracies": {
                    peer: {result: Accuracy(**accuracy) for result, accuracy in results.items()}
                    for peer, results in row["accuracies"].items()
                },
            }
        )

    def ratios(self, peer: str, to: str | None = None) -> list[float]:
        """Seconds of ``peer`` over those of ``to``, or of the baseline, within each round that both have."""
        return [a / b for a, b in zip(self.seconds[peer], self.seconds[to or self.baseline])]

    def ratio(self, peer: str, to: str | None = None) -> Interval:
        """Median of the ratios with its interval."""
        return bootstrap.median(self.ratios(peer, to))


@dataclass(frozen=True)
class Ceilings:
    """What this machine reached during the run, at a number of threads; None where it was not measured.

    Attributes:
        copy_bytes_per_second: bytes read and bytes written by a copy much larger than the cache.
        float32_operations_per_second, bfloat16_operations_per_second: of the library's fastest product or convolution,
            a product and a sum being two operations.
    """

    threads: int
    copy_bytes_per_second: float | None = None
    float32_operations_per_second: float | None = None
    bfloat16_operations_per_second: float | None = None


@dataclass(frozen=True)
class Verdict:
    """A measured number, its interval where it has one, and where a target is set, whether the number reaches it."""

    what: str
    value: float
    low: float | None = None
    high: float | None = None
    target: str | None = None
    """As "<= 1.00" or ">= 1.30"."""
    reached: bool | None = None


@dataclass(frozen=True)
class Run:
    """A run of one command.

    Attributes:
        complete: False where it was stopped; it then holds the rows that were done.
        skipped: the reason by peer, or by "peer: case, setting" where a peer was left out of single rows.
        ceilings: for each number of threads that was timed.
        content: what else the command writes, by name; commands that have no rows have only that.
    """

    command: str
    date: str
    machine: Mapping[str, Any]
    versions: Mapping[str, Any]
    commit: Mapping[str, Any] | None
    conditions: Mapping[str, Any]
    complete: bool = False
    skipped: Mapping[str, str] = field(default_factory=dict)
    ceilings: tuple[Ceilings, ...] = ()
    rows: tuple[Row, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    content: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, run: Mapping[str, Any]) -> Run:
        """Raises ``KeyError`` and ``TypeError`` for what is no run of this format."""
        read = {
            "ceilings": lambda entry: Ceilings(**entry),
            "rows": Row.from_json,
            "verdicts": lambda entry: Verdict(**entry),
        }
        values = {name: run[name] for name in _HEAD}
        values |= {name: run[name] for name in ("complete", "skipped") if name in run}
        values |= {name: tuple(map(make, run[name])) for name, make in read.items() if name in run}
        values["content"] = {name: value for name, value in run.items() if name not in values | _FIXED}
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        run = asdict(self)
        content = run.pop("content")
        return {"format": FORMAT, "command": run.pop("command")} | run | {"times_in": "seconds"} | content


_FIXED = {"format": FORMAT, "times_in": "seconds"}
_HEAD = ("command", "date", "machine", "versions", "commit", "conditions")


def read(path: Path) -> Run:
    """The run in a file; raises ``UnknownFormatError`` for files of another kind or version, and ``OSError``."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnknownFormatError(f"{path}: is no JSON ({error}); wanted a file written by python -m bench") from None
    command = found.get("command") if isinstance(found, dict) else None
    if command is None:
        raise UnknownFormatError(f"{path}: is no run; wanted a file written by python -m bench")
    version = found.get("format", 1)
    if version != FORMAT:
        other = "an older" if isinstance(version, int) and version < FORMAT else "another"
        raise UnknownFormatError(
            f"{path}: is of format {version!r}, written by {other} version; wanted format {FORMAT}: "
            f"run python -m bench {command} again"
        )
    try:
        return Run.from_json(found)
    except (KeyError, TypeError, AttributeError) as error:
        raise UnknownFormatError(f"{path}: is damaged ({type(error).__name__}: {error}); run it again") from None
