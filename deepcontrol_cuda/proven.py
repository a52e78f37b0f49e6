"""Which kernels were proven on which GPUs: ``proven.json``, written by ``make gpu``, read by the planner."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

FILE = Path(__file__).with_name("proven.json")
_FORMAT = 2


@dataclass(frozen=True, order=True)
class Proof:
    """On ``gpu`` the tests of an op passed and its error was in its budget, for one dtype and layout."""

    backend: str
    """"cuda" or "triton"."""
    op: str
    """A name of ``csrc/ops.cpp``."""
    dtype: str
    """As in ``torch.<dtype>``."""
    layout: str
    """"contiguous" or "channels_last", the latter with 1 to 3 spatial dimensions."""
    capability: str
    """Compute capability, "9.0"; what is proven for one says nothing of another."""
    gpu: str
    commit: str
    date: str
    kernels: str
    """Digest of the sources that ran; what is proven of them says nothing of others."""

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        return self.backend, self.op, self.dtype, self.layout, self.capability

    def __str__(self) -> str:
        return f"proven on {self.gpu} (compute capability {self.capability}), commit {self.commit}, {self.date}"


def read(path: Path) -> tuple[Proof, ...]:
    """The proofs of a file; ``ValueError`` or ``OSError`` where it is not one of ours."""
    names = {field.name for field in fields(Proof)}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']!r}, wanted {_FORMAT}")
        rows = content["proofs"]
        if not all(row.keys() == names and all(isinstance(v, str) for v in row.values()) for row in rows):
            raise ValueError(f"a proof that is not {', '.join(sorted(names))} as text")
        return tuple(Proof(**row) for row in rows)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path.name}: {error!r}") from error


def read_or_warn(path: Path) -> tuple[Proof, ...]:
    """The proofs of a file, or none and a warning: without them the reference runs, which is slow but right."""
    try:
        return read(path)
    except (OSError, ValueError) as error:
        warnings.warn(
            f"deepcontrol_cuda takes no kernel for proven on any GPU, since its table of proofs cannot be read "
            f"({error}); the package should be installed again",
            stacklevel=2,
        )
        return ()


def write(proofs: Iterable[Proof], path: Path) -> None:
    """Make ``proofs`` the content of the file, sorted."""
    text = json.dumps({"format": _FORMAT, "proofs": [asdict(proof) for proof in sorted(proofs)]}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
