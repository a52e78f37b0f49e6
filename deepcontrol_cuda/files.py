"""Files that are whole at every moment, whatever stops the process or fills the disk."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # no POSIX system
    fcntl = None

_PARTIAL = ".partial-"
# Seconds. Worker processes of a DataLoader share the lock of their parent, and notice within 5 that it was killed.
_PATIENCE = 10.0


class WriteError(OSError):
    """A file could not be written; the message says what is there, how many bytes were wanted and how many are free."""


def replace(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path`` in one step: a reader, or who starts after a crash, finds the old file or the new.

    Raises:
        WriteError: what was at ``path`` before is still there; or ``content``, if only its folder was not written out.
    """
    # Of a name of its own: two processes at one file must not write into each other's.
    partial = path.with_name(f"{_PARTIAL}{path.name}-{secrets.token_hex(8)}")
    left = "what was there before is whole"
    try:
        try:
            with open(partial, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            left = "the new file is there and whole, but a power failure may bring back the one before"
            _sync_folder(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise WriteError(
            f"cannot write {path}: {error.strerror} ({len(content)} bytes wanted, {_free(path.parent)} free); {left}"
        ) from error


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep out others who call this on ``folder``, where the system can lock one; remove what killed ones left half.

    Raises:
        BlockingIOError: another process holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor)
        for path in folder.glob(_PARTIAL + "*"):
            path.unlink(missing_ok=True)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    if fcntl is None:
        return
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)
        except OSError:  # a file system without locks, as NFS for folders
            return


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
