"""The generated table of docs/hardware.md: which kernel ran on which GPU, how right and how fast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import product
from pathlib import Path

from deepcontrol_cuda.training.table import markdown_table

from . import kernels

FILE = Path(__file__).resolve().parents[1] / "docs/hardware.md"
BACKENDS = ("cuda", "triton")
OPS = (*kernels.OPS, "conv_center", "conv_center_backward")
BEGIN = "<!-- Written by `make gpu`, up to the next such line. -->"
END = "<!-- End of what `make gpu` writes. -->"
NOT_RUN = "not yet run on hardware"
_HEAD = ["backend", "op", "dtype", "layout", "state", "GPU", "commit", "error", "GB/s", "share of a copy"]


@dataclass(frozen=True)
class Entry:
    """One op of a backend in one dtype and layout on one GPU."""

    backend: str
    op: str
    dtype: str
    layout: str
    state: str
    """"proven", or what went wrong."""
    gpu: str
    commit: str
    error: str = "-"
    speed: str = "-"
    share: str = "-"

    @property
    def cells(self) -> list[str]:
        return list(astuple(self))


def table(entries: Sequence[Entry]) -> str:
    """Markdown; an op without an entry has a line that says so."""
    lines = []
    for key in product(BACKENDS, OPS):
        found = [entry.cells for entry in entries if (entry.backend, entry.op) == key]
        lines += found or [[*key, "-", "-", NOT_RUN, *["-"] * 5]]
    return markdown_table([_HEAD, *lines])


def read(text: str) -> list[Entry]:
    """The entries of a document; ``ValueError`` where it lacks the lines that enclose them."""
    _, generated, _ = _parts(text)
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in generated.splitlines()[2:] if line]
    return [Entry(*row) for row in rows if NOT_RUN not in row]


def rewrite(path: Path, gpu: str, entries: Sequence[Entry]) -> None:
    """Put ``entries`` in the place of those that the document has of ``gpu``; those of other GPUs stay."""
    text = path.read_text(encoding="utf-8")
    before, _, after = _parts(text)
    others = [entry for entry in read(text) if entry.gpu != gpu]
    path.write_text(f"{before}{BEGIN}\n\n{table([*others, *entries])}\n\n{END}{after}", encoding="utf-8")


def _parts(text: str) -> tuple[str, str, str]:
    before, begin, rest = text.partition(BEGIN)
    generated, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"docs/hardware.md: lacks the line {BEGIN!r} or {END!r}")
    return before, generated.strip(), after
