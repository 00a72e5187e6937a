"""Random probes on outputs, random subsets of examples, and random hashes of vectors, from a seed."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from alignreg import checks
from alignreg.sketches import random
from alignreg.sketches.random import DISTRIBUTIONS, Distribution


def probes(
    m: int,
    n: int,
    c: int,
    *,
    seed: int,
    step: int = 0,
    offset: int = 0,
    distribution: Distribution = "gaussian",
    like: Tensor | None = None,
) -> Tensor:
    """Return rows ``offset:offset + n`` of one global draw of m random probes Ω on the outputs, ``(m, n, c)``.

    The numbers of an example depend only on (seed, step, its global index). Ranks that draw their own rows, with the
    number of examples on the ranks before them as ``offset``, therefore hold one global set of probes. With equal
    probes on two ranks, the parts of the kernel between those ranks would be counted as if they were equal.

    Args:
        m: the number of probes.
        n: the number of examples.
        c: the number of outputs.
        seed: any integer.
        step: the optimizer step; another step draws other probes.
        offset: the global index of the first example.
        distribution: the distribution of the entries, ``"gaussian"`` or ``"rademacher"``; mean 0, variance 1.
        like: a tensor with the dtype and device of the probes; by default float32 on the CPU.

    Raises:
        TypeError: if ``like`` is not a real tensor.
        ValueError: if another argument is out of range.

    Example:
        >>> import torch
        >>> from alignreg import sketches
        >>> whole = sketches.probes(4, 6, 2, seed=0)
        >>> torch.equal(whole[:, 4:], sketches.probes(4, 2, 2, seed=0, offset=4))
        True
    """
    m, n, c = checks.count("m", m), checks.count("n", n, 0), checks.count("c", c)
    seed, step, offset = checks.seed(seed), checks.integer("step", step), checks.integer("offset", offset)
    checks.choice("distribution", distribution, DISTRIBUTIONS)
    like = torch.empty(0, dtype=torch.float32, device="cpu") if like is None else like
    checks.real("like", like)
    rows = torch.empty(n, m, c, dtype=torch.float32, device=like.device)
    for row, index in zip(rows, range(offset, offset + n), strict=True):
        random.fill(row, distribution, f"{seed}/{step}/{index}")
    return rows.transpose(0, 1).to(like.dtype).contiguous()


def subset(n: int, size: int, *, seed: int, step: int = 0, stream: int = 0) -> Tensor:
    """Return ``size`` of the indices below ``n``, drawn uniformly without replacement.

    Args:
        n: the number of examples.
        size: the number of indices, at most n.
        seed: any integer.
        step: the optimizer step; another step draws other indices.
        stream: a further key, with which ranks draw different indices.

    Example:
        >>> from alignreg import sketches
        >>> sorted(sketches.subset(4, 4, seed=0).tolist())
        [0, 1, 2, 3]
    """
    n, size = checks.count("n", n, 0), checks.count("size", size, 0)
    seed, step, stream = checks.seed(seed), checks.integer("step", step), checks.integer("stream", stream)
    if size > n:
        raise ValueError(f"size: expected at most the {n} examples, got {size}.")
    generator = random.generator(f"subset/{seed}/{step}/{stream}", torch.device("cpu"))
    return torch.randperm(n, generator=generator, device="cpu")[:size]


def count_sketch(vectors: Mapping[str, Tensor], size: int, *, seed: int) -> Tensor:
    """Return hashes of vectors in parameter space; a hash is linear, and ‖hash‖² has the mean ‖vector‖².

    The entries of one parameter are split into runs of ``size``; each run is rotated by a random shift and multiplied
    by random signs before it is added. Two entries meet with a probability of at most 1/``size``, and then their
    product cancels on average because of the signs, so that the relative standard deviation of ‖hash‖² is at most
    √(2/size). (After Charikar et al., "Finding frequent items in data streams", 2002.)

    Args:
        vectors: r vectors ``(r, *shape)`` by parameter name.
        size: the length of a hash.
        seed: any integer; hashes with equal seeds can be added.

    Returns:
        ``(r, size)``, in float64.

    Raises:
        TypeError: if the vectors are not real tensors by name.
        ValueError: if there are no vectors, not equally many for each parameter, or values that are not finite.

    Example:
        >>> import torch
        >>> from alignreg import sketches
        >>> hashed = sketches.count_sketch({"w": torch.tensor([[3.0, 4.0]])}, 1000, seed=0)
        >>> hashed.shape, hashed.square().sum()
        (torch.Size([1, 1000]), tensor(25., dtype=torch.float64))
    """
    size, seed = checks.count("size", size), checks.seed(seed)
    vectors = checks.by_name("vectors", vectors)
    first = next(iter(vectors.values()))
    total = torch.zeros(len(first), size, dtype=torch.float64, device=first.device)
    for name, vector in vectors.items():
        for index, run in enumerate(torch.split(vector.reshape(len(vector), math.prod(vector.shape[1:])), size, dim=1)):
            key, length = f"count/{seed}/{name}/{index}", run.shape[1]
            signs = torch.empty(length, dtype=torch.float32, device=run.device)
            random.fill(signs, "rademacher", key)
            start = random.number(key) % size
            signed = (run * signs.to(run.dtype)).to(total)
            before = min(length, size - start)
            total[:, start : start + before] += signed[:, :before]
            total[:, : length - before] += signed[:, before:]
    return checks.finite("vectors", total)
