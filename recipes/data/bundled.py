"""Data sets that need no download: digits, upright and rotated, and points in the plane with two classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor

SPLIT_SEED = 0
"""All seeds share one split, so that runs differ in their flags and not in the test set."""
RADIUS = math.sqrt(2 / math.pi)
"""Of the disk with half the area of the square [-1, 1]²."""


class Split(NamedTuple):
    """Inputs and class indices."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    num_classes: int


def digits() -> Split:
    """Return 1000 training and 797 test images of handwritten digits, 1 x 8 x 8, with pixels in [0, 1]."""
    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    y = torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(SPLIT_SEED))
    train, test = order[:1000], order[1000:]
    return Split(x[train], y[train], x[test], y[test], num_classes=10)


def rotated_digits() -> Split:
    """Return the same images rotated by a quarter turn, with the same labels, as a second data set to mix in."""
    upright = digits()
    train, test = (x.rot90(dims=(2, 3)).contiguous() for x in (upright.train_x, upright.test_x))
    return upright._replace(train_x=train, test_x=test)


def points(inside: Callable[[Tensor], Tensor]) -> Split:
    """Return 1000 training and 1000 test points, uniform in [-1, 1]²; those inside the shape are class 1."""
    x = torch.rand(2000, 2, generator=torch.Generator().manual_seed(SPLIT_SEED)) * 2 - 1
    y = inside(x).long()
    return Split(x[:1000], y[:1000], x[1000:], y[1000:], num_classes=2)


def _disk(x: Tensor) -> Tensor:
    return x.norm(dim=1) < RADIUS


def _half_disk(x: Tensor) -> Tensor:
    """Return the disk with its classes exchanged in the right half of the square."""
    return _disk(x) ^ (x[:, 0] > 0)


def _dark(x: Tensor) -> Tensor:
    """Return the dark half of a yin and yang: the left half of the disk, plus the upper and minus the lower head."""
    upper, lower = ((x - x.new_tensor([0.0, s * RADIUS / 2])).norm(dim=1) < RADIUS / 2 for s in (1, -1))
    return _disk(x) & (((x[:, 0] < 0) & ~lower) | upper)


def _dark_with_eyes(x: Tensor) -> Tensor:
    """Return the same with eyes, a disk of the other class in each head."""
    heads = x.new_tensor([[0.0, RADIUS / 2], [0.0, -RADIUS / 2]])
    return _dark(x) ^ ((x[:, None] - heads).norm(dim=-1) < RADIUS / 5).any(1)


POINTS = {"disk": _disk, "half_disk": _half_disk, "yin_yang": _dark, "yin_yang_eyes": _dark_with_eyes}
BUNDLED: dict[str, Callable[[], Split]] = {
    "digits": digits,
    "rotated_digits": rotated_digits,
    **{name: partial(points, inside) for name, inside in POINTS.items()},
}
