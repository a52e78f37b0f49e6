"""The section "Measured" of README.md and its pictures, made of the newest files in bench/results."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, median

from deepcontrol_cuda import files
from deepcontrol_cuda.training.table import markdown_table

from . import bootstrap, plot
from .options import RESULTS
from .pictures import label, mean, means, roofline, scaling, typical
from .reading import InputError, is_ours
from .report import by_setting, significant, verdicts_table
from .rows import Row, Run, Setting, UnknownFormatError, read

HELP = "write the section Measured of README.md and its pictures from the newest files in bench/results"
ROOT = Path(__file__).resolve().parents[1]
BEGIN = "<!-- Written by `python -m bench readme`, up to the next such line. -->"
END = "<!-- End of what `python -m bench readme` writes. -->"
PICTURES = "docs/pictures"
_BATCH_NORM, _BARE = "conv_bn_relu", "conv_relu"
_MEAN_SHIFT = "ours, mean shift rejection"
# The set of shapes and the batch that the targets are set for.
_SET, _BATCH = "resnet50", 8
_LAYERS = f"layers, {_SET}"


@dataclass(frozen=True)
class Found:
    """A run and the name of its file."""

    name: str
    run: Run

    @property
    def link(self) -> str:
        return f"[`{self.name}`](bench/results/{self.name})"


def newest(folder: Path) -> dict[str, Found]:
    """The last whole run of each command on a CPU, by command; "layers, SHAPES" and "gpu, NAME" for shapes and GPUs.

    Quick runs and files of other formats are passed over.
    """
    found = {}
    for path in sorted(folder.glob("*.json"), key=_order):
        try:
            run = read(path)
        except UnknownFormatError:
            continue
        if run.complete and not run.conditions.get("quick"):
            found[_key(run)] = Found(path.name, run)
    return found


def _order(path: Path) -> tuple[str, int]:
    number = re.search(r"_(\d+)$", path.stem)
    return path.stem[:10], int(number[1]) if number else 1


def _key(run: Run) -> str:
    if gpu := run.content.get("gpu"):
        return f"{run.command}, {gpu['name']}"
    return f"layers, {_shapes(run)}" if run.command == "layers" else run.command


def _shapes(run: Run) -> str:
    batch = run.conditions.get("batch", _BATCH)
    return run.conditions.get("set", _SET) + ("" if batch == _BATCH else f", batch {batch}")


def section(found: Mapping[str, Found]) -> str:
    """Markdown between the two comments. Raises ``InputError`` where there is nothing to write of."""
    if _LAYERS not in found:
        raise InputError(
            "bench/results: no whole run of 'layers' in the format of this version; make one: python -m bench layers"
        )
    parts = list(_layers(found[_LAYERS]))
    parts += _other_shapes([one for key, one in found.items() if key.startswith("layers, ") and key != _LAYERS])
    for command, write in _PARTS.items():
        if command in found:
            parts += write(found[command])
    for one in found.values():
        if "gpu" in one.run.content:
            parts.append(f"On {one.run.content['gpu']['name']} ({one.link}; [docs/hardware.md](docs/hardware.md)):")
            parts.append(verdicts_table(one.run.verdicts))
    return "\n\n".join(parts)


def drawings(found: Mapping[str, Found]) -> dict[str, tuple[Run, Callable]]:
    """By file name what README's pictures are drawn of, and by what."""
    wanted = {"layers.svg": (_LAYERS, means), "roofline.svg": (_LAYERS, roofline)}
    wanted["scaling.svg"] = ("scaling", scaling)
    return {name: (found[key].run, draw) for name, (key, draw) in wanted.items() if key in found}


def _conditions(one: Found, what: str) -> str:
    run = one.run
    rounds = [len(seconds) for row in run.rows for seconds in row.seconds.values()]
    parts = [f"{run.machine['cpu']}, {run.machine['cores']} cores", f"torch {run.versions['torch']}"]
    parts += [f"{name} {_span([getattr(row.setting, name) for row in run.rows])}" for name in ("threads", "batch")]
    parts += [f"{_span(rounds)} interleaved rounds"] if rounds else []
    return f"{what}: {', '.join(parts)}; {run.date}, {_commit(run)}{one.link}."


def _commit(run: Run) -> str:
    if run.commit is None:
        return ""
    return f"commit {run.commit['hash'][:7]}{' with changes' if run.commit['dirty'] else ''}, "


def _span(values: Sequence[int]) -> str:
    least, most = min(values, default=0), max(values, default=0)
    return str(least) if least == most else f"{least} to {most}"


def _layers(one: Found) -> Iterator[str]:
    run = one.run
    yield "### Layers"
    yield _conditions(one, "Layers of ResNet-50")
    yield (
        f"![Time over conv + ReLU of conv + BN + ReLU and of Deep Control]({PICTURES}/layers.svg)\n\n"
        "Time over conv + ReLU, geometric mean over the layers, with the 95 % interval of ours and its worst layer. "
        "Training is forward + backward; conv + ReLU has no norm at all. Whether a target is reached goes by the "
        "measured value, wherever its interval ends."
    )
    yield _means_table(run)
    yield from _targets(run)
    yield _layer_table(
        [row for row in run.rows if (row.setting.layout, row.setting.mode) == ("channels_last", "training")]
    )
    yield _reading(run.rows)
    if any(ceilings.copy_bytes_per_second for ceilings in run.ceilings):
        yield f"![Roofline of the layers, bare convolution and Deep Control]({PICTURES}/roofline.svg)"


def _means_table(run: Run) -> str:
    rows = run.rows
    peers = list(dict.fromkeys(p for row in rows for p in row.seconds if p != row.baseline and not is_ours(p)))
    lines = [
        [
            "dtype, layout, mode",
            *map(label, peers),
            "ours",
            "interval",
            "worst layer of ours",
            "conv + BN + ReLU over ours",
        ]
    ]
    for setting, own in by_setting(rows).items():
        ours = mean(own, "ours")
        cells = [f"{typical(own, p):.2f}" if all(p in row.seconds for row in own) else "-" for p in peers]
        over = typical(own, _BATCH_NORM, "ours") if all(_BATCH_NORM in row.seconds for row in own) else None
        lines.append([
            _place(setting, run), *cells, f"**{ours.value:.2f}**", f"{ours.low:.2f} to {ours.high:.2f}",
            _worst(own), f"{over:.2f}" if over else "-",
        ])  # fmt: skip
    return markdown_table(lines)


def _place(setting: Setting, run: Run) -> str:
    """dtype, layout and mode, and what else the rows of ``run`` do not have in common."""
    parts = [setting.dtype, setting.layout, setting.mode]
    for name in ("batch", "threads"):
        if len({getattr(row.setting, name) for row in run.rows}) > 1:
            parts.append(f"{name} {getattr(setting, name)}")
    return ", ".join(parts)


def _targets(run: Run) -> Iterator[str]:
    judged = [verdict for verdict in run.verdicts if verdict.reached is not None]
    missed = [verdict for verdict in judged if not verdict.reached]
    if judged:
        rest = "; missed:" if missed else "."
        yield f"Targets reached: {len(judged) - len(missed)} of {len(judged)}{rest}"
    if missed:
        yield verdicts_table(missed)


def _layer_table(rows: Sequence[Row]) -> str:
    threads, layout = max(row.setting.threads for row in rows), rows[0].setting.layout
    rows = [row for row in rows if (row.setting.threads, row.setting.layout) == (threads, layout)]
    peers = (_BARE, _BATCH_NORM, "ours")
    settings = list(by_setting(rows))
    head = [f"{s.dtype}: {label(p) if p != 'ours' else p}, ms" for s in settings for p in peers]
    lines = [[f"layer, {layout}, forward + backward, threads: {threads}", *head]]
    found = {(row.case, row.setting): row for row in rows}
    for case in dict.fromkeys(row.case for row in rows):
        cells = [_milliseconds(found.get((case, setting)), peer) for setting in settings for peer in peers]
        lines.append([case, *cells])
    return markdown_table(lines)


def _milliseconds(row: Row | None, peer: str) -> str:
    return "-" if row is None or peer not in row.seconds else f"{1e3 * median(row.seconds[peer]):.4g}"


def _reading(rows: Sequence[Row]) -> str:
    """In which rows ours is slower or faster for certain, and where it gains most on Batch Norm and least."""
    ratios = [row.ratio("ours") for row in rows]
    faster, slower = sum(ratio.high < 1 for ratio in ratios), sum(ratio.low > 1 for ratio in ratios)
    text = (
        f"Read it so. Peers take turns within each round and ratios are taken within rounds, so a slow spell falls on "
        f"all. Of {len(rows)} layers and settings ours is faster than conv + ReLU in {faster} and slower in {slower}, "
        "with the whole interval on that side of 1."
    )
    gains = [(median(row.ratios(_BATCH_NORM, "ours")), row) for row in rows if _BATCH_NORM in row.seconds]
    if gains:
        least, most = (pick(gains, key=lambda gain: gain[0]) for pick in (min, max))
        words = (f"{gain:.2f} times ({row.case}; {row.setting})" for gain, row in (most, least))
        text += " Over conv + BN + ReLU it gains most with {} and least with {}.".format(*words)
    return (
        f"{text} Files hold every round, the error of each result of ours beside the one that is let pass, and what "
        "was left out, with the reason."
    )


def _other_shapes(found: Sequence[Found]) -> Iterator[str]:
    if not found:
        return
    head = ["shapes", "dtype, layout, mode", "layers", "ours over conv + ReLU", "worst layer of ours"]
    lines = [[*head, "conv + BN + ReLU over ours"]]
    for one in found:
        for setting, rows in by_setting(one.run.rows).items():
            ours, over = (_interval(mean(rows, *peers)) for peers in (("ours",), (_BATCH_NORM, "ours")))
            shapes = f"{_shapes(one.run)} ({one.link})"
            lines.append([shapes, _place(setting, one.run), str(len(rows)), ours, _worst(rows), over])
    yield "All other shapes that were timed, geometric means with 95 % intervals:"
    yield markdown_table(lines)
    reached = []
    for one in found:
        judged = [verdict.reached for verdict in one.run.verdicts if verdict.reached is not None]
        if judged:
            reached.append(f"{sum(judged)} of {len(judged)} with {_shapes(one.run)}")
    if reached:
        yield f"Targets reached: {', '.join(reached)}. The files have them all."


def _worst(rows: Sequence[Row]) -> str:
    worst = max(rows, key=lambda row: median(row.ratios("ours")))
    return f"{median(worst.ratios('ours')):.2f} ({worst.case})"


def _interval(found: bootstrap.Interval | None) -> str:
    return "-" if found is None else f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"


def _blocks(one: Found) -> Iterator[str]:
    yield "### Blocks"
    yield _conditions(one, "Blocks of layers")
    lines = [
        ["block", "dtype, layout, mode", "without norm, ms", "with Batch Norm, ms", "ours, ms", "Batch Norm over ours"]
    ]
    for row in one.run.rows:
        times = [_milliseconds(row, peer) for peer in (_BARE, _BATCH_NORM, "ours")]
        lines.append([row.case, _place(row.setting, one.run), *times, _interval(_ratio(row, "ours"))])
    yield markdown_table(lines)


def _ratio(row: Row, peer: str) -> bootstrap.Interval | None:
    """Batch Norm's time over the peer's."""
    return row.ratio(_BATCH_NORM, peer) if {_BATCH_NORM, peer} <= row.seconds.keys() else None


def _models(one: Found) -> Iterator[str]:
    yield "### Models"
    yield _conditions(one, "Whole models before and after `replace_conv_bn`")
    yield (
        "Training is a whole step: forward, loss, backward and the optimizer. Behind the milliseconds Batch Norm's "
        "time over each peer's, with 95 % intervals; peak memory is what tensors of a step hold at a time, without "
        "parameters, their gradients and the optimizer's state."
    )
    others = {_BARE: "no norm", f"{_BATCH_NORM}_compiled": "Batch Norm, compiled", f"{_BATCH_NORM}_folded": "folded"}
    head = ["Batch Norm, ms", "Deep Control, ms", "over Deep Control", "over Mean Shift Rejection"]
    head += [f"over {name}" for name in others.values()]
    lines = [["model", "dtype, layout, mode", *head, "peak, MiB: Batch Norm", "Deep Control"]]
    for row in one.run.rows:
        times = [_milliseconds(row, peer) for peer in (_BATCH_NORM, "ours")]
        ratios = [_interval(_ratio(row, peer)) for peer in ("ours", _MEAN_SHIFT, *others)]
        peaks = [f"{row.peak_bytes[p] / 2**20:.0f}" if p in row.peak_bytes else "-" for p in (_BATCH_NORM, "ours")]
        lines.append([row.case, _place(row.setting, one.run), *times, *ratios, *peaks])
    yield markdown_table(lines)
    yield from _targets(one.run)


def _bandwidth(one: Found) -> Iterator[str]:
    yield "### Bandwidth"
    yield _conditions(one, "Bytes a second of the kernels, beside a copy of as many bytes")
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in one.run.rows:
        if row.bytes and "ours" in row.seconds:
            op = row.case.rpartition(", ")[0]
            groups.setdefault((op, _place(row.setting, one.run)), []).append(row)
    lines = [["kernel", "dtype, layout, mode", "GB/s", "share of a copy, geometric mean"]]
    for key, rows in groups.items():
        speeds = [row.bytes / median(row.seconds["ours"]) / 1e9 for row in rows]
        spread = " to ".join(significant(speed) for speed in dict.fromkeys((min(speeds), max(speeds))))
        share = bootstrap.geometric_mean([row.ratios(row.baseline, "ours") for row in rows])
        lines.append([*key, spread, _interval(share)])
    yield markdown_table(lines)


def _memory(one: Found) -> Iterator[str]:
    yield "### Memory"
    yield f"Bytes kept for backward, ours over conv + BN + ReLU, geometric mean over the layouts; {one.link}."
    ratios: dict[str, dict[str, list[float]]] = {}
    for row in one.run.rows:
        if {"ours", _BATCH_NORM} <= row.kept_bytes.keys():
            ratio = row.kept_bytes["ours"] / row.kept_bytes[_BATCH_NORM]
            ratios.setdefault(row.case, {}).setdefault(row.setting.dtype, []).append(ratio)
    dtypes = list(dict.fromkeys(dtype for own in ratios.values() for dtype in own))
    lines = [["layers", *dtypes]]
    for case, own in ratios.items():
        lines.append([case, *(f"{geometric_mean(own[dtype]):.2f}" if dtype in own else "-" for dtype in dtypes)])
    yield markdown_table(lines)


def _overhead(one: Found) -> Iterator[str]:
    yield "### Overhead"
    yield _conditions(one, "A layer so tiny that only calls cost")
    peers = (_BARE, _BATCH_NORM, "ours")
    head = ["conv + ReLU, µs", "conv + BN + ReLU, µs", "ours, µs", "ours over conv + BN + ReLU"]
    lines = [["dtype, layout, mode", *head]]
    for row in one.run.rows:
        times = [f"{1e6 * median(row.seconds[peer]):.1f}" if peer in row.seconds else "-" for peer in peers]
        ratio = row.ratio("ours", _BATCH_NORM) if _BATCH_NORM in row.seconds else None
        lines.append([_place(row.setting, one.run), *times, _interval(ratio)])
    yield markdown_table(lines)


def _scaling(one: Found) -> Iterator[str]:
    yield "### Scaling"
    yield _conditions(one, "How the time of a layer grows")
    yield f"![Time over batch, channels, map size and threads]({PICTURES}/scaling.svg)"


def _projection(one: Found) -> Iterator[str]:
    yield "### Projection"
    yield _conditions(one, "Mean Shift Rejection's projection of kernel gradients in a training step of ResNet-50")
    yield verdicts_table(one.run.verdicts)


_PARTS: dict[str, Callable[[Found], Iterator[str]]] = {
    "models": _models,
    "blocks": _blocks,
    "memory": _memory,
    "overhead": _overhead,
    "bandwidth": _bandwidth,
    "scaling": _scaling,
    "projection": _projection,
}


def stale(found: Mapping[str, Found], root: Path) -> list[str]:
    """README.md and pictures that are not those of ``found``."""
    _, written, _ = parts((root / "README.md").read_text(encoding="utf-8"))
    wrong = [] if written == section(found) else ["README.md"]
    for name, (run, _) in drawings(found).items():
        path = root / PICTURES / name
        if not path.is_file() or plot.digest([run]) not in path.read_text(encoding="utf-8"):
            wrong.append(f"{PICTURES}/{name}")
    return wrong


def parts(text: str) -> tuple[str, str, str]:
    """A README before, between and behind the two comments. Raises ``InputError`` where it lacks them."""
    before, begin, rest = text.partition(BEGIN)
    written, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(f"README.md: lacks the line {BEGIN!r} or {END!r}")
    return before, written.strip(), after


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the files (default: bench/results)")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md (default: this checkout)")


def run(options: argparse.Namespace) -> int:
    plot.wanted()
    path = options.root / "README.md"
    try:
        before, _, after = parts(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--root: {path} cannot be read: {error.strerror}") from None
    found = newest(options.results)
    text = section(found)
    folder = options.root / PICTURES
    folder.mkdir(parents=True, exist_ok=True)
    for name, (measured, draw) in drawings(found).items():
        files.replace(folder / name, plot.image(draw(measured), "svg", plot.digest([measured])))
        print(folder / name)
    files.replace(path, f"{before}{BEGIN}\n\n{text}\n\n{END}{after}".encode())
    print(path)
    return 0
