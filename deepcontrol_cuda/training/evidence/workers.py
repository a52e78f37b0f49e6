"""Does runs in several processes at once."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

from ..errors import TrainingError
from .plan import Setting
from .runs import Run, train


def run(settings: list[Setting], jobs: int) -> Iterator[Run]:
    """Each run as it ends, in any order. With one job they are done here, one after the other.

    Closed early, as by Ctrl-C, it stops the runs that have not ended.

    Raises:
        TrainingError: the system ended a process.
    """
    if jobs == 1 or len(settings) <= 1:
        yield from map(train, settings)
        return
    # Not forked: the threads of torch would not be in the copies.
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(min(jobs, len(settings)), context, initializer=_ignore_interrupts)
    try:
        for future in as_completed([pool.submit(train, setting) for setting in settings]):
            yield future.result()
        pool.shutdown()
    except BrokenProcessPool as error:
        raise TrainingError(
            "the system ended a process, perhaps for want of memory; try fewer --jobs. The same command goes on from "
            "the runs that ended"
        ) from error
    finally:
        # Nobody wants what is still running. Were it waited for, a second Ctrl-C would interrupt the waiting and leave
        # processes that the end of Python waits for without end.
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)


def _ignore_interrupts() -> None:
    # Ctrl-C reaches all processes of a terminal; the one that hands out the work decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
