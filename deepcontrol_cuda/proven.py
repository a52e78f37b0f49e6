"""Which kernels were proven on which GPUs: ``proven.json``, written by ``make gpu``, read by the planner."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .tables import Table

FILE = Path(__file__).with_name("proven.json")


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


_TABLE = Table(Proof, "proofs", 2, "takes no kernel for proven on any GPU")
read, read_or_warn, write = _TABLE.read, _TABLE.read_or_warn, _TABLE.write
