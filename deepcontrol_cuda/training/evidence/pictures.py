"""The pictures of the evidence, as PNG files in memory."""

from __future__ import annotations

import statistics

from matplotlib.figure import Figure

from ..methods import METHODS
from ..pictures import png
from .analysis import Analysis
from .intervals import CONFIDENCE
from .plan import MEAN_SHIFT_METHODS
from .tasks import GUESSING

# Okabe and Ito's colours, which stay apart for colour-blind readers; a family of methods has one colour.
_COLOURS = {
    "none": "#999999",
    "batch_norm": "#D55E00",
    "group_norm": "#E69F00",
    "instance_norm": "#F0E442",
    "gradient_centralization": "#CC79A7",
    "deep_control": "#0072B2",
    "mean_shift_rejection": "#009E73",
}
_STYLES = ("-", "--", ":", "-.")
_DPI = 110


def learning_rates(analysis: Analysis) -> bytes:
    """Accuracy over the learning rate: a panel a task, a line a method."""
    sweeps = analysis.rate_sweeps()
    figure = Figure(figsize=(6.2 * len(sweeps), 5.6), layout="constrained")
    compared = [m for m in METHODS if all(m in analysis.methods(sweep) for sweep in sweeps)]
    for panel, sweep in zip(figure.subplots(1, len(sweeps), squeeze=False).flat, sweeps):
        for method in compared:
            rates = analysis.rates(sweep, method)
            _line(panel, rates, [analysis.estimate(sweep, method, rate) for rate in rates], method)
        panel.set_title(f"{sweep.task}, batch size {sweep.batch_size}", fontsize=10)
        _axes(panel, "learning rate", analysis.rates(sweep))
    _legend(figure)
    return png(figure, _DPI)


def batch_sizes(analysis: Analysis) -> bytes:
    """Accuracy at the best learning rate over the batch size: a panel a task, a line a method."""
    groups = analysis.batch_sweeps()
    figure = Figure(figsize=(6.2 * len(groups), 5.2), layout="constrained")
    for panel, (task, sweeps) in zip(figure.subplots(1, len(groups), squeeze=False).flat, groups.items()):
        for method in (m for m in METHODS if all(m in analysis.methods(sweep) for sweep in sweeps)):
            estimates = [analysis.estimate(s, method, analysis.best_rate(s, method)) for s in sweeps]
            _line(panel, [sweep.batch_size for sweep in sweeps], estimates, method)
        panel.set_title(f"{task}, each method at its best learning rate", fontsize=10)
        _axes(panel, "batch size", [sweep.batch_size for sweep in sweeps])
    _legend(figure)
    return png(figure, _DPI)


def mean_shift(analysis: Analysis, task: str) -> bytes:
    """Mean shift of every layer over the training, means over seeds: a panel a method."""
    methods = [method for method in MEAN_SHIFT_METHODS if analysis.mean_shifts(task, method)]
    figure = Figure(figsize=(3.3 * len(methods) + 0.8, 4), layout="constrained")
    panels = list(figure.subplots(1, len(methods), squeeze=False, sharey=True).flat)
    for panel, method in zip(panels, methods):
        runs = analysis.mean_shifts(task, method)
        points = min(len(run.mean_shifts) for run in runs)
        layers = len(runs[0].mean_shifts[0].layers)
        grid = [
            [statistics.fmean(run.mean_shifts[p].layers[layer] for run in runs) for p in range(points)]
            for layer in range(layers)
        ]
        picture = panel.imshow(grid, vmin=0, vmax=1, aspect="auto", origin="lower", cmap="viridis")
        panel.set_xticks(range(points), [str(runs[0].mean_shifts[p].step) for p in range(points)], fontsize=7)
        panel.set_yticks(range(layers), [str(layer + 1) for layer in range(layers)], fontsize=7)
        panel.set_title(METHODS[method].label, fontsize=10)
        panel.set_xlabel("step")
    panels[0].set_ylabel("layer, in the order of calls")
    figure.colorbar(picture, ax=panels, label="mean of |mean of map| / rms of map")
    return png(figure, _DPI)


def _line(panel, places: list, estimates: list, method: str) -> None:
    family = next(name for name in sorted(_COLOURS, key=len, reverse=True) if method.startswith(name))
    style = _STYLES[[m for m in METHODS if m.startswith(family)].index(method) % len(_STYLES)]
    panel.errorbar(
        places, [e.mean for e in estimates], [e.half or 0 for e in estimates], color=_COLOURS[family], linestyle=style,
        marker="o", markersize=4, linewidth=1.5, elinewidth=0.8, capsize=2, label=METHODS[method].label,
    )  # fmt: skip


def _axes(panel, label: str, places: list) -> None:
    panel.axhline(GUESSING, color="black", linewidth=0.8, linestyle=":")
    panel.set_xscale("log", base=2)
    panel.set_xticks(places, [f"{place:g}" for place in places])
    panel.set_ylim(0, 1.02)
    panel.set_xlabel(label)
    panel.set_ylabel(f"test accuracy, mean and {CONFIDENCE:.0%} interval over seeds")
    panel.grid(alpha=0.25)


def _legend(figure: Figure) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
