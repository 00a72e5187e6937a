"""Data sets that need no download: digits, upright and turned, and four classes of shapes in the plane."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor

SPLIT_SEED = 0
"""One split for all seeds, so that runs differ in what their flags say and not in the test set."""


class Split(NamedTuple):
    """Inputs and class indices."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    num_classes: int


def digits() -> Split:
    """1000 training and 797 test images of handwritten digits, 1 x 8 x 8, pixels in [0, 1]."""
    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    y = torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(SPLIT_SEED))
    train, test = order[:1000], order[1000:]
    return Split(x[train], y[train], x[test], y[test], num_classes=10)


def rotated_digits() -> Split:
    """The same images turned by a quarter, with the same labels: a second data set to mix in."""
    upright = digits()
    return upright._replace(
        train_x=upright.train_x.rot90(dims=(2, 3)).contiguous(), test_x=upright.test_x.rot90(dims=(2, 3)).contiguous()
    )


def disk() -> Split:
    """1000 training and 1000 test points, uniform in [-1, 1]^2; class 1 inside the centered disk of half the area."""
    x = _points()
    return _split(x, _in_disk(x))


def half_disk() -> Split:
    """The points of the disk, with its classes exchanged in the right half of the square."""
    x = _points()
    return _split(x, _in_disk(x) ^ (x[:, 0] > 0))


def yin_yang() -> Split:
    """The points of the disk; class 1 is the dark half of a yin and yang of that size, without its eyes."""
    x = _points()
    return _split(x, _dark(x))


def yin_yang_eyes() -> Split:
    """The same with eyes: a disk of the other class in each half's head."""
    x = _points()
    radius = math.sqrt(2 / math.pi)
    heads = x.new_tensor([[0.0, radius / 2], [0.0, -radius / 2]])
    eyes = ((x[:, None] - heads).norm(dim=-1) < radius / 5).any(1)
    return _split(x, _dark(x) ^ eyes)


def _points() -> Tensor:
    return torch.rand(2000, 2, generator=torch.Generator().manual_seed(SPLIT_SEED)) * 2 - 1


def _in_disk(x: Tensor) -> Tensor:
    return x.norm(dim=1) < math.sqrt(2 / math.pi)


def _dark(x: Tensor) -> Tensor:
    # The left half of the disk, with the head of the upper right added and that of the lower left taken away.
    radius = math.sqrt(2 / math.pi)
    upper, lower = ((x - x.new_tensor([0.0, s * radius / 2])).norm(dim=1) < radius / 2 for s in (1, -1))
    return _in_disk(x) & (((x[:, 0] < 0) & ~lower) | upper)


def _split(x: Tensor, inside: Tensor) -> Split:
    y = inside.long()
    return Split(x[:1000], y[:1000], x[1000:], y[1000:], num_classes=2)


BUNDLED = {
    "digits": digits,
    "rotated_digits": rotated_digits,
    "disk": disk,
    "half_disk": half_disk,
    "yin_yang": yin_yang,
    "yin_yang_eyes": yin_yang_eyes,
}
POINTS = ("disk", "half_disk", "yin_yang", "yin_yang_eyes")
