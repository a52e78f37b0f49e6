"""The commands of ``python -m bench``."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch

from deepcontrol_cuda import _ops, backends

from . import (
    fine_tuning,
    gpu,
    memory,
    overhead,
    peers,
    predict,
    projection,
    record,
    report,
    runner,
    training_step,
)
from .cases import SETS
from .runner import DTYPES, LAYOUTS, MODES, Row, Setting, WrongResultError

_RESULTS = Path(__file__).parent / "results"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 0 for success, 1 for a failure that was explained, 2 for bad usage."""
    options = _parser().parse_args(arguments)
    if options.run is _predict:
        return _predict(options)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=options.output):
            pass
    except OSError as error:
        return _fail(f"--output: cannot write into {options.output}: {error.strerror}")
    if options.run is _gpu:
        return _gpu(options)
    if reason := backends.available()["cpu"]:
        return _fail(f"backend 'cpu': {reason}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        options.run(options)
    except WrongResultError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure Deep Control on this machine.")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run, help: str, layouts: Sequence[str] | None) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        if layouts is not None:
            sub.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES, help="default: both")
            sub.add_argument(
                "--layout", nargs="+", choices=LAYOUTS, default=layouts, help=f"default: {' '.join(layouts)}"
            )
        sub.add_argument("--threads", type=_positive, help="default: torch's choice")
        sub.add_argument("--output", type=Path, default=_RESULTS, help="folder for the JSON (default: bench/results)")
        sub.set_defaults(run=run)
        return sub

    layers = command("layers", _layers, "time layers against their peers, call by call", LAYOUTS)
    layers.add_argument("--mode", nargs="+", choices=MODES, default=MODES, help="default: both")
    layers.add_argument("--set", choices=SETS, default="resnet50", help="shapes (default: resnet50)")
    layers.add_argument(
        "--peers", nargs="+", choices=peers.PEERS, default=peers.PEERS, help=f"{' and '.join(peers.ALWAYS)} always run"
    )
    layers.add_argument("--batch", type=_positive, help="default: 8, or 1 with --quick")
    layers.add_argument("--repeats", type=_repeats, help="default: 25, or 3 with --quick")
    layers.add_argument("--quick", action="store_true", help="the last two shapes only, to see that it runs")

    saved = command("memory", _memory, "count the bytes that a chain of three layers keeps for backward", LAYOUTS)
    saved.add_argument("--batch", type=_positive, default=8, help="default: 8")

    tiny = command("overhead", _overhead, "time one tiny layer: Python's and the dispatcher's share", LAYOUTS[:1])
    tiny.add_argument("--repeats", type=_repeats, default=2000, help="default: 2000")

    projected = command("projection", _projection, "time the projection of kernel gradients in ResNet-50's step", None)
    projected.add_argument("--batch", type=_positive, default=8, help="default: 8")
    projected.add_argument("--size", type=_positive, default=224, help="pixels a side (default: 224)")
    projected.add_argument("--repeats", type=_repeats, default=15, help="default: 15")

    stepped = command("training-step", _training_step, "time ResNet-50's step before and after replace_conv_bn", None)
    stepped.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES, help="default: both")
    stepped.add_argument(
        "--models", nargs="+", choices=training_step.MODELS, help="default: all; Batch Norm always runs"
    )
    stepped.add_argument("--batch", type=_positive, default=8, help="default: 8")
    stepped.add_argument("--size", type=_positive, default=224, help="pixels a side (default: 224)")
    stepped.add_argument("--repeats", type=_repeats, default=15, help="default: 15")

    tuned = command("fine-tuning", _fine_tuning, "train converted networks on, over learning rates and seeds", None)
    tuned.add_argument("--seeds", type=_positive, default=5, help="default: 5")
    tuned.add_argument("--quick", action="store_true", help="two steps each, to see that it runs")

    help = "print what layers should take on an H100: counted from bytes and operations, not measured"
    counted = commands.add_parser("predict", help=help, description=help)
    counted.add_argument("--backend", choices=predict.WAYS, default="cuda", help="default: cuda")
    counted.add_argument("--set", choices=SETS, default="resnet50_all", help="shapes (default: resnet50_all)")
    counted.add_argument("--batch", type=_positive, default=predict.BATCH, help=f"default: {predict.BATCH}")
    counted.set_defaults(run=_predict)

    help = "test, check and time the kernels on this machine's GPU, and write down which of them are proven"
    proof = commands.add_parser("gpu", help=help, description=help)
    proof.add_argument("--architecture", action="store_true", help="only print what TORCH_CUDA_ARCH_LIST should be")
    proof.add_argument("--repeats", type=_repeats, default=30, help="default: 30")
    proof.add_argument(
        "--seconds",
        type=_positive,
        default=400,
        help="start no timing after this; tests and sanitizers get shares of it (default: 400)",
    )
    proof.add_argument("--commit", help="what to record where this is no git checkout")
    proof.add_argument("--output", type=Path, default=_RESULTS, help="folder for the JSON (default: bench/results)")
    proof.set_defaults(run=_gpu)
    return parser


def _positive(text: str) -> int:
    return _integer(text, 1)


def _repeats(text: str) -> int:
    # Quartiles need two.
    return _integer(text, 2)


def _integer(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted an integer of at least {least}")
    return int(text)


def _layers(options: argparse.Namespace) -> None:
    from tqdm import tqdm  # not where only `make gpu` runs

    shapes = SETS[options.set][-2:] if options.quick else SETS[options.set]
    batch = options.batch or (1 if options.quick else 8)
    repeats = options.repeats or (3 if options.quick else 25)
    settings = [Setting(*names) for names in product(options.dtype, options.layout, options.mode)]
    wanted = [name for name in peers.PEERS if name in (*options.peers, *peers.ALWAYS)]
    names, skipped = _usable(wanted, options.mode)
    run = record.collect("layers", set=options.set, quick=options.quick, batch=batch, repeats=repeats)
    rows: list[Row] = []
    complete = False
    try:
        with tqdm(total=len(settings) * len(shapes) * repeats, unit="round", dynamic_ncols=True) as bar:
            for setting in settings:
                for shape in shapes:
                    bar.set_description(f"{setting}: {shape}")
                    rows.append(runner.measure(shape, setting, batch, names[setting.mode], repeats, bar.update))
                timed = rows[-len(shapes) :]
                tqdm.write(f"\n{setting}, batch {batch}\n\n{report.rows_table(timed)}\n", file=sys.stdout)
        complete = True
    finally:
        # What was measured before a failure or an interruption is kept.
        if rows:
            verdicts = report.verdicts(rows)
            results = {
                "complete": complete,
                "times_in": "seconds",
                "skipped": skipped,
                "rows": [asdict(row) for row in rows],
                "verdicts": [asdict(verdict) for verdict in verdicts],
            }
            path = record.write(run | results, options.output)
            print(f"\n{report.verdicts_table(verdicts)}\n")
            if shapes != SETS["resnet50"] or batch != 8:
                print("The targets are set for all shapes of resnet50 at batch 8; this run is another.")
            print(f"Written to {path}" + ("" if complete else ", incomplete"))


def _usable(wanted: Sequence[str], modes: Sequence[str]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """For each mode the peers that can be timed, and the reasons why others cannot."""
    names: dict[str, list[str]] = {}
    skipped: dict[str, str] = {}
    for mode in modes:
        reasons = {name: peers.why_not(name, mode) for name in wanted}
        names[mode] = [name for name, reason in reasons.items() if reason is None]
        for name, reason in reasons.items():
            if reason is not None:
                skipped[f"{name}, {mode}"] = reason
                print(f"{name} is left out of {mode}: {reason}")
    return names, skipped


def _memory(options: argparse.Namespace) -> None:
    run = record.collect("memory", batch=options.batch)
    grid = product(memory.CHAINS, options.dtype, options.layout)
    counted = [memory.measure(*cell, options.batch) for cell in grid]
    verdicts = [report.at_most(f"{c.chain}, {c.dtype}, {c.layout}", c.ratio, 0.5) for c in counted]
    lines = [["chain", "dtype", "layout", *(f"{name}, bytes" for name in memory.LAYERS)]]
    lines += [[c.chain, c.dtype, c.layout, *(str(c.bytes[name]) for name in memory.LAYERS)] for c in counted]
    print(f"Kept for backward at batch {options.batch}\n\n{report.markdown_table(lines)}\n")
    print(f"Ours over conv_bn_relu\n\n{report.verdicts_table(verdicts)}\n")
    results = {"saved": [asdict(c) for c in counted], "verdicts": [asdict(verdict) for verdict in verdicts]}
    print(f"Written to {record.write(run | results, options.output)}")


def _overhead(options: argparse.Namespace) -> None:
    from tqdm import tqdm  # not where only `make gpu` runs

    run = record.collect("overhead", batch=1, repeats=options.repeats)
    rows = []
    total = len(options.dtype) * len(options.layout) * len(MODES)
    for row in tqdm(overhead.run(options.dtype, options.layout, options.repeats), total=total, dynamic_ncols=True):
        tqdm.write(f"\n{row.setting}, batch 1\n\n{report.rows_table([row])}\n", file=sys.stdout)
        rows.append(row)
    verdicts = [
        report.at_most(f"{row.setting}: ours / conv_bn_relu", row.ratio("ours", "conv_bn_relu"), 1.0) for row in rows
    ]
    print(f"\n{report.verdicts_table(verdicts)}\n")
    results = {
        "times_in": "seconds",
        "rows": [asdict(row) for row in rows],
        "verdicts": [asdict(verdict) for verdict in verdicts],
    }
    print(f"Written to {record.write(run | results, options.output)}")


def _projection(options: argparse.Namespace) -> None:
    from tqdm import tqdm  # not where only `make gpu` runs

    run = record.collect("projection", batch=options.batch, size=options.size, repeats=options.repeats)
    costs = []
    with tqdm(total=2 * options.repeats, unit="round", dynamic_ncols=True) as bar:
        for measure in (projection.between, projection.within):
            bar.set_description(measure.__name__)
            costs.append(measure(options.batch, options.size, options.repeats, bar.update))
    (between, share), (within, ratio) = (next(iter(cost.ratios.items())) for cost in costs)
    verdicts = [
        report.at_most(f"between backward and step: {between}", share.median, 0.02),
        # Nothing that can be measured: in a quarter of the rounds or more it was no slower.
        report.at_most(f"within backward: {within}, lower quartile", ratio.lower_quartile, 1.0),
        report.Verdict(f"within backward: {within}, median", ratio.median),
    ]
    print(f"\nResNet-50, batch {options.batch}, {options.size} pixels a side\n\n{report.verdicts_table(verdicts)}\n")
    results = {
        "times_in": "seconds",
        "costs": [asdict(cost) for cost in costs],
        "verdicts": [asdict(verdict) for verdict in verdicts],
    }
    print(f"Written to {record.write(run | results, options.output)}")


def _training_step(options: argparse.Namespace) -> None:
    from tqdm import tqdm  # not where only `make gpu` runs

    wanted = options.models or training_step.MODELS
    names = tuple(n for n in training_step.MODELS if n in wanted or n == training_step.BATCH_NORM)
    run = record.collect("training-step", batch=options.batch, size=options.size, repeats=options.repeats)
    error = training_step.check(min(options.size, 64))
    results = []
    with tqdm(total=len(options.dtype) * options.repeats, unit="round", dynamic_ncols=True) as bar:
        for dtype in options.dtype:
            bar.set_description(dtype)
            args = (dtype, options.batch, options.size, options.repeats, names, bar.update)
            results.append(training_step.measure(*args))
    verdicts = training_step.verdicts(results)
    print(f"\nResNet-50, batch {options.batch}, {options.size} pixels a side\n\n{training_step.table(results)}\n")
    print(f"{report.verdicts_table(verdicts)}\n")
    written = {
        "times_in": "seconds",
        "error": error,
        "results": [asdict(result) for result in results],
        "verdicts": [asdict(verdict) for verdict in verdicts],
    }
    print(f"Written to {record.write(run | written, options.output)}")


def _fine_tuning(options: argparse.Namespace) -> None:
    from tqdm import tqdm  # not where only `make gpu` runs

    from deepcontrol_cuda.training.data import digits

    run = record.collect("fine-tuning", seeds=options.seeds, quick=options.quick)
    data = digits()
    total = sum(fine_tuning.steps(plan, options.seeds) for plan in fine_tuning.plans(options.quick))
    with tqdm(total=total, unit="step", dynamic_ncols=True) as bar:
        runs = list(fine_tuning.run(options.quick, options.seeds, data, bar.update))
    print(f"\nTest accuracy, means over {options.seeds} seeds\n\n{fine_tuning.table(runs)}\n")
    rows = [{name: value for name, value in asdict(tuned).items() if name != "losses"} for tuned in runs]
    print(f"Written to {record.write(run | {'runs': rows}, options.output)}")


def _predict(options: argparse.Namespace) -> int:
    if options.backend == "triton" and importlib.util.find_spec("triton") is None:
        return _fail("predict asks the Triton kernels what they would do; install triton: pip install 'triton>=3.5'")
    if options.backend == "cuda" and _ops.unavailable is not None:
        return _fail(f"predict asks the extension what its kernels would do: {_ops.unavailable}")
    print(predict.table(options.backend, SETS[options.set], options.batch))
    return 0


def _gpu(options: argparse.Namespace) -> int:
    if lacks := gpu.missing():
        return _fail("make gpu needs " + "\n       and ".join(lacks))
    if options.architecture:
        print(gpu.architecture(torch.cuda.get_device_capability()))
        return 0
    return gpu.run(options.output, options.seconds, options.repeats, options.commit)


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
