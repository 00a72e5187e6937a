"""A small network, its examples, and what tests ask of them."""

import torch
from oracles import jacobian
from torch import nn

X, Y = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)), torch.arange(7) % 3


def mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def normalized():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()


def trace_of(model, x=X):
    return float(sum(value.square().sum() for value in jacobian(model, x).values()))


def gradients(model, value):
    return torch.autograd.grad(value, [p for p in model.parameters() if p.requires_grad], materialize_grads=True)


def calls_of(model):
    """A list that grows by the number of examples of each forward pass."""
    calls = []
    model.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    return calls
