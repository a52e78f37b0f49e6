"""The commands of ``python -m deepcontrol_cuda``."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch

from . import __version__, backends
from ._ops import extension, unavailable
from .conversion import command as conversion
from .conversion import sources
from .training import settings

_TRAINING_NEEDS = {
    "matplotlib": "matplotlib",
    "numpy": "numpy",
    "PIL": "pillow",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "tqdm": "tqdm",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 0 for success, 1 for a failure that was explained, 2 for bad usage."""
    parser = argparse.ArgumentParser(prog="python -m deepcontrol_cuda", description="Deep Control for PyTorch")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")
    info = commands.add_parser("info", help="print versions, build, GPUs and what each backend would do")
    info.set_defaults(run=_info)
    demo = commands.add_parser("demo", help="train and time Deep Control against Batch Norm, and write a report")
    demo.add_argument("--output", type=Path, default=Path("report"), help="folder for the report (default: report)")
    demo.add_argument("--quick", action="store_true", help="a few steps of everything, to see that it runs")
    demo.add_argument("--seed", type=int, default=0, help="first random seed (default: 0)")
    demo.set_defaults(run=_demo)
    train = commands.add_parser("train", help="train a ResNet; alone: Deep Control on scikit-learn's digits")
    settings.add_arguments(train)
    train.add_argument(
        "--output", type=Path, help="folder for checkpoint, log and curves, seen by all machines (default: in runs/)"
    )
    train.add_argument("--resume", action="store_true", help="go on with the run in --output, with its settings")
    train.set_defaults(run=_train)
    evidence = commands.add_parser("evidence", help="compare the methods over learning rates, batch sizes and seeds")
    evidence.add_argument("--output", type=Path, default=Path("report"), help="folder for the report (default: report)")
    evidence.add_argument("--quick", action="store_true", help="a few steps of a few methods, to see that it runs")
    evidence.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time (default: all cores)")
    evidence.add_argument("--tasks", nargs="+", default=["digits", "shapes"], help="default: digits shapes")
    evidence.add_argument("--seeds", type=int, default=5, help="runs of each setting (default: 5)")
    evidence.set_defaults(run=_evidence)
    convert = commands.add_parser(
        "convert", help="replace the Batch Norm of a model, with its weights, and write a file"
    )
    conversion.add_arguments(convert)
    convert.set_defaults(run=_convert)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:  # the commands say more once they have begun
        return _fail("interrupted before anything was done")


def _info(options: argparse.Namespace) -> int:
    from .training.conditions import conditions

    rows = conditions()
    del rows["Deep Control backend"]  # the rows below say more
    rows["extension"] = f"not loaded: {unavailable}" if extension is None else _build(extension.info())
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        rows[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"
    rows["for example"] = "3x3 convolution of 64 to 64 channels, float32, channels_last:"
    for name, reason in backends.available().items():
        device = "cuda" if name in ("cuda", "triton") and torch.cuda.is_available() else "cpu"
        rows[f"backend {name}"] = _would_do(name, device) if reason is None else f"not available: {reason}"
    for device in ("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))):
        rows[f"chosen on {device}"] = _would_do(None, device)
    width = max(map(len, rows))
    for key, value in rows.items():
        indented = value.replace("\n", "\n" + " " * width)
        print(f"{key.ljust(width)}  {indented}")
    return 0


def _build(info: dict[str, object]) -> str:
    kernels = "with CUDA kernels" if info["cuda"] else "without CUDA kernels"
    return f"compiler {info['compiler']}, {kernels}, on this CPU {info['isa']}"


def _would_do(backend: str | None, device: str) -> str:
    """What a typical layer gets on ``device``, from a backend or by itself."""
    if backend == "reference":
        return "plain PyTorch, on any device"
    try:
        images = torch.empty(8, 64, 56, 56, device=device, memory_format=torch.channels_last)
        weight = torch.empty(64, 64, 3, 3, device=device, memory_format=torch.channels_last)
        found = backends.explain(images, backend, weight=weight, padding=1)
    except RuntimeError as error:  # one is asked for that does not run there, or the GPU is full
        return str(error)
    if backend is None:
        return found
    # What each algorithm costs stands where the choice does.
    return (
        found.partition("\n")[0]
        .removeprefix(f"{backend}, ")
        .replace(": asked for by the call; ", ": ")
        .removesuffix(": asked for by the call")
    )


def _demo(options: argparse.Namespace) -> int:
    if missing := _missing():
        return _fail(f"the demo needs {missing}: in the checkout, pip install --no-build-isolation '.[train]'")
    output: Path = options.output
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        return _fail(f"--output: cannot write into {output}: {error.strerror}")
    from .training import demo

    try:
        path, table = demo.run(output, options.quick, options.seed)
    except KeyboardInterrupt:
        return _fail(f"interrupted; what was measured before is in {output / 'report.md'}")
    print(f"\n{table}\n\nThe report, with layer times and pictures, is {path}")
    return 0


def _train(options: argparse.Namespace) -> int:
    if missing := _missing():
        return _fail(f"training needs {missing}: in the checkout, pip install --no-build-isolation '.[train]'")
    from .training.errors import TrainingError
    from .training.trainer import Machine, default_output, train

    given = vars(options)
    machine = Machine(**{field.name: given[field.name] for field in fields(Machine) if field.name in given})
    try:
        train(given, machine, options.output or default_output(given), options.resume)
    except TrainingError as error:
        return _fail(str(error))
    return 0


def _evidence(options: argparse.Namespace) -> int:
    if missing := _missing():
        return _fail(f"the evidence needs {missing}: in the checkout, pip install --no-build-isolation '.[train]'")
    from .training.errors import TrainingError
    from .training.evidence import command

    try:
        print(command.run(options.output, options.tasks, options.seeds, options.quick, options.jobs))
    except TrainingError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail(f"interrupted; the runs that ended are in {options.output}, the same command goes on from them")
    return 0


def _convert(options: argparse.Namespace) -> int:
    given = vars(options)
    arguments = conversion.Options(**{field.name: given[field.name] for field in fields(conversion.Options)})
    try:
        with warnings.catch_warnings():
            # Of the packages that build and export models to each other, about what will change in them.
            warnings.simplefilter("ignore", FutureWarning)
            print(conversion.run(arguments))
    except (conversion.Unwritten, sources.InputError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was written")
    return 0


def _missing() -> str:
    """What a training command needs and is not installed, separated by commas."""
    return ", ".join(p for module, p in _TRAINING_NEEDS.items() if importlib.util.find_spec(module) is None)


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1
