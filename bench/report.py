"""Tables of what was timed, and the verdicts against the targets."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Container, Iterable, Sequence

from deepcontrol_cuda.training.table import markdown_table

from . import bootstrap
from .bootstrap import Interval
from .rows import Row, Setting, Verdict

# The CPU rows of the targets; they are set for the shapes of resnet50 at batch 8.
_GEOMETRIC_MEAN_OVER_CONV_RELU = 1.00
_WORST_OVER_CONV_RELU = 1.10
_BATCH_NORM_OVER_OURS = {"float32": 1.3, "bfloat16": 1.4}


def at_most(what: str, found: float | Interval, target: float) -> Verdict:
    return _verdict(what, found, f"<= {target:.2f}", lambda value: value <= target)


def at_least(what: str, found: float | Interval, target: float) -> Verdict:
    return _verdict(what, found, f">= {target:.2f}", lambda value: value >= target)


def without_target(what: str, found: float | Interval) -> Verdict:
    return _verdict(what, found, None, lambda value: None)


def _verdict(what: str, found: float | Interval, target: str | None, reached) -> Verdict:
    if isinstance(found, Interval):
        return Verdict(what, found.value, found.low, found.high, target, reached(found.value))
    return Verdict(what, found, target=target, reached=reached(found))


def rows_table(rows: Sequence[Row], named: Callable[[Row], Container[str]] = lambda row: row.seconds) -> str:
    """Markdown, for rows of one setting: times with quartiles, ratios with intervals, the largest errors of ours.

    ``named`` gives the peers of a row that have a line of their own; geometric means are of all.
    """
    lines = [["case", "peer", "ms", "quartiles", "rounds", f"/ {rows[0].baseline}", "interval", "error", "budget"]]
    for row in rows:
        for peer, seconds in row.seconds.items():
            if peer not in named(row):
                continue
            times = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [*seconds] * 3
            lower, median, upper = map(_milliseconds, times)
            ratio = row.ratio(peer)
            errors = [found for found in row.accuracies.get(peer, {}).values() if found.budget > 0]
            worst = max(errors, key=lambda accuracy: accuracy.error / accuracy.budget, default=None)
            lines.append([
                row.case, peer, median, f"{lower} to {upper}", str(len(seconds)), f"{ratio.value:.3f}",
                f"{ratio.low:.3f} to {ratio.high:.3f}",
                *(["", ""] if worst is None else [f"{worst.error:.1e}", f"{worst.budget:.1e}"]),
            ])  # fmt: skip
    common = [peer for peer in rows[0].seconds if all(peer in row.seconds for row in rows)]
    for peer in common if len(rows) > 1 else ():
        ratio = math.exp(statistics.mean(math.log(statistics.median(row.ratios(peer))) for row in rows))
        lines.append(["geometric mean", peer, "", "", "", f"{ratio:.3f}", "", "", ""])
    return markdown_table(lines)


def by_setting(rows: Iterable[Row]) -> dict[Setting, list[Row]]:
    found: dict[Setting, list[Row]] = {}
    for row in rows:
        found.setdefault(row.setting, []).append(row)
    return found


def layer_verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """For each setting ours against ``conv_relu`` and, in training with a target, Batch Norm against ours."""
    found = []
    for setting, some in by_setting(rows).items():
        if ours := [row for row in some if {"ours", "conv_relu"} <= row.seconds.keys()]:
            ratios = [row.ratios("ours", "conv_relu") for row in ours]
            what = f"{setting}: ours / conv_relu"
            mean = bootstrap.geometric_mean(ratios)
            found.append(at_most(f"{what}, geometric mean", mean, _GEOMETRIC_MEAN_OVER_CONV_RELU))
            found.append(at_most(f"{what}, worst", bootstrap.largest(ratios), _WORST_OVER_CONV_RELU))
        if ours := [row for row in some if {"ours", "conv_bn_relu"} <= row.seconds.keys()]:
            mean = bootstrap.geometric_mean([row.ratios("conv_bn_relu", "ours") for row in ours])
            what = f"{setting}: conv_bn_relu / ours, geometric mean"
            target = _BATCH_NORM_OVER_OURS[setting.dtype]
            found.append(at_least(what, mean, target) if setting.mode == "training" else without_target(what, mean))
    return found


def row_verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Of each row ours against its baseline and Batch Norm against ours; nothing has a target."""
    found = []
    for row in rows:
        for peer, to in (("ours", row.baseline), ("conv_bn_relu", "ours")):
            if {peer, to} <= row.seconds.keys() and peer != to:
                found.append(without_target(f"{row.case}, {row.setting}: {peer} / {to}", row.ratio(peer, to)))
    return found


def verdicts_table(found: Iterable[Verdict]) -> str:
    lines = [["what", "measured", "interval", "target", "verdict"]]
    words = {None: "-", True: "reached", False: "missed"}
    for verdict in found:
        interval = "-" if verdict.low is None else f"{verdict.low:.3f} to {verdict.high:.3f}"
        lines.append([verdict.what, f"{verdict.value:.3f}", interval, verdict.target or "-", words[verdict.reached]])
    return markdown_table(lines)


def significant(value: float) -> str:
    """A positive number with three significant digits, all of them in front of the point if it is larger."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.4g}"
