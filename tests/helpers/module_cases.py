"""Modules of torch.nn, each in a small network: a new one is a row in MODULES."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


class Between(nn.Module):
    """A module between two linear layers, the first of which gives it ``shape``."""

    def __init__(self, module, shape, pick=None):
        super().__init__()
        self.shape, self.pick = shape, pick or (lambda y: y)
        self.first = nn.Linear(4, torch.Size(shape).numel())
        self.module = module.eval()
        with torch.no_grad():
            width = self.pick(module(torch.rand(3, *shape))).reshape(3, -1).shape[1]
        self.last = nn.Linear(width, 2)

    def forward(self, x):
        h = self.first(x).reshape(len(x), *self.shape)
        return self.last(torch.tanh(self.pick(self.module(h)).reshape(len(x), -1)))


class Tokens(nn.Module):
    """A module of token numbers below a linear layer."""

    def __init__(self, module, pick=lambda y: y.mean(1)):
        super().__init__()
        self.module, self.pick, self.last = module, pick, nn.Linear(4, 2)

    def forward(self, tokens):
        return self.last(torch.tanh(self.pick(self.module(tokens))))


class Pair(nn.Module):
    """A module of two tensors."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, h):
        return self.module(*h.chunk(2, 1)).reshape(len(h), -1)


class Sequence(nn.Module):
    """A module that takes time first and gives a tuple."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, h):
        return self.module(h.transpose(0, 1))[0].transpose(0, 1)


class Attending(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, h):
        return self.module(h, h.sin(), h)[0]


class Transforming(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, h):
        return self.module(h, h.sin())


class Cells(nn.Module):
    """A recurrent cell along a sequence."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, h):
        state = None
        for x in h.unbind(1):
            state = self.cell(x, state)
        return state[0] if isinstance(state, tuple) else state


class Decided(nn.Module):
    """What the number of a class decides."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, h):
        return self.module(h, torch.arange(len(h)) % 6)


class LogProbabilities(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = nn.AdaptiveLogSoftmaxWithLoss(6, 6, [2])

    def forward(self, h):
        return self.module.log_prob(h)


def _normalized(norm):
    """A normalization whose statistics and weights are no zeros and ones."""
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in (*norm.named_parameters(), *norm.named_buffers()):
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=g) + (0.5 if name.endswith("var") else 0.2))
    return norm


def _activation(name):
    return Between(getattr(nn, name)(), FLAT)


def _tokens():
    return torch.tensor([[1, 4, 4], [0, 2, 3], [5, 5, 1]])


ACTIVATIONS = (
    "CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish PReLU ReLU ReLU6 "
    "RReLU SELU Sigmoid SiLU Softplus Softshrink Softsign Tanh Tanhshrink GLU Identity Dropout "
    "AlphaDropout"
)
FLAT, MAPS, LINES = (6,), (2, 4, 4), (2, 8)
PARAMETRIZED = nn.utils.parametrizations
OF_TENSORS = {
    **{f"nn.{name}": partial(_activation, name) for name in ACTIVATIONS.split()},
    "nn.PReLU, channels": lambda: Between(nn.PReLU(2), LINES),
    "nn.Softmax": lambda: Between(nn.Softmax(1), FLAT),
    "nn.LogSoftmax": lambda: Between(nn.LogSoftmax(1), FLAT),
    "nn.Softmax2d": lambda: Between(nn.Softmax2d(), MAPS),
    "nn.Threshold": lambda: Between(nn.Threshold(0.1, 0.0), FLAT),
    "nn.Bilinear": lambda: Between(Pair(nn.Bilinear(3, 3, 4)), FLAT),
    "nn.CosineSimilarity": lambda: Between(Pair(nn.CosineSimilarity()), FLAT),
    "nn.PairwiseDistance": lambda: Between(Pair(nn.PairwiseDistance()), FLAT),
    "nn.Conv1d": lambda: Between(nn.Conv1d(2, 3, 3, padding=1), LINES),
    "nn.Conv2d, circular": lambda: Between(nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), MAPS),
    "nn.Conv3d": lambda: Between(nn.Conv3d(2, 2, 2), (2, 2, 2, 4)),
    "nn.ConvTranspose1d": lambda: Between(nn.ConvTranspose1d(2, 2, 3, stride=2), LINES),
    "nn.ConvTranspose2d": lambda: Between(nn.ConvTranspose2d(2, 4, 2, groups=2), MAPS),
    "nn.ConvTranspose3d": lambda: Between(nn.ConvTranspose3d(2, 2, 2), (2, 2, 2, 2)),
    "nn.MaxPool1d": lambda: Between(nn.MaxPool1d(2), LINES),
    "nn.MaxPool2d": lambda: Between(nn.MaxPool2d(2), MAPS),
    "nn.AvgPool2d": lambda: Between(nn.AvgPool2d(2), MAPS),
    "nn.LPPool2d": lambda: Between(nn.LPPool2d(2, 2), MAPS),
    "nn.FractionalMaxPool2d": lambda: Between(
        nn.FractionalMaxPool2d(2, 2, _random_samples=torch.full((3, 2, 2), 0.3)), MAPS
    ),
    "nn.AdaptiveAvgPool2d": lambda: Between(nn.AdaptiveAvgPool2d((3, 2)), MAPS),
    "nn.AdaptiveMaxPool2d": lambda: Between(nn.AdaptiveMaxPool2d((3, 2)), MAPS),
    "nn.Upsample": lambda: Between(nn.Upsample(scale_factor=2, mode="bilinear"), MAPS),
    "nn.Unfold": lambda: Between(nn.Unfold(2), MAPS),
    "nn.Fold": lambda: Between(nn.Fold((4, 4), 2), (4, 9)),
    "nn.PixelShuffle": lambda: Between(nn.PixelShuffle(2), (4, 2, 2)),
    "nn.ReflectionPad2d": lambda: Between(nn.ReflectionPad2d(1), MAPS),
    "nn.ReplicationPad3d": lambda: Between(nn.ReplicationPad3d(1), (1, 2, 2, 2)),
    "nn.ZeroPad2d": lambda: Between(nn.ZeroPad2d(1), MAPS),
    "nn.LocalResponseNorm": lambda: Between(nn.LocalResponseNorm(2), MAPS),
    "nn.BatchNorm1d": lambda: Between(_normalized(nn.BatchNorm1d(6)), FLAT),
    "nn.BatchNorm2d": lambda: Between(_normalized(nn.BatchNorm2d(2)), MAPS),
    "nn.BatchNorm2d, no affine": lambda: Between(_normalized(nn.BatchNorm2d(2, affine=False)), MAPS),
    "nn.BatchNorm3d": lambda: Between(_normalized(nn.BatchNorm3d(2)), (2, 2, 2, 2)),
    "nn.LayerNorm": lambda: Between(_normalized(nn.LayerNorm(6)), FLAT),
    "nn.RMSNorm": lambda: Between(_normalized(nn.RMSNorm(6)), FLAT),
    "nn.GroupNorm": lambda: Between(_normalized(nn.GroupNorm(2, 4)), (4, 3)),
    "nn.InstanceNorm1d": lambda: Between(_normalized(nn.InstanceNorm1d(2, affine=True)), LINES),
    "nn.InstanceNorm2d, running": lambda: Between(
        _normalized(nn.InstanceNorm2d(2, affine=True, track_running_stats=True)), MAPS
    ),
    "nn.MultiheadAttention": lambda: Between(Attending(nn.MultiheadAttention(4, 2, batch_first=True)), (3, 4)),
    "nn.TransformerEncoderLayer": lambda: Between(nn.TransformerEncoderLayer(4, 2, 5, batch_first=True), (3, 4)),
    "nn.TransformerDecoderLayer": lambda: Between(
        Transforming(nn.TransformerDecoderLayer(4, 2, 5, batch_first=True)), (3, 4)
    ),
    "nn.Transformer": lambda: Between(Transforming(nn.Transformer(4, 2, 1, 1, 5, batch_first=True)), (2, 4)),
    "nn.RNN": lambda: Between(Sequence(nn.RNN(4, 3)), (3, 4)),
    "nn.LSTM": lambda: Between(Sequence(nn.LSTM(4, 3, bidirectional=True)), (3, 4)),
    "nn.LSTM, projected": lambda: Between(Sequence(nn.LSTM(4, 3, proj_size=2)), (3, 4)),
    "nn.GRU": lambda: Between(Sequence(nn.GRU(4, 3)), (3, 4)),
    "nn.RNNCell": lambda: Between(Cells(nn.RNNCell(4, 3, nonlinearity="relu")), (3, 4)),
    "nn.LSTMCell": lambda: Between(Cells(nn.LSTMCell(4, 3)), (3, 4)),
    "nn.GRUCell": lambda: Between(Cells(nn.GRUCell(4, 3)), (3, 4)),
    "nn.AdaptiveLogSoftmaxWithLoss": lambda: Between(LogProbabilities(), FLAT),
    "nn.MultiMarginLoss": lambda: Between(Decided(nn.MultiMarginLoss(reduction="none")), FLAT),
    "nn.CrossEntropyLoss": lambda: Between(Decided(nn.CrossEntropyLoss(reduction="none")), FLAT),
    "weight_norm": lambda: Between(PARAMETRIZED.weight_norm(nn.Linear(6, 3)), FLAT),
    "weight_norm, old": lambda: Between(nn.utils.weight_norm(nn.Linear(6, 3)), FLAT),
    "spectral_norm": lambda: Between(PARAMETRIZED.spectral_norm(nn.Linear(6, 3)).eval(), FLAT),
    "orthogonal": lambda: Between(PARAMETRIZED.orthogonal(nn.Linear(6, 6), orthogonal_map="matrix_exp"), FLAT),
    "orthogonal, cayley": lambda: Between(PARAMETRIZED.orthogonal(nn.Linear(6, 6), orthogonal_map="cayley"), FLAT),
}


OF_TOKENS = {
    "nn.Embedding": lambda: Tokens(nn.Embedding(6, 4)),
    "nn.Embedding, padding": lambda: Tokens(nn.Embedding(6, 4, padding_idx=1)),
    "nn.Embedding, sparse": lambda: Tokens(nn.Embedding(6, 4, sparse=True)),
    "nn.Embedding, by frequency": lambda: Tokens(nn.Embedding(6, 4, scale_grad_by_freq=True)),
    **{
        f"nn.EmbeddingBag, {mode}": lambda mode=mode: Tokens(nn.EmbeddingBag(6, 4, mode=mode), lambda y: y)
        for mode in ("sum", "mean", "max")
    },
    "nn.EmbeddingBag, padding": lambda: Tokens(nn.EmbeddingBag(6, 4, padding_idx=4), lambda y: y),
    "nn.EmbeddingBag, sparse": lambda: Tokens(nn.EmbeddingBag(6, 4, sparse=True), lambda y: y),
    "padding of an embedding, normalized": lambda: Tokens(
        nn.Embedding(6, 4, padding_idx=1), lambda y: F.normalize(y, dim=-1).mean(1)
    ),
}


def build(name):
    """A float64 model and its inputs."""
    torch.manual_seed(0)
    if name in OF_TOKENS:
        return OF_TOKENS[name]().double(), _tokens()
    return OF_TENSORS[name]().double(), torch.randn(3, 4, dtype=torch.float64)


MODULES = [*OF_TENSORS, *OF_TOKENS]
