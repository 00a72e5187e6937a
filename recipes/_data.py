"""Data sets that need no download, as tensors: a fixed split, seeded subsets and label noise."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor

SPLIT_SEED = 0
"""One split for all seeds, so that runs differ in what their flags say and not in the test set."""


class Data(NamedTuple):
    """Inputs and class indices, and what a model needs to know of them."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    num_classes: int


def digits() -> Data:
    """1000 training and 797 test images of handwritten digits, 1 x 8 x 8, pixels in [0, 1]."""
    pixels, labels = load_digits(return_X_y=True)
    x = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    y = torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(SPLIT_SEED))
    train, test = order[:1000], order[1000:]
    return Data(x[train], y[train], x[test], y[test], num_classes=10)


def disk() -> Data:
    """1000 training and 1000 test points, uniform in [-1, 1]^2; class 1 inside the centred disk of half the area."""
    x = torch.rand(2000, 2, generator=torch.Generator().manual_seed(SPLIT_SEED)) * 2 - 1
    y = (x.norm(dim=1) < math.sqrt(2 / math.pi)).long()
    return Data(x[:1000], y[:1000], x[1000:], y[1000:], num_classes=2)


DATASETS = {"digits": digits, "disk": disk}


def load(name: str, *, train_size: int, label_noise: float, seed: int) -> Data:
    """Load a data set, keep ``train_size`` training examples and redraw the labels of a share of them.

    Redrawn labels are uniform over all classes, so that about 1/num_classes of them stay right. Test labels are clean.
    """
    data = DATASETS[name]()
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(data.train_x), generator=generator)[:train_size]
    labels = data.train_y[rows].clone()
    redrawn = torch.randperm(len(rows), generator=generator)[: round(label_noise * len(rows))]
    labels[redrawn] = torch.randint(data.num_classes, (len(redrawn),), generator=generator)
    return data._replace(train_x=data.train_x[rows], train_y=labels)
