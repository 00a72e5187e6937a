"""What the rules of layers are for: a new one is a row in LAYERS."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from block_cases import BLOCKS
from cases import MODELS, Case, batch_of, tokens_of
from oracles import call, double, jacobian
from torch import nn

from alignreg import TangentFeatures


class Twice(nn.Module):
    """A module called twice, or once and its weight used by hand."""

    def __init__(self, by_hand=False):
        super().__init__()
        self.lin, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.by_hand = by_hand

    def forward(self, x):
        x = torch.tanh(self.lin(x))
        x = x @ self.lin.weight.T if self.by_hand else self.lin(x)
        return self.head(torch.tanh(x))


class TokensTwice(nn.Module):
    """An embedding called twice, the second time perhaps without a gradient."""

    def __init__(self, still=False):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)
        self.still = still

    def forward(self, tokens):
        with torch.set_grad_enabled(not self.still):
            y = self.embed(tokens.flip(1) + 2)
        return self.head((torch.tanh(self.embed(tokens)) * y).sum(1))


class NormTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.lin, self.head = nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.norm(self.lin(self.norm(x)))))


class Mapped(nn.Module):
    """Maps a weight as if it were an input."""

    def __init__(self):
        super().__init__()
        self.lin, self.mix, self.head = nn.Linear(4, 5), nn.Linear(4, 4, bias=False), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.lin(x)) * self.mix(self.lin.weight).sum(1))


class Borrowed(nn.Module):
    """Reads the weight of a module that it never calls."""

    def __init__(self):
        super().__init__()
        self.lin, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(F.linear(x, self.lin.weight)))


class Attention(nn.Module):
    def __init__(self, batch_first, reshaped=False, cross=False, **options):
        super().__init__()
        self.first, self.reshaped, self.cross = batch_first, reshaped, cross
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first, **options)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = x if self.first else x.transpose(0, 1)
        y = torch.sin(x) if self.cross else x
        x = self.attention(x, y, y)[0]
        if self.reshaped:
            x = torch.tanh(self.mix(x.reshape(-1, 4))).reshape(x.shape)
        return self.head(torch.tanh(self.mix(x)).mean(1 if self.first else 0))


class Positions(nn.Module):
    """Tokens, and positions that all examples share; a raw parameter; a weight in low-rank factors."""

    def __init__(self):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, 4, padding_idx=2), nn.Embedding(5, 4)
        self.scale = nn.Parameter(torch.rand(4))
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        x = x + self.up(self.down(x * self.scale))
        return self.head(torch.tanh(x).sum(1))


class Unused(nn.Module):
    """A layer that the outputs do not depend on, one that runs without a gradient, one that some outputs skip."""

    def __init__(self):
        super().__init__()
        self.lin, self.idle, self.still, self.side = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        with torch.no_grad():
            y = self.still(x)
        self.idle(x)
        return torch.cat([torch.tanh(self.lin(x) + y), self.side(x)], dim=1)[:, [0, 1, 5]]


class Frames(nn.Module):
    """Frames folded into the axis of the examples, examples first or frames first."""

    def __init__(self, examples_first):
        super().__init__()
        self.examples_first = examples_first
        self.conv = nn.Conv2d(1, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        n, frames = x.shape[:2]
        x = x if self.examples_first else x.transpose(0, 1)
        x = torch.tanh(self.norm(self.conv(x.flatten(0, 1)))).mean((2, 3))
        x = x.unflatten(0, (n, frames) if self.examples_first else (frames, n))
        return self.head(x.mean(1 if self.examples_first else 0))


class Pooled(nn.Module):
    def forward(self, x):
        return x.flatten(2).mean(2)


def _trained(net):
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return net


def _without_gradient(net, *names):
    for name in names:
        net.get_parameter(name).requires_grad_(False)
    return net


def _conv(build_conv, channels, *shape):
    """A convolution alone, under a nonlinearity and a head."""
    return Case(lambda: nn.Sequential(build_conv(), nn.Tanh(), Pooled(), nn.Linear(channels, 3)), batch_of(*shape))


# What the rules of layers are for: a case, and the parameters in it that no rule takes.
LAYERS = {
    "wide layers, scalar output": (
        Case(lambda: nn.Sequential(nn.Linear(4, 30), nn.Tanh(), nn.Linear(30, 1, bias=False)), batch_of(6, 4)),
        [],
    ),
    "linear on sequences": (
        Case(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)), batch_of(5, 3, 4)),
        [],
    ),
    "linear on grids": (
        Case(lambda: nn.Sequential(nn.Linear(4, 20), nn.Tanh(), nn.Flatten(), nn.Linear(120, 3)), batch_of(3, 2, 3, 4)),
        [],
    ),
    "conv1d, dilated": (_conv(lambda: nn.Conv1d(2, 3, 3, dilation=2, padding=2), 3, 4, 2, 9), []),
    "conv1d, same, even kernel": (_conv(lambda: nn.Conv1d(2, 3, 4, padding="same", dilation=3), 3, 4, 2, 9), []),
    "conv1d, reflect": (_conv(lambda: nn.Conv1d(2, 3, 3, padding=2, padding_mode="reflect"), 3, 4, 2, 9), []),
    "conv1d, valid": (_conv(lambda: nn.Conv1d(2, 3, 3, padding="valid"), 3, 4, 2, 9), []),
    "conv2d, stride, no bias": (_conv(lambda: nn.Conv2d(2, 3, (3, 2), (2, 1), (1, 0), bias=False), 3, 4, 2, 7, 6), []),
    "conv2d, circular": (_conv(lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), 3, 3, 2, 5, 4), []),
    "conv2d, same, replicate": (
        _conv(lambda: nn.Conv2d(2, 3, (3, 4), padding="same", padding_mode="replicate"), 3, 3, 2, 5, 4),
        [],
    ),
    "conv2d, depthwise, dilated": (
        _conv(lambda: nn.Conv2d(4, 8, 3, groups=4, dilation=2, padding=1), 8, 3, 4, 6, 7),
        [],
    ),
    "conv2d, groups, few positions": (_conv(lambda: nn.Conv2d(8, 8, 3, groups=2), 8, 4, 8, 4, 3), []),
    "conv2d, groups, one position": (_conv(lambda: nn.Conv2d(8, 6, 3, groups=2), 6, 4, 8, 3, 3), []),
    "conv3d": (
        _conv(lambda: nn.Conv3d(2, 3, (2, 3, 2), padding=(0, 1, 1), stride=(1, 2, 1)), 3, 3, 2, 4, 5, 3),
        [],
    ),
    "batchnorm 1d, 3d": (
        Case(
            lambda: _trained(
                nn.Sequential(
                    nn.Conv3d(1, 3, 2), nn.BatchNorm3d(3), nn.Tanh(), Pooled(), nn.BatchNorm1d(3), nn.Linear(3, 2)
                )
            ),
            batch_of(4, 1, 3, 3, 3),
        ),
        [],
    ),
    "instance norm, running statistics": (
        Case(
            lambda: nn.Sequential(
                nn.Conv1d(2, 3, 2),
                nn.InstanceNorm1d(3, affine=True, track_running_stats=True),
                nn.Tanh(),
                Pooled(),
                nn.Linear(3, 2),
            ),
            batch_of(4, 2, 6),
        ),
        [],
    ),
    "bias that a norm takes out": (
        Case(
            lambda: _without_gradient(
                nn.Sequential(nn.Conv1d(2, 3, 2), nn.InstanceNorm1d(3), nn.Tanh(), Pooled(), nn.Linear(3, 2)),
                "0.weight",
            ),
            batch_of(4, 2, 6),
        ),
        [],
    ),
    "norms over several axes": (
        Case(
            lambda: nn.Sequential(
                nn.LayerNorm((3, 4)),
                nn.Tanh(),
                nn.RMSNorm((3, 4)),
                nn.Flatten(),
                nn.Linear(12, 3),
                nn.LayerNorm(3, bias=False),
            ),
            batch_of(5, 3, 4),
        ),
        [],
    ),
    "prelu, one slope and by channel": (
        Case(
            lambda: nn.Sequential(
                nn.Conv1d(2, 3, 2), nn.PReLU(3), Pooled(), nn.Linear(3, 4), nn.PReLU(), nn.Linear(4, 2)
            ),
            batch_of(4, 2, 6),
        ),
        [],
    ),
    "bias alone, on sequences": (
        Case(
            lambda: _without_gradient(
                nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)), "0.weight"
            ),
            batch_of(5, 3, 4),
        ),
        [],
    ),
    "module used twice": (Case(Twice, batch_of(6, 4)), []),
    "embedding used twice": (Case(TokensTwice, tokens_of(7, 4, 3)), []),
    "embedding used twice, once without a gradient": (
        Case(lambda: TokensTwice(still=True), tokens_of(7, 4, 3)),
        [],
    ),
    "norm used twice": (Case(NormTwice, batch_of(6, 4)), []),
    "module used twice, once by hand": (Case(lambda: Twice(by_hand=True), batch_of(6, 4)), []),
    "weight that is also an input": (
        Case(Mapped, batch_of(6, 4)),
        [],
    ),
    "weight that is also an input, of a map without gradients": (
        Case(lambda: _without_gradient(Mapped(), "mix.weight"), batch_of(5, 4)),
        [],
    ),
    "weight of a module never called": (Case(Borrowed, batch_of(6, 4)), ["lin.bias"]),
    "attention": (Case(lambda: Attention(True), batch_of(5, 3, 4)), []),
    "attention, sequence first, as long as the batch": (
        Case(lambda: Attention(False, reshaped=True), batch_of(4, 4, 4)),
        [],
    ),
    "attention, tokens reshaped": (Case(lambda: Attention(True, reshaped=True), batch_of(3, 6, 4)), []),
    "attention, tokens reshaped, sequence first": (
        Case(lambda: Attention(False, reshaped=True), batch_of(3, 6, 4)),
        [],
    ),
    "attention to something else": (
        Case(lambda: Attention(True, cross=True), batch_of(5, 3, 4)),
        [],
    ),
    "attention, added keys, no bias": (
        Case(lambda: Attention(True, add_bias_kv=True, bias=False), batch_of(5, 3, 4)),
        [],
    ),
    "transformer layer, norm first": (
        Case(
            lambda: nn.Sequential(
                nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, norm_first=True, activation="gelu"),
                nn.Flatten(),
                nn.Linear(12, 2),
            ),
            batch_of(5, 3, 4),
        ),
        [],
    ),
    "positions, raw parameter, low rank": (Case(Positions, tokens_of(7, 4, 5)), []),
    "many tokens": (
        Case(
            lambda: nn.Sequential(nn.Embedding(500, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)), tokens_of(500, 6, 4)
        ),
        [],
    ),
    "layers without gradients": (
        Case(Unused, batch_of(5, 4)),
        ["idle.weight", "idle.bias", "still.weight", "still.bias"],
    ),
    "frames, examples first": (Case(lambda: _trained(Frames(True)), batch_of(4, 4, 1, 5, 5)), []),
    "frames first": (Case(lambda: _trained(Frames(False)), batch_of(3, 4, 1, 5, 5)), []),
    "frozen parameters": (
        Case(lambda: _without_gradient(MODELS["cnn"].build(), "0.weight", "3.bias"), batch_of(5, 1, 8, 8)),
        [],
    ),
    **BLOCKS,
}


def build(name):
    torch.manual_seed(1)
    case = MODELS[name] if name in MODELS else LAYERS[name][0]
    return case.build(), case.inputs(), case.forward_fn


def features_of(name, **options):
    """Features of a model or layer, its inputs, and its Jacobian."""
    model, x, forward_fn = build(name)
    oracle = jacobian(model, x, forward_fn or call)
    return TangentFeatures(model.double(), forward_fn=forward_fn, **options), double(x), oracle
