"""Fits the planner's table of costs to measured layers: ``python -m bench costs [FILE ...]``."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch

from deepcontrol_cuda import _ops, backends, costs
from deepcontrol_cuda.costs import Cost
from deepcontrol_cuda.timing import Shape

from . import rows
from .cases import SETS
from .options import MissingError
from .report import markdown_table
from .rows import Row, Run, Setting, UnknownFormatError

HELP = "fit the planner's table of costs to the layers that were measured on CPUs"
RESULTS = Path(__file__).with_name("results")
_LEAST_LAYERS = 4
"""A fit has up to three numbers; with no more layers than that it would seem to have no error."""
_SHAPES = {str(shape): shape for shapes in SETS.values() for shape in shapes}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="*", type=Path, help="runs of layers (default: all of them in bench/results)")
    parser.add_argument("--table", type=Path, default=costs.FILE, help="default: the table in the package")


def run(asked: argparse.Namespace) -> int:
    if _ops.extension is None:
        raise MissingError(f"bench costs needs the compiled extension, which counts operations: {_ops.unavailable}")
    paths = asked.files or sorted(RESULTS.glob("*_cpu_*_layers*.json"))
    runs = {}
    for path in paths:
        try:
            runs[path.name] = rows.read(path)
        except (OSError, UnknownFormatError) as error:
            # One that is named is wanted; of a folder the others go on.
            if asked.files:
                print(f"error: {error}", file=sys.stderr)
                return 1
            print(f"left out: {error}")
    samples = [sample for name, one in runs.items() for sample in samples_of(one, name)]
    table = fit_all(samples)
    if not table:
        wanted = "make one with: python -m bench layers --peers algorithms"
        print(f"error: no layers by algorithms in any run; {wanted}", file=sys.stderr)
        return 1
    costs.write(table, asked.table)
    print(f"{report(table, samples)}\n\nWritten to {asked.table}")
    return 0


@dataclass(frozen=True)
class Place:
    """What a row of the table is for, but the algorithm."""

    backend: str
    hardware: str
    threads: int
    dtype: str
    layout: str
    kind: str
    mode: str


@dataclass(frozen=True)
class Sample:
    """A measured layer."""

    place: Place
    case: str
    batch: int
    algorithm: str
    operations: float
    bytes: float
    seconds: float
    result: str


def samples_of(run: Run, name: str) -> list[Sample]:
    """Of the layers that all algorithms were timed on; backward is what training takes longer than forward."""
    hardware = run.versions.get("extension_isa")
    if run.command != "layers" or "gpu" in run.content or not hardware:
        return []
    forward: dict[tuple, float] = {}
    found = []
    for row in sorted(run.rows, key=lambda row: row.setting.mode):  # forward first
        shape = _SHAPES.get(row.case)
        is_forward = row.setting.mode == "forward"
        if shape is None or (shape.reads_image and not is_forward):  # without the input's gradient it is another pass
            continue
        setting, mode = row.setting, "forward" if is_forward else "backward"
        plan = _ops.extension.plan_conv_cpu(case(shape, setting))
        place = Place("cpu", hardware, setting.threads, setting.dtype, setting.layout, plan["kind"], mode)
        for algorithm, seconds in _by_algorithm(row).items():
            key = (row.case, algorithm, setting.dtype, setting.layout, setting.batch, setting.threads)
            if is_forward:
                forward[key] = seconds
            elif seconds > forward.get(key, seconds):
                seconds -= forward[key]
            else:
                continue
            if plan[mode]["obstacles"][algorithm]:  # that pass was another's
                continue
            counts = plan[mode]["operations"][algorithm], plan[mode]["bytes"]
            found.append(Sample(place, row.case, setting.batch, algorithm, *counts, seconds, name))
    return found


def _by_algorithm(row: Row) -> dict[str, float]:
    names = [name for name in backends.ALGORITHMS["cpu"] if f"ours, {name}" in row.seconds]
    return {name: statistics.median(row.seconds[f"ours, {name}"]) for name in names}


def fit_all(samples: Iterable[Sample]) -> list[Cost]:
    """A row for each place and algorithm that has enough layers."""
    groups: dict[tuple[Place, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.place, sample.algorithm), []).append(sample)
    return sorted(fit(*key, group) for key, group in groups.items() if len(group) >= _LEAST_LAYERS)


def fit(place: Place, algorithm: str, samples: Sequence[Sample]) -> Cost:
    """The fixed, per-operation and per-byte seconds, none negative.

    The sum of ``|log(predicted / measured)|`` is least: half and twice are as wrong as each other, and layers that page
    faults made slow weigh no more than others.
    """
    seconds = torch.tensor([sample.seconds for sample in samples], dtype=torch.float64)
    terms = torch.tensor([[1e-6, s.operations / 1e12, s.bytes / 1e12] for s in samples], dtype=torch.float64)
    terms = terms / seconds[:, None]
    best, least = None, float("inf")
    # With so few terms the constraint is met by trying which of them take part.
    for chosen in (subset for size in (1, 2, 3) for subset in combinations(range(3), size)):
        for solution in _improved(terms[:, chosen]):
            misfit = (terms[:, chosen] @ solution).log().abs().sum().item()
            if (solution >= 0).all() and misfit < least:
                best, least = dict(zip(chosen, solution.tolist())), misfit
    rates = [float(f"{best.get(i, 0.0):.4g}") for i in range(3)]
    results = ", ".join(sorted({sample.result for sample in samples}))
    cost = Cost(**vars(place), algorithm=algorithm, **_rates(rates), layers=len(samples), error=0.0, results=results)
    error = statistics.median(abs(deviation(cost, sample)) for sample in samples)
    return Cost(**vars(cost) | {"error": float(f"{error:.2g}")})


def _improved(terms: torch.Tensor) -> Iterator[torch.Tensor]:
    """Solutions x, from that of least squares on, of ``log(terms @ x) = 0`` with the least sum of absolute values.

    By Gauss and Newton, in each step with the weights that turn squares into absolute values.
    """
    weights, wanted = torch.ones(len(terms), 1, dtype=terms.dtype), torch.ones(len(terms), 1, dtype=terms.dtype)
    rows = terms
    for _ in range(30):
        solution = torch.linalg.lstsq(weights * rows, weights * wanted, driver="gelsd").solution
        ratios = terms @ solution
        if (ratios <= 0).any():
            return
        yield solution[:, 0]
        rows, wanted = terms / ratios, 1 - ratios.log()
        weights = ratios.log().abs().clamp(min=0.001).rsqrt()


def _rates(rates: Sequence[float]) -> dict[str, float]:
    names = ("fixed_microseconds", "milliseconds_per_gigaoperation", "milliseconds_per_gigabyte")
    return dict(zip(names, rates))


def deviation(cost: Cost, sample: Sample) -> float:
    """Of the prediction, relative."""
    return cost.seconds(sample.operations, sample.bytes) / sample.seconds - 1


@dataclass(frozen=True)
class Choices:
    """What the planner chooses where several algorithms were timed: of how many layers for how many the fastest."""

    layers: int
    fastest: int
    loss: float
    """Time of what is chosen over that of the fastest, in all layers, less 1."""


def choices(table: Sequence[Cost], samples: Iterable[Sample]) -> dict[Place, Choices]:
    """By place, of layers that were timed on hardware like this machine's; meanwhile the planner has ``table``."""
    here = [cost for cost in table if cost.hardware == _ops.extension.info()["isa"]]
    layers: dict[tuple[Place, str, int, str], dict[str, float]] = {}
    for sample in samples:
        if sample.place.hardware == _ops.extension.info()["isa"]:
            key = (sample.place, sample.case, sample.batch, sample.result)
            layers.setdefault(key, {})[sample.algorithm] = sample.seconds
    found: dict[Place, list[tuple[float, float]]] = {}
    try:
        costs.tell_extension(here, backends.ALGORITHMS["cpu"])
        for (place, name, batch, _), seconds in layers.items():
            setting = Setting(place.dtype, place.layout, place.mode, batch, place.threads)
            chosen = _ops.extension.plan_conv_cpu(case(_SHAPES[name], setting))[place.mode]["chosen"]
            if len(seconds) > 1 and chosen in seconds:
                found.setdefault(place, []).append((seconds[chosen], min(seconds.values())))
    finally:
        costs.tell_extension(backends._costs, backends.ALGORITHMS["cpu"])
    return {place: _choices(pairs) for place, pairs in found.items()}


def _choices(pairs: Sequence[tuple[float, float]]) -> Choices:
    chosen, fastest = map(sum, zip(*pairs))
    return Choices(len(pairs), sum(a == b for a, b in pairs), chosen / fastest - 1)


def case(shape: Shape, setting: Setting):
    """``_C.ConvCase`` of a layer."""
    spatial = ((1, *[shape.size] * 2), (1, *[shape.kernel_size] * 2), (1, *[shape.stride] * 2))
    padding = (0, *[shape.kernel_size // 2] * 2)
    return _ops.extension.ConvCase(
        2, setting.batch, shape.in_channels, shape.out_channels, shape.groups, *spatial, padding, (1, 1, 1),
        setting.dtype, setting.layout == "channels_last", setting.threads,
    )  # fmt: skip


def report(table: Sequence[Cost], samples: Sequence[Sample]) -> str:
    """How well the table predicts, and how well the planner chooses by it."""
    lines = [["hardware, threads, dtype, layout, layer, pass", "algorithm", "layers", "median error"]]
    for c in table:
        where = f"{c.hardware}, {c.threads}, {c.dtype}, {c.layout}, {c.kind}, {c.mode}"
        lines.append([where, c.algorithm, str(c.layers), f"{c.error:.0%}"])
    text = markdown_table(lines)
    chosen = choices(table, samples)
    if chosen:
        right, total = (sum(getattr(c, name) for c in chosen.values()) for name in ("fastest", "layers"))
        text += (
            f"\n\nOf {total} layers that several algorithms were timed on the planner takes the fastest for {right}."
        )
    for place, c in chosen.items():
        where = ", ".join(map(str, vars(place).values()))
        text += f"\n{where}: {c.fastest} of {c.layers}, {c.loss:.1%} longer than by the fastest"
    return text
