"""What the commands' arguments have in common, and what must be true before one of them starts."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from deepcontrol_cuda import backends

DTYPES = ("float32", "bfloat16")
LAYOUTS = ("channels_last", "contiguous")
MODES = ("forward", "training")
DEVICES = ("cpu", "cuda")
RESULTS = Path(__file__).parent / "results"


class UsageError(Exception):
    """What was asked for cannot be had here; the message says what is missing."""


class MissingError(Exception):
    """Something is not installed or cannot be written to; the message says what to do."""


def positive(text: str) -> int:
    return _integer(text, 1)


def rounds(text: str) -> int:
    """Quartiles need two."""
    return _integer(text, 2)


def _integer(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted an integer of at least {least}")
    return int(text)


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON (default: bench/results)")


def add_machine(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """``--device``, ``--threads`` (of which there may be ``several``), ``--output``."""
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="default: cpu")
    count = {"nargs": "+"} if several else {}
    parser.add_argument("--threads", type=positive, help="of the CPU (default: torch's choice)", **count)
    add_output(parser)


def add_grid(
    parser: argparse.ArgumentParser, layouts: Sequence[str] | None = LAYOUTS, modes: Sequence[str] | None = MODES
) -> None:
    """``--dtype``, ``--layout`` with the default ``layouts``, and ``--mode`` unless ``modes`` is None.

    Without ``layouts`` they are both, and the first with ``--quick``.
    """
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES, help="default: both")
    names = "both, or the first with --quick" if layouts is None else " ".join(layouts)
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=layouts, help=f"default: {names}")
    if modes is not None:
        parser.add_argument("--mode", nargs="+", choices=MODES, default=modes, help=f"default: {' '.join(modes)}")


def add_time(parser: argparse.ArgumentParser, seconds: int, quick: int) -> None:
    """``--quick`` and ``--seconds`` with their defaults."""
    parser.add_argument("--quick", action="store_true", help="the peers of the verdicts only, and less time")
    parser.add_argument(
        "--seconds",
        type=positive,
        help=f"for timing, of all rows together (default: {seconds}, or {quick} with --quick)",
    )
    parser.add_argument("--rounds", type=rounds, help="of every row, instead of as many as it needs")
    parser.set_defaults(default_seconds=(seconds, quick))


def seconds(options: argparse.Namespace) -> int:
    return options.seconds or options.default_seconds[options.quick]


def threads(options: argparse.Namespace) -> list[int]:
    """The numbers of threads to be timed with; torch's own where none are given."""
    found = options.threads
    if found is None:
        return [torch.get_num_threads()]
    return [found] if isinstance(found, int) else list(dict.fromkeys(found))


def check(options: argparse.Namespace) -> None:
    """Raise ``UsageError`` without the GPU asked for, ``MissingError`` without the extension or the folder."""
    if output := getattr(options, "output", None):
        try:
            output.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=output):
                pass
        except OSError as error:
            raise MissingError(f"--output: cannot write into {output}: {error.strerror}") from error
    device = getattr(options, "device", None)
    if device is None:
        return
    reasons = backends.available()
    if device == "cpu" and reasons["cpu"]:
        raise MissingError(f"backend 'cpu': {reasons['cpu']}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device cuda: {reasons['cuda']}")
