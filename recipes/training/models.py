"""Networks by name: ``build(name, shape, num_classes, hidden=..., depth=..., batch_norm=..., init=...)``."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

WIDTHS = {"mlp": 256, "cnn": 32, "vgg11": 64, "vgg13": 64, "vgg16": 64, "vgg19": 64, "resnet18": 64, "transformer": 64}
"""Default width: units of a hidden layer, channels of the first stage, or size of the embedding."""
DEPTHS = {"mlp": 3, "cnn": 3, "transformer": 2}
"""Default depth of the networks whose depth can be chosen."""
INITS = ("torch", "kaiming")
# Convolutions in each stage; the stages have 1, 2, 4, 8 and 8 times the width (Simonyan and Zisserman, 2015).
VGG = {"vgg11": (1, 1, 2, 2, 2), "vgg13": (2, 2, 2, 2, 2), "vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}


def build(
    name: str,
    shape: tuple[int, ...],
    num_classes: int,
    *,
    hidden: int = 0,
    depth: int = 0,
    batch_norm: bool = False,
    init: str = "torch",
) -> nn.Module:
    """Return a network for inputs of shape ``(channels, height, width)``, or any shape for the MLP.

    Args:
        name: one of ``WIDTHS``.
        shape: shape of an input.
        num_classes: number of outputs.
        hidden: the width; 0 for the default.
        depth: layers with weights (mlp, cnn), or blocks (transformer); 0 for the default.
        batch_norm: normalize after every convolution (vgg, resnet18).
        init: "torch" for torch's default, "kaiming" for normal weights of variance 2/fan_in and zero biases.
    """
    width = hidden or WIDTHS[name]
    layers = depth or DEPTHS.get(name, 0)
    if name == "mlp":
        model = mlp(shape, num_classes, width, layers)
    elif name == "cnn":
        model = cnn(shape, num_classes, width, layers)
    elif name in VGG:
        model = vgg(VGG[name], shape, num_classes, width, batch_norm=batch_norm)
    elif name == "resnet18":
        model = resnet18(shape, num_classes, width, batch_norm=batch_norm)
    else:
        model = Transformer(shape, num_classes, width, layers)
    if init == "kaiming":
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
    return model


def size(*arguments: Any, **options: Any) -> float:
    """Return the number of parameters that :func:`build` would create; infinity if torch cannot count them."""
    try:
        with torch.device("meta"):
            return sum(p.numel() for p in build(*arguments, **options).parameters())
    except (RuntimeError, TypeError, OverflowError):
        return math.inf


def mlp(shape: tuple[int, ...], num_classes: int, width: int, depth: int) -> nn.Module:
    """Return ``depth`` linear layers with rectifiers between them."""
    widths = [math.prod(shape), *[width] * (depth - 1), num_classes]
    layers: list[nn.Module] = [nn.Flatten()]
    for index in range(depth):
        layers += [nn.Linear(widths[index], widths[index + 1]), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn(shape: tuple[int, ...], num_classes: int, width: int, depth: int) -> nn.Module:
    """Return ``depth - 1`` convolutions, pooled after the first, and a linear layer."""
    layers: list[nn.Module] = []
    channels, height, breadth = shape
    for index in range(depth - 1):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
        channels = width
        if index == 0:
            layers.append(nn.MaxPool2d(2))
            height, breadth = height // 2, breadth // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * height * breadth, num_classes))


def vgg(
    stages: tuple[int, ...], shape: tuple[int, ...], num_classes: int, width: int, *, batch_norm: bool
) -> nn.Module:
    """Return stages of convolutions, each pooled until one pixel is left, and a linear layer."""
    layers: list[nn.Module] = []
    channels, size = shape[0], min(shape[1:])
    for count, factor in zip(stages, (1, 2, 4, 8, 8), strict=True):
        for _ in range(count):
            layers += [*_convolution(channels, factor * width, batch_norm=batch_norm), nn.ReLU()]
            channels = factor * width
        if size > 1:
            layers.append(nn.MaxPool2d(2))
            size //= 2
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


def resnet18(shape: tuple[int, ...], num_classes: int, width: int, *, batch_norm: bool) -> nn.Module:
    """Return ResNet18 for small images (He et al., 2016), with two blocks at each of 1, 1/2, 1/4, 1/8 resolution."""
    layers: list[nn.Module] = [*_convolution(shape[0], width, batch_norm=batch_norm), nn.ReLU()]
    channels = width
    for stage in range(4):
        for block in range(2):
            stride = 2 if stage and not block else 1
            layers.append(Residual(channels, width << stage, stride, batch_norm=batch_norm))
            channels = width << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


class Residual(nn.Module):
    """Two convolutions with a shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, batch_norm: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_convolution(inputs, outputs, stride=stride, batch_norm=batch_norm),
            nn.ReLU(),
            *_convolution(outputs, outputs, batch_norm=batch_norm),
        )
        same = inputs == outputs and stride == 1
        past = () if same else _convolution(inputs, outputs, size=1, stride=stride, batch_norm=batch_norm)
        self.past = nn.Sequential(*past)

    def forward(self, x: Tensor) -> Tensor:
        """Add the convolutions and the shortcut."""
        return torch.relu(self.body(x) + self.past(x))


class Transformer(nn.Module):
    """A small vision Transformer: patches of a quarter of the side, learned positions, mean of the tokens."""

    def __init__(self, shape: tuple[int, ...], num_classes: int, width: int, depth: int) -> None:
        super().__init__()
        channels, height, breadth = shape
        self.patch = max(1, min(height, breadth) // 4)
        tokens = (height // self.patch) * (breadth // self.patch)
        self.embed = nn.Linear(channels * self.patch**2, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        heads = next(count for count in (4, 2, 1) if width % count == 0)
        block = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, depth, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images."""
        patches = nn.functional.unfold(x, self.patch, stride=self.patch).mT
        return self.head(self.norm(self.blocks(self.embed(patches) + self.position)).mean(1))


def _convolution(
    inputs: int, outputs: int, *, size: int = 3, stride: int = 1, batch_norm: bool
) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=not batch_norm)
    return (convolution, nn.BatchNorm2d(outputs)) if batch_norm else (convolution,)
