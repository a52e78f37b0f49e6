"""Measures cells one after the other, within a given time, and records them."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from itertools import groupby, product

import torch

from . import options as asked
from . import report, roofline, runner
from .record import Recording
from .rows import Setting
from .runner import Box, Cell


def settings(options: argparse.Namespace, batch: int) -> list[Setting]:
    """All that is asked for, those of one number of threads behind one another."""
    grid = product(asked.threads(options), options.dtype, options.layout, options.mode)
    return [Setting(dtype, layout, mode, batch, threads) for threads, dtype, layout, mode in grid]


def run(
    recording: Recording,
    cells: Sequence[Cell],
    options: argparse.Namespace,
) -> int:
    """Measure ``cells``, which come sorted by setting, and return the exit status: 1 where something was wrong.

    Ceilings are measured at each number of threads. What a row leaves of its time goes to those behind it. A row whose
    baseline is missing or whose "ours" is wrong is not kept.
    """
    from tqdm import tqdm  # not where only `make gpu` runs

    clock = runner.clock_of(options.device)
    end = time.perf_counter() + asked.seconds(options)
    done = 0
    with recording, tqdm(total=len(cells), unit="row", dynamic_ncols=True) as bar:
        refresh = _seldom(bar.refresh)
        for threads, some in groupby(cells, lambda cell: cell.setting.threads):
            torch.set_num_threads(threads)
            bar.set_description("ceilings")
            recording.ceilings.append(roofline.measure(options.device))
            for setting, group in groupby(some, lambda cell: cell.setting):
                timed = []
                for cell in group:
                    bar.set_description(f"{setting}: {cell.case}")
                    share = (end - time.perf_counter()) / (len(cells) - done)
                    least = [3 * rounds // 5 if options.quick else rounds for rounds in cell.least]
                    box = Box.exactly(options.rounds) if options.rounds else Box(share, *least)
                    row, prepared = runner.measure(cell, clock, box, refresh)
                    done += 1
                    bar.update()
                    _tell(recording, cell, prepared, tqdm)
                    if cell.baseline in row.seconds and "ours" not in prepared.wrong:
                        timed.append(row)
                        recording.rows.append(row)
                if timed:
                    tqdm.write(f"\n{setting}\n\n{report.rows_table(timed)}\n", file=sys.stdout)
    return 1 if recording.wrong else 0


def _seldom(call: Callable[[], object]) -> Callable[[], None]:
    """``call`` at most once a second, so that drawing takes nothing from short rounds."""
    last = 0.0

    def run() -> None:
        nonlocal last
        if time.perf_counter() - last > 1:
            call()
            last = time.perf_counter()

    return run


def _tell(recording: Recording, cell: Cell, prepared: runner.Prepared, tqdm) -> None:
    for peer, reason in prepared.skipped.items():
        if recording.skip(peer, reason, cell.case, cell.setting):
            tqdm.write(f"{peer} is left out of {cell.case}, {cell.setting}: {reason}", file=sys.stdout)
    for message in prepared.wrong.values():
        recording.wrong.append(message)
        tqdm.write(f"error: {message}", file=sys.stderr)
