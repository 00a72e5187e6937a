"""Random numbers that a key reproduces, without torch's global random state.

Signs are the bits of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) at
counters, so any part of them can be drawn without the rest, and all devices draw the same ones.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Distribution = Literal["gaussian", "rademacher"]
DISTRIBUTIONS = ("gaussian", "rademacher")
_AT_ONCE = 2**21
"""The number of signs that are unpacked at once: as many as stay in the caches of a CPU."""


def number(key: str) -> int:
    """Return 64 bits of a key, as an integer from 0."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def generator(key: str, device: torch.device) -> torch.Generator:
    """Return a generator of torch for a key."""
    # The key is hashed because adjacent seeds may give correlated streams. torch's CPU generator uses 32 bits of it, so
    # one pair of draws in some billions coincides, which no estimate can resolve.
    return torch.Generator(device).manual_seed(number(key) >> 1)


def fill(values: Tensor, distribution: Distribution, key: str) -> None:
    """Fill a tensor with independent numbers of mean 0 and variance 1."""
    if distribution == "gaussian":
        values.normal_(generator=generator(f"gaussian/{key}", values.device))
    else:
        values.copy_(signs(key, 0, 1, values.numel(), values.device).reshape(values.shape))


def signs(
    key: str, start: int, stop: int, size: int, device: torch.device, *, width: int = 1, rows: Tensor | None = None
) -> Tensor:
    """Return random signs in float32, for each of the streams ``start:stop`` of a key.

    Args:
        key: the key.
        start: the first stream.
        stop: one past the last stream.
        size: the number of signs in a stream.
        device: where to draw.
        width: the number of signs in a row, if a stream counts as rows.
        rows: draw only these rows, as indices.

    Returns:
        ``(stop - start, size)``, or ``(stop - start, len(rows) * width)``.
    """
    keys = _words(
        torch.tensor(_signed(number(f"signs/{key}")), device=device), torch.arange(start, stop, device=device)
    )
    if rows is None:
        index, shift, length = torch.arange(-(-size // 64), device=device), None, size
    else:
        # A row begins inside a word, and ends inside one of the next.
        first = rows.to(device) * width
        index = (first >> 6)[:, None] + torch.arange((width + 62) // 64 + 1, device=device)
        shift = (first & 63)[:, None] + torch.arange(width, device=device)
        shift = (shift + 64 * index.shape[1] * torch.arange(len(rows), device=device)[:, None]).flatten()
        index, length = index.flatten(), len(rows) * width
    table = _table(device)
    result = torch.empty(len(keys), length, device=device)
    step = max(1, _AT_ONCE // max(1, 64 * len(index)))
    for first_key in range(0, len(keys), step):
        some = _words(keys[first_key : first_key + step, None], index).view(torch.uint8)
        unpacked = table.index_select(0, some.flatten().int()).view(len(some), -1)
        result[first_key : first_key + step] = unpacked[:, :length] if shift is None else unpacked[:, shift]
    return result


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


_GAMMA, _FIRST, _SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _words(keys: Tensor, index: Tensor) -> Tensor:
    """Return 64 random bits for each key and index. Integers overflow modulo 2^64, and ``>>`` copies the sign."""
    z = (index + 1) * _GAMMA + keys
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * _FIRST
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * _SECOND
    return z ^ (z >> 31 & (1 << 33) - 1)


@lru_cache
def _table(device: torch.device) -> Tensor:
    """Return the signs of the bits of each byte, ``(256, 8)``."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return 2.0 * bits.to(torch.float32) - 1
