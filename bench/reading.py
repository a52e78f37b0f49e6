"""What commands that read results share: files in, a message and an exit status for what cannot be read."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from . import rows
from .rows import Run


class InputError(ValueError):
    """The files are not what the command wants; the message says what was given, what is wanted and what to do."""


def read(path: Path) -> Run:
    """The run in a file. Raises ``InputError``."""
    try:
        return rows.read(path)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read: {error.strerror}; wanted a file written by python -m bench"
        ) from None
    except rows.UnknownFormatError as error:
        raise InputError(str(error)) from None


def refusing(command: Callable[..., int]) -> Callable[..., int]:
    """Turn an ``InputError`` of ``command`` into a message and the exit status 2, that of bad usage."""

    @wraps(command)
    def run(*arguments: Any, **named: Any) -> int:
        try:
            return command(*arguments, **named)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return run


def is_ours(peer: str) -> bool:
    """Whether a peer is of this package: "ours", and "ours, " in front of the name of an algorithm or backend."""
    return peer.partition(",")[0] == "ours"


def heading(run: Run) -> str:
    """A run in a line: command, date, commit and processor or GPU."""
    parts = [run.command, run.date]
    if run.commit:
        parts.append(f"commit {run.commit['hash']}" + (" with changes" if run.commit["dirty"] else ""))
    gpu = run.content.get("gpu")
    parts.append(str(gpu["name"] if gpu else run.machine["cpu"]))
    return ", ".join(parts) + ("" if run.complete else "; INCOMPLETE, the run was stopped")
