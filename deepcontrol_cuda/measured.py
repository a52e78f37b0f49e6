"""How long layers took by each backend: ``measured.json``, written by ``make gpu``, read by the planner."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

FILE = Path(__file__).with_name("measured.json")
_FORMAT = 1


@dataclass(frozen=True, order=True)
class Time:
    """Of a layer's forward and backward on one GPU."""

    capability: str
    """Compute capability, "9.0"."""
    dtype: str
    """As in ``torch.<dtype>``."""
    layout: str
    """"contiguous" or "channels_last"."""
    layer: str
    """As ``layer`` tells it."""
    backend: str
    seconds: float
    """Sum of the medians over the batches that were timed."""
    gpu: str
    result: str
    """The file of bench/results that it is from."""

    @property
    def place(self) -> tuple[str, str, str, str]:
        return self.capability, self.dtype, self.layout, self.layer


def layer(kernel_size: Sequence[int], channels: int, filters: int, stride: Sequence[int], groups: int) -> str:
    """What a time is kept for: the convolution, whatever the size of its maps."""
    size, steps = ("x".join(map(str, values)) for values in (kernel_size, stride))
    return f"{size}, {channels} to {filters}, stride {steps}, groups {groups}"


def read(path: Path) -> tuple[Time, ...]:
    """The times of a file; ``ValueError`` or ``OSError`` where it is not one of ours."""
    kinds = {field.name: float if field.name == "seconds" else str for field in fields(Time)}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']!r}, wanted {_FORMAT}")
        rows = content["times"]
        for row in rows:
            if row.keys() != kinds.keys() or not all(isinstance(row[name], kind) for name, kind in kinds.items()):
                raise ValueError(f"a time that is not {', '.join(sorted(kinds))}")
        return tuple(Time(**row) for row in rows)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path.name}: {error!r}") from error


def read_or_warn(path: Path) -> tuple[Time, ...]:
    """The times of a file, or none and a warning: without them a proven backend runs that may not be the fastest."""
    try:
        return read(path)
    except (OSError, ValueError) as error:
        warnings.warn(
            f"deepcontrol_cuda chooses among proven backends without knowing their times, since its table of them "
            f"cannot be read ({error}); the package should be installed again",
            stacklevel=2,
        )
        return ()


def write(times: Iterable[Time], path: Path) -> None:
    """Make ``times`` the content of the file, sorted."""
    text = json.dumps({"format": _FORMAT, "times": [asdict(time) for time in sorted(times)]}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def fastest(times: Iterable[Time], place: tuple[str, str, str, str], backends: Sequence[str]) -> Time | None:
    """The least time at ``place`` if each of ``backends`` has one there, else None."""
    found = {time.backend: time for time in times if time.place == place and time.backend in backends}
    return min(found.values(), key=lambda time: time.seconds) if found.keys() == set(backends) else None
