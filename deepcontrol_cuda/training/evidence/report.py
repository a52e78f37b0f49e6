"""Makes of the records a report that people read and a summary that programs read."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from ... import files
from ..methods import METHODS
from ..table import markdown_table
from . import claims, pictures, text
from .analysis import Analysis, Sweep
from .claims import Claim
from .costs import Cost
from .intervals import Estimate, difference, trained
from .records import Records
from .tasks import TASKS

# Beside evidence.md.
FOLDER = "evidence"
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
        files.replace(folder / FOLDER / name, content)
    files.replace(folder / FOLDER / "summary.json", (json.dumps(summary(records), indent=1) + "\n").encode())
    path = folder / "evidence.md"
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
                    **_rounded(analysis.estimate(sweep, method, rate)),
                    "trained": sum(map(trained, runs)), "diverged": sum(run.accuracy is None for run in runs),
                })  # fmt: skip
    return {
        "complete": records.complete,
        "conditions": [c | {"runs": n} for c, n in zip(records.conditions, records.counts, strict=True)],
        "claims": [asdict(claim) for claim in claims.check(analysis)],
        "cells": cells,
        "costs": {task: [asdict(cost) for cost in costs] for task, costs in records.costs.items()},
    }


def _rounded(estimate: Estimate) -> dict[str, float | int | None]:
    # Far below what can be told apart, and above what versions of SciPy disagree on.
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in asdict(estimate).items()}


def claims_table(found: list[Claim]) -> str:
    head = ["claim", "source", "task", "verdict", "numbers"]
    return markdown_table([head, *([c.text, c.source, c.task, c.verdict, c.numbers] for c in found)])


def markdown(records: Records) -> str:
    """The report; it depends on ``records`` only."""
    analysis = Analysis(records.runs.values())
    parts = ["# Evidence: training without batch statistics", text.INTRODUCTION]
    if not records.complete:
        missing = f"{len(records.missing)} of {len(records.plan)} runs are missing"
        parts.append(f"**Incomplete: {missing}. What is here was measured.**")
    parts += ["## Claims", text.CLAIMS, claims_table(claims.check(analysis))]
    parts.append("## Conditions")
    parts += _conditions(records)
    parts += ["## How it was measured", *text.method(sweep.task for sweep in analysis.rate_sweeps())]
    parts += ["## Learning rates", text.RATES]
    if analysis.rate_sweeps():
        parts.append(f"![accuracy over learning rates]({FOLDER}/learning_rates.png)")
    for sweep in analysis.rate_sweeps():
        parts += [f"### {sweep.task.capitalize()}, batch size {sweep.batch_size}", _rates_table(analysis, sweep)]
    parts += ["## Largest stable learning rate, best and worst", text.STABLE]
    parts += [_stable_table(analysis, sweep) for sweep in analysis.rate_sweeps()]
    ingredients = [sweep for sweep in analysis.rate_sweeps() if _ingredients(analysis, sweep)]
    if ingredients:
        parts += ["## Ingredients of Mean Shift Rejection", text.INGREDIENTS]
        parts += [_ingredients_table(analysis, sweep) for sweep in ingredients]
    if analysis.batch_sweeps():
        parts += ["## Batch sizes", text.BATCHES, f"![accuracy over batch sizes]({FOLDER}/batch_sizes.png)"]
        for task, sweeps in analysis.batch_sweeps().items():
            parts += [f"### {task.capitalize()}, {sweeps[0].images} images", _batches_table(analysis, sweeps)]
    shifted = [task for task in TASKS if any(analysis.mean_shifts(task, method) for method in METHODS)]
    if shifted:
        parts += ["## Mean shift", text.MEAN_SHIFT]
        for task in shifted:
            parts += [f"![mean shift, {task}]({FOLDER}/mean_shift_{task}.png)", _mean_shift_table(analysis, task)]
    if records.costs:
        parts += ["## What a step costs", text.COSTS]
        for task, costs in records.costs.items():
            parts += [f"### {task.capitalize()}", _costs_table(costs)]
    return "\n\n".join(parts) + "\n"


def _conditions(records: Records) -> list[str]:
    """A table for all starts under the same conditions that did runs."""
    counts: dict[tuple[tuple[str, str], ...], int] = {}
    for conditions, count in zip(records.conditions, records.counts, strict=True):
        if count:
            key = tuple(conditions.items())
            counts[key] = counts.get(key, 0) + count
    return [
        markdown_table([["condition", "value"], ["runs", f"{n}"], *map(list, items)]) for items, n in counts.items()
    ]


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
    methods = (_FULL, *_ingredients(analysis, sweep))
    rates = analysis.common_rates(sweep, methods)
    if not rates:
        return ""
    stable = analysis.stable_rate(sweep, _FULL, rates)
    common = "" if stable is None else f"at {stable:g} over the full recipe"
    lines = [[f"recipe ({sweep.task})", "largest stable", "best", "best over the full recipe's best", common]]
    full_best = analysis.accuracies(sweep, _FULL, analysis.best_rate(sweep, _FULL, rates))
    for method in methods:
        rate, best = analysis.stable_rate(sweep, method, rates), analysis.best_rate(sweep, method, rates)
        line = [METHODS[method].label, "none" if rate is None else f"{rate:g}"]
        line.append(f"{analysis.estimate(sweep, method, best)} at {best:g}")
        full = method == _FULL
        line.append("" if full else _difference(analysis.accuracies(sweep, method, best), full_best))
        at_stable = (
            ""
            if full or stable is None
            else _difference(analysis.accuracies(sweep, method, stable), analysis.accuracies(sweep, _FULL, stable))
        )
        lines.append([*line, at_stable])
    grid = ", ".join(f"{rate:g}" for rate in rates)
    return f"Over the learning rates at which all of them ran: {grid}.\n\n{markdown_table(lines)}"


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
    over = "over Batch Norm"
    lines = [["method", "step, ms", "spread", over, "saved for backward, KiB", over, "peak, KiB", over]]
    for cost in costs:
        lines.append([
            METHODS[cost.method].label,
            f"{cost.milliseconds:.2f}",
            f"{cost.spread:.0%}",
            f"{cost.milliseconds / norm.milliseconds:.2f}",
            f"{cost.saved_bytes / 1024:.0f}",
            f"{cost.saved_bytes / norm.saved_bytes:.2f}",
            f"{cost.peak_bytes / 1024:.0f}",
            f"{cost.peak_bytes / norm.peak_bytes:.2f}",
        ])  # fmt: skip
    return markdown_table(lines)
