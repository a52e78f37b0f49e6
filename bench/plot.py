"""Writes pictures of runs to files, the same bytes for the same numbers."""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from deepcontrol_cuda import files

from .options import MissingError
from .pictures import pictures
from .reading import InputError, read
from .rows import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")
_DPI = 120


def digest(runs: Sequence[Run]) -> str:
    """Of everything that pictures of ``runs`` are drawn from, so that a picture tells which numbers it shows."""
    numbers = [[asdict(row) for row in run.rows] + [asdict(ceilings) for ceilings in run.ceilings] for run in runs]
    return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()[:16]


def image(figure: Figure, suffix: str, identifier: str) -> bytes:
    """A file of ``FORMATS`` with ``identifier`` in it; equal figures give equal bytes, without a date or chance."""
    import matplotlib

    metadata = {
        "svg": {"Date": None, "Creator": None, "Identifier": identifier},
        "png": {"Software": None, "Identifier": identifier},
    }
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "deepcontrol", "svg.fonttype": "path"}):
        figure.savefig(buffer, dpi=_DPI, format=suffix, metadata=metadata[suffix])
    return buffer.getvalue()


def wanted() -> None:
    """Raise ``MissingError`` where pictures cannot be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingError("pictures need matplotlib: pip install matplotlib")


HELP = "draw ratios, roofline, scaling, bandwidth, overhead and memory of files"


def add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="files that python -m bench has written")
    parser.add_argument("--output", type=Path, default=Path("report/bench"), help="folder (default: report/bench)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_files(parser)
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=FORMATS, help="default: both")


def run(options: argparse.Namespace) -> int:
    wanted()
    runs = {path: read(path) for path in options.files}
    for path, found in runs.items():
        if not pictures(found):
            raise InputError(f"{path}: a run of {found.command!r} with nothing to draw, wanted one with timed rows")
    for path, found in runs.items():
        if not found.complete:
            print(f"{path} is incomplete: the run was stopped")
        for name, draw in pictures(found).items():
            figure = draw()
            for suffix in options.format:
                target = options.output / f"{path.stem}_{name}.{suffix}"
                files.replace(target, image(figure, suffix, digest([found])))
                print(target)
    return 0
