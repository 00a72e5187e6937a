"""Blocks of well-known models, written by hand: what parameters meet there that modules of torch do not do."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from cases import Case, batch_of, tokens_of
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class RMSNorm(nn.Module):
    """That of Llama, Qwen and T5, or of Gemma."""

    def __init__(self, width, gemma=False):
        super().__init__()
        self.weight, self.gemma = nn.Parameter(torch.rand(width)), gemma

    def forward(self, x):
        h = x.float() if x.dtype != torch.float64 else x
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return (h * (1.0 + self.weight)).type_as(x) if self.gemma else self.weight * h.to(x.dtype)


class Normed(nn.Module):
    """A normalization that is shared by two places, one that is not, before a head."""

    def __init__(self, gemma):
        super().__init__()
        self.shared, self.last = RMSNorm(4, gemma), RMSNorm(4, gemma)
        self.lin, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        x = x + torch.tanh(self.lin(self.shared(x)))
        return self.head(self.last(x + torch.sin(self.shared(x)))[:, -1])


class Conv1D(nn.Module):
    """That of GPT-2."""

    def __init__(self, out, width):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(width, out)), nn.Parameter(torch.randn(out))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


class GPT(nn.Module):
    """Positions that all examples share, linear maps from the right, a head that is tied to the table or not."""

    def __init__(self, tied, bias=False):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(9, 4), nn.Embedding(6, 4)
        self.c_attn, self.c_fc = Conv1D(12, 4), Conv1D(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 9, bias=bias)
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, tokens):
        place = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(0)
        x = self.wte(tokens) + self.wpe(place)
        q, k, v = self.c_attn(x).split(4, dim=-1)
        x = x + self.c_fc(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self.head(self.norm(x))[:, -1, :4]


class Embeddings(nn.Module):
    """Those of BERT: positions from a buffer, types that are zero."""

    def __init__(self):
        super().__init__()
        self.words, self.positions, self.types = (
            nn.Embedding(9, 4, padding_idx=0),
            nn.Embedding(8, 4),
            nn.Embedding(2, 4),
        )
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)
        self.register_buffer("ids", torch.arange(8)[None], persistent=False)
        self.register_buffer("zeros", torch.zeros(1, 8, dtype=torch.long), persistent=False)

    def forward(self, tokens):
        n, length = tokens.shape
        types = self.types(self.zeros[:, :length].expand(n, length))
        x = self.words(tokens) + types
        x += self.positions(self.ids[:, :length])
        return self.head(torch.tanh(self.norm(x)).sum(1))


class Patches(nn.Module):
    """Those of a vision transformer: tokens, raw positions, layer scale, attention, perhaps a mask token."""

    def __init__(self, mask=False):
        super().__init__()
        self.embed = nn.Conv2d(1, 4, 2, stride=2)
        self.cls, self.register = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 2, 4))
        self.position, self.mask_token = nn.Parameter(torch.randn(1, 5, 4)), nn.Parameter(torch.randn(1, 4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.scale, self.head = nn.Parameter(torch.rand(4)), nn.Linear(4, 3)
        self.mask = mask

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        if self.mask:
            x = torch.where((x.detach().sum(2) > 0).unsqueeze(-1), self.mask_token.to(x.dtype).unsqueeze(0), x)
        x = torch.cat((self.cls.expand(len(x), -1, -1), x), dim=1) + self.position
        x = torch.cat([x[:, :1], self.register.repeat(len(x), 1, 1), x[:, 1:]], dim=1)
        x = x + self.scale * self.attention(x, x, x)[0]
        return self.head(torch.tanh(x)[:, 0])


class ConvNeXt(nn.Module):
    """Layer scale by channel, and the response normalization of the second version, channels first and last."""

    def __init__(self):
        super().__init__()
        self.conv, self.lin = nn.Conv2d(1, 3, 2), nn.Linear(3, 3)
        self.gamma, self.beta = nn.Parameter(torch.rand(1, 1, 1, 3)), nn.Parameter(torch.rand(1, 1, 1, 3))
        self.scale, self.head = nn.Parameter(torch.rand(3)), nn.Linear(3, 2)

    def forward(self, x):
        x = self.conv(x)
        h = torch.tanh(self.lin(x.permute(0, 2, 3, 1)))
        size = torch.linalg.vector_norm(h, dim=(1, 2), keepdim=True)
        h = self.gamma * (h * (size / size.mean(-1, keepdim=True))) + self.beta + h
        x = x + h.permute(0, 3, 1, 2) * self.scale.reshape(1, -1, 1, 1)
        return self.head(x.mul(self.scale[:, None, None]).mean((2, 3)))


class Standardized(nn.Conv2d):
    """A convolution of NFNets, with a gain."""

    def __init__(self, *sizes, scaled=True):
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.rand(sizes[1], 1, 1, 1)) if scaled else None

    def forward(self, x):
        if self.gain is None:
            w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            w = w / (w.std((1, 2, 3), keepdim=True) + 1e-4)
        else:
            flat = self.weight.reshape(1, len(self.weight), -1)
            w = F.batch_norm(flat, None, None, weight=(self.gain * 0.3).view(-1), training=True, momentum=0.0, eps=1e-6)
            w = w.reshape_as(self.weight)
        return F.conv2d(x, w, self.bias)


class Pooled(nn.Module):
    def forward(self, x):
        return torch.tanh(x).flatten(2).mean(2)


class Experts(nn.Module):
    """Those of Mixtral: each in its part of two tensors, with the tokens that are sent to it."""

    def __init__(self, transposed=False):
        super().__init__()
        self.router = nn.Linear(4, 3, bias=False)
        self.up, self.down = nn.Parameter(torch.randn(3, 5, 4)), nn.Parameter(torch.randn(3, 5, 4))
        self.head, self.transposed = nn.Linear(4, 2), transposed

    def forward(self, x):
        flat = x.reshape(-1, 4)
        weights, chosen = self.router(flat).softmax(-1).topk(2, dim=-1)
        y = torch.zeros_like(flat)
        for expert in chosen.flatten().unique() if self.transposed else range(3):
            place, token = torch.where(expert == chosen.T)
            h = torch.tanh(F.linear(flat[token], self.up[expert]))
            h = h @ self.down[expert] if self.transposed else F.linear(h, self.down[expert].T)
            y = y.index_add(0, token, h * weights[token, place, None])
        return self.head(torch.tanh(x + y.view_as(x)).mean(1))


class Windows(nn.Module):
    """Attention with a table of relative positions, as in Swin and T5."""

    def __init__(self):
        super().__init__()
        self.qkv, self.table, self.head = nn.Linear(4, 12), nn.Parameter(torch.randn(5, 2)), nn.Linear(4, 2)
        index = torch.arange(3)[:, None] - torch.arange(3)[None] + 2
        self.register_buffer("index", index)

    def forward(self, x):
        q, k, v = self.qkv(x).view(len(x), 3, 3, 2, 2).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(3, 3, -1).permute(2, 0, 1).contiguous()
        scores = q @ k.transpose(-1, -2) + bias.unsqueeze(0)
        scores += F.embedding(self.index, self.table).permute(2, 0, 1)
        return self.head(torch.tanh((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)).mean(1))


class ByHand(nn.Module):
    """All that can be done with a bias and a gain, a linear map and an attention vector."""

    def __init__(self):
        super().__init__()
        self.w, self.u, self.v = (
            nn.Parameter(torch.randn(4, 5)),
            nn.Parameter(torch.randn(5, 4)),
            nn.Parameter(torch.randn(5)),
        )
        self.b, self.c, self.g, self.r = (nn.Parameter(torch.rand(4) + 0.5) for _ in range(4))
        self.one, self.free = nn.Parameter(torch.rand(())), nn.Parameter(torch.rand(1, 4))

    def forward(self, x):
        h = torch.tanh(x @ self.w.t()[:4, :4].t() + self.b)
        h = torch.tanh(torch.matmul(x, self.w) - self.v) @ self.u + h
        h = torch.sub(self.c, h, alpha=2) / self.r + self.g / (2 + torch.cos(h)) + torch.add(h, self.b, alpha=3)
        h = self.one * h
        h = torch.where(h > 0, h, self.free * h)
        return torch.stack([torch.mm(h[:, 0], self.w) @ self.v, (h.sum(1) * self.c).sum(-1) / self.one], dim=1)


class Odd(nn.Module):
    """Products from the left, positions added to scores, repeated parameters, changes in place, choices by keyword."""

    def __init__(self):
        super().__init__()
        self.mix, self.bias = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.randn(2, 3, 3))
        self.gain, self.twice, self.head = (
            nn.Parameter(torch.rand(4)),
            nn.Parameter(torch.randn(1, 3, 2)),
            nn.Linear(4, 2),
        )
        self.pair = nn.Parameter(torch.randn(2, 3, 2))
        self.fill, self.weigh = nn.Parameter(torch.rand(1)), nn.Parameter(torch.rand(3))

    def forward(self, x):
        h = torch.tanh(self.mix @ x) + self.twice.repeat(len(x), 1, 2)
        gain = (self.gain + 1).view(1, -1)
        gain *= 2
        h = torch.where(other=h, input=self.fill, condition=x > 1) * gain
        h = torch.where(x < -1, 0.5, torch.sin(h) * self.fill)
        heads = h.view(len(x), 3, 2, 2).transpose(1, 2)
        heads = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=self.bias.unsqueeze(0))
        heads = heads + torch.bmm(
            heads.flatten(0, 1), (self.pair @ self.pair.mT).repeat(len(x), 1, 1)[:, :2, :2]
        ).view_as(heads)
        h = heads.transpose(1, 2).reshape(len(x), 3, 4)
        return self.head(torch.tanh(h.sum(1))) + (self.weigh @ h)[:, :2] + (self.gain @ h.sum(1).mT)[:, None]


class Queries(nn.Module):
    """Learned queries that go through layers before they meet the examples, shared or expanded."""

    def __init__(self, expanded):
        super().__init__()
        self.queries, self.norm, self.project = nn.Parameter(torch.randn(2, 4)), nn.LayerNorm(4), nn.Linear(4, 4)
        self.keys, self.head, self.expanded = nn.Linear(4, 4), nn.Linear(4, 2), expanded

    def forward(self, x):
        q = self.queries.unsqueeze(0)
        q = self.project(self.norm(q.expand(len(x), -1, -1) if self.expanded else q))
        keys = self.keys(x)
        h = (q @ keys.mT).softmax(-1) @ keys if self.expanded else torch.tanh(keys[:, :2] * q)
        return self.head(torch.tanh(h).mean(1))


class Packed(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind(3, 4, **options)
        self.head = nn.LazyLinear(2)

    def forward(self, x):
        lengths = 1 + (x[:, 0, 0].detach().abs() * 100).long().cpu() % x.shape[1]
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        h, end = self.rnn(packed)
        end = end[0] if isinstance(end, tuple) else end
        return self.head(torch.cat([pad_packed_sequence(h, batch_first=True)[0].sum(1), end[-1]], dim=1))


class Padded(nn.Module):
    def __init__(self, kind, first=True, start=False, **options):
        super().__init__()
        self.rnn = kind(3, 4, batch_first=first, **options)
        self.start = nn.Parameter(torch.randn(1, 1, 4)) if start else None
        self.head, self.first = nn.LazyLinear(2), first

    def forward(self, x):
        start = () if self.start is None else (self.start.expand(-1, len(x), -1),)
        h, end = self.rnn(x if self.first else x.transpose(0, 1), *start)
        end = torch.cat([e.transpose(0, 1).flatten(1) for e in (end if isinstance(end, tuple) else (end,))], dim=1)
        return self.head(torch.cat([h.sum(1 if self.first else 0), end], dim=1))


class Cells(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell, self.head = kind(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        h = torch.zeros(len(x), 4, dtype=x.dtype, device=x.device)
        state = (h, h) if isinstance(self.cell, nn.LSTMCell) else h
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


class AlsoElsewhere(nn.Module):
    """Parameters with a rule, that are used in a way without one as well."""

    def __init__(self):
        super().__init__()
        self.gain, self.bias, self.w, self.part, self.still = (nn.Parameter(torch.rand(4)) for _ in range(5))
        self.table, self.tail = nn.Parameter(torch.randn(2, 4, 4)), nn.Linear(4, 2)

    def forward(self, x):
        h = self.gain * x + self.bias
        h *= self.still
        h = h + torch.einsum("btd,d->btd", torch.sin(h), self.gain)
        filled = torch.zeros_like(h)
        filled[:, 0] = self.bias
        h = h @ self.table[0] + torch.addcmul(h, torch.cos(h), self.w) + filled
        h = torch.cat([h[:, :, :2] * self.part[:2], h[:, :, 1:3] * self.part[1:3]], dim=2)
        return self.tail(torch.baddbmm(h, h, self.table[1].expand(len(h), 4, 4)).sum(1))


def _built(build, *shape):
    """A case whose lazy modules have their sizes."""

    def made():
        net = build()
        net(torch.randn(2, *shape[1:]))
        return net

    return Case(made, batch_of(*shape))


def _convs(build):
    return Case(lambda: nn.Sequential(build(), Pooled(), nn.Linear(3, 2)), batch_of(4, 2, 4, 4))


BLOCKS = {
    "rms norm by hand, shared": (Case(lambda: Normed(gemma=False), batch_of(4, 3, 4)), []),
    "rms norm of gemma": (Case(lambda: Normed(gemma=True), batch_of(4, 3, 4)), []),
    "gpt": (Case(lambda: GPT(tied=False), tokens_of(9, 3, 5)), []),
    "gpt, as many positions as examples": (Case(lambda: GPT(tied=False), tokens_of(9, 5, 5)), []),
    "gpt, tied": (Case(lambda: GPT(tied=True), tokens_of(9, 3, 5)), []),
    "gpt, tied, bias": (Case(lambda: GPT(tied=True, bias=True), tokens_of(9, 3, 5)), []),
    "embeddings of bert": (Case(Embeddings, tokens_of(9, 4, 6)), []),
    "patches": (Case(Patches, batch_of(3, 1, 4, 4)), ["mask_token"]),
    "patches, as many as examples": (Case(Patches, batch_of(7, 1, 4, 4)), ["mask_token"]),
    "patches, some masked": (Case(lambda: Patches(mask=True), batch_of(3, 1, 4, 4)), []),
    "convnext": (Case(ConvNeXt, batch_of(4, 1, 4, 5)), []),
    "standardized weight": (_convs(lambda: Standardized(2, 3, 2, scaled=False)), []),
    "standardized weight, scaled by batchnorm": (_convs(lambda: Standardized(2, 3, 2)), []),
    "weight norm": (_convs(lambda: parametrizations.weight_norm(nn.Conv2d(2, 3, 2))), []),
    "spectral norm": (_convs(lambda: parametrizations.spectral_norm(nn.Conv2d(2, 3, 2))), []),
    "experts": (Case(Experts, batch_of(3, 5, 4)), []),
    "experts, transposed": (Case(lambda: Experts(transposed=True), batch_of(3, 5, 4)), []),
    "relative positions": (Case(Windows, batch_of(4, 3, 4)), []),
    "by hand": (Case(ByHand, batch_of(3, 2, 4)), []),
    "odd": (Case(Odd, batch_of(4, 3, 4)), []),
    "queries, shared": (Case(lambda: Queries(False), batch_of(4, 3, 4)), []),
    "queries, expanded": (Case(lambda: Queries(True), batch_of(4, 3, 4)), []),
    "lstm, two directions, packed": (
        _built(lambda: Packed(nn.LSTM, bidirectional=True, num_layers=2), 4, 5, 3),
        [],
    ),
    "gru, packed": (_built(lambda: Packed(nn.GRU), 4, 5, 3), []),
    "lstm, projected, sequence first": (
        _built(lambda: Padded(nn.LSTM, first=False, proj_size=2, num_layers=2), 4, 3, 3),
        [],
    ),
    "gru, two directions, no bias": (_built(lambda: Padded(nn.GRU, bidirectional=True, bias=False), 3, 3, 3), []),
    "rnn, learned start": (_built(lambda: Padded(nn.RNN, start=True, nonlinearity="relu"), 4, 3, 3), []),
    "lstm cells": (Case(lambda: Cells(nn.LSTMCell), batch_of(4, 3, 3)), []),
    "gru cells": (Case(lambda: Cells(nn.GRUCell), batch_of(4, 3, 3)), []),
    "used elsewhere too": (
        Case(lambda: nn.Sequential(AlsoElsewhere()), batch_of(3, 2, 4)),
        ["0.bias", "0.gain", "0.still", "0.w"],
    ),
}
"""A case, and the parameters in it that no rule takes."""
