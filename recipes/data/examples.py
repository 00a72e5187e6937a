"""The examples of a run: a data set with redrawn labels, another set mixed in, and marks of difficult examples."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from data import bundled, images

DATASETS = (*bundled.BUNDLED, *images.SOURCES)


class Data(NamedTuple):
    """Inputs and class indices, ready for a network."""

    train_x: Tensor
    train_y: Tensor
    """Labels to train on, including redrawn ones."""
    test_x: Tensor
    test_y: Tensor
    num_classes: int
    difficult: Tensor
    """Marks training examples that have a redrawn label (possibly the same one) or come from the mixed-in set."""
    rows: Tensor
    """Their indices in the training split of the data set that they come from."""
    val_x: Tensor
    """Examples of the training split, held out for validation."""
    val_y: Tensor
    """Validation labels, redrawn like the training labels."""
    val_rows: Tensor


def load(
    name: str,
    *,
    train_size: int = 0,
    val_size: int = 0,
    label_noise: float = 0.0,
    mix: str | None = None,
    mix_size: int = 0,
    data_path: str | None = None,
    mix_path: str | None = None,
    seed: int,
) -> Data:
    """Load a data set, keep some training examples, redraw a share of the labels, and add examples of another set.

    Redrawn labels are uniform over all classes, so about 1/num_classes of them stay correct; the same share of the
    validation labels is redrawn. Test examples come from the first data set, with clean labels. Images are normalized
    by the mean and standard deviation of each channel over the training split; digits and points are not.
    The options are the flags of the same names.

    Raises:
        ValueError: if a data set is not available, or has too few examples, another shape or other classes.
    """
    split = _load(name, data_path)
    generator = torch.Generator().manual_seed(seed)
    count = len(split.train_x) - val_size
    if count < 1 or train_size > count:
        flags, expected = ("--train_size", count) if count > 0 else ("--val_size", len(split.train_x) - 1)
        held_out = f", {val_size} held out" if val_size and count > 0 else ""
        got = train_size if count > 0 else val_size
        raise ValueError(f"{flags}: expected at most the {expected} training examples of {name}{held_out}, got {got}.")
    kept = train_size or count
    order = torch.randperm(len(split.train_x), generator=generator)
    rows, held_out_rows = order[:kept], order[kept : kept + val_size]
    labels, difficult = _redrawn(split.train_y[rows], label_noise, split.num_classes, generator)
    val_labels, _ = _redrawn(split.train_y[held_out_rows], label_noise, split.num_classes, generator)
    data = Data(
        split.train_x[rows],
        labels,
        split.test_x,
        split.test_y,
        split.num_classes,
        difficult=difficult,
        rows=rows,
        val_x=split.train_x[held_out_rows],
        val_y=val_labels,
        val_rows=held_out_rows,
    )
    return data if mix is None else _mixed(data, mix, _load(mix, mix_path), mix_size, generator)


def _redrawn(labels: Tensor, share: float, num_classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return labels with a share redrawn, and a mask of the redrawn ones."""
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    labels = labels.clone()
    labels[chosen] = torch.randint(num_classes, (len(chosen),), generator=generator)
    redrawn = torch.zeros(len(labels), dtype=torch.bool)
    redrawn[chosen] = True
    return labels, redrawn


def _mixed(data: Data, name: str, other: bundled.Split, size: int, generator: torch.Generator) -> Data:
    if other.train_x.shape[1:] != data.train_x.shape[1:] or other.num_classes != data.num_classes:
        expected, got = (f"{tuple(part.train_x.shape[1:])} and {part.num_classes}" for part in (data, other))
        raise ValueError(f"--mix: expected a data set of the same shape and classes, {expected}, got {got}.")
    if size > len(other.train_x):
        raise ValueError(f"--mix_size: expected at most the {len(other.train_x)} examples of {name}, got {size}.")
    rows = torch.randperm(len(other.train_x), generator=generator)[:size]
    return data._replace(
        train_x=torch.cat([data.train_x, other.train_x[rows]]),
        train_y=torch.cat([data.train_y, other.train_y[rows]]),
        difficult=torch.cat([data.difficult, torch.ones(size, dtype=torch.bool)]),
        rows=torch.cat([data.rows, rows]),
    )


def _load(name: str, data_path: str | None) -> bundled.Split:
    if name in bundled.BUNDLED:
        return bundled.BUNDLED[name]()
    split = images.load(name, data_path)
    pixels = split.train_x.float() / 255
    mean, std = (value[None, :, None, None] for value in (pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))))
    return split._replace(
        train_x=(pixels - mean) / std,
        test_x=(split.test_x.float() / 255 - mean) / std,
        train_y=split.train_y.long(),
        test_y=split.test_y.long(),
    )


def crop_and_flip(x: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Return random crops of images padded by zeros, half of them mirrored, as the paper does for CIFAR.

    Args:
        x: images ``(n, channels, height, width)``.
        generator: a generator on the CPU.
        padding: pixels of padding on each side.
    """
    n, _, height, width = x.shape
    down, right = torch.randint(2 * padding + 1, (2, n, 1), generator=generator)
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.arange(width)
    columns = torch.where(mirrored, columns.flip(0), columns) + right
    lines = torch.arange(height) + down
    padded = torch.nn.functional.pad(x, [padding] * 4)
    examples = torch.arange(n)[:, None, None].to(x.device)
    index = (examples, slice(None), lines[:, :, None].to(x.device), columns[:, None].to(x.device))
    return padded[index].permute(0, 3, 1, 2).contiguous()
