"""Networks that people use, with random weights, and what ``replace_conv_bn`` makes of them.

``python -m tests.zoo`` writes ``docs/zoo.md``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import deepcontrol_cuda as dc
from deepcontrol_cuda.memory import saved_bytes
from tests.torchvision_operators import define_missing

define_missing()

METHODS = ("deep_control", "mean_shift_rejection")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "zoo.md"


def torchvision(name: str, **options) -> nn.Module:
    from torchvision import models

    return models.get_model(name, weights=None, **options)


def torchvision_segmentation(name: str) -> nn.Module:
    return torchvision(name, weights_backbone=None, aux_loss=True)


def torchvision_fpn(norm: str) -> nn.Module:
    from torchvision import ops
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    norm_layer = {"BatchNorm2d": nn.BatchNorm2d, "FrozenBatchNorm2d": ops.FrozenBatchNorm2d}[norm]
    return resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=norm_layer)


def vgg11_bn() -> nn.Module:
    """With one linear layer in place of three, which have 119 million of the 129 million parameters."""
    model = torchvision("vgg11_bn", init_weights=False)
    model.classifier = nn.Linear(512 * 7 * 7, 1000)
    return model


def timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False)


def hugging_face_resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=16, hidden_sizes=[32, 64, 96, 128], depths=[1, 2, 2, 1], num_labels=1000)
    return ResNetForImageClassification(config)


class DoubleConv3d(nn.Sequential):
    """Twice convolution, norm and activation, as every level of a U-Net has them."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        layers: list[nn.Module] = []
        for channels in (in_channels, out_channels):
            conv = nn.Conv3d(channels, out_channels, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm3d(out_channels), nn.ReLU(inplace=True)]
        super().__init__(*layers)


class UNet3d(nn.Module):
    """Two levels down and up again, with norms behind the transposed convolutions too."""

    def __init__(self, in_channels: int = 1, classes: int = 3, width: int = 8) -> None:
        super().__init__()
        self.down1 = DoubleConv3d(in_channels, width)
        self.down2 = DoubleConv3d(width, 2 * width)
        self.bottom = DoubleConv3d(2 * width, 4 * width)
        self.pool = nn.MaxPool3d(2)
        self.up2 = nn.ConvTranspose3d(4 * width, 2 * width, 2, stride=2)
        self.up2_norm = nn.BatchNorm3d(2 * width)
        self.merge2 = DoubleConv3d(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose3d(2 * width, width, 2, stride=2)
        self.up1_norm = nn.BatchNorm3d(width)
        self.merge1 = DoubleConv3d(2 * width, width)
        self.head = nn.Conv3d(width, classes, 1)

    def forward(self, volume: Tensor) -> Tensor:
        skip1 = self.down1(volume)
        skip2 = self.down2(self.pool(skip1))
        x = self.bottom(self.pool(skip2))
        x = torch.relu(self.up2_norm(self.up2(x)))
        x = self.merge2(torch.cat([skip2, x], 1))
        x = torch.relu(self.up1_norm(self.up1(x)))
        return self.head(self.merge1(torch.cat([skip1, x], 1)))


class DCGANGenerator(nn.Sequential):
    """From a code of one pixel to an image, by transposed convolutions alone."""

    def __init__(self, code: int = 16, width: int = 16) -> None:
        layers: list[nn.Module] = []
        sizes = (code, 4 * width, 2 * width, width)
        for i in range(3):
            geometry = {"stride": 1, "padding": 0} if i == 0 else {"stride": 2, "padding": 1}
            conv = nn.ConvTranspose2d(sizes[i], sizes[i + 1], 4, bias=False, **geometry)
            layers += [conv, nn.BatchNorm2d(sizes[i + 1]), nn.ReLU(inplace=True)]
        super().__init__(*layers, nn.ConvTranspose2d(width, 3, 4, stride=2, padding=1, bias=False), nn.Tanh())


class PointNet(nn.Module):
    """Every point alone by convolutions of length 1, the largest over the points, then linear layers with norms."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(3, 32, 1)
        self.bn1 = nn.BatchNorm1d(32)
        self.conv2 = nn.Conv1d(32, 64, 1)
        self.bn2 = nn.BatchNorm1d(64)
        self.fc1 = nn.Linear(64, 48)
        self.bn3 = nn.BatchNorm1d(48)
        self.fc2 = nn.Linear(48, 32)
        self.bn4 = nn.BatchNorm1d(32)
        self.fc3 = nn.Linear(32, classes)
        self.dropout = nn.Dropout(0.3)

    def forward(self, points: Tensor) -> Tensor:
        x = nn.functional.relu(self.bn1(self.conv1(points)))
        x = self.bn2(self.conv2(x))
        x = torch.max(x, 2)[0]
        x = nn.functional.relu(self.bn3(self.fc1(x)))
        x = nn.functional.relu(self.bn4(self.dropout(self.fc2(x))))
        return self.fc3(x)


@dataclass(frozen=True)
class Entry:
    """A network of the zoo. ``left`` has the norms that must stay, each with a part of the reason that is given."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...] = (2, 3, 64, 64)
    left: tuple[tuple[str, str], ...] = ()


ZOO: dict[str, Entry] = {
    "torchvision resnet18": Entry(partial(torchvision, "resnet18")),
    "torchvision resnet50": Entry(partial(torchvision, "resnet50")),
    "torchvision resnext50_32x4d": Entry(partial(torchvision, "resnext50_32x4d")),
    "torchvision wide_resnet50_2": Entry(partial(torchvision, "wide_resnet50_2")),
    "torchvision densenet121": Entry(partial(torchvision, "densenet121")),
    "torchvision vgg11_bn": Entry(vgg11_bn),
    "torchvision mobilenet_v2": Entry(partial(torchvision, "mobilenet_v2")),
    "torchvision mobilenet_v3_small": Entry(partial(torchvision, "mobilenet_v3_small")),
    "torchvision mobilenet_v3_large": Entry(partial(torchvision, "mobilenet_v3_large")),
    "torchvision efficientnet_b0": Entry(partial(torchvision, "efficientnet_b0")),
    "torchvision regnet_x_400mf": Entry(partial(torchvision, "regnet_x_400mf")),
    "torchvision regnet_y_400mf": Entry(partial(torchvision, "regnet_y_400mf")),
    "torchvision shufflenet_v2_x1_0": Entry(partial(torchvision, "shufflenet_v2_x1_0")),
    # Its auxiliary head needs images of 299 pixels.
    "torchvision inception_v3": Entry(
        partial(torchvision, "inception_v3", aux_logits=False, init_weights=False), (2, 3, 107, 107)
    ),
    "torchvision googlenet": Entry(partial(torchvision, "googlenet", init_weights=False)),
    "torchvision mnasnet1_0": Entry(partial(torchvision, "mnasnet1_0")),
    "torchvision deeplabv3_resnet50": Entry(partial(torchvision_segmentation, "deeplabv3_resnet50")),
    "torchvision fcn_resnet50": Entry(partial(torchvision_segmentation, "fcn_resnet50")),
    "torchvision resnet50 FPN": Entry(partial(torchvision_fpn, "BatchNorm2d")),
    "torchvision resnet50 FPN, frozen": Entry(partial(torchvision_fpn, "FrozenBatchNorm2d")),
    "timm resnet18": Entry(partial(timm, "resnet18")),
    "timm resnetv2_50": Entry(partial(timm, "resnetv2_50")),
    "timm efficientnet_b0": Entry(partial(timm, "efficientnet_b0")),
    "timm tf_efficientnet_b0": Entry(partial(timm, "tf_efficientnet_b0")),
    "timm tf_mobilenetv3_small_100": Entry(partial(timm, "tf_mobilenetv3_small_100")),
    "timm convnext_atto": Entry(partial(timm, "convnext_atto")),
    "transformers ResNet": Entry(hugging_face_resnet),
    "3D U-Net": Entry(UNet3d, (2, 1, 16, 16, 16)),
    "DCGAN generator": Entry(DCGANGenerator, (4, 16, 1, 1)),
    "PointNet": Entry(PointNet, (4, 3, 64)),
}


def tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of what a network returns: a tensor, a mapping, a tuple or a ``ModelOutput``."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from tensors(value)
    elif output is not None:
        raise TypeError(f"output: got {type(output).__name__}, wanted tensors in mappings and sequences")


class OneTensor(nn.Module):
    """All that ``model`` returns in one tensor, which costs no bytes kept for backward; the last one is ``output``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        self.output = torch.cat([tensor.flatten() for tensor in tensors(self.model(x))])
        return self.output


def norms(model: nn.Module) -> dict[str, nn.Module]:
    """The Batch Norms of a model by name, those with fixed statistics of torchvision and timm too."""
    batch_norm = nn.modules.batchnorm._BatchNorm
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, batch_norm) or type(module).__name__.startswith("FrozenBatchNorm")
    }


@torch.no_grad()
def trained(model: nn.Module, x: Tensor) -> nn.Module:
    """``model`` in ``eval()`` as a training could have left it: statistics near those of ``x``, no vector trivial.

    Scales, shifts and statistics are off by about a tenth, so that to forget any of them shows. Scales are near one and
    so are shifts: around zero, where ReLU has its kink, deep networks with random kernels are chaotic and amplify
    float32's rounding several hundred times, as trained ones do not.
    """

    def off(like: Tensor) -> Tensor:
        return 0.1 * (2 * torch.rand_like(like) - 1)

    def set_statistics(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        z = inputs[0].transpose(0, 1).flatten(1)
        norm.running_mean.copy_(z.mean(1))
        # Of few values some channels have next to no variance; of a training's they would have more.
        norm.running_var.copy_(z.var(1).clamp_min(0.1 * z.var().item()))

    found = norms(model).values()
    hooks = [norm.register_forward_pre_hook(set_statistics) for norm in found]
    for norm in found:
        norm.weight.copy_(1 + off(norm.weight))
        norm.bias.copy_(1 + off(norm.bias))
    model.train()(x)
    for hook in hooks:
        hook.remove()
    for norm in found:
        norm.running_mean += norm.running_var.sqrt() * off(norm.running_mean)
        norm.running_var *= 1 + off(norm.running_var)
    return model.eval()


class Step(NamedTuple):
    """A forward and a backward in training."""

    bytes: int
    """Kept for backward, as ``deepcontrol_cuda.memory.saved_bytes`` counts them."""
    without_gradient: set[str]
    """Parameters that want a gradient and got none."""
    not_finite: set[str]
    """Parameters whose gradient is not finite."""


def step(model: nn.Module, x: Tensor) -> Step:
    torch.manual_seed(2)
    net = OneTensor(model.train())
    kept = saved_bytes(net, x)
    net.output.square().mean().backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    missing = {name for name, gradient in wanted.items() if gradient is None}
    broken = {name for name, gradient in wanted.items() if name not in missing and not gradient.isfinite().all()}
    model.zero_grad()
    return Step(kept, missing, broken)


class Counts(NamedTuple):
    """What a report and the converted model say of one network, alike for both methods."""

    norms: int
    merged: int
    activations: int
    adds: int
    norm_only: int
    left: int


class Case:
    """One network with its conversions, each made once."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.entry = ZOO[name]
        torch.manual_seed(0)
        self.x = torch.randn(self.entry.shape)
        self.model = trained(self.entry.build(), self.x)
        with torch.no_grad():
            self.oracle = copy.deepcopy(self.model).double()(self.x.double())
        self.norms = norms(self.model)
        self.before = step(copy.deepcopy(self.model), self.x)
        self._reports: dict[tuple[str, str], Any] = {}
        self._steps: dict[str, Step] = {}
        self._evaluated: dict[str, tuple[Any, Counts]] = {}

    def report(self, method: str, initialization: str) -> Any:
        key = method, initialization
        if key not in self._reports:
            self._reports[key] = dc.replace_conv_bn(self.model, method, initialization)
        return self._reports[key]

    def fresh_step(self, method: str) -> Step:
        if method not in self._steps:
            self._steps[method] = step(self.report(method, "fresh").model, self.x)
        return self._steps[method]

    def evaluated(self, method: str) -> tuple[Any, Counts]:
        """What the folded model gives in evaluation, and what is in it."""
        if method not in self._evaluated:
            report = self.report(method, "folded")
            # Under Mean Shift Rejection convolutions without a norm change too.
            layers = [report.model.get_submodule(row.module) for row in report.replaced if row.norm]
            adds = set()

            def look(layer: nn.Module, arguments: tuple, keywords: dict[str, Any]) -> None:
                if (*arguments[1:], keywords.get("residual"))[0] is not None:
                    adds.add(layer)

            hooks = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
            with torch.no_grad():
                output = report.model(self.x)
            for hook in hooks:
                hook.remove()
            merged = sum(isinstance(layer, nn.modules.conv._ConvNd) for layer in layers)
            self._evaluated[method] = (
                output,
                Counts(
                    norms=len(self.norms),
                    merged=merged,
                    activations=sum(getattr(layer, "activation", "identity") != "identity" for layer in layers),
                    adds=len(adds),
                    norm_only=len(layers) - merged,
                    left=len(report.left),
                ),
            )
        return self._evaluated[method]


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# One at a time: the largest ones have half a gigabyte with their conversions.
case = lru_cache(maxsize=1)(Case)


def row(name: str) -> tuple[str, ...]:
    """The line of the page for one network, in ``HEAD``'s columns."""
    this = case(name)
    before = this.before.bytes
    cells = [name, " x ".join(map(str, this.entry.shape)), *map(str, this.evaluated("deep_control")[1])]
    cells.append(f"{parameters(this.model):,}")
    cells += [f"{parameters(this.report(method, 'fresh').model):,}" for method in METHODS]
    cells.append(f"{before:,}")
    for method in METHODS:
        after = this.fresh_step(method).bytes
        cells += [f"{after:,}", f"{after / before:.2f}"]
    return tuple(cells)


HEAD = (
    "network", "input", "norms", "merged", "activations", "adds", "norm only", "left", "parameters",
    "with Deep Control", "with Mean Shift Rejection", "bytes", "bytes with Deep Control", "ratio",
    "bytes with Mean Shift Rejection", "ratio",
)  # fmt: skip
PACKAGES = ("torch", "torchvision", "timm", "transformers")


def head_lines() -> str:
    """What the page says above its table."""
    versions = ", ".join(f"{package} {version(package).partition('+')[0]}" for package in PACKAGES)
    return f"""# The zoo

What `replace_conv_bn` makes of networks that people use, by either method; random weights, no download. Written by
`python -m tests.zoo`, and `tests/test_zoo.py` fails if it does not agree with what it finds. There every network,
folded, computes what its Batch Norms compute in evaluation, and, fresh, trains a step with finite gradients.

Merged norms went with the convolution in front into one layer; "norm only" ones became a layer in their own place, as
behind a linear layer or in front of a convolution; "left" ones stay, and the report says why. Into how many layers an
activation and the add of a residual went is in the columns with these names. "Bytes" are what a forward in training
keeps for backward besides parameters and buffers, in float32, at **the small inputs of the test** (in larger images
maps weigh more); behind them the same of the converted networks, and the ratio of the two. Nothing is saved where no
convolution is merged, as with transposed ones, and where norms were frozen, which keep nothing themselves.

Versions: {versions}.
"""


def line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def page() -> str:
    table = [HEAD, tuple("---" if i < 2 else "---:" for i in range(len(HEAD))), *map(row, ZOO)]
    return "\n".join([head_lines(), *map(line, table), ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
