"""The pictures of the demo's report and of a training run, as PNG files in memory."""

from __future__ import annotations

import io
import math
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FormatStrFormatter

from .layers import LAYERS, PASSES, Timing
from .loop import NETWORKS, Run

# Okabe and Ito's colours, which stay apart for colour-blind readers.
_COLOURS = dict(zip(NETWORKS, ("#D55E00", "#0072B2", "#009E73", "#999999")))
_LAYER_COLOURS = dict(zip(LAYERS, ("#999999", "#D55E00", "#0072B2")))
_DPI = 130
# Above it a run has left every useful range, and the scale would hide all the others.
_HIGHEST_LOSS = 10.0


def losses(runs: list[Run]) -> bytes:
    """Training loss over steps: a panel a setting, a line a network and seed, a cross where a run diverged."""
    settings = list(dict.fromkeys(run.setting for run in runs))
    columns = min(2, len(settings))
    rows = math.ceil(len(settings) / columns)
    figure = Figure(figsize=(5.5 * columns, 3.4 * rows + 0.6), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for panel, setting in zip(panels, settings):
        for run in (r for r in runs if r.setting == setting and r.losses):
            curve = [min(loss, _HIGHEST_LOSS) for loss in _smooth(run.losses)]
            colour = _COLOURS[run.network]
            panel.plot(curve, color=colour, linewidth=1.2, alpha=0.9)
            if run.diverged_at is not None:
                panel.plot(len(curve) - 1, curve[-1], "x", color=colour, markersize=9, markeredgewidth=2)
        panel.axhline(math.log(10), color="black", linewidth=0.8, linestyle=":")
        panel.set_yscale("log")
        panel.set_ylim(top=1.6 * _HIGHEST_LOSS)
        panel.set_title(setting, fontsize=10)
        panel.set_xlabel("step")
        panel.set_ylabel("training loss (cross-entropy, nats)")
        panel.grid(alpha=0.25)
    for panel in list(figure.axes)[len(settings) :]:
        panel.set_visible(False)
    shown = [network for network in NETWORKS if any(run.network == network for run in runs)]
    handles = [Line2D([], [], color=_COLOURS[network], label=network) for network in shown]
    handles.append(Line2D([], [], color="black", linestyle=":", label="guessing, ln 10"))
    diverged = f"diverged (cut at {_HIGHEST_LOSS:g})"
    handles.append(Line2D([], [], color="black", linestyle="", marker="x", label=diverged))
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    return png(figure)


def layers(timings: list[Timing]) -> bytes:
    """Time of each layer over conv + ReLU, a panel for inference and one for training, milliseconds on the bars."""
    modes = [mode for mode in PASSES if any(t.mode == mode for t in timings)]
    count = max(sum(t.mode == mode for t in timings) for mode in modes)
    figure = Figure(figsize=(3.2 + 1.45 * count, 3.6 * len(modes) + 0.5), layout="constrained")
    width = 0.8 / len(LAYERS)
    for panel, mode in zip(figure.subplots(len(modes), 1, squeeze=False).flat, modes):
        shown = [t for t in timings if t.mode == mode]
        for i, name in enumerate(LAYERS):
            places = [place + (i - (len(LAYERS) - 1) / 2) * width for place in range(len(shown))]
            ratios = [t.milliseconds[name] / t.milliseconds[LAYERS[0]] for t in shown]
            bars = panel.bar(places, ratios, width * 0.95, color=_LAYER_COLOURS[name], label=name)
            panel.bar_label(bars, [f"{t.milliseconds[name]:.1f}" for t in shown], fontsize=7, padding=1)
        panel.axhline(1, color="black", linewidth=0.8, linestyle=":")
        panel.set_xticks(range(len(shown)), [t.shape.replace(", ", "\n") for t in shown], fontsize=8)
        panel.set_ylabel("time / time of conv + ReLU")
        panel.set_title(f"{mode}; milliseconds on the bars", fontsize=10)
        panel.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        panel.margins(y=0.12)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(LAYERS), frameon=False)
    return png(figure)


def curves(title: str, epochs: list[dict[str, Any]]) -> bytes:
    """Loss and accuracy of a training run over epochs, from the records of its log; of the initial state none."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    numbers = [record["epoch"] for record in epochs]
    for panel, name, unit in zip(
        figure.subplots(1, 2), ("loss", "accuracy"), ("cross-entropy, nats", "share of images")
    ):
        for part, colour in (("train", "#D55E00"), ("test", "#0072B2")):
            values = [record[f"{part}_{name}"] for record in epochs]
            panel.plot(numbers, values, ".-" if len(numbers) < 50 else "-", color=colour, label=part)
        panel.set_xlabel("epoch")
        panel.set_ylabel(f"{name} ({unit})")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.25)
        panel.legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    return png(figure)


def png(figure: Figure, dpi: int = _DPI) -> bytes:
    """The file of ``figure``; equal data give equal bytes, as neither date nor version is in it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _smooth(values: list[float]) -> list[float]:
    """Exponential average over about a fiftieth of the steps: single batches are too noisy to compare by eye."""
    keep = 1 - 1 / max(1.0, len(values) / 50)
    average, weight, curve = 0.0, 0.0, []
    for value in values:
        average = keep * average + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        curve.append(average / weight)
    return curve
