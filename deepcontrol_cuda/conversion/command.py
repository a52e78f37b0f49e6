"""The command ``convert``: a model by its name, converted, written to a file, with a report."""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import backends, files, modules
from .._version import __version__
from ..plain import to_reference
from . import Report, replace_conv_bn
from .layers import INITIALIZATIONS, METHODS
from .sources import InputError, Source, load_weights, read_batch

# Enough maps for a standard deviation, and a forward of them fits a small machine.
_IMAGES = 64
_IMAGE_SIZE = 224
_ONNX_NEEDS = ("onnx", "onnxscript")
_OURS = (modules._DeepControl, modules._FusedConv)


@dataclass(frozen=True)
class Options:
    """The command's arguments, as ``add_arguments`` describes them."""

    model: str
    method: str
    initialization: str | None = None
    weights: Path | None = None
    select: list[str] | None = None
    example: tuple[int, ...] | None = None
    image_size: int | None = None
    batch: Path | None = None
    images: Path | None = None
    dry_run: bool = False
    report: Path | None = None
    out: Path | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those that ``Options`` has."""
    parser.add_argument(
        "--model", required=True, metavar="SPEC",
        help="torchvision:NAME, timm:NAME, package.module:FUNCTION or path/file.py:FUNCTION; options follow the name: "
        "'torchvision:resnet50(num_classes=10)'",
    )  # fmt: skip
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="state dict of the model with Batch Norm (.pt, .pth, .safetensors)"
    )
    parser.add_argument("--method", choices=METHODS, default=METHODS[0], help=f"default: {METHODS[0]}")
    parser.add_argument("--initialization", choices=INITIALIZATIONS, help="default: folded with --weights, else fresh")
    parser.add_argument("--select", nargs="+", metavar="GLOB", help="names of norms to replace (default: all)")
    parser.add_argument(
        "--example", type=_shape, metavar="N,C,H,W", help="shape of the model's argument, to count bytes and to export"
    )
    parser.add_argument("--image-size", type=_side, metavar="S", help="short for --example 2,3,S,S; size of --images")
    parser.add_argument(
        "--batch",
        type=Path,
        metavar="FILE",
        help="the model's argument or arguments (.pt), to count, calibrate, export",
    )
    parser.add_argument(
        "--images", type=Path, metavar="DIR",
        help=f"the same from up to {_IMAGES} images below a folder, normalised as ImageNet's (default size: "
        f"{_IMAGE_SIZE})",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="only report what would be replaced")
    parser.add_argument("--report", type=Path, metavar="FILE", help="also write the report as JSON")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="by its suffix a state dict (.pt, .pth), torch.export (.pt2) or ONNX"
    )


def _shape(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if len(parts) < 2 or not all(part.strip().isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted sizes as 1,3,224,224")
    return tuple(map(int, parts))


def _side(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a positive integer")
    return int(text)


class Unwritten(Exception):
    """A file could not be written; the message tells which, and which were."""


def run(options: Options, say: Callable[[str], object] = lambda line: print(line, file=sys.stderr, flush=True)) -> str:
    """Do everything and return what is to be printed: the report, what was written, and how to load it.

    Args:
        say: is told what begins now, a line each.

    Raises:
        InputError: an argument, a file or the model does not fit; nothing was written.
        Unwritten: a disk is full, for one; what was at the path before is whole.
    """
    source = Source.parse(options.model)
    initialization = options.initialization or ("folded" if options.weights else "fresh")
    _check(options, initialization)
    say(f"building {options.model}")
    model = source.build()
    if options.weights is not None:
        say(f"reading {options.weights}")
        load_weights(model, options.weights)
    example = _example(options)
    say("converting")
    try:
        report = replace_conv_bn(
            model, options.method, initialization, select=options.select, example=example, dry_run=options.dry_run
        )
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{options.model} cannot be converted: {error}") from error
    if not report.replaced:
        raise InputError(_nothing(options, model, report))
    parts = [str(report)]
    contents: dict[Path, tuple[bytes, str]] = {}
    if options.dry_run:
        parts.append("Nothing was converted (--dry-run).")
    else:
        if example is not None and initialization == "folded":
            parts.append(_agreement(model, report.model, example))
        contents[options.out] = _CONTENTS[options.out.suffix.lower()](options, initialization, source, report, example)
    if options.report is not None:
        contents[options.report] = (f"{report.to_json()}\n".encode(), "")
    return "\n\n".join(parts + _write(contents, say))


def _check(options: Options, initialization: str) -> None:
    """Everything that can be known before any work."""
    if options.out is None:
        if not options.dry_run:
            raise InputError("--out: wanted the file to write, or --dry-run to see what would be replaced")
    elif not options.dry_run:
        suffix = options.out.suffix.lower()
        if suffix not in _CONTENTS:
            raise InputError(f"--out: got {options.out}, wanted a name that ends in {', '.join(_CONTENTS)}")
        if suffix in (".pt2", ".onnx") and not _has_example(options):
            raise InputError(
                f"--out: {suffix} is made by running the model; add --image-size S, --example N,C,H,W or --batch FILE"
            )
        lacking = [name for name in _ONNX_NEEDS if suffix == ".onnx" and importlib.util.find_spec(name) is None]
        if lacking:
            raise InputError(f"--out: ONNX needs {', '.join(lacking)}: pip install {' '.join(lacking)}")
        _check_writable("--out", options.out)
    for name in ("out", "report"):
        written = getattr(options, name)
        for given in ("weights", "batch"):
            read = getattr(options, given)
            if written is not None and read is not None and written.resolve() == read.resolve():
                raise InputError(f"--{name}: got {written}, which is --{given}; wanted another file")
    if options.report is not None:
        _check_writable("--report", options.report)
        if options.out is not None and options.report.resolve() == options.out.resolve():
            raise InputError(f"--report: got {options.report}, which is --out; wanted another file")
    given = [f"--{name}" for name in ("example", "batch", "images") if getattr(options, name) is not None]
    if options.image_size is not None and options.images is None:
        given.append("--image-size")
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)}: wanted one of them, each gives the model's argument")
    if initialization == "calibrated" and options.batch is None and options.images is None:
        raise InputError(
            "--initialization calibrated measures deviations on real images; add --images DIR or --batch FILE"
        )
    lacking = [
        package
        for module, package in (("numpy", "numpy"), ("PIL", "pillow"))
        if options.images is not None and importlib.util.find_spec(module) is None
    ]
    if lacking:
        raise InputError(f"--images needs {', '.join(lacking)}: pip install {' '.join(lacking)}")


def _has_example(options: Options) -> bool:
    return any(getattr(options, name) is not None for name in ("example", "image_size", "batch", "images"))


def _check_writable(argument: str, path: Path) -> None:
    # A link stays one: what it leads to is written.
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise InputError(f"{argument}: {path} is no file but {'a folder' if path.is_dir() else 'a device'}")
    if path.exists() and not os.access(path, os.W_OK):
        raise InputError(f"{argument}: cannot write {path}: no permission")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"{argument}: cannot write into {path.parent}: {error.strerror}") from error


def _example(options: Options) -> Tensor | tuple | list | dict | None:
    if options.batch is not None:
        return read_batch(options.batch)
    if options.images is not None:
        from ..training import errors, imagefolder

        try:
            return imagefolder.sample(options.images, options.image_size or _IMAGE_SIZE, _IMAGES)
        except errors.TrainingError as error:
            raise InputError(str(error)) from error
    shape = options.example
    if options.image_size is not None:
        # Of one sample Batch Norm cannot train on maps of one pixel, nor exports keep the batch size open.
        shape = (2, 3, options.image_size, options.image_size)
    return None if shape is None else torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _nothing(options: Options, model: nn.Module, report: Report) -> str:
    """Why nothing was replaced."""
    if report.left:
        return (
            f"none of the {len(report.left)} norms of {options.model} can be replaced; nothing was written\n\n{report}"
        )
    if any(isinstance(module, _OURS) for module in model.modules()):
        return (
            f"{options.model} is converted already: it has layers of deepcontrol_cuda and no Batch Norm; nothing was "
            "written"
        )
    return f"{options.model} has no Batch Norm, so there is nothing to replace; nothing was written"


@torch.no_grad()
def _agreement(model: nn.Module, converted: nn.Module, example: Tensor | tuple | list | Mapping) -> str:
    """How far the outputs are apart in evaluation."""
    arguments, keywords = _arguments(example)
    outputs = [tree_leaves(module.eval()(*arguments, **keywords)) for module in (model, converted)]
    pairs = [pair for pair in zip(*outputs) if isinstance(pair[0], Tensor) and pair[0].is_floating_point()]
    if not pairs or any(wanted.shape != got.shape for wanted, got in pairs):
        return "The outputs cannot be compared with those of Batch Norm in evaluation: their shapes vary."
    errors = [((got - wanted).abs().max() / wanted.abs().max()).item() for wanted, got in pairs if wanted.numel()]
    return f"Largest difference from Batch Norm in evaluation: {max(errors):.1e} of the largest output."


def _arguments(example: Tensor | tuple | list | Mapping) -> tuple[tuple, dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example) if isinstance(example, (tuple, list)) else (example,)), {}


def _checkpoint(
    options: Options, initialization: str, source: Source, report: Report, example: object
) -> tuple[bytes, str]:
    buffer = io.BytesIO()
    content = {
        "state_dict": report.model.state_dict(),
        "model": options.model,
        "method": options.method,
        "initialization": initialization,
        "select": options.select,
        "version": __version__,
        "report": json.loads(report.to_json()),
    }
    torch.save(content, buffer)
    package, expression = source.code()
    arguments = [expression, repr(options.method), repr(initialization)]
    if options.select:
        arguments.append(f"select={options.select!r}")
    if example is not None:
        # Which layers there are depends on the sizes of maps, but not on how many samples there are.
        arguments.append(f"example={_code(example[:2] if isinstance(example, Tensor) else example)}")
    code = (
        f"import torch, {package}, deepcontrol_cuda as dc",
        f"model = dc.replace_conv_bn({', '.join(arguments)}).model",
        f"model.load_state_dict(torch.load({str(options.out)!r}, weights_only=True)['state_dict'])",
    )
    return buffer.getvalue(), "\n".join(code)


def _program(options: Options, _: str, __: Source, report: Report, example: object) -> tuple[bytes, str]:
    arguments, keywords, shapes = _dynamic(example)
    buffer = io.BytesIO()
    with _made(".pt2"), backends.use("reference"):
        program = torch.export.export(_deployed(report), arguments, keywords, dynamic_shapes=shapes)
        torch.export.save(program, buffer)
    code = (
        "import torch",
        f"model = torch.export.load({str(options.out)!r}).module()",
        f"output = model({', '.join([*map(_code, arguments), *(f'{k}={_code(v)}' for k, v in keywords.items())])})",
    )
    return buffer.getvalue(), "\n".join(code)


def _deployed(report: Report) -> nn.Module:
    """The model for inference alone, in PyTorch's own modules, with all that can be merged into its kernels."""
    return to_reference(report.model.eval(), fold=True)


def _onnx(options: Options, _: str, __: Source, report: Report, example: object) -> tuple[bytes, str]:
    arguments, keywords, shapes = _dynamic(example)
    with _made(".onnx"), backends.use("reference"):
        program = torch.onnx.export(
            _deployed(report), arguments, kwargs=keywords, dynamic_shapes=shapes, dynamo=True, verbose=False
        )
        content = program.model_proto.SerializeToString()
    names = [value.name for value in program.model_proto.graph.input]
    shape = tuple(tree_leaves((arguments, keywords))[0].shape)
    code = (
        "import numpy, onnxruntime",
        f"session = onnxruntime.InferenceSession({str(options.out)!r})",
        f"outputs = session.run(None, {{{names[0]!r}: numpy.zeros({shape}, 'float32')}})",
    )
    return content, "\n".join(code)


def _dynamic(example: Tensor | tuple | list | Mapping) -> tuple[tuple, dict[str, Any], tuple | dict]:
    """Arguments for an export, and which of their sizes the program leaves open: all that the model allows."""

    def several(value: Any) -> Any:
        # Of one sample an export takes the 1 for a constant.
        return torch.cat([value, value]) if isinstance(value, Tensor) and value.dim() and len(value) == 1 else value

    def open_sizes(value: Any) -> dict[int, Any] | None:
        sizes = [size for size in range(value.dim()) if size != 1] if isinstance(value, Tensor) else []
        return dict.fromkeys(sizes, torch.export.Dim.AUTO) or None

    arguments, keywords = _arguments(example)
    arguments = tuple(map(several, arguments))
    keywords = {name: several(value) for name, value in keywords.items()}
    if keywords:
        return arguments, keywords, {name: open_sizes(value) for name, value in keywords.items()}
    return arguments, keywords, tuple(map(open_sizes, arguments))


@contextmanager
def _made(suffix: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # exporters raise anything when they meet code that they cannot record
        first = str(error).strip().partition("\n")[0]
        raise InputError(
            f"--out: the converted model cannot be made into {suffix}: {type(error).__name__}: {first}; nothing was "
            "written. A state dict (.pt) can be"
        ) from error


def _code(value: Any) -> str:
    """Python that makes tensors of the same sizes."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name!r}: {_code(part)}" for name, part in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_code, value))}]"
    shape = tuple(value.shape)
    if value.dtype == torch.float32:
        return f"torch.randn({', '.join(map(str, shape)) or '()'})"
    return f"torch.zeros({shape}, dtype={value.dtype})"


def _write(contents: dict[Path, tuple[bytes, str]], say: Callable[[str], object]) -> list[str]:
    """What was written, how large it is, and how to load it."""
    parts: list[str] = []
    for path, (content, code) in contents.items():
        say(f"writing {path}")
        try:
            files.replace(path.resolve(), content)
        except (files.WriteError, KeyboardInterrupt) as error:
            done = list(contents)[: len(parts)]
            reason = str(error) or f"interrupted; {path} was not written"
            raise Unwritten(", but ".join([reason, *(f"{other} was" for other in done)])) from error
        parts.append(f"{path}: written, {_size(len(content))}")
        if code:
            parts[-1] += f"; to load it:\n\n{textwrap.indent(code, '    ')}"
    return parts


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


_CONTENTS: dict[str, Callable[..., tuple[bytes, str]]] = {
    ".pt": _checkpoint,
    ".pth": _checkpoint,
    ".pt2": _program,
    ".onnx": _onnx,
}
