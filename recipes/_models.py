"""Small networks for the bundled data."""

from __future__ import annotations

from torch import nn


def mlp(shape: tuple[int, ...], num_classes: int, *, hidden: int, depth: int) -> nn.Module:
    """``depth`` linear layers of their own weights, with rectifiers between."""
    numbers = 1
    for axis in shape:
        numbers *= axis
    widths = [numbers, *[hidden] * (depth - 1), num_classes]
    layers: list[nn.Module] = [nn.Flatten()]
    for index in range(depth):
        layers += [nn.Linear(widths[index], widths[index + 1]), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn(shape: tuple[int, ...], num_classes: int, *, hidden: int, depth: int) -> nn.Module:
    """``depth - 1`` convolutions of ``hidden // 8`` channels, pooled after the first, and a linear layer."""
    width, size = max(1, hidden // 8), shape[1]
    layers: list[nn.Module] = []
    channels = shape[0]
    for index in range(depth - 1):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        channels = width
        if index == 0:
            layers.append(nn.MaxPool2d(2))
            size //= 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size * size, num_classes))


MODELS = {"mlp": mlp, "cnn": cnn}
