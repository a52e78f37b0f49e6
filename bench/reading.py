"""What commands that read results share."""

from __future__ import annotations

from pathlib import Path

from . import rows
from .options import UsageError
from .rows import Run


class InputError(UsageError):
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
