"""Models that users bring: a new one is a row in MODELS."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class Case(NamedTuple):
    build: Any
    inputs: Any
    forward_fn: Any = None


class BasicBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(out)) + x)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(BasicBlock(4), BasicBlock(4))
        self.head = nn.Linear(4, 3)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):  # statistics as after some training
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class DictTransformer(nn.Module):
    def __init__(self, layers=12, dropout=0.1):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens):
        hidden = self.encoder(self.embed(tokens))
        return {"logits": self.head(hidden.mean(1)), "hidden": hidden, "loss": None}


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(5, 6, num_layers=2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)
        self.decode = nn.Linear(4, 7, bias=False)
        self.decode.weight = self.embed.weight

    def forward(self, tokens):
        return self.decode(torch.tanh(self.mix(self.embed(tokens))).mean(1))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, left, right):
        return torch.tanh(self.a(left)) * self.b(right)


class Checkpointed(nn.Module):
    def __init__(self, *inside):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), *inside, nn.Tanh())
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(checkpoint(self.body, x, use_reentrant=False))


class Counting(nn.Module):
    """Writes to its buffers in the forward pass, in evaluation mode too."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return torch.tanh(self.lin(x))


class _Cube(torch.autograd.Function):
    """Neither a forward-mode nor a batching rule."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class Cubic(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 3)

    def forward(self, x):
        return _Cube.apply(self.lin(x))


class BorrowedWeights(nn.Module):
    """Uses a weight where its module's hooks never see it, and moves the examples to another axis."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = F.linear(x, self.lin.weight) + self.lin(x)
        x = x.transpose(0, 1)  # sequence first
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.head(x.reshape(-1, 4)).reshape(x.shape[0], x.shape[1], 2).sum(0)


class Coupled(nn.Module):
    """Outputs of an example depend on the others: no running statistics."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3, track_running_stats=False)

    def forward(self, x):
        return torch.tanh(self.norm(self.lin(x)))


class Noisy(nn.Module):
    """Draws from the global random state in its forward pass, in evaluation mode too."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 3)

    def forward(self, x):
        return self.lin(F.dropout(x, 0.5, training=True))


def _frozen_backbone():
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    net[0].requires_grad_(False)
    return net


def batch_of(*shape):
    return lambda: torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def tokens_of(high, *shape):
    return lambda: torch.randint(high, shape, generator=torch.Generator().manual_seed(5))


def logits_of(model, x):
    return model(x)["logits"]


class Tempered(nn.Module):
    """A parameter without axes, as the scale of CLIP's logits."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        return self.lin(x).tanh() * self.scale.exp()


MODELS = {
    "mlp": Case(
        lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), batch_of(6, 4)
    ),
    "scalar output": Case(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)), batch_of(6, 4)),
    "parameter without axes": Case(Tempered, batch_of(6, 4)),
    "one example": Case(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), batch_of(1, 4)),
    "cnn": Case(
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(3, 4, 3),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(16, 3),
        ),
        batch_of(5, 1, 8, 8),
    ),
    "grouped conv, stride": Case(
        lambda: nn.Sequential(
            nn.Conv1d(4, 4, 3, groups=2, stride=2), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(12, 2)
        ),
        batch_of(4, 4, 8),
    ),
    "in-place, dropout": Case(
        lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(6, 3)), batch_of(6, 4)
    ),
    "resnet, batchnorm": Case(ResNet, batch_of(4, 1, 6, 6)),
    "layernorm, weight norm": Case(
        lambda: nn.Sequential(
            nn.LayerNorm(4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.SiLU(), nn.Linear(5, 3)
        ),
        batch_of(6, 4),
    ),
    "every norm": Case(
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3),
            nn.BatchNorm1d(4),
            nn.Tanh(),
            nn.InstanceNorm1d(4, affine=True),
            nn.Conv1d(4, 4, 1),
            nn.GroupNorm(2, 4),
            nn.Tanh(),
            nn.Flatten(),
            nn.RMSNorm(16),
            nn.Linear(16, 3),
            nn.LayerNorm(3),
        ),
        batch_of(4, 2, 6),
    ),
    "transformer, dict output": Case(DictTransformer, tokens_of(11, 3, 5), logits_of),
    "lstm": Case(lambda: Recurrent(nn.LSTM), batch_of(4, 5, 5)),
    "gru": Case(lambda: Recurrent(nn.GRU), batch_of(4, 5, 5)),
    "tied weights": Case(Tied, tokens_of(7, 4, 3)),
    "tuple inputs": Case(TwoInputs, lambda: (batch_of(5, 4)(), batch_of(5, 5)())),
    "dict inputs": Case(TwoInputs, lambda: {"right": batch_of(5, 5)(), "left": batch_of(5, 4)()}),
    "checkpointed": Case(Checkpointed, batch_of(5, 4)),
    "buffers written": Case(Counting, batch_of(5, 4)),
    "custom function": Case(Cubic, batch_of(5, 4)),
    "borrowed weights": Case(BorrowedWeights, batch_of(3, 5, 4)),
    "coupled examples": Case(Coupled, batch_of(6, 4)),
    "frozen backbone": Case(_frozen_backbone, batch_of(5, 4)),
}


def build(name):
    torch.manual_seed(1)
    case = MODELS[name]
    return case.build(), case.inputs(), case.forward_fn
