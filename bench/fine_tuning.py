"""What training on does to networks that were converted with their trained weights, over rates and seeds."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from statistics import mean

import torch

from deepcontrol_cuda.training.data import DataSet, digits
from deepcontrol_cuda.training.fine_tuning import NETWORKS, PLAN, FineTuning, Plan, fine_tune, pretrain
from deepcontrol_cuda.training.loop import Setting
from deepcontrol_cuda.training.table import markdown_table

from . import options
from .record import Recording

HELP = "train converted networks on, over learning rates and seeds"
RATES = (0.002, 0.005, 0.01, 0.02, 0.05)
# Trained to the end on all images: nothing is left to be gained.
ENDED = Plan(1347, Setting(64, 0.05, 252), PLAN.then)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=options.positive, default=5, help="default: 5")
    parser.add_argument("--quick", action="store_true", help="two steps each, to see that it runs")
    parser.add_argument("--threads", type=options.positive, help="of the CPU (default: torch's choice)")
    parser.set_defaults(device="cpu")
    options.add_output(parser)


def run(asked: argparse.Namespace) -> int:
    from tqdm import tqdm  # not where only `make gpu` runs

    torch.set_num_threads(*options.threads(asked))
    total = sum(steps(plan, asked.seeds) for plan in plans(asked.quick))
    recording = Recording("fine-tuning", asked.output, seeds=asked.seeds, quick=asked.quick)
    tuned: list[FineTuning] = []
    with recording, tqdm(total=total, unit="step", dynamic_ncols=True) as bar:
        for found in every(asked.quick, asked.seeds, digits(), bar.update):
            bar.set_description(f"{found.network}, learning rate {found.learning_rate:g}")
            tuned.append(found)
            row = {name: value for name, value in asdict(found).items() if name != "losses"}
            recording.content.setdefault("runs", []).append(row)
    print(f"\nTest accuracy, means over {asked.seeds} seeds\n\n{table(tuned)}\n")
    return 0


def plans(quick: bool) -> list[Plan]:
    """Those that ``every`` follows, the ones that start alike behind one another."""
    if quick:
        return [Plan(64, Setting(64, 0.05, 2), Setting(64, 0.005, 2))]
    return [replace(PLAN, then=replace(PLAN.then, learning_rate=rate)) for rate in RATES] + [ENDED]


def steps(plan: Plan, seeds: int) -> int:
    """How many ``every`` takes for ``plan`` alone, but for the first training."""
    return plan.then.steps * len(NETWORKS) * seeds


def every(quick: bool, seeds: int, data: DataSet, on_step: Callable[[], object]) -> Iterator[FineTuning]:
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
