"""Writes what a demo has measured so far: Markdown, pictures and the raw numbers as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .. import files
from . import pictures
from .fine_tuning import NETWORKS as CONVERTED
from .fine_tuning import FineTuning
from .layers import LAYERS, PASSES, Timing
from .loop import NETWORKS, Run
from .table import markdown_table


@dataclass
class Results:
    """Everything that was measured, and how. ``complete`` turns true when nothing is missing.

    Args:
        method, fine_tuning_method: what is said about the trainings.
    """

    conditions: dict[str, str]
    method: list[str]
    fine_tuning_method: str
    runs: list[Run] = field(default_factory=list)
    fine_tuning: list[FineTuning] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)
    complete: bool = False


def write(results: Results, folder: Path) -> Path:
    """Write report.md, its pictures and results.json into ``folder``, each in one step, and return report.md's path."""
    files.replace(folder / "results.json", (json.dumps(asdict(results), indent=1) + "\n").encode())
    if results.runs:
        files.replace(folder / "losses.png", pictures.losses(results.runs))
    if results.timings:
        files.replace(folder / "layers.png", pictures.layers(results.timings))
    report = folder / "report.md"
    files.replace(report, _markdown(results).encode())
    return report


def training_table(runs: list[Run]) -> str:
    """Markdown: one line for each setting and network, the seeds side by side."""
    seeds = sorted({run.seed for run in runs})
    lines = [["setting", "network", f"test accuracy ({_seeds(seeds)})", "final loss", "diverged"]]
    for setting in dict.fromkeys(run.setting for run in runs):
        for network in NETWORKS:
            cell = [run for run in runs if (run.setting, run.network) == (setting, network)]
            lines.append([
                setting,
                network,
                " / ".join("-" if run.test_accuracy is None else f"{run.test_accuracy:.4f}" for run in cell),
                " / ".join("-" if run.final_loss is None else f"{run.final_loss:.4f}" for run in cell),
                " / ".join("no" if run.diverged_at is None else f"step {run.diverged_at}" for run in cell),
            ])  # fmt: skip
    return markdown_table(lines)


def fine_tuning_table(runs: list[FineTuning]) -> str:
    """Markdown: one line for each network, the seeds side by side; accuracies before and after a conversion."""
    seeds = sorted({run.seed for run in runs})
    lines = [["fine-tuned", f"before ({_seeds(seeds)})", "converted", "after 1 step", "after 1 epoch", "at the end"]]
    for network in CONVERTED:
        cell = [run for run in runs if run.network == network]
        times = ("before", "converted", "first_step", "first_epoch", "end")
        accuracies = [[getattr(run, time) for run in cell] for time in times]
        lines.append([network, *(" / ".join("-" if a is None else f"{a:.4f}" for a in row) for row in accuracies)])
    return markdown_table(lines)


def layer_table(timings: list[Timing], mode: str) -> str:
    """Markdown: milliseconds of each layer, ratios, the largest spread and the largest error against float64."""
    plain, batch_norm, deep_control = LAYERS
    head = ["layer", *(f"{name}, ms" for name in LAYERS), "BN / plain", "Deep Control / plain", "BN / Deep Control"]
    lines = [[*head, "spread", "error"]]
    for timing in (t for t in timings if t.mode == mode):
        ms = timing.milliseconds
        ratios = (ms[batch_norm] / ms[plain], ms[deep_control] / ms[plain], ms[batch_norm] / ms[deep_control])
        numbers = [f"{number:.2f}" for number in (*(ms[name] for name in LAYERS), *ratios)]
        numbers.append(f"{max(timing.spreads.values()):.0%}")
        lines.append([timing.shape, *numbers, f"{max(timing.errors.values()):.0e}"])
    return markdown_table(lines)


def _markdown(results: Results) -> str:
    parts = ["# Deep Control and Batch Norm, measured on this machine"]
    if not results.complete:
        parts.append("**Incomplete: the demo is running or was stopped. What is here was measured.**")
    parts.append(markdown_table([["condition", "value"], *map(list, results.conditions.items())]))
    if results.runs:
        parts += ["## Training", *results.method, training_table(results.runs)]
        parts += ["Training loss, smoothed; one line for each seed.", "![loss curves](losses.png)"]
    if results.fine_tuning:
        parts += ["## Fine-tuning", results.fine_tuning_method, fine_tuning_table(results.fine_tuning)]
        worst = max(run.deviation for run in results.fine_tuning)
        parts.append(f"Largest difference that a conversion made to an output: {worst:.0e} of the largest.")
    if results.timings:
        parts += ["## Layers", _LAYERS_TEXT]
        for mode in PASSES:
            if any(timing.mode == mode for timing in results.timings):
                parts += [f"### {mode.capitalize()}", layer_table(results.timings, mode)]
        parts.append("![layer times](layers.png)")
    return "\n\n".join(parts) + "\n"


_LAYERS_TEXT = """\
Convolutions of a ResNet-50 at stride 1, float32, channels_last; medians of interleaved runs. Inference: `eval()`, no \
gradients. Training: forward and backward in `train()`, gradients for the input and all parameters. "plain" is \
conv + ReLU. BN is timed in eager mode as it is written; at inference one can fold it into the convolution, and then \
it costs what plain costs. "spread" is the largest distance between the quartiles over the median: differences below \
it mean nothing, and a large one says that the machine was busy with other things. "error" is the largest of the three \
layers' errors against float64: of the output its largest deviation over its largest value, of each gradient relative \
in the Euclidean norm."""


def _seeds(seeds: list[int]) -> str:
    return f"seed {seeds[0]}" if len(seeds) == 1 else "seeds " + " / ".join(map(str, seeds))
