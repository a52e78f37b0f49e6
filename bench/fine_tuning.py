"""What training on does to networks that were converted with their trained weights, over rates and seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import mean

from deepcontrol_cuda.training.data import DataSet
from deepcontrol_cuda.training.fine_tuning import NETWORKS, PLAN, FineTuning, Plan, fine_tune, pretrain
from deepcontrol_cuda.training.loop import Setting
from deepcontrol_cuda.training.table import markdown_table

RATES = (0.002, 0.005, 0.01, 0.02, 0.05)
# Trained to the end on all images: nothing is left to be gained.
ENDED = Plan(1347, Setting(64, 0.05, 252), PLAN.then)


def plans(quick: bool) -> list[Plan]:
    """Those that ``run`` follows, the ones that start alike behind one another."""
    if quick:
        return [Plan(64, Setting(64, 0.05, 2), Setting(64, 0.005, 2))]
    return [replace(PLAN, then=replace(PLAN.then, learning_rate=rate)) for rate in RATES] + [ENDED]


def steps(plan: Plan, seeds: int) -> int:
    """How many ``run`` takes for ``plan`` alone, but for the first training."""
    return plan.then.steps * len(NETWORKS) * seeds


def run(quick: bool, seeds: int, data: DataSet, on_step: Callable[[], object]) -> Iterator[FineTuning]:
    """Every network, plan and seed; ``on_step`` is called after each step that ``steps`` counts."""
    for seed in range(seeds):
        start, trained = None, None
        for plan in plans(quick):
            if (plan.images, plan.first) != start:
                start, trained = (plan.images, plan.first), pretrain(plan, seed, data)
            for network in NETWORKS:
                yield fine_tune(trained, network, plan, seed, data, on_step)


def table(runs: list[FineTuning]) -> str:
    """Markdown: means over the seeds, and in how many of them the end is no lower than the start."""
    times = ("before", "converted", "first_step", "first_epoch", "end")
    lines = [["images before", "learning rate", "network", *times, "end >= before", "lowest end - before"]]
    for key in dict.fromkeys((run.images, run.learning_rate, run.network) for run in runs):
        cell = [run for run in runs if (run.images, run.learning_rate, run.network) == key]
        ended = [run.end - run.before for run in cell if run.end is not None]
        lines.append([
            str(key[0]), f"{key[1]:g}", key[2], *(_mean([getattr(run, time) for run in cell]) for time in times),
            f"{sum(gain >= 0 for gain in ended)} of {len(cell)}", f"{min(ended):+.4f}" if ended else "-",
        ])  # fmt: skip
    return markdown_table(lines)


def _mean(values: list[float | None]) -> str:
    return "-" if None in values else f"{mean(values):.4f}"
