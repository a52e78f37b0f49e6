"""Tables of what was timed, and the verdict against the targets."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import geometric_mean

from deepcontrol_cuda.training.table import markdown_table

from .runner import Row, Setting

# The CPU rows of the targets; they are set for the shapes of resnet50 at batch 8.
_GEOMETRIC_MEAN_OVER_CONV_RELU = 1.00
_WORST_OVER_CONV_RELU = 1.10
_BATCH_NORM_OVER_OURS = {"float32": 1.3, "bfloat16": 1.4}


@dataclass(frozen=True)
class Verdict:
    """A measured number and, where one is set, its target and whether it is reached."""

    what: str
    value: float
    target: str = "-"
    reached: bool | None = None


def at_most(what: str, value: float, target: float) -> Verdict:
    return Verdict(what, value, f"<= {target:.2f}", value <= target)


def at_least(what: str, value: float, target: float) -> Verdict:
    return Verdict(what, value, f">= {target:.2f}", value >= target)


def rows_table(rows: list[Row]) -> str:
    """Markdown, for rows of one setting: every time with its quartiles, over conv_relu, and the errors of ours."""
    lines = [["layer", "peer", "ms", "quartiles", "/ conv_relu", "error", "budget"]]
    for row in rows:
        worst = max(row.accuracies.values(), key=lambda accuracy: accuracy.error / accuracy.budget)
        for peer, times in row.times.items():
            quartiles = f"{_milliseconds(times.lower_quartile)} to {_milliseconds(times.upper_quartile)}"
            checked = [f"{worst.error:.1e}", f"{worst.budget:.1e}"] if peer == "ours" else ["", ""]
            ratio = f"{row.ratio(peer, 'conv_relu'):.2f}"
            lines.append([row.shape, peer, _milliseconds(times.median), quartiles, ratio, *checked])
    for peer in rows[0].times if len(rows) > 1 else ():
        ratio = geometric_mean(row.ratio(peer, "conv_relu") for row in rows)
        lines.append(["geometric mean", peer, "", "", f"{ratio:.2f}", "", ""])
    return markdown_table(lines)


def verdicts(rows: list[Row]) -> list[Verdict]:
    """Ours against ``conv_relu`` and Batch Norm against ours, for each setting.

    The worst shape has a target in channels_last, Batch Norm over ours in training.
    """
    found = []
    for setting in dict.fromkeys(row.setting for row in rows):
        found += _verdicts(setting, [row for row in rows if row.setting == setting])
    return found


def _verdicts(setting: Setting, rows: list[Row]) -> list[Verdict]:
    ratios = {row.shape: row.ratio("ours", "conv_relu") for row in rows}
    mean = geometric_mean(ratios.values())
    worst = max(ratios, key=ratios.__getitem__)
    found = [at_most(f"{setting}: ours / conv_relu, geometric mean", mean, _GEOMETRIC_MEAN_OVER_CONV_RELU)]
    what = f"{setting}: ours / conv_relu, worst ({worst})"
    if setting.layout == "channels_last":
        found.append(at_most(what, ratios[worst], _WORST_OVER_CONV_RELU))
    else:
        found.append(Verdict(what, ratios[worst]))
    if "conv_bn_relu" in rows[0].times:
        over_ours = geometric_mean(row.ratio("conv_bn_relu", "ours") for row in rows)
        what = f"{setting}: conv_bn_relu / ours, geometric mean"
        if setting.mode == "training":
            found.append(at_least(what, over_ours, _BATCH_NORM_OVER_OURS[setting.dtype]))
        else:
            found.append(Verdict(what, over_ours))
    return found


def verdicts_table(found: Iterable[Verdict]) -> str:
    lines = [["what", "measured", "target", "verdict"]]
    words = {None: "-", True: "reached", False: "missed"}
    lines += [[v.what, f"{v.value:.3f}", v.target, words[v.reached]] for v in found]
    return markdown_table(lines)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.4g}"
