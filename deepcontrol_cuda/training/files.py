"""Files that are whole at every moment, whatever stops the process or fills the disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

_PARTIAL = ".partial-"


class WriteError(OSError):
    """A file could not be written; the message says how many bytes were wanted and how many are free."""


def replace(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path`` in one step: a reader, or who starts after a crash, finds the old file or the new.

    Raises:
        WriteError: what was at ``path`` before is still there.
    """
    partial = path.with_name(_PARTIAL + path.name)
    try:
        try:
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            _sync_folder(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise WriteError(
            f"cannot write {path}: {error.strerror} ({len(content)} bytes wanted, {_free(path.parent)} free); "
            "what was there before is whole"
        ) from error


def is_partial(path: Path) -> bool:
    """Whether ``path`` is what a process left that was killed inside ``replace``."""
    return path.name.startswith(_PARTIAL)


def _sync_folder(folder: Path) -> None:
    # The new name is on the disk only when the folder is.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free(folder: Path) -> int | str:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return "unknown"
