"""The demo: trains, times and reports; every number in the report is measured by it."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from ..conversion import replace_conv_bn
from . import fine_tuning, layers, report
from .conditions import conditions
from .data import DataSet, digits
from .loop import NETWORKS, Setting, build, train
from .methods import CALIBRATION_IMAGES

# 21 full batches of 64 are an epoch of the 1347 training images.
_SETTINGS = (Setting(64, 0.05, 252), Setting(64, 0.2, 252), Setting(64, 0.4, 252), Setting(1, 0.01, 1347))
_QUICK_SETTINGS = (Setting(64, 0.05, 12), Setting(1, 0.01, 12))
_QUICK_PLAN = fine_tuning.Plan(64, Setting(64, 0.05, 4), Setting(64, 0.005, 4))


def run(output: Path, quick: bool, seed: int) -> tuple[Path, str]:
    """Do everything and return the path of the report and its main table.

    ``output`` is a folder that exists and can be written to; the report in it is renewed after each setting and
    written at the end, come what may. ``quick`` takes a few steps of everything, to see that it runs. ``seed`` is the
    first of the seeds.
    """
    settings = _QUICK_SETTINGS if quick else _SETTINGS
    plan = _QUICK_PLAN if quick else fine_tuning.PLAN
    seeds = [seed] if quick else [seed, seed + 1]
    data = digits()
    results = report.Results(conditions(), _method(data), _fine_tuning_method(plan))
    print(replace_conv_bn(build("Batch Norm", seed, data)))
    report.write(results, output)
    try:
        _train(results, settings, seeds, data, output)
        _fine_tune(results, plan, seeds, data)
        report.write(results, output)
        _time(results, quick)
        results.complete = True
    finally:
        path = report.write(results, output)
    return path, f"{report.training_table(results.runs)}\n\n{report.fine_tuning_table(results.fine_tuning)}"


def _train(
    results: report.Results, settings: tuple[Setting, ...], seeds: list[int], data: DataSet, output: Path
) -> None:
    total = sum(setting.steps for setting in settings) * len(NETWORKS) * len(seeds)
    with tqdm(total=total, unit="step", desc="training", dynamic_ncols=True) as bar:
        done = 0
        for setting in settings:
            for network in NETWORKS:
                for seed in seeds:
                    bar.set_description(f"{setting}: {network}, seed {seed}")
                    results.runs.append(train(network, setting, seed, data, bar.update))
                    done += setting.steps
                    bar.update(done - bar.n)
            report.write(results, output)


def _fine_tune(results: report.Results, plan: fine_tuning.Plan, seeds: list[int], data: DataSet) -> None:
    total = (plan.first.steps + len(fine_tuning.NETWORKS) * plan.then.steps) * len(seeds)
    with tqdm(total=total, unit="step", desc="fine-tuning", dynamic_ncols=True) as bar:
        for seed in seeds:
            trained = fine_tuning.pretrain(plan, seed, data, bar.update)
            for network in fine_tuning.NETWORKS:
                bar.set_description(f"fine-tuning: {network}, seed {seed}")
                results.fine_tuning.append(fine_tuning.fine_tune(trained, network, plan, seed, data, bar.update))


def _time(results: report.Results, quick: bool) -> None:
    shapes, batch_size, rounds = (layers.RESNET50[-1:], 1, 3) if quick else (layers.RESNET50, 8, 15)
    results.conditions["layers"] = f"batch size {batch_size}, {rounds} rounds"
    with tqdm(total=len(shapes) * len(layers.PASSES), unit="layer", desc="timing layers", dynamic_ncols=True) as bar:
        for shape in shapes:
            for timing in layers.measure(shape, batch_size, rounds):
                results.timings.append(timing)
                bar.update()


def _method(data: DataSet) -> list[str]:
    return [
        f"ResNet-10 (16 and 32 channels) on scikit-learn's digits: {len(data.train)} training and "
        f"{len(data.test)} test images of 8x8 pixels. SGD, momentum 0.9, learning rate down to zero along a "
        "cosine; no weight decay, no augmentation; one thread. The settings are the same for all networks; the "
        "learning rates reach from where all train to where some fail. Networks of one seed start with the same "
        "kernels and see the same images in the same order.",
        "*Batch Norm* is the usual network. In *Deep Control* every conv + BN (+ sum) (+ ReLU) of it is one "
        f"`DeepControlConv2d`; `calibrate_gain_` sets the gains before training from {CALIBRATION_IMAGES} training "
        "images, so that every channel has deviation 1. *Deep Control, not calibrated* starts with gains of 1, as "
        "what `replace_conv_bn` makes of a model does. *no norm* has biases in place of the norms.",
        "*diverged* gives the step with a loss that is not finite; the run ends there and has no accuracy. *final "
        "loss* is the mean over the last tenth of the steps; guessing has ln 10 = 2.303. One test image is "
        f"{1 / len(data.test):.4f} of accuracy, and so few seeds do not decide who is better by a point or two.",
    ]


def _fine_tuning_method(plan: fine_tuning.Plan) -> str:
    return (
        f"A ResNet-10 is trained with Batch Norm on {plan.images} of the training images for {plan.first.steps} steps "
        f"({plan.first}) and converted with its weights by `replace_conv_bn(model, method, "
        '"folded")`. Then it and the two converted networks are trained on with all training images for '
        f"{plan.then.steps} steps, all parameters free, mean_scale too. The learning rate is at most "
        f"{plan.then.learning_rate:g}, a tenth of the first: it rises along a line over the first epoch and falls to "
        f"zero along a cosine, and gradients are clipped to norm {fine_tuning.CLIP:g}, since nothing keeps them small "
        "in a converted network. Test accuracies:"
    )
