"""The commands of ``python -m deepcontrol_cuda``."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import __version__, backends
from ._ops import extension

_DEMO_NEEDS = {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "tqdm": "tqdm"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 0 for success, 1 for a failure that was explained, 2 for bad usage."""
    parser = argparse.ArgumentParser(prog="python -m deepcontrol_cuda", description="Deep Control for PyTorch")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")
    info = commands.add_parser("info", help="print versions, backends and the machine")
    info.set_defaults(run=_info)
    demo = commands.add_parser("demo", help="train and time Deep Control against Batch Norm, and write a report")
    demo.add_argument("--output", type=Path, default=Path("report"), help="folder for the report (default: report)")
    demo.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    demo.add_argument("--seed", type=int, default=0, help="first random seed (default: 0)")
    demo.set_defaults(run=_demo)
    options = parser.parse_args(arguments)
    return options.run(options)


def _info(options: argparse.Namespace) -> int:
    from .training.conditions import conditions

    rows = conditions()
    for name, reason in backends.available().items():
        rows[f"backend {name}"] = "available" if reason is None else f"not available: {reason}"
    if extension is not None:
        rows |= {f"extension, {key}": str(value) for key, value in extension.info().items()}
    width = max(map(len, rows))
    for key, value in rows.items():
        print(f"{key.ljust(width)}  {value}")
    return 0


def _demo(options: argparse.Namespace) -> int:
    missing = [package for module, package in _DEMO_NEEDS.items() if importlib.util.find_spec(module) is None]
    if missing:
        return _fail(f"the demo needs {', '.join(missing)}: pip install deepcontrol_cuda[train]")
    output: Path = options.output
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        return _fail(f"--output: cannot write into {output}: {error.strerror}")
    from .training import demo

    try:
        path, table = demo.run(output, options.quick, options.seed)
    except KeyboardInterrupt:
        return _fail(f"interrupted; what was measured before is in {output / 'report.md'}")
    print(f"\n{table}\n\nThe report, with layer times and pictures, is {path}")
    return 0


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1
