"""``python -m bench gpu``, which ``make gpu`` calls."""

from __future__ import annotations

import argparse

import torch

from . import gpu, options

HELP = "test, check and time the kernels on this machine's GPU, and write down which of them are proven"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--architecture", action="store_true", help="only print what TORCH_CUDA_ARCH_LIST should be")
    parser.add_argument("--repeats", type=options.rounds, default=30, help="default: 30")
    parser.add_argument(
        "--seconds",
        type=options.positive,
        default=400,
        help="start no timing after this; tests and sanitizers get shares of it (default: 400)",
    )
    parser.add_argument("--commit", help="what to record where this is no git checkout")
    options.add_output(parser)


def run(asked: argparse.Namespace) -> int:
    if lacks := gpu.missing():
        raise options.MissingError("make gpu needs " + "\n       and ".join(lacks))
    if asked.architecture:
        print(gpu.architecture(torch.cuda.get_device_capability()))
        return 0
    return gpu.run(asked.output, asked.seconds, asked.repeats, asked.commit)
