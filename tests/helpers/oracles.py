"""Slow answers from the formulas, in float64; nothing here imports alignreg."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import torch
from torch.nn.modules.batchnorm import _NormBase as NormBase


def call(model, x):
    if isinstance(x, dict):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)


def double(x):
    if isinstance(x, dict):
        return {k: double(v) for k, v in x.items()}
    if isinstance(x, tuple):
        return tuple(double(v) for v in x)
    return x.double() if x.is_floating_point() else x


def take(x, rows):
    if isinstance(x, dict):
        return {k: v[rows] for k, v in x.items()}
    return tuple(v[rows] for v in x) if isinstance(x, tuple) else x[rows]


def jacobian(model, x, forward_fn=call, names=None, *, trained=False):
    """Row by row: ∇_w f_k(x_i) of a float64 copy, as {name: (n, c, *shape)}.

    In evaluation mode, or as it is trained: modules that normalize by the batch do so as the model's own would now.
    """
    modes = [module.training and isinstance(module, NormBase) for module in model.modules()]
    model = copy.deepcopy(model).double().eval()
    for module, training in zip(model.modules(), modes, strict=True):
        module.training = training and trained
    parameters = {k: p for k, p in model.named_parameters() if (p.requires_grad if names is None else k in names)}
    with torch.enable_grad():
        y = forward_fn(model, double(x))
        rows = [
            [
                torch.autograd.grad(y[i, k], list(parameters.values()), retain_graph=True, materialize_grads=True)
                for k in range(y.shape[1])
            ]
            for i in range(y.shape[0])
        ]
    return {
        name: torch.stack([torch.stack([row[p].detach().to_dense() for row in example]) for example in rows])
        for p, name in enumerate(parameters)
    }


def matrix(jac):
    """Φ as (n·c, P), example-major."""
    return torch.cat([value.reshape(value.shape[0] * value.shape[1], -1) for value in jac.values()], dim=1)


def kernel(jac, jac2=None):
    n, c = next(iter(jac.values())).shape[:2]
    right = jac if jac2 is None else jac2
    return (matrix(jac) @ matrix(right).T).reshape(n, c, -1, c)


def centered_features(jac):
    return {name: value - value.mean(0, keepdim=True) for name, value in jac.items()}


def one_hot(labels, c):
    y = torch.zeros(len(labels), c, dtype=torch.float64)
    for i, k in enumerate(labels.tolist()):
        y[i, k] = 1
    return y


def alignment(jac, y, centered=True):
    """yᵀKy / (‖K‖_F ‖y‖²) with dense K from (centered) features."""
    jac = centered_features(jac) if centered else jac
    phi = matrix(jac)
    K = phi @ phi.T
    target = (y - y.mean(0)).reshape(-1).double()
    return float(target @ K @ target / (K.pow(2).sum().sqrt() * target.pow(2).sum()))


def mean_over_different(K, L):
    """h(K, L) over all i, j, q, r that differ, of kernels (n, c, n, c): E⟨k̃, l̃⟩ without bias."""
    n, total, count = len(K), 0.0, 0
    for i, j, q, r in itertools.permutations(range(n), 4):
        one = K[i, :, j]
        total += (one * (L[i, :, j] - L[i, :, q] - L[q, :, j] + L[q, :, r])).sum()
        count += 1
    return total / count


def unbiased_alignment(jac, y):
    """Alignment of the population from a sample of it."""
    K, L = kernel(jac), torch.einsum("ik,jl->ikjl", y.double(), y.double())
    return mean_over_different(K, L) / (mean_over_different(K, K) * mean_over_different(L, L)).sqrt()


def eigenvalues(K):
    n, c = K.shape[:2]
    return np.sort(np.linalg.svd(K.reshape(n * c, n * c).double().numpy(), compute_uv=False))[::-1].copy()


def effective_rank(K):
    lam = eigenvalues(K)
    total = lam.sum()
    return math.exp(-sum(v / total * math.log(v / total) for v in lam if v > 0))


def kare(K, y, ridge):
    n, c = K.shape[:2]
    N = n * c
    M = np.linalg.inv(K.reshape(N, N).double().numpy() / N + ridge * np.eye(N))
    target = (y - y.mean(0)).reshape(-1).double().numpy()
    return float((target @ M @ M @ target / N) / (np.trace(M) / N) ** 2)
