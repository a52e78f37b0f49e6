"""What a training run tells: records in log.jsonl, curves, TensorBoard, a progress bar or lines on the terminal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .. import files
from . import pictures

LOG = "log.jsonl"
CURVES = "curves.png"
_SCALARS = ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "learning_rate")


class Log:
    """Keeps the records of a run and shows them. Each file is whole at every moment.

    Args:
        folder: where the files go; None for a process that is not to tell anything.
        title: of the curves.
        records: of the epochs before, when a run is resumed.
        epochs, images: how many epochs there will be in all, and how many images are in one.
    """

    def __init__(
        self, folder: Path | None, title: str, records: list[dict[str, Any]], epochs: int, images: int
    ) -> None:
        self.folder = folder
        self.title = title
        self.records = list(records)
        self.images = images
        shown = folder is not None and sys.stderr.isatty()
        done = len(self.epochs) * images
        # One bar for the whole run, so that the time left is that of the run.
        self._bar = tqdm(
            total=epochs * images, initial=done, unit=" images", unit_scale=True, dynamic_ncols=True, disable=not shown
        )
        # Opened by the first ``write``: a run that cannot write its first checkpoint is to leave nothing behind.
        self._board = None
        self._opened = False

    @property
    def epochs(self) -> list[dict[str, Any]]:
        return [record for record in self.records if record["kind"] == "epoch"]

    def say(self, line: str) -> None:
        """A line on the terminal, above the bar."""
        if self.folder is not None:
            tqdm.write(line)
            sys.stdout.flush()

    def progress(self, epoch: int, images: int, loss: float) -> None:
        """The bar to ``images`` in epoch ``epoch`` (from 1), with the mean loss so far."""
        self._bar.set_description(f"epoch {epoch}", refresh=False)
        self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        self._bar.update((epoch - 1) * self.images + images - self._bar.n)

    def add(self, kind: str, **values: Any) -> None:
        """Append a record; ``write`` puts it into the files."""
        self.records.append({"kind": kind, **values})
        if kind == "epoch":
            for name in _SCALARS:
                self._on_board("add_scalar", name, values[name], values["epoch"])

    def write(self) -> None:
        """Renew the files from the records.

        Raises:
            files.WriteError: the file named in it is as it was.
        """
        if self.folder is None:
            return
        if not self._opened:
            self._open_board()
        lines = [json.dumps(record, allow_nan=False) + "\n" for record in self.records]
        files.replace(self.folder / LOG, "".join(lines).encode())
        if self.epochs:
            files.replace(self.folder / CURVES, pictures.curves(self.title, self.epochs))
        self._on_board("flush")

    def close(self) -> None:
        self._bar.close()
        self._on_board("close")

    def _open_board(self) -> None:
        """A writer for TensorBoard that hides what an earlier process wrote behind the epochs so far."""
        self._opened = True
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.say("no TensorBoard here, so no events for it; curves.png and log.jsonl have the same numbers")
            return
        try:
            self._board = SummaryWriter(str(self.folder), purge_step=len(self.epochs) + 1)
        except OSError as error:
            self._drop_board(error)

    def _on_board(self, method: str, *arguments: object) -> None:
        if self._board is None:
            return
        try:
            getattr(self._board, method)(*arguments)
        except OSError as error:
            self._drop_board(error)

    def _drop_board(self, error: OSError) -> None:
        # The run goes on: what TensorBoard would show is in the log too.
        self._board = None
        self.say(f"no more events for TensorBoard: {error}; curves.png and log.jsonl have the same numbers")
