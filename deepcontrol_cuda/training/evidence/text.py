"""The words of the report; what is a number in them is that of the code."""

from __future__ import annotations

from collections.abc import Iterable

from ..methods import CALIBRATION_IMAGES
from .intervals import CONFIDENCE, TRAINED_ACCURACY
from .plan import BATCH_SIZE, MEAN_SHIFT_RATE, MOMENTUM
from .tasks import GUESSING, TASKS


def method(tasks: Iterable[str]) -> list[str]:
    """How the runs of ``tasks`` were done, in paragraphs."""
    return [_RUNS, "\n".join(f"- *{task}*: {TASKS[task].text}" for task in tasks), _DEFINITIONS, _METHODS]


INTRODUCTION = """\
Written by `python -m deepcontrol_cuda evidence` from what it measured, verdicts included; what was measured is in \
[evidence/results.jsonl](evidence/results.jsonl), one line a run. Small networks, small images and short trainings on \
a CPU: what holds here need not hold elsewhere. No figure of either paper is known to the authors of this package, so \
none is compared with."""

CLAIMS = f"""\
*holds*: what is claimed to be higher or lower is, by the {CONFIDENCE:.0%} interval of the difference; *does not \
hold*: by the same interval it is the other way round; *undecided*: the interval contains zero. Claims about learning \
rates hold or not by the definitions below, without an interval. "within Batch Norm's interval or above", at each \
learning rate above the largest stable one of no norm (at all, if it has none): all seeds trained, and their mean is \
not below the lower end of that interval; learning rates at which Batch Norm did not train with all seeds are not \
counted. "against" is against Batch Norm, or what the claim names. A best learning rate at *the edge of the grid* may \
not be the best there is. Every interval stands alone: of so many at {CONFIDENCE:.0%} some miss by chance."""

_RUNS = f"""\
Every run is alike but for method, learning rate, batch size and seed: SGD with momentum {MOMENTUM:g}, the learning \
rate falling to zero along a cosine, no weight decay, warm-up, augmentation or clipping; float32, one thread. What a \
method brings along is part of it (for Mean Shift Rejection a quarter of the learning rate for biases and \
classifier). The grid of learning rates is the same for all compared methods. Runs of one seed see the same images in \
the same order and start, where methods share an initialisation, from the same kernels."""

_DEFINITIONS = f"""\
The budget is short, so that many runs could be done: accuracies say how far a method gets in that budget, not what \
it reaches in the end. A run whose loss is not finite has *diverged*; it ends there and counts with accuracy \
{GUESSING:g}, which guessing has. A run has *trained* if its test accuracy is {TRAINED_ACCURACY:g} or more. Intervals \
are Student's over seeds at {CONFIDENCE:.0%}, those of differences Welch's; the spread over test images is not in \
them. The best learning rate of a method is that of the highest mean accuracy on the test images: chosen in \
hindsight, for all methods alike."""

_METHODS = f"""\
*no norm* is convolution + bias + ReLU after Kaiming initialisation. *Batch Norm*, *Group Norm* (8 groups) and \
*Instance Norm* (with scale and bias) stand in the place of the bias. *Gradient Centralization* (arXiv 2004.01461) is \
no norm with centred gradients. *Deep Control* has a learned gain, mean scale and bias in each filter; its gains are \
set from {CALIBRATION_IMAGES} training images so that maps have deviation 1, or start at 1 where it is *not \
calibrated*. *Mean Shift Rejection* (MSR) is the recipe that its authors recorded: zero-mean kernels of norm 1, \
scales that start at 0.8, projection 0.9, noise 0.1, unity decay 5e-4. *Deep Control + MSR* has those kernels, \
gradients, noise and rates in Deep Control's layers, with gains that start at 0.8."""

RATES = f"""\
Test accuracy, mean ± half of the {CONFIDENCE:.0%} interval over seeds. *diverged*: the loss of every seed; *not \
trained*: accuracy below {TRAINED_ACCURACY:g}."""

STABLE = """\
The largest stable learning rate is the last one, going up the grid from the lowest at which the runs of all seeds \
trained, before one at which some did not. "over no norm" is how many times that of no norm it is. "best" and "worst" \
are over the learning rates of the grid."""

INGREDIENTS = """\
One ingredient off at a time, and all but the scaled kernels off. The last column compares at the largest learning \
rate at which the full recipe is stable, where an ingredient that is there for high learning rates has to show."""

BATCHES = """\
Each cell lists learning rates and the accuracies at them; fewer images a run than in the tables above, the same for \
all batch sizes. Steps of one image take long, so there are few learning rates for each batch size, the same for all \
methods."""

MEAN_SHIFT = f"""\
How much of what a layer makes, ahead of residual and activation, is nothing but a constant in each map: the mean \
over samples and maps of |mean of the map| / rms of the map, from 0 (no mean) to 1 (nothing but mean), while \
training, on the training batch, at learning rate {MEAN_SHIFT_RATE:g} and batch size {BATCH_SIZE}. Behind Batch Norm \
maps are those that it gives out, Deep Control's include its bias. The table has means over layers and training."""

COSTS = f"""\
One training step (forward, backward, optimizer) at batch size {BATCH_SIZE}, one thread, medians of interleaved runs; \
"spread" is the distance between the quartiles over the median. Layers this small are mostly overhead, so these times \
say nothing about large networks. Saved for backward: bytes that the forward keeps, by saved-tensor hooks, parameters \
and buffers left out. Peak: most bytes that the step holds at a time, gradients included, above what is there before \
it."""
