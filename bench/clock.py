"""Seconds that calls take: on a GPU by events around graphs, elsewhere by the clock on the wall."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from deepcontrol_cuda.timing import Times, summarize

Call = Callable[[], object]


class WallClock:
    """For tensors on the CPU."""

    device = "cpu"
    cache_bytes = 0
    """Calls that together touch more than this find nothing of their own in the cache when their turn comes again."""

    def prepare(self, calls: Sequence[Call]) -> Call:
        """What runs all ``calls`` in turn and is to be timed."""

        def run() -> None:
            for call in calls:
                call()

        run()
        return run

    def seconds(self, prepared: Call) -> float:
        start = time.perf_counter()
        prepared()
        return time.perf_counter() - start


class GpuClock:
    """The GPU's time alone: calls are captured into a CUDA graph, so that Python and launches are not on the clock."""

    device = "cuda"

    def __init__(self) -> None:
        self.cache_bytes = torch.cuda.get_device_properties("cuda").L2_cache_size

    def prepare(self, calls: Sequence[Call]) -> Call:
        warm_up = torch.cuda.Stream()
        warm_up.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm_up):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(warm_up)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            # Kept until the end of the capture, so that each call writes to memory of its own.
            results = [call() for call in calls]
        del results
        graph.replay()
        return graph.replay

    def seconds(self, prepared: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # While the GPU sleeps all that follows is queued, so that nothing between the events waits for Python.
        torch.cuda._sleep(1_000_000)
        start.record()
        prepared()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


Clock = WallClock | GpuClock


def race(clock: Clock, contestants: Mapping[str, Sequence[Call]], rounds: int) -> dict[str, Times]:
    """Seconds a call of each of ``contestants``, which take turns in a new order every round (two at least)."""
    prepared = {name: clock.prepare(calls) for name, calls in contestants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            seconds[name].append(clock.seconds(prepared[name]) / len(contestants[name]))
    return {name: summarize(values) for name, values in seconds.items()}
