"""The digits data set, and small networks for it with each kind of normalization."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils.parametrizations import weight_norm


def digits():
    """Return 1,000 training and 797 test images ``(n, 1, 8, 8)`` with their labels."""
    images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    images = images.float().reshape(-1, 1, 8, 8) / 16
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = rows[:1000], rows[1000:]
    return (images[train], labels[train]), (images[test], labels[test])


def redrawn(labels, share, seed):
    """Return labels with a share redrawn uniformly; a tenth of the redrawn ones stay correct by chance."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(len(labels), generator=generator) < share
    return torch.where(chosen, torch.randint(10, (len(labels),), generator=generator), labels)


NORMALIZATIONS = {
    "none": lambda _: nn.Identity(),
    "weight norm": lambda _: nn.Identity(),
    "BatchNorm": nn.BatchNorm2d,
    "GroupNorm": lambda channels: nn.GroupNorm(4, channels),
    "LayerNorm": nn.LayerNorm,
}


def _mlp(kind, width=64):
    normalization = nn.BatchNorm1d if kind == "BatchNorm" else NORMALIZATIONS[kind]
    layers = [nn.Flatten()]
    for _ in range(2):
        layers += [nn.Linear(64, width), normalization(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def cnn(kind, widths=(8, 16), side=2):
    """Return a network of two convolutions that pools the image to ``side`` by ``side``."""
    layers, before = [], 1
    for width in widths:
        layers += [nn.Conv2d(before, width, 3, padding=1), NORMALIZATIONS[kind](width), nn.ReLU()]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(side), nn.Flatten(), nn.Linear(side**2 * before, 10))


class _Block(nn.Module):
    def __init__(self, kind, width):
        super().__init__()
        layers = []
        for _ in range(2):
            layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), NORMALIZATIONS[kind](width), nn.ReLU()]
        self.body = nn.Sequential(*layers[:-1])

    def forward(self, x):
        return torch.relu(x + self.body(x))


def _resnet(kind, width=8):
    stem = [nn.Conv2d(1, width, 3, padding=1, bias=False), NORMALIZATIONS[kind](width), nn.ReLU()]
    blocks = [nn.MaxPool2d(2), _Block(kind, width), _Block(kind, width), nn.AdaptiveAvgPool2d(2)]
    return nn.Sequential(*stem, *blocks, nn.Flatten(), nn.Linear(4 * width, 10))


class _Transformer(nn.Module):
    """A Transformer whose tokens are the rows of the image."""

    def __init__(self, width=16, layers=1):
        super().__init__()
        self.embedding = nn.Linear(8, width)
        self.position = nn.Parameter(0.1 * torch.randn(8, width))
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.encoder(self.embedding(x[:, 0]) + self.position).mean(1))


NETWORKS = {"MLP": _mlp, "CNN": cnn, "ResNet": _resnet, "Transformer": lambda _: _Transformer()}


def build(network, normalization):
    """Return a network in training mode."""
    model = NETWORKS[network](normalization)
    if normalization == "weight norm":
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                weight_norm(module)
    return model
