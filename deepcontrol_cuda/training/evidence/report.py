"""Makes of the records a report that people read and a summary that programs read."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from .. import files
from ..methods import CALIBRATION_IMAGES, METHODS
from ..table import markdown_table
from . import claims, pictures
from .analysis import Analysis, Sweep
from .claims import Claim
from .costs import Cost
from .intervals import CONFIDENCE, TRAINED_ACCURACY, difference, trained
from .plan import BATCH_SIZE, MEAN_SHIFT_RATE, MOMENTUM
from .records import Records
from .tasks import GUESSING, TASKS

NAME = "evidence"
_FULL = "mean_shift_rejection"


def write(records: Records, folder: Path) -> Path:
    """Write evidence.md into ``folder``, pictures and summary.json into its folder ``evidence``, each in one step.

    Returns the path of evidence.md. Raises ``files.WriteError``.
    """
    analysis = Analysis(records.runs.values())
    drawn = {}
    if analysis.rate_sweeps():
        drawn["learning_rates.png"] = pictures.learning_rates(analysis)
    if analysis.batch_sweeps():
        drawn["batch_sizes.png"] = pictures.batch_sizes(analysis)
    for task in TASKS:
        if any(analysis.mean_shifts(task, method) for method in METHODS):
            drawn[f"mean_shift_{task}.png"] = pictures.mean_shift(analysis, task)
    for name, content in drawn.items():
        files.replace(folder / NAME / name, content)
    files.replace(folder / NAME / "summary.json", (json.dumps(summary(records), indent=1) + "\n").encode())
    path = folder / f"{NAME}.md"
    files.replace(path, markdown(records).encode())
    return path


def summary(records: Records) -> dict:
    """Everything in the report that is a number, by names."""
    analysis = Analysis(records.runs.values())
    cells = []
    for sweep in dict.fromkeys([*analysis.rate_sweeps(), *(s for g in analysis.batch_sweeps().values() for s in g)]):
        for method in analysis.methods(sweep):
            for rate in analysis.rates(sweep, method):
                runs = analysis.cell(sweep, method, rate)
                cells.append({
                    **asdict(sweep), "method": method, "learning_rate": rate,
                    **asdict(analysis.estimate(sweep, method, rate)),
                    "trained": sum(map(trained, runs)), "diverged": sum(run.accuracy is None for run in runs),
                })  # fmt: skip
    return {
        "complete": records.complete,
        "conditions": records.conditions,
        "claims": [asdict(claim) for claim in claims.check(analysis)],
        "cells": cells,
        "costs": {task: [asdict(cost) for cost in costs] for task, costs in records.costs.items()},
    }


def claims_table(found: list[Claim]) -> str:
    head = ["claim", "source", "task", "verdict", "numbers"]
    return markdown_table([head, *([c.text, c.source, c.task, c.verdict, c.numbers] for c in found)])


def markdown(records: Records) -> str:
    """The report; it depends on ``records`` only."""
    analysis = Analysis(records.runs.values())
    parts = ["# Evidence: training without batch statistics", _INTRODUCTION]
    if not records.complete:
        parts.append(
            f"**Incomplete: {len(records.missing)} of {len(records.plan)} runs are missing. What is here was measured.**"
        )
    parts += ["## Claims", _CLAIMS, claims_table(claims.check(analysis))]
    parts += ["## Conditions", *(_conditions(conditions) for conditions in records.conditions)]
    parts += ["## How it was measured", *_method(analysis)]
    parts += ["## Learning rates", _RATES]
    if analysis.rate_sweeps():
        parts.append(f"![accuracy over learning rates]({NAME}/learning_rates.png)")
    for sweep in analysis.rate_sweeps():
        parts += [f"### {sweep.task.capitalize()}, batch size {sweep.batch_size}", _rates_table(analysis, sweep)]
    parts += ["## Largest stable learning rate, best and worst", _STABLE]
    parts += [_stable_table(analysis, sweep) for sweep in analysis.rate_sweeps()]
    ingredients = [sweep for sweep in analysis.rate_sweeps() if _ingredients(analysis, sweep)]
    if ingredients:
        parts += ["## Ingredients of Mean Shift Rejection", _INGREDIENTS]
        parts += [_ingredients_table(analysis, sweep) for sweep in ingredients]
    if analysis.batch_sweeps():
        parts += ["## Batch sizes", _BATCHES, f"![accuracy over batch sizes]({NAME}/batch_sizes.png)"]
        for task, sweeps in analysis.batch_sweeps().items():
            parts += [f"### {task.capitalize()}, {sweeps[0].images} images", _batches_table(analysis, sweeps)]
    shifted = [task for task in TASKS if any(analysis.mean_shifts(task, method) for method in METHODS)]
    if shifted:
        parts += ["## Mean shift", _MEAN_SHIFT]
        for task in shifted:
            parts += [f"![mean shift, {task}]({NAME}/mean_shift_{task}.png)", _mean_shift_table(analysis, task)]
    if records.costs:
        parts += ["## What a step costs", _COSTS]
        for task, costs in records.costs.items():
            parts += [f"### {task.capitalize()}", _costs_table(costs)]
    return "\n\n".join(parts) + "\n"


def _conditions(conditions: dict[str, str]) -> str:
    return markdown_table([["condition", "value"], *map(list, conditions.items())])


def _method(analysis: Analysis) -> list[str]:
    tasks = [f"- *{task}*: {TASKS[task].text}" for task in dict.fromkeys(s.task for s in analysis.rate_sweeps())]
    return [
        f"Every run is alike but for method, learning rate, batch size and seed: SGD with momentum {MOMENTUM:g}, the "
        "learning rate falling to zero along a cosine, no weight decay, warm-up, augmentation or clipping; float32, "
        "one thread. What a method brings along is part of it (for Mean Shift Rejection a quarter of the learning rate "
        "for biases and classifier). The grid of learning rates is the same for all. Runs of one seed see the same "
        "images in the same order and start, where methods share an initialisation, from the same kernels.",
        "\n".join(tasks),
        "The budget is short, so that many runs could be done: accuracies say which method gets how far in that budget, "
        "not what it reaches in the end. A run whose loss is not finite has *diverged*; it ends there and counts with "
        f"accuracy {GUESSING:g}, which guessing has. A run has *trained* if its test accuracy is {TRAINED_ACCURACY:g} or "
        f"more. Intervals are Student's over seeds at {CONFIDENCE:.0%}, those of differences Welch's; the spread over "
        "test images is not in them. The best learning rate of a method is that of the highest mean accuracy on the "
        "test images: chosen in hindsight, for all methods alike.",
        _methods_text(),
    ]


def _methods_text() -> str:
    return (
        "The methods: *no norm* is convolution + bias + ReLU after Kaiming initialisation. *Batch Norm*, *Group Norm* "
        "(8 groups) and *Instance Norm* (with scale and bias) stand in the place of the bias. *Gradient Centralization* "
        "(arXiv 2004.01461) is no norm with centred gradients. *Deep Control* has a learned gain, mean scale and bias "
        f"in each filter; its gains are set from {CALIBRATION_IMAGES} training images so that maps have deviation 1, or "
        "start at 1 where it is *not calibrated*. *Mean Shift Rejection* (MSR) is the recipe that its authors recorded: "
        "zero-mean kernels of norm 1, scales that start at 0.8, projection 0.9, noise 0.1, unity decay 5e-4. *Deep "
        "Control + MSR* has those kernels, gradients, noise and rates in Deep Control's layers, with gains that start "
        "at 0.8."
    )


def _rates_table(analysis: Analysis, sweep: Sweep) -> str:
    rates = analysis.rates(sweep)
    lines = [["method", *(f"{rate:g}" for rate in rates)]]
    for method in analysis.methods(sweep):
        lines.append([METHODS[method].label, *(_cell(analysis, sweep, method, rate) for rate in rates)])
    return markdown_table(lines)


def _cell(analysis: Analysis, sweep: Sweep, method: str, rate: float) -> str:
    runs = analysis.cell(sweep, method, rate)
    if not runs:
        return ""
    failed = sum(not trained(run) for run in runs)
    if failed == len(runs):
        diverged = sum(run.accuracy is None for run in runs)
        return "diverged" if diverged == failed else f"{analysis.estimate(sweep, method, rate).mean:.3f}, not trained"
    return f"{analysis.estimate(sweep, method, rate)}" + (f", {failed} of {len(runs)} not trained" if failed else "")


def _stable_table(analysis: Analysis, sweep: Sweep) -> str:
    none = analysis.stable_rate(sweep, "none")
    lines = [
        [f"method ({sweep.task})", "largest stable", "over no norm", "best", "worst", "best over Batch Norm's best"]
    ]
    for method in analysis.methods(sweep):
        stable = analysis.stable_rate(sweep, method)
        best, worst = analysis.best_rate(sweep, method), analysis.worst_rate(sweep, method)
        over = "" if method == "batch_norm" else _over_batch_norm(analysis, sweep, method)
        lines.append([
            METHODS[method].label,
            "none" if stable is None else f"{stable:g}",
            f"{stable / none:g}" if stable and none else "",
            f"{analysis.estimate(sweep, method, best)} at {best:g}",
            f"{analysis.estimate(sweep, method, worst).mean:.3f} at {worst:g}",
            over,
        ])  # fmt: skip
    return markdown_table(lines)


def _over_batch_norm(analysis: Analysis, sweep: Sweep, method: str) -> str:
    if "batch_norm" not in analysis.methods(sweep):
        return ""
    return _difference(analysis.best(sweep, method), analysis.best(sweep, "batch_norm"))


def _difference(ours: list[float], theirs: list[float]) -> str:
    over = difference(ours, theirs)
    word = {claims.HOLDS: ", better", claims.FAILS: ", worse", claims.UNDECIDED: ""}[claims.decide(over)]
    return f"{over.mean:+.3f}" + ("" if over.half is None else f" ± {over.half:.3f}") + word


def _ingredients(analysis: Analysis, sweep: Sweep) -> list[str]:
    methods = analysis.methods(sweep)
    return [m for m in methods if m.startswith(_FULL) and m != _FULL] if _FULL in methods else []


def _ingredients_table(analysis: Analysis, sweep: Sweep) -> str:
    stable = analysis.stable_rate(sweep, _FULL)
    common = "" if stable is None else f"at {stable:g} over the full recipe"
    lines = [[f"recipe ({sweep.task})", "largest stable", "best", "best over the full recipe's best", common]]
    for method in (_FULL, *_ingredients(analysis, sweep)):
        rate, best = analysis.stable_rate(sweep, method), analysis.best_rate(sweep, method)
        line = [METHODS[method].label, "none" if rate is None else f"{rate:g}"]
        line.append(f"{analysis.estimate(sweep, method, best)} at {best:g}")
        there = [] if stable is None else analysis.accuracies(sweep, method, stable)
        full = method == _FULL
        line.append("" if full else _difference(analysis.best(sweep, method), analysis.best(sweep, _FULL)))
        line.append("" if full or not there else _difference(there, analysis.accuracies(sweep, _FULL, stable)))
        lines.append(line)
    return markdown_table(lines)


def _batches_table(analysis: Analysis, sweeps: list[Sweep]) -> str:
    methods = [m for m in METHODS if any(m in analysis.methods(sweep) for sweep in sweeps)]
    lines = [["method", *(f"{sweep.batch_size}" for sweep in sweeps)]]
    for method in methods:
        line = [METHODS[method].label]
        for sweep in sweeps:
            rates = analysis.rates(sweep, method)
            line.append("<br>".join(f"{rate:g}: {_cell(analysis, sweep, method, rate)}" for rate in rates))
        lines.append(line)
    return markdown_table(lines)


def _mean_shift_table(analysis: Analysis, task: str) -> str:
    lines = [[f"method ({task})", "mean shift", "over that of no norm"]]
    for method in METHODS:
        values = analysis.mean_shift(task, method)
        if values:
            over = "" if method == "none" else _shift_over_none(analysis, task, values)
            lines.append([METHODS[method].label, f"{difference(values, [0.0]).mean:.3f}", over])
    return markdown_table(lines)


def _shift_over_none(analysis: Analysis, task: str, values: list[float]) -> str:
    none = analysis.mean_shift(task, "none")
    if not none:
        return ""
    over = difference(values, none)
    return f"{over.mean:+.3f}" + ("" if over.half is None else f" ± {over.half:.3f}")


def _costs_table(costs: list[Cost]) -> str:
    by_method = {cost.method: cost for cost in costs}
    norm = by_method["batch_norm"]
    lines = [["method", "step, ms", "spread", "over Batch Norm", "saved for backward, KiB", "over Batch Norm"]]
    for cost in costs:
        lines.append([
            METHODS[cost.method].label,
            f"{cost.milliseconds:.2f}",
            f"{cost.spread:.0%}",
            f"{cost.milliseconds / norm.milliseconds:.2f}",
            f"{cost.saved_bytes / 1024:.0f}",
            f"{cost.saved_bytes / norm.saved_bytes:.2f}",
        ])  # fmt: skip
    return markdown_table(lines)


_INTRODUCTION = f"""\
Written by `python -m deepcontrol_cuda evidence` from what it measured, verdicts included; what was measured is in \
[{NAME}/results.jsonl]({NAME}/results.jsonl), one line a run. Small networks, small images and short trainings on a \
CPU: what holds here need not hold elsewhere. No figure of either paper is known to the authors of this package, so \
none is compared with."""

_CLAIMS = f"""\
*holds*: by the {CONFIDENCE:.0%} interval of the difference; *does not hold*: by the same interval it is the other way \
round; *undecided*: the interval contains no difference. Claims about learning rates have no interval: they hold or not \
by the definitions below. "against" is against Batch Norm, or what the claim names."""

_RATES = f"""\
Test accuracy, mean ± half of the {CONFIDENCE:.0%} interval over seeds. *diverged*: the loss of every seed; *not \
trained*: accuracy below {TRAINED_ACCURACY:g}."""

_STABLE = """\
The largest stable learning rate is the largest one of the grid at which the runs of all seeds trained. "over no norm" \
is how many times that of no norm it is. "best" and "worst" are over the learning rates of the grid."""

_INGREDIENTS = """\
One ingredient off at a time, and all but the scaled kernels off. The last column compares at the largest learning rate \
at which the full recipe is stable, where an ingredient that is there for high learning rates has to show."""

_BATCHES = """\
Each cell lists learning rates and the accuracies at them; fewer images a run than in the tables above, the same for all \
batch sizes. Steps of one image take long, so there are few learning rates for each batch size, the same for all \
methods."""

_MEAN_SHIFT = f"""\
How much of what a layer makes, ahead of residual and activation, is nothing but a constant in each map: the mean over \
samples and maps of |mean of the map| / rms of the map, from 0 (no mean) to 1 (nothing but mean), while training, on the \
training batch, at learning rate {MEAN_SHIFT_RATE:g} and batch size {BATCH_SIZE}. Behind Batch Norm maps are those that \
it gives out, Deep Control's include its bias. The table has means over layers and training."""

_COSTS = f"""\
One training step (forward, backward, optimizer) at batch size {BATCH_SIZE}, one thread, medians of interleaved runs; \
"spread" is the distance between the quartiles over the median. Layers this small are mostly overhead, so these times \
say nothing about large networks. Saved for backward: bytes that the forward keeps, by saved-tensor hooks, parameters \
and buffers left out."""
