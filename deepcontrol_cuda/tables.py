"""JSON files of rows: what ``make gpu`` and ``python -m bench costs`` write and the planner reads."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

_KINDS = {"float": float, "int": int}


class Table(NamedTuple):
    """How rows of a dataclass are kept, whose fields are texts and numbers."""

    row: type
    name: str
    """Of the rows, in the file."""
    format: int
    without: str
    """What the package does where the file cannot be read."""

    def read(self, path: Path) -> tuple[Any, ...]:
        """The rows of a file; ``ValueError`` or ``OSError`` where it is not one of ours."""
        kinds = {field.name: _KINDS.get(field.type, str) for field in fields(self.row)}
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != self.format:
                raise ValueError(f"format {content['format']!r}, wanted {self.format}")
            rows = content[self.name]
            for row in rows:
                if row.keys() != kinds.keys() or not all(isinstance(row[name], kind) for name, kind in kinds.items()):
                    raise ValueError(f"a row that is not {', '.join(sorted(kinds))}")
            return tuple(self.row(**row) for row in rows)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path.name}: {error!r}") from error

    def read_or_warn(self, path: Path) -> tuple[Any, ...]:
        """The rows of a file, or none and a warning."""
        try:
            return self.read(path)
        except (OSError, ValueError) as error:
            warnings.warn(
                f"deepcontrol_cuda {self.without}, since its table of {self.name} cannot be read ({error}); the "
                "package should be installed again",
                stacklevel=2,
            )
            return ()

    def write(self, rows: Iterable[Any], path: Path) -> None:
        """Make ``rows`` the content of the file, sorted."""
        text = json.dumps({"format": self.format, self.name: [asdict(row) for row in sorted(rows)]}, indent=1)
        path.write_text(text + "\n", encoding="utf-8")
