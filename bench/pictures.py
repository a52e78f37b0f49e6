"""Pictures of a run: ratio bars, roofline, scaling curves, bandwidth, overhead and memory, as matplotlib's figures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import geometric_mean, median
from typing import TYPE_CHECKING, Any

from . import bootstrap
from .bootstrap import Interval
from .reading import is_ours
from .report import significant
from .rows import Ceilings, Row, Run, Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEAN = "geometric mean"
# Okabe and Ito's colours, which stay apart for colour-blind readers; blue and green are ours.
_COLOURS = {
    "ours": "#0072B2",
    "conv_bn_relu": "#D55E00",
    "conv_bn": "#D55E00",
    "conv_bn_relu_compiled": "#E69F00",
    "conv_bn_compiled": "#E69F00",
    "conv": "#999999",
    "conv_relu": "#555555",
    "copy": "#999999",
    "conv_instance_norm_relu": "#F0E442",
    "conv_group_norm_relu": "#CC79A7",
}
_OTHER_COLOURS = {
    True: ("#56B4E9", "#009E73", "#80CDC1", "#003C5A"),
    False: ("#882255", "#DDCC77", "#BBBBBB", "#332288"),
}
_WORDS = {"bn": "BN", "relu": "ReLU", "abn": "ABN"}
_NORMS = {
    "group + norm": "GroupNorm",
    "instance + norm": "InstanceNorm",
    "sync + BN": "SyncBatchNorm",
    "inplace + ABN": "InPlace-ABN",
}
_SUFFIXES = ("compiled", "folded")
# More bars of one row than these are not told apart; the tables have all peers.
_PEERS = 6
# Above it a bar is cut and its number written at its end: one slow peer would make all others short.
_LONGEST = 2.5
# Where a point's label may stand, the first choice first.
_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (0.7, 0.7), (-0.7, 0.7), (0.7, -0.7), (-0.7, -0.7))
# Labels are read across lines.
_ON_LINES = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
_AXES = ("batch", "channels", "size", "threads")


def label(peer: str, command: str = "layers") -> str:
    """The name of a peer in words: "conv_bn_relu" is "conv + BN + ReLU", or of a run of models "Batch Norm"."""
    if is_ours(peer):
        return peer.replace("ours", "Deep Control", 1)
    if command == "models":
        peer = {"conv_relu": "no norm"}.get(peer, peer.removeprefix("conv_").replace("_relu", ""))
    in_place, parts = peer.endswith("_"), peer.rstrip("_").split("_")
    prefix = [part for part in parts if part in _SUFFIXES]
    text = " + ".join(_WORDS.get(part, part) for part in parts if part not in _SUFFIXES)
    for found, word in _NORMS.items():
        text = text.replace(found, word)
    text = "Batch Norm" if text == "BN" else text
    return " ".join([*prefix, text]) + (" in place" if in_place else "")


def colours(peers: Sequence[str]) -> dict[str, str]:
    left = {own: iter(found * len(peers)) for own, found in _OTHER_COLOURS.items()}
    return {peer: _COLOURS.get(peer) or next(left[is_ours(peer)]) for peer in peers}


def shown(rows: Sequence[Row]) -> list[str]:
    """The peers that bars are drawn of, in order: those with a colour of their own, then ours, then the others."""
    peers = list(dict.fromkeys(peer for row in rows for peer in row.seconds if peer != row.baseline))
    first = sorted(peers, key=lambda peer: (peer not in _COLOURS, not is_ours(peer)))[:_PEERS]
    return [peer for peer in peers if peer in first]


def means(run: Run) -> Figure:
    """Geometric means over the cases, of Batch Norm and ours, with 95 % intervals: the run at a glance."""
    every = ("conv_bn_relu", "conv_bn_relu_compiled", "ours")
    peers = [peer for peer in every if any(peer in row.seconds for row in run.rows)]
    modes = list(dict.fromkeys(row.setting.mode for row in run.rows))
    figure = _figure(9.0, 3.1 * len(modes) + 0.6)
    width = 0.8 / len(peers)
    for panel, mode in zip(figure.subplots(len(modes), 1, squeeze=False).flat, modes):
        groups = _grouped([row for row in run.rows if row.setting.mode == mode], lambda row: row.setting)
        for i, peer in enumerate(peers):
            timed = {g: rows for g, rows in enumerate(groups.values()) if all(peer in row.seconds for row in rows)}
            places = [g + (i - (len(peers) - 1) / 2) * width for g in timed]
            _bars(panel, places, [mean(rows, peer) for rows in timed.values()], width, _COLOURS[peer], peer)
        panel.axhline(1, color="black", linewidth=0.9, linestyle=":")
        panel.set_xticks(range(len(groups)), [_place(setting, run) for setting in groups])
        panel.set_ylabel(f"time / {label(run.rows[0].baseline)}")
        panel.set_title({"training": "forward + backward"}.get(mode, mode), fontsize=10)
        panel.margins(y=0.14)
    count = len(dict.fromkeys(row.case for row in run.rows))
    _legend(figure, f"geometric mean over {count} layers, 95 % intervals; less is faster", peers)
    return figure


def mean(rows: Sequence[Row], peer: str, to: str | None = None) -> Interval:
    """Geometric mean of the rows' ratios to a peer or the baseline."""
    return bootstrap.geometric_mean([row.ratios(peer, to) for row in rows])


def typical(rows: Sequence[Row], peer: str, to: str | None = None) -> float:
    """The same without its interval."""
    return geometric_mean(median(row.ratios(peer, to)) for row in rows)


def _bars(
    panel: Axes, places: Sequence[float], found: Sequence[Interval], width: float, colour: str, peer: str
) -> None:
    if not found:
        return
    heights = [interval.value for interval in found]
    reach = [[i.value - i.low for i in found], [i.high - i.value for i in found]]
    style = {"error_kw": {"elinewidth": 0.9}, "ecolor": "black", "label": label(peer)}
    bars = panel.bar(places, heights, width * 0.94, color=colour, yerr=reach, **style)
    panel.bar_label(bars, [f"{height:.2f}" for height in heights], fontsize=8, padding=3, bbox=_ON_LINES)


def ratios(rows: Sequence[Row], title: str, command: str = "layers") -> Figure:
    """Time over the baseline: a panel a layout and mode, a group of bars a case and one for the geometric mean."""
    panels = _grouped(rows, lambda row: (row.setting.layout, row.setting.mode, row.setting.batch, row.setting.threads))
    peers = shown(rows)
    tints = colours(peers)
    cases = list(dict.fromkeys(row.case for row in rows))
    groups = [*cases, MEAN] if len(cases) > 1 else cases
    height = 0.8 / len(peers)
    figure = _figure(2.2 + 3.0 * len(panels), 1.3 + max(2.0, len(groups) * (0.12 + 0.15 * len(peers))))
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for panel, (key, own) in zip(axes, panels.items()):
        found = {row.case: row for row in own}
        values = [v for row in own for peer in peers if peer in row.seconds for v in [median(row.ratios(peer))]]
        longest = min(_LONGEST, max(values))
        for i, peer in enumerate(peers):
            bars = [
                (g, median(found[case].ratios(peer))) for g, case in enumerate(cases) if _has(found.get(case), peer)
            ]
            if len(bars) == len(cases) > 1:
                bars.append((len(cases), geometric_mean([value for _, value in bars])))
            places = [g + (i - (len(peers) - 1) / 2) * height for g, _ in bars]
            panel.barh(
                places, [min(v, longest) for _, v in bars], 0.92 * height, color=tints[peer], label=label(peer, command)
            )
            style = {"va": "center", "fontsize": 6.5, "bbox": _ON_LINES}
            for place, (g, value) in zip(places, bars):
                if value > longest or is_ours(peer) or groups[g] == MEAN:
                    panel.text(min(value, longest) + 0.015 * longest, place, f"{value:.2f}", **style)
        panel.axvline(1, color="black", linewidth=0.9, linestyle=":")
        if len(cases) > 1:
            panel.axhline(len(cases) - 0.5, color="black", linewidth=0.6)
        panel.set_xlim(0, 1.14 * longest)
        panel.set_ylim(len(groups) - 0.45, -0.55)
        panel.set_yticks(range(len(groups)), groups)
        panel.tick_params(axis="y", length=0)
        panel.set_xlabel(f"time / {label(own[0].baseline, command)}", fontsize=9)
        panel.set_title(_panel_title(key, panels), fontsize=10)
    _legend(figure, f"{title}; less is faster", peers)
    return figure


def roofline(run: Run) -> Figure:
    """Operations a second over operations a byte, below what this machine's products and copies reach."""
    ceilings = {ceiling.threads: ceiling for ceiling in run.ceilings}
    rows = [row for row in run.rows if _in_roofline(row, ceilings)]
    panels = _grouped(rows, lambda row: (row.setting.dtype, row.setting.layout, row.setting.mode, row.setting.threads))
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    cases = list(dict.fromkeys(row.case for row in rows))
    figure = _figure(3.7 * columns, 3.4 * lines + 0.8 + 0.15 * -(-len(cases) // 4))
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    peers = [peer for peer in ("conv", "ours") if any(peer in row.seconds for row in rows)]
    placed: list[tuple[Axes, list[tuple[float, float, str]]]] = []
    for panel, (key, own) in zip(axes, panels.items()):
        _roof(panel, ceilings[key[3]], key[0], [row.operations / row.bytes for row in own])
        labels = []
        for peer in peers:
            points = [(_intensity(row), _speed(row, peer), row.case) for row in own if peer in row.seconds]
            x, y, names = zip(*points)
            marker, fill = ("o", _COLOURS["ours"]) if peer == "ours" else ("s", "none")
            panel.scatter(
                x, y, 26, marker=marker, facecolors=fill, edgecolors=_COLOURS[peer], label=label(peer), zorder=3
            )
            labels += zip(x, y, [str(cases.index(name) + 1) if peer == "ours" else "" for name in names])
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_ylim(0.7 * min(y for _, y, _ in labels), 1.6 * _peak(ceilings[key[3]], key[0]) / 1e9)
        _ticks(panel)
        placed.append((panel, labels))
        panel.set_title(_words(key, panels), fontsize=10)
        panel.set_xlabel("operations / byte", fontsize=9)
        panel.grid(alpha=0.25)
    for panel in axes[::columns]:
        panel.set_ylabel("operations / second, 1e9", fontsize=9)
    for panel in axes[len(panels) :]:
        panel.set_visible(False)
    _legend(figure, "lines: this machine's fastest product and copy, measured in the run", peers)
    if len(cases) <= 40:
        numbered = [f"{i} {case}" for i, case in enumerate(cases, 1)]
        text = "\n".join("    ".join(numbered[at : at + 4]) for at in range(0, len(numbered), 4))
        figure.supxlabel(text, fontsize=7.5)
    # Only now is known where in the figure the points are.
    figure.draw_without_rendering()
    for panel, labels in placed:
        _place_labels(panel, labels, figure.dpi / 72)
    return figure


def _in_roofline(row: Row, ceilings: Mapping[int, Ceilings]) -> bool:
    ceiling = ceilings.get(row.setting.threads)
    known = ceiling is not None and ceiling.copy_bytes_per_second and _peak(ceiling, row.setting.dtype)
    return bool(known and row.bytes and row.operations and "ours" in row.seconds)


def _peak(ceilings: Ceilings, dtype: str) -> float | None:
    return getattr(ceilings, f"{dtype}_operations_per_second", None)


def _intensity(row: Row) -> float:
    return row.operations / row.bytes


def _speed(row: Row, peer: str) -> float:
    return row.operations / median(row.seconds[peer]) / 1e9


def _roof(panel: Axes, ceilings: Ceilings, dtype: str, intensities: Sequence[float]) -> None:
    peak, copy = _peak(ceilings, dtype) / 1e9, ceilings.copy_bytes_per_second / 1e9
    ridge = peak / copy
    left, right = min(*intensities, ridge) / 2, max(*intensities, ridge) * 2
    panel.plot([left, ridge, right], [left * copy, peak, peak], color="black", linewidth=1.2)
    panel.text(right, peak * 1.06, f"{peak:.0f} GFLOP/s", ha="right", fontsize=7.5)
    panel.text(ridge, peak * 1.06, f"{copy:.0f} GB/s", ha="center", fontsize=7.5)


def _place_labels(panel: Axes, points: Sequence[tuple[float, float, str]], pixels: float) -> None:
    """Write each text at the first place around its point that no point or earlier text has, at ``pixels`` a point."""
    taken = [tuple(panel.transData.transform(point[:2])) for point in points]
    for (x, y, text), (left, low) in zip(points, list(taken)):
        if not text:
            continue
        offsets = [(r * dx, r * dy) for r in (8, 15, 22) for dx, dy in _DIRECTIONS]
        free = [
            (dx, dy) for dx, dy in offsets
            if all(max(abs(left + dx * pixels - a), abs(low + dy * pixels - b)) > 6 * pixels for a, b in taken)
        ]  # fmt: skip
        dx, dy = (free or offsets)[0]
        taken.append((left + dx * pixels, low + dy * pixels))
        style = {"textcoords": "offset points", "fontsize": 7, "ha": "center", "va": "center"}
        panel.annotate(text, (x, y), (dx, dy), **style).set_in_layout(False)


def scaling(run: Run) -> Figure:
    """Seconds over batch, channels, map size and threads, as far as the run has them: a line a peer, both axes logs."""
    series = list(_series(run.rows))
    kinds = list(dict.fromkeys((s.dtype, s.layout, s.mode) for _, s, _, _ in series))
    axes = [axis for axis in _AXES if any(axis == found for found, *_ in series)]
    peers = shown(run.rows)
    peers = [run.rows[0].baseline, *peers][: _PEERS + 1]
    tints = colours(peers)
    figure = _figure(3.4 * len(axes) + 0.4, 2.9 * len(kinds) + 0.7)
    panels = figure.subplots(len(kinds), len(axes), squeeze=False)
    for i, kind in enumerate(kinds):
        for j, axis in enumerate(axes):
            panel = panels[i][j]
            own = [s for s in series if s[0] == axis and (s[1].dtype, s[1].layout, s[1].mode) == kind]
            if not own:
                panel.set_visible(False)
                continue
            _, _, fixed, rows = max(own, key=lambda s: len(s[3]))
            for peer in peers:
                points = [(value, 1e3 * median(row.seconds[peer])) for value, row in rows if peer in row.seconds]
                style = {"marker": "o", "markersize": 3.5, "linewidth": 2.0 if peer == "ours" else 1.2}
                if points:
                    panel.plot(*zip(*points), color=tints[peer], label=label(peer), **style)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            values = [value for value, _ in rows]
            panel.set_xticks(values, [f"{value:g}" for value in values])
            panel.minorticks_off()
            _ticks(panel)
            panel.set_xlabel(f"{axis}\n{fixed}", fontsize=8)
            panel.grid(alpha=0.25)
            panel.set_title(", ".join(kind), fontsize=9)
        panels[i][0].set_ylabel("milliseconds")
    _legend(figure, "", peers)
    return figure


def _ticks(panel: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    panel.yaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.yaxis.set_major_formatter("{x:g}")


def _series(rows: Sequence[Row]) -> Iterator[tuple[str, Setting, str, list[tuple[float, Row]]]]:
    """Rows that differ along one axis alone: the axis, a setting of theirs, what is the same, and rows by value."""
    places = [(place, row) for row in rows if (place := _place_of(row)) is not None]
    for axis in _AXES:
        groups: dict[Any, dict[float, Row]] = {}
        for place, row in places:
            rest = tuple((name, value) for name, value in place.items() if name != axis)
            kind = (row.setting.dtype, row.setting.layout, row.setting.mode)
            groups.setdefault((kind, rest), {})[place[axis]] = row
        for (_, rest), found in groups.items():
            if len(found) > 1:
                fixed = ", ".join(f"{value} {name}" if name == "threads" else f"{name} {value}" for name, value in rest)
                yield axis, next(iter(found.values())).setting, fixed, sorted(found.items(), key=lambda item: item[0])


def _place_of(row: Row) -> dict[str, Any] | None:
    found = re.match(r"(\d+x\d+), (\d+) to (\d+), (\d+)x\d+(.*)", row.case)
    if not found:
        return None
    kernel, channels, _, size, rest = found.groups()
    place = {"kernel": kernel + rest, "batch": row.setting.batch, "channels": int(channels)}
    return place | {"size": int(size), "threads": row.setting.threads}


def bandwidth(run: Run) -> Figure:
    """Bytes a second of each kernel, beside a copy of as many bytes: a panel a dtype and layout."""
    rows = [row for row in run.rows if row.bytes]
    panels = _grouped(rows, lambda row: (row.setting.dtype, row.setting.layout, row.setting.mode, row.setting.threads))
    cases = list(dict.fromkeys(row.case for row in rows))
    peers = _timed(rows)
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure = _figure(2.6 + 2.7 * columns, 0.8 + lines * (0.7 + len(cases) * (0.12 + 0.16 * len(peers))))
    axes = list(figure.subplots(lines, columns, squeeze=False, sharey=True).flat)
    for panel, (key, own) in zip(axes, panels.items()):
        bars = {peer: [] for peer in peers}
        for peer, row in ((peer, row) for peer in peers for row in own if peer in row.seconds):
            value = row.bytes / median(row.seconds[peer]) / 1e9
            share = "" if peer == row.baseline else f", {1 / median(row.ratios(peer)):.0%}"
            bars[peer].append((cases.index(row.case), value, significant(value) + share))
        _across(panel, cases, bars)
        panel.set_xlabel("GB / s", fontsize=9)
        panel.set_title(_words(key, panels), fontsize=10)
    for panel in axes[len(panels) :]:
        panel.set_visible(False)
    _legend(figure, f"share of {label(rows[0].baseline)} behind the number", peers)
    return figure


def overhead(run: Run) -> Figure:
    """Microseconds that a tiny layer costs by each peer: a panel a case, a group of bars a setting."""
    rows = [row for row in run.rows if row.seconds]
    panels = _grouped(rows, lambda row: row.case)
    settings = list(dict.fromkeys(row.setting for row in rows))
    peers = _timed(rows)
    figure = _figure(2.6 + 3.6 * len(panels), 1.5 + len(settings) * (0.12 + 0.16 * len(peers)))
    names = [f"{_place(setting, run)}\n{setting.mode}" for setting in settings]
    for panel, (case, own) in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels.items()):
        bars = {peer: [] for peer in peers}
        for peer, row in ((peer, row) for peer in peers for row in own if peer in row.seconds):
            value = 1e6 * median(row.seconds[peer])
            bars[peer].append((settings.index(row.setting), value, significant(value)))
        _across(panel, names, bars)
        panel.set_xlabel("microseconds", fontsize=9)
        panel.set_title(case, fontsize=10)
    _legend(figure, "a layer so small that its time is that of the calls; less is faster", peers)
    return figure


def _timed(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(peer for row in rows for peer in row.seconds))[: _PEERS + 1]


def _across(panel: Axes, groups: Sequence[str], bars: Mapping[str, Sequence[tuple[int, float, str]]]) -> None:
    """Bars in groups from top to bottom: by peer the index of the group, the length and the text behind it."""
    tints = colours(list(bars))
    height = 0.8 / len(bars)
    for i, (peer, some) in enumerate(bars.items()):
        places = [g + (i - (len(bars) - 1) / 2) * height for g, _, _ in some]
        panel.barh(places, [value for _, value, _ in some], 0.92 * height, color=tints[peer], label=label(peer))
        for place, (_, value, text) in zip(places, some):
            panel.text(value, place, f" {text}", va="center", fontsize=6.5)
    panel.set_xlim(right=1.35 * panel.get_xlim()[1])
    panel.set_ylim(len(groups) - 0.45, -0.55)
    panel.set_yticks(range(len(groups)), groups, fontsize=8)
    panel.tick_params(axis="y", length=0)


def memory(run: Run) -> Figure:
    """Bytes kept for backward and most bytes held at a time, in MiB: a panel a dtype, layout and kind."""
    found = [(row, what) for what in ("kept", "peak") for row in run.rows if getattr(row, f"{what}_bytes")]
    panels = _grouped(
        found, lambda pair: (pair[1], pair[0].setting.dtype, pair[0].setting.layout, pair[0].setting.mode)
    )
    peers = list(dict.fromkeys(peer for row, what in found for peer in getattr(row, f"{what}_bytes")))[: _PEERS + 1]
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    cases = list(dict.fromkeys(row.case for row, _ in found))
    figure = _figure(2.6 + 2.9 * columns, 0.9 + lines * (0.75 + len(cases) * (0.12 + 0.17 * len(peers))))
    axes = list(figure.subplots(lines, columns, squeeze=False, sharey=True).flat)
    for panel, (key, own) in zip(axes, panels.items()):
        bars = {peer: [] for peer in peers}
        for row, what in own:
            count = getattr(row, f"{what}_bytes")
            to = next((count[name] for name in ("conv_bn_relu", "conv_bn") if name in count), None)
            for peer in (peer for peer in peers if peer in count):
                value = count[peer] / 2**20
                share = f", {count[peer] / to:.2f}" if to and is_ours(peer) else ""
                bars[peer].append((cases.index(row.case), value, f"{value:.3g}{share}"))
        _across(panel, cases, bars)
        panel.set_xlabel({"kept": "kept for backward, MiB", "peak": "most held at a time, MiB"}[key[0]], fontsize=9)
        panel.set_title(_words(key[1:], [k[1:] for k in panels]), fontsize=10)
    for panel in axes[len(panels) :]:
        panel.set_visible(False)
    _legend(figure, "behind ours: of Batch Norm's", peers)
    return figure


def _has(row: Row | None, peer: str) -> bool:
    return row is not None and peer in row.seconds


def _grouped(items: Sequence[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _place(setting: Setting, run: Run) -> str:
    """dtype and layout, and what else is not the same in all settings."""
    parts = [setting.dtype, setting.layout]
    settings = [row.setting for row in run.rows]
    for name in ("batch", "threads"):
        if len({getattr(s, name) for s in settings}) > 1:
            parts.append(f"{name} {getattr(setting, name)}")
    return "\n".join(parts)


def _words(key: Sequence[Any], keys: Sequence[Sequence[Any]]) -> str:
    """The words of a key, and its numbers of threads where they are not the same in all ``keys``."""
    words = [part for part in key if isinstance(part, str)]
    numbers = [
        f"{part} threads" for i, part in enumerate(key) if isinstance(part, int) and len({k[i] for k in keys}) > 1
    ]
    return ", ".join([*words, *numbers])


def _panel_title(key: tuple[str, str, int, int], keys: Sequence[tuple[str, str, int, int]]) -> str:
    layout, mode, batch, threads = key
    parts = [layout, mode]
    parts += [f"batch {batch}"] if len({k[2] for k in keys}) > 1 else []
    return ", ".join(parts + ([f"{threads} threads"] if len({k[3] for k in keys}) > 1 else []))


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    # On white, also where the page around is dark.
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _legend(figure: Figure, title: str, peers: Sequence[str]) -> None:
    found = {}
    for panel in figure.axes:
        found |= {name: handle for handle, name in zip(*panel.get_legend_handles_labels())}
    columns = max(1, min(len(found), int(figure.get_figwidth() / 2.1)))
    style = {"loc": "outside upper center", "ncols": columns, "frameon": False, "fontsize": 9, "title_fontsize": 9.5}
    figure.legend(found.values(), found.keys(), title=title or None, **style)


def pictures(run: Run) -> dict[str, Callable[[], Figure]]:
    """What can be drawn of a run, by name; each is drawn when called. Empty where it has no rows."""
    timed = [row for row in run.rows if len(row.seconds) > 1]
    found: dict[str, Callable[[], Figure]] = {}
    if run.command == "scaling" and any(True for _ in _series(run.rows)):
        return {"scaling": lambda: scaling(run)}
    if run.command == "bandwidth" and any(row.bytes for row in timed):
        return {"bandwidth": lambda: bandwidth(run)}
    if run.command == "overhead" and timed:
        return {"overhead": lambda: overhead(run)}
    if timed and run.command == "layers" and all("ours" in row.seconds for row in timed):
        found["means"] = lambda: means(run)
    for dtype, rows in _grouped(timed, lambda row: row.setting.dtype).items():
        found[f"ratios_{dtype}"] = lambda rows=rows, dtype=dtype: ratios(rows, dtype, run.command)
    ceilings = {ceiling.threads: ceiling for ceiling in run.ceilings}
    if any(_in_roofline(row, ceilings) for row in timed):
        found["roofline"] = lambda: roofline(run)
    if any(row.kept_bytes or row.peak_bytes for row in run.rows):
        found["memory"] = lambda: memory(run)
    return found
