"""Made-up runs of ``python -m bench``, for the tests of what reads them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from itertools import product

from bench import report
from bench.cases import SETS
from bench.rows import Accuracy, Ceilings, Row, Run, Setting

MODES = ("forward", "training")
LAYOUTS = ("channels_last", "contiguous")
DTYPES = ("float32", "bfloat16")
LAYERS = {"conv": 0.9, "conv_relu": 1.0, "conv_bn_relu": 1.25, "conv_bn_relu_compiled": 1.4,
          "conv_group_norm_relu": 1.6, "conv_instance_norm_relu": 3.1, "ours": 0.9,
          "ours, two passes": 1.05}  # fmt: skip
ROUNDS = 9
_MEMORY = {"conv_bn_relu": 11_240_960, "ours": 4_973_568}


def run(command: str, rows=(), verdicts=(), **values) -> Run:
    head = {
        "date": "2026-01-31",
        "machine": {"cpu": "Made-up CPU", "cores": 2, "memory_gib": 16.0},
        "versions": {"python": "3.11.7", "torch": "2.13.0+cpu", "deepcontrol_cuda": "0.1.0"},
        "commit": {"hash": "0123456789ab", "dirty": False},
        "conditions": {"set": "resnet50", "quick": False, "repeats": ROUNDS, "load_average_before": [0.1, 0.1, 0.1]},
        "complete": True,
        "ceilings": (Ceilings(1, 2e10, 1.1e11, 2.3e11), Ceilings(2, 5e10, 2.2e11, 4.5e11)),
    }
    return Run(command, rows=tuple(rows), verdicts=tuple(verdicts), **head | values)


def seconds(factors: Mapping[str, float], base: float, seed: str, noise: float = 0.01) -> dict[str, tuple[float, ...]]:
    """A time a round and peer; a slow round is slow for all."""
    draw = random.Random(seed)
    rounds = [1 + 0.2 * draw.random() for _ in range(ROUNDS)]
    return {
        peer: tuple(base * factor * slow * (1 + noise * draw.gauss(0, 1)) for slow in rounds)
        for peer, factor in factors.items()
    }


def layers(factors: Mapping[str, float] = LAYERS, seed: int = 0, day: float = 1.0, **values) -> Run:
    rows = []
    for dtype, layout, mode, shape in product(DTYPES, LAYOUTS, MODES, SETS["resnet50"]):
        operations = 2 * 8 * shape.out_size**2 * shape.out_channels * shape.in_channels * shape.kernel_size**2
        moved = 4 * 8 * (shape.in_channels * shape.size**2 + shape.out_channels * shape.out_size**2)
        times = 3 if mode == "training" else 1
        setting = Setting(dtype, layout, mode, 8, 2)
        base = day * times * operations / 1.6e11
        accuracies = {"ours": {"output": Accuracy(1e-7, 1e-6)}}
        own = seconds(factors, base, f"{seed}, {setting}, {shape}")
        rows.append(Row(str(shape), setting, "conv_relu", own, accuracies, times * moved, times * operations))
    verdicts = report.layer_verdicts(rows)
    return run("layers", rows, verdicts, **values)


def models() -> Run:
    factors = {"conv_relu": 0.9, "conv_bn_relu": 1.0, "conv_bn_relu_compiled": 1.08, "ours": 0.8,
               "ours, mean shift rejection": 0.78}  # fmt: skip
    peaks = {"conv_relu": 340 << 20, "conv_bn_relu": 700 << 20, "ours": 360 << 20}
    rows = []
    for model, dtype, mode in product(("ResNet-50, 224 pixels", "MobileNetV2, 224 pixels"), DTYPES, MODES):
        setting = Setting(dtype, "channels_last", mode, 8, 2)
        own = seconds(factors, 1.2, f"{model}, {setting}")
        rows.append(Row(model, setting, "conv_bn_relu", own, peak_bytes=peaks if mode == "training" else {}))
    return run("models", rows)


def blocks() -> Run:
    factors = {"conv_relu": 1.0, "conv_bn_relu": 1.2, "ours": 0.95}
    rows = []
    for block, dtype, mode in product(("bottleneck, 256 channels", "inverted residual, 32 channels"), DTYPES, MODES):
        setting = Setting(dtype, "channels_last", mode, 8, 2)
        rows.append(Row(block, setting, "conv_relu", seconds(factors, 0.02, f"{block}, {setting}")))
    return run("blocks", rows)


def bandwidth() -> Run:
    kernels = ("center, relu, 64x56x56", "center_backward, relu, 64x56x56")
    rows = []
    for kernel, dtype, layout in product(kernels, DTYPES, LAYOUTS):
        setting = Setting(dtype, layout, "forward", 8, 2)
        own = seconds({"copy": 1.0, "ours": 1.1}, 1e-3, f"{kernel}, {setting}")
        rows.append(Row(kernel, setting, "copy", own, {}, 50_000_000))
    return run("bandwidth", rows)


def memory() -> Run:
    chains = ("three layers of 64 channels", "three layers from an image")
    rows = [
        Row(chain, Setting(dtype, layout, "training", 8, 2), "conv_bn_relu", {}, kept_bytes=_MEMORY, peak_bytes=_MEMORY)
        for chain, dtype, layout in product(chains, DTYPES, LAYOUTS)
    ]
    return run("memory", rows)


def overhead() -> Run:
    factors = {"conv_relu": 1.0, "conv_bn_relu": 2.0, "ours": 1.9}
    rows = [
        Row("3x3, 16 to 16, 4x4", setting := Setting(dtype, "channels_last", mode, 1, 1), "conv_relu",
            seconds(factors, 2e-5, str(setting)))
        for dtype, mode in product(DTYPES, MODES)
    ]  # fmt: skip
    return run("overhead", rows)


def scaling() -> Run:
    places = [(batch, 64, 28, 2) for batch in (1, 2, 4, 8, 16)]
    places += [(8, channels, 28, 2) for channels in (16, 32, 128, 256)]
    places += [(8, 64, size, 2) for size in (7, 14, 56)] + [(8, 64, 28, 1)]
    rows = []
    for mode, (batch, channels, size, threads) in product(MODES, places):
        setting = Setting("float32", "channels_last", mode, batch, threads)
        base = 1e-9 * batch * channels**2 * size**2 / threads + 1e-5
        case = f"3x3, {channels} to {channels}, {size}x{size}"
        rows.append(Row(case, setting, "conv_relu", seconds(LAYERS, base, f"{case}, {setting}")))
    return run("scaling", rows)


ALL = {make.__name__: make for make in (layers, blocks, models, bandwidth, memory, overhead, scaling)}
