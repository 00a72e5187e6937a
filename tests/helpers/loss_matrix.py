"""Which losses are right for which models in which training: a new model is a row in ROWS.

The gradient of each loss, as one step of training brings it into `.grad`, against the float64 formula.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any, NamedTuple

import oracles
import torch
from cases import Checkpointed, DictTransformer, Recurrent, ResNet, Tied, logits_of
from loss_cases import LOSSES, formula, make, slopes_of
from torch import nn
from torch.nn.functional import cross_entropy


class Row(NamedTuple):
    build: Any
    inputs: Any
    forward_fn: Any = None
    c: int = 3


class DictOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3))

    def forward(self, x):
        logits = self.net(x)
        return {"loss": None, "logits": logits, "hidden": x}


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, tokens):
        return self.head(torch.tanh(self.embed(tokens)).mean(1))


class LowRank(nn.Module):
    """A frozen layer with an adapter of rank 2."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(4, 6).requires_grad_(False)
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 6, bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.base(x) + self.up(self.down(x))))


def _frozen_backbone():
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    net[0].requires_grad_(False)
    return net


def _numbers(*shape):
    return lambda n: torch.randn(n, *shape)


def _tokens(high, length):
    return lambda n: torch.randint(high, (n, length))


ROWS = {
    "MLP": Row(lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), _numbers(4)),
    "CNN": Row(
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.GELU(), nn.Flatten(), nn.Linear(4, 3)
        ),
        _numbers(1, 6, 6),
    ),
    "ResNet, BatchNorm in train mode": Row(ResNet, _numbers(1, 6, 6)),
    "in-place activations": Row(
        lambda: nn.Sequential(
            nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 5), nn.ELU(inplace=True), nn.Linear(5, 3)
        ),
        _numbers(4),
    ),
    "Dropout": Row(lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)), _numbers(4)),
    "Transformer, LayerNorm, SDPA": Row(lambda: DictTransformer(layers=1), _tokens(11, 4), logits_of),
    "LSTM": Row(lambda: Recurrent(nn.LSTM), _numbers(3, 5)),
    "Embedding": Row(Bag, _tokens(9, 4)),
    "tied weights": Row(Tied, _tokens(7, 3), c=7),
    "frozen backbone": Row(_frozen_backbone, _numbers(4)),
    "low-rank adapters": Row(LowRank, _numbers(4)),
    "dict output": Row(DictOutput, _numbers(4), logits_of),
    "checkpointed": Row(Checkpointed, _numbers(4)),
    "checkpointed, BatchNorm inside": Row(lambda: Checkpointed(nn.BatchNorm1d(6)), _numbers(4)),
    "checkpointed, Dropout inside": Row(lambda: Checkpointed(nn.Dropout()), _numbers(4)),
}
COLUMNS = ("plain", "bf16", "compiled", "DDP", "fully_shard")
SIZE = 5


def build(name, rank=0):
    """Model in training mode and float64, inputs and targets of a rank."""
    row = ROWS[name]
    torch.manual_seed(1)
    model = row.build().double().train()
    torch.manual_seed(10 + rank)
    x = row.inputs(SIZE)
    return model, x.double() if x.is_floating_point() else x, torch.arange(SIZE) % 3


def gradient(model):
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters() if p.requires_grad]
    grads = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]
    return torch.cat([g.detach().double().flatten() for g in grads])


def train_step(name, model, reg, x, y, *, copied=False):
    """One backward pass of a task loss that adds nothing, and of the loss in question; a copy of the model in it."""
    row = ROWS[name]
    outputs = model(x) if row.forward_fn is None else row.forward_fn(model, x)
    model.zero_grad()
    at_once = copy.deepcopy(model) if copied else None  # buffers as they are now
    (0 * cross_entropy(outputs.double(), y) + reg(x, y)).backward()
    return outputs, at_once


def plain(name, kind, rank=0):
    """The gradient of a loss, and whether it has the slopes of the formula."""
    row = ROWS[name]
    model, x, y = build(name, rank)
    reg = make(kind, model, weight=1.0, probes=8, forward_fn=row.forward_fn)
    _, reference = train_step(name, model, reg, x, y, copied=True)
    grads = gradient(model)
    forward_fn = row.forward_fn or oracles.call
    parameters = [p for p in reference.parameters() if p.requires_grad]
    pieces = [g.view_as(p) for g, p in zip(grads.split([p.numel() for p in parameters]), parameters, strict=True)]
    value = sum((p * g).sum() for p, g in zip(parameters, pieces, strict=True))
    slopes, expected = slopes_of(
        value,
        reference,
        lambda: formula(kind, reference, x, y, forward_fn=forward_fn, c=row.c, offset=rank << 32),
    )
    scale = float(grads.norm())
    return grads, all(
        abs(a - b) <= 1e-5 * max(abs(b), scale) for a, b in zip(slopes, expected, strict=True)
    ) and scale > 0


def other(name, kind, column):
    """The gradient in another way of training, and whether that way was taken."""
    row = ROWS[name]
    model, x, y = build(name)
    wrapped, taken = model, contextlib.nullcontext()
    if column == "compiled":
        torch.compiler.reset()
        wrapped = torch.compile(model, backend="aot_eager")
    if column == "bf16":
        model.float()
        x = x.float() if x.is_floating_point() else x
        taken = torch.autocast("cpu", dtype=torch.bfloat16)
    reg = make(kind, wrapped, weight=1.0, probes=8, forward_fn=row.forward_fn)
    with taken:
        outputs, _ = train_step(name, wrapped, reg, x, y)
    assert column != "bf16" or outputs.dtype == torch.bfloat16
    return gradient(model)


def close(found, expected, column):
    return float((found - expected).norm()) <= (2e-3 if column == "bf16" else 1e-9) * float(expected.norm())


def verdict(name, column):
    """What becomes of each loss: "right", "wrong" or the message of an error."""
    found = {}
    for kind in LOSSES:
        try:
            expected, right = plain(name, kind)
            if column != "plain":
                right = right and close(other(name, kind, column), expected, column)
            found[kind] = "right" if right else "wrong"
        except (RuntimeError, ValueError, TypeError) as error:
            found[kind] = type(error).__name__
    return found
