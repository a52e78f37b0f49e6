"""Checkpoints: one file from which a run goes on with the same bits."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import torch

from .. import files
from .errors import TrainingError

_FORMAT = "deepcontrol_cuda train, 1"
_KEYS = {
    "settings": dict,
    "data": str,
    "fingerprint": str,
    "epoch": int,
    "records": list,
    "model": dict,
    "optimizer": dict,
    "scaler": dict,
}


def write(path: Path, state: dict[str, Any]) -> None:
    """Replace the file at ``path`` in one step.

    Args:
        state: tensors, numbers, strings, None and containers of them, with the keys that ``read`` returns.

    Raises:
        files.WriteError: the file from before is whole.
    """
    buffer = io.BytesIO()
    torch.save({"format": _FORMAT, **state}, buffer)
    files.replace(path, buffer.getvalue())


def read(path: Path) -> dict[str, Any]:
    """The checkpoint at ``path``, tensors on the CPU; no code in it is run.

    Returns:
        "settings" and "data" (the path) of the run, "fingerprint" of its data, "epoch" (how many are whole), "records"
        of the log, the states of "model", "optimizer" and gradient "scaler".

    Raises:
        TrainingError: there is none, or what is there is damaged or something else.
    """
    try:
        content = path.read_bytes()
        if not zipfile.is_zipfile(io.BytesIO(content)):
            raise TrainingError(_unusable(path, "it is cut off or no checkpoint at all"))
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            # torch.load does not look at the checksums.
            damaged = archive.testzip()
        if damaged is not None:
            raise TrainingError(_unusable(path, f"the checksum of its part {damaged} is wrong"))
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise TrainingError(
            f"{path} does not exist, so there is no run to resume; start one without --resume. On several machines "
            "--output must be a folder that all of them see: rank 0 writes, every rank reads"
        ) from error
    except (TrainingError, MemoryError):
        raise
    except Exception as error:  # what bytes that mean nothing make of the readers is anything
        raise TrainingError(_unusable(path, str(error).partition("\n")[0] or type(error).__name__)) from error
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise TrainingError(_unusable(path, "it was not written by this command"))
    for key, kind in _KEYS.items():
        if not isinstance(state.get(key), kind):
            raise TrainingError(_unusable(path, f"its part {key!r} is missing or no {kind.__name__}"))
    return state


def _unusable(path: Path, why: str) -> str:
    return (
        f"{path} cannot be resumed from: {why}. It was left as it is; put a good copy in its place, or start anew with "
        "another --output"
    )
