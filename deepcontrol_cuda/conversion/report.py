"""What a conversion did, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from torch import Tensor, nn

from . import checkpoints


@dataclass(frozen=True)
class Row:
    """One norm.

    Attributes:
        module: name of the new layer; of a norm that was left, its own.
        norm: name of the norm.
        source, target: what was there and what came, by class; target is "" for what was left.
        initialization: as asked for, "" for what was left.
        parameters_before, parameters_after: elements of the parameters of both.
        activation_bytes_before, activation_bytes_after: what a training forward on the example keeps of what these
            modules made; None without an example.
        remark: what else there is to know; of a norm that was left, why.
    """

    module: str
    norm: str
    source: str
    target: str
    initialization: str = ""
    parameters_before: int = 0
    parameters_after: int = 0
    activation_bytes_before: int | None = None
    activation_bytes_after: int | None = None
    remark: str = ""


@dataclass
class Report:
    """What ``replace_conv_bn`` did, or with ``dry_run`` would do. ``str()`` is a table.

    Attributes:
        model: the converted model.
        replaced, left: a row for each norm.
        notes: what concerns the model as a whole.
        activation_bytes_before, activation_bytes_after: what a training forward on the example keeps in all; None
            without an example.
    """

    model: nn.Module
    method: str
    initialization: str
    replaced: list[Row] = field(default_factory=list)
    left: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    activation_bytes_before: int | None = None
    activation_bytes_after: int | None = None
    _old: nn.Module | None = field(default=None, repr=False)
    _sources: list[checkpoints.Source] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        what = f"{self.method}, initialization {self.initialization}"
        lines = [f"{len(self.replaced)} replaced, {len(self.left)} left: {what}", *self.notes]
        if self.activation_bytes_before:
            before, after = self.activation_bytes_before, self.activation_bytes_after
            ratio = f" ({after / before:.2f})"
            lines.append(f"kept for backward: {_bytes(before)} before, {_bytes(after)} after{ratio}")
        if rows := [*self.replaced, *self.left]:
            lines += ["", *_table(rows)]
        return "\n".join(lines)

    def to_json(self) -> str:
        """Everything but the model."""
        content = {
            "method": self.method,
            "initialization": self.initialization,
            "notes": self.notes,
            "activation_bytes_before": self.activation_bytes_before,
            "activation_bytes_after": self.activation_bytes_after,
            "replaced": [asdict(row) for row in self.replaced],
            "left": [asdict(row) for row in self.left],
        }
        return json.dumps(content, indent=1)

    def key_map(self) -> dict[str, str]:
        """Where each key of the Batch Norm model's state dict goes; several may go into one, "" is dropped."""
        self._check_converted()
        return checkpoints.key_map(self._old, self.model, self._sources)

    def translate(self, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of a trained Batch Norm model as one for the converted model, folded.

        ``report.model.load_state_dict(report.translate(checkpoint))`` then computes what the Batch Norm model computes
        in evaluation, whatever ``initialization`` set before. A prefix "module." on all keys is taken off.

        Raises:
            ValueError: the checkpoint is of another architecture: keys are missing, unknown or of another shape; a
                layer has no parameter that could hold a value, as Mean Shift Rejection's after "fresh" have no bias;
                or nothing was converted (``dry_run``).
        """
        self._check_converted()
        return checkpoints.translate(self._old, self.model, self._sources, state_dict)

    def _check_converted(self) -> None:
        if self._old is None:
            raise ValueError("report: got one of dry_run=True, which converted nothing; wanted one of a conversion")


def _table(rows: list[Row]) -> list[str]:
    measured = any(row.activation_bytes_before is not None for row in rows)
    head = ["module", "from", "to", "parameters", *(["kept for backward"] if measured else []), "remark"]
    cells = [head]
    for row in rows:
        parameters = f"{row.parameters_before} -> {row.parameters_after}" if row.target else f"{row.parameters_before}"
        kept = [_change(row)] if measured else []
        target = row.target or "(left)"
        cells.append([row.module or "(the model)", row.source, target, parameters, *kept, row.remark])
    widths = [max(map(len, column)) for column in zip(*cells)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells]


def _change(row: Row) -> str:
    if row.activation_bytes_before is None:
        return ""
    return f"{_bytes(row.activation_bytes_before)} -> {_bytes(row.activation_bytes_after)}"


def _bytes(number: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} B"
