"""A task made by a program: which of ten shapes is in a small colour image with much that does not matter.

Place, size, stretch, rotation and colour of the shape, a darker background that changes in colour, clutter in front of
and behind the shape, brightness, contrast and noise are drawn anew for every image. Arithmetic is in float64 and uses
nothing but sums, products, quotients, square roots and comparisons, all of which IEEE 754 rounds in one way only, one
element at a time; so a seed gives the same bytes on every machine.
"""

from __future__ import annotations

import numpy as np

SIZE = 12
CLASSES = ("disc", "ring", "square", "frame", "triangle", "cross", "bars", "crescent", "L", "T")
_SUBPIXELS = 3


def make(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """``count`` images (count, 3, SIZE, SIZE) uint8 and labels (count,) int64, indices into ``CLASSES``.

    The classes take turns, so each has ``count / 10`` images.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    labels = np.arange(count, dtype=np.int64) % len(CLASSES)
    u, v = _coordinates(rng, count, smallest=0.34, largest=0.44, jitter=0.1)
    inside = np.empty(u.shape, dtype=bool)
    for label in range(len(CLASSES)):
        mine = labels == label
        inside[mine] = _shape(label, u[mine], v[mine])
    image = _background(rng, count)
    image = _paint(image, _blob(rng, count), _uniform(rng, 0, 1, count, 3, 1, 1))
    image = _paint(image, inside, _uniform(rng, 0.65, 1, count, 3, 1, 1))
    image = _paint(image, _blob(rng, count), _uniform(rng, 0, 1, count, 3, 1, 1))
    image = _photograph(rng, image)
    # Floor of the value plus a half: adding and truncating are exact where rounding modes need not agree.
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8), labels


def _uniform(rng: np.random.Generator, low: float, high: float, *shape: int) -> np.ndarray:
    return low + (high - low) * rng.random(shape)


def _coordinates(rng, count: int, smallest: float, largest: float, jitter: float) -> tuple[np.ndarray, np.ndarray]:
    """Where the subpixels (count, SIZE * _SUBPIXELS, same) lie in the frame of an object of extent [-1, 1].

    ``smallest``, ``largest`` and ``jitter``: the object's radius and the offset of its centre, over the image's side.
    """
    side = SIZE * _SUBPIXELS
    grid = (np.arange(side) + 0.5) / side - 0.5
    centre = _uniform(rng, -jitter, jitter, 2, count, 1, 1)
    radius = _uniform(rng, smallest, largest, count, 1, 1)
    stretch = _uniform(rng, 0.75, 1.0, count, 1, 1)
    # The tangent of half the angle, which so is at most 33 degrees either way; cosine and sine are rational in it.
    t = _uniform(rng, -0.3, 0.3, count, 1, 1)
    cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    x, y = grid[None, None, :] - centre[0], grid[None, :, None] - centre[1]
    return (cos * x + sin * y) / radius, (cos * y - sin * x) / (radius * stretch)


def _shape(label: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether the points (u, v) are inside the shape."""
    distance = u * u + v * v
    box = np.maximum(abs(u), abs(v))
    name = CLASSES[label]
    if name == "disc":
        return distance < 0.8
    if name == "ring":
        return (distance < 1) & (distance > 0.3)
    if name == "square":
        return box < 0.78
    if name == "frame":
        return (box < 0.88) & (box > 0.5)
    if name == "triangle":
        return (v > -0.6) & (1.7 * abs(u) + v < 1)
    if name == "cross":
        return (box < 1) & (np.minimum(abs(u), abs(v)) < 0.27)
    if name == "bars":
        return (abs(u) < 0.9) & (abs(v) < 0.85) & (abs(v) > 0.35)
    if name == "crescent":
        return (distance < 1) & ((u - 0.55) * (u - 0.55) + v * v > 0.7)
    if name == "L":
        return (box < 0.9) & ((u < -0.35) | (v < -0.35))
    return (box < 0.9) & ((v > 0.4) | (abs(u) < 0.27))


def _blob(rng, count: int) -> np.ndarray:
    """A short bar or a small ellipse."""
    u, v = _coordinates(rng, count, smallest=0.05, largest=0.16, jitter=0.5)
    bar = rng.random((count, 1, 1)) < 0.5
    return np.where(bar, (abs(u) < 1.6) & (abs(v) < 0.4), u * u + v * v < 1)


def _background(rng, count: int) -> np.ndarray:
    """(count, 3, SIZE, SIZE): a dark colour that changes linearly in some direction, each channel in its own."""
    grid = (np.arange(SIZE) + 0.5) / SIZE - 0.5
    slopes = _uniform(rng, -0.2, 0.2, 2, count, 3, 1, 1)
    return _uniform(rng, 0, 0.5, count, 3, 1, 1) + slopes[0] * grid[None, :] + slopes[1] * grid[:, None]


def _paint(image: np.ndarray, inside: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Mix ``colour`` in by the share of each pixel's subpixels that are inside."""
    count = len(image)
    parts = inside.reshape(count, SIZE, _SUBPIXELS, SIZE, _SUBPIXELS).sum((2, 4), dtype=np.int64)
    share = (parts / (_SUBPIXELS * _SUBPIXELS))[:, None]
    return image + share * (colour - image)


def _photograph(rng, image: np.ndarray) -> np.ndarray:
    """Contrast, brightness, and noise of a deviation that differs from image to image."""
    count = len(image)
    contrast = _uniform(rng, 0.4, 1.0, count, 1, 1, 1)
    brightness = _uniform(rng, -0.2, 0.2, count, 1, 1, 1)
    # The sum of four uniform draws in (-1, 1) has deviation 2 / sqrt(3), and is near enough to normal.
    noise = rng.random(image.shape) + rng.random(image.shape) + rng.random(image.shape) + rng.random(image.shape)
    deviation = _uniform(rng, 0, 0.06, count, 1, 1, 1)
    return 0.5 + brightness + contrast * (image - 0.5) + deviation * (2 * noise - 4) / (2 / 1.7320508075688772)
