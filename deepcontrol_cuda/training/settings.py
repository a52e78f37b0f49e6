"""The settings of a training run: what the command takes, what it means, and what may change when a run is resumed."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .errors import TrainingError
from .methods import MAIN_METHODS
from .networks import NETWORKS

DATASETS = ("digits", "cifar10", "cifar100", "imagefolder")
_SGD_RATE = 0.1
_ADAMW = {"learning_rate": 1e-3, "weight_decay": 0.01}
# For ImageNet as in arXiv 1706.02677; for CIFAR the schedule is a cosine, else as in arXiv 1512.03385, section 4.2.
_CIFAR = {"network": "resnet20", "epochs": 200, "batch_size": 128, "weight_decay": 1e-4}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {"network": "resnet10", "epochs": 12, "batch_size": 64, "weight_decay": 0.0},
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "imagefolder": {"network": "resnet50", "epochs": 90, "batch_size": 256, "weight_decay": 1e-4, "warmup": 5.0},
}


@dataclass(frozen=True)
class Settings:
    """What decides the result of a run, but for data and machine. A run is resumed only with the same settings.

    ``learning_rate`` is that of the largest group of parameters, at its highest; ``warmup`` and ``milestones`` count
    epochs; ``batch_size`` is that of an optimizer step, over all ranks and over all ``accumulate`` parts of it.
    """

    dataset: str
    network: str
    method: str
    optimizer: str
    learning_rate: float
    momentum: float
    weight_decay: float
    schedule: str
    milestones: list[int]
    warmup: float
    epochs: int
    batch_size: int
    accumulate: int
    clip_grad_norm: float | None
    image_size: int
    seed: int
    amp: str | None
    channels_last: bool
    compile: str | None
    deterministic: bool

    def factor(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of optimizer step ``step`` (from 0) over the highest."""
        warm = round(self.warmup * steps_per_epoch)
        if step < warm:
            return (step + 1) / warm
        if self.schedule == "cosine":
            return (1 + math.cos(math.pi * (step - warm) / (self.epochs * steps_per_epoch - warm))) / 2
        return 0.1 ** sum(step >= milestone * steps_per_epoch for milestone in self.milestones)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options. None has a default here: what is not given depends on others, or on the run resumed."""

    def add(name: str, **keywords) -> None:
        group.add_argument(f"--{name}", default=argparse.SUPPRESS, **keywords)

    group = parser.add_argument_group("what is trained on what")
    add("dataset", choices=DATASETS, help="default: digits, which come with scikit-learn")
    add("data", type=Path, metavar="PATH", help="cifar10, cifar100: folder or .tar.gz of the python version; "
        "imagefolder: folder with train/CLASS/*.jpg and val/CLASS/*.jpg (or other formats)")  # fmt: skip
    add("network", choices=tuple(NETWORKS), help="default: resnet10 for digits, resnet20 for CIFAR, resnet50")
    add("method", choices=MAIN_METHODS, help="default: deep_control")
    add("image-size", type=int, metavar="PIXELS", help="imagefolder: side of the squares to train on (default: 224)")
    group = parser.add_argument_group("how")
    add("optimizer", choices=("sgd", "adamw"), help="default: sgd")
    add("learning-rate", type=float, help="default: 0.1 for sgd, 0.001 for adamw")
    add("momentum", type=float, help="of sgd (default: 0.9)")
    add("weight-decay", type=float, help="default: for sgd 0 for digits, else 1e-4; for adamw 0.01")
    add("schedule", choices=("cosine", "step", "constant"), help="of the learning rate (default: cosine)")
    add("milestones", type=int, nargs="+", metavar="EPOCH",
        help="of schedule step: the rate drops to a tenth behind these epochs (default: at 1/2 and 3/4)")  # fmt: skip
    add("warmup", type=float, metavar="EPOCHS",
        help="the rate rises linearly at first (default: 5 for imagefolder, fewer in under 90 epochs; 0)")  # fmt: skip
    add("epochs", type=int, help="default: 12 for digits, 200 for CIFAR, 90")
    add(
        "batch-size",
        type=int,
        help="images of a step, all processes together (default: 64 for digits, 128 for CIFAR, 256)",
    )
    add(
        "accumulate",
        type=int,
        metavar="PARTS",
        help="compute each batch in this many parts to save memory (default: 1)",
    )
    add("clip-grad-norm", type=float, metavar="NORM", help="scale gradients down to this Euclidean norm")
    add("seed", type=int, help="default: 0")
    group = parser.add_argument_group("speed and machine")
    add("amp", nargs="?", const="bfloat16", choices=("bfloat16", "float16"), help="mixed precision; alone: bfloat16")
    add("channels-last", action=argparse.BooleanOptionalAction, help="memory format of maps (default: channels last)")
    add("compile", nargs="?", const="inductor", metavar="BACKEND", help="torch.compile; alone: inductor")
    add(
        "deterministic",
        action="store_true",
        help="on a GPU: only PyTorch's deterministic kernels, slower; on a CPU all are",
    )
    add("device", help="cpu, cuda or cuda:1 (default: cuda if there is a GPU)")
    add("parallel", choices=("ddp", "fsdp2"), help="for many processes, started by torchrun")
    add("workers", type=int, help="imagefolder: processes that read images (default: one a core, at most 8)")


def new(given: dict[str, Any]) -> Settings:
    """Settings from the options that the user gave, by name, and defaults.

    Raises:
        TrainingError: an option is out of its range or does not go with another.
    """
    values: dict[str, Any] = {
        "dataset": "digits",
        "method": "deep_control",
        "optimizer": "sgd",
        "schedule": "cosine",
        "milestones": [],
        "warmup": 0.0,
        "accumulate": 1,
        "clip_grad_norm": None,
        "image_size": 224,
        "seed": 0,
        "amp": None,
        "channels_last": True,
        "compile": None,
        "deterministic": False,
    }
    values |= {key: value for key, value in given.items() if key in _names()}
    adamw = values["optimizer"] == "adamw"
    dataset = {"learning_rate": _SGD_RATE, "momentum": 0.0 if adamw else 0.9, **_DEFAULTS[values["dataset"]]}
    values = values | dataset | (_ADAMW if adamw else {}) | {k: v for k, v in given.items() if k in _names()}
    if "warmup" not in given:
        # In a shorter run than ImageNet's 90 epochs the same share of it.
        values["warmup"] = min(values["warmup"], values["epochs"] / 18)
    if values["schedule"] == "step" and not values["milestones"]:
        values["milestones"] = sorted({max(1, values["epochs"] * share // 4) for share in (2, 3)})
    settings = Settings(**values)
    _check(settings, given)
    return settings


def resumed(saved: dict[str, Any], given: dict[str, Any]) -> Settings:
    """The settings of a checkpoint, which the options that the user gave may only repeat.

    ``epochs`` may grow unless the schedule is a cosine: then the rates of the epochs behind us would have been others.

    Raises:
        TrainingError: an option differs, or the checkpoint's settings are not those of this version.
    """
    if set(saved) != _names():
        odd = ", ".join(sorted(set(saved) ^ _names()))
        raise TrainingError(f"the checkpoint was written by another version of this command, which differs in: {odd}")
    given = {key: value for key, value in given.items() if key in _names()}
    longer = "epochs" in given and given["epochs"] > saved["epochs"] and saved["schedule"] != "cosine"
    differing = [k for k, value in given.items() if value != saved[k] and not (k == "epochs" and longer)]
    if differing:
        listed = "; ".join(f"{option(k)}: got {given[k]}, the run has {saved[k]}" for k in differing)
        why = ""
        if "epochs" in differing:
            why = " (--epochs may only grow, and not under a cosine, whose rates so far would have been others)"
        raise TrainingError(
            f"a run is resumed with its own settings. {listed}{why}. Leave them out, or start a new run"
        )
    settings = Settings(**saved | given)
    _check(settings, {})
    return settings


def _names() -> set[str]:
    return {field.name for field in fields(Settings)}


def option(name: str) -> str:
    """The option of the command that sets what the code calls ``name``."""
    return "--" + name.replace("_", "-")


def _check(settings: Settings, given: dict[str, Any]) -> None:
    values = asdict(settings)

    def want(name: str, right: bool, wanted: str) -> None:
        if not right:
            raise TrainingError(f"{option(name)}: got {values[name]}, wanted {wanted}")

    for name in ("epochs", "batch_size", "accumulate", "image_size"):
        want(name, values[name] >= 1, "at least 1")
    want("learning_rate", 0 < settings.learning_rate < math.inf, "a positive number")
    want("momentum", 0 <= settings.momentum < 1, "a number from 0 to below 1")
    want("weight_decay", 0 <= settings.weight_decay < math.inf, "a number from 0 up")
    want("warmup", 0 <= settings.warmup < settings.epochs, f"less than the {settings.epochs} epochs, from 0 up")
    clip = settings.clip_grad_norm
    want("clip_grad_norm", clip is None or 0 < clip < math.inf, "a positive number")
    want("seed", 0 <= settings.seed < 2**63, "a number from 0 to below 2^63")
    want(
        "batch_size",
        settings.batch_size % settings.accumulate == 0,
        f"a multiple of --accumulate {settings.accumulate}",
    )
    if settings.schedule == "step":
        rising = sorted(set(settings.milestones)) == settings.milestones
        want("milestones", rising and settings.milestones[0] > 0, "rising epochs from 1")
    for name, master, value in (
        ("momentum", "optimizer", "sgd"),
        ("milestones", "schedule", "step"),
        ("image_size", "dataset", "imagefolder"),
    ):
        if name in given and values[master] != value:
            raise TrainingError(f"{option(name)} goes with {option(master)} {value}, not with {values[master]}")
