"""Functions of torch, each to stand between two linear layers: a new one is a row in OPERATIONS.

A function takes the hidden vectors h ``(n, 6)`` of n examples and returns n rows of any shape.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F


def at(seed, *shape):
    """Fixed numbers of that shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def each(module, name, functions, use=lambda f, h: f(h)):
    """A row for each of the functions of a module."""
    return {f"{name}.{one}": partial(use, getattr(module, one)) for one in functions.split()}


def grid(h):
    return h.unflatten(1, (2, 3))


def image(h):
    """One channel, 4 x 4, each number of its own."""
    return (h @ at(1, 6, 16)).unflatten(1, (1, 4, 4))


def channels(h):
    """Two channels of length 8."""
    return (h @ at(1, 6, 16)).unflatten(1, (2, 8))


def square(h):
    """Well conditioned 3 x 3 matrices."""
    return (h @ at(2, 6, 9)).unflatten(1, (3, 3)) * 0.3 + 2 * torch.eye(3, dtype=h.dtype)


def symmetric(h):
    return square(h) @ square(h).mT + torch.diag(torch.tensor([1.0, 3.0, 6.0], dtype=h.dtype))


def positive(h):
    return h.square() + 0.5


def unit(h):
    """Between 0 and 1."""
    return torch.sigmoid(h)


def rows_of(function):
    """A function of each row alone, the rows one after the other."""
    return lambda h: torch.stack([function(row) for row in h])


def masked(function):
    """Hidden vectors of which the last is padding: zero, whatever the weights."""
    return lambda h: function(h * (torch.arange(len(h)) < len(h) - 1)[:, None])


POINTWISE = {
    **each(
        F,
        "F",
        "celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish relu relu6 rrelu "
        "selu sigmoid silu softplus softshrink softsign tanh tanhshrink",
    ),
    "F.gelu, tanh": lambda h: F.gelu(h, approximate="tanh"),
    "F.glu": F.glu,
    "F.threshold": lambda h: F.threshold(h, 0.1, -1.0),
    "F.prelu": lambda h: F.prelu(h, h.new_full((1,), 0.2)),
    "F.softmax": lambda h: F.softmax(h, 1),
    "F.softmin": lambda h: F.softmin(h, 1),
    "F.log_softmax": lambda h: F.log_softmax(h, 1),
    "F.normalize": F.normalize,
    "F.normalize, l1": lambda h: F.normalize(h, p=1.0),
    "F.normalize, padding": masked(F.normalize),
    "F.dropout": lambda h: F.dropout(h, training=False),
    **each(
        torch,
        "torch",
        "abs arctan asinh atan cos cosh deg2rad erf erfc exp exp2 expm1 neg positive rad2deg relu sigmoid sin "
        "sinc sinh square tan tanh",
    ),
    **each(torch, "torch", "digamma lgamma log log10 log1p log2 reciprocal rsqrt sqrt", lambda f, h: f(positive(h))),
    "torch.acosh": lambda h: torch.acosh(positive(h) + 1),
    **each(torch, "torch", "acos asin atanh erfinv logit", lambda f, h: f(unit(h) * 0.9)),
    "torch.logit, eps": lambda h: torch.logit(unit(h), eps=0.3),
    "torch.frac": torch.frac,
    "torch.nan_to_num": torch.nan_to_num,
    "torch.clamp": lambda h: torch.clamp(h, -0.5, 0.7),
    "torch.clamp, tensors": lambda h: torch.clamp(h, h[:, :1] - 1, h[:, :1] + 0.2),
    "torch.pow": lambda h: torch.pow(positive(h), 1.7),
    "torch.pow, tensors": lambda h: torch.pow(positive(h[:, :3]), h[:, 3:]),
    "torch.float_power": lambda h: torch.float_power(positive(h), 1.5),
    "torch.polygamma": lambda h: torch.polygamma(1, positive(h)),
    "torch.mvlgamma": lambda h: torch.mvlgamma(positive(h) + 2, 2),
    "torch.i0": torch.i0,
    "torch.atan2": lambda h: torch.atan2(h[:, :3], h[:, 3:]),
    "torch.hypot": lambda h: torch.hypot(h[:, :3], h[:, 3:]),
    "torch.logaddexp": lambda h: torch.logaddexp(h[:, :3], h[:, 3:]),
    "torch.logaddexp2": lambda h: torch.logaddexp2(h[:, :3], h[:, 3:]),
    "torch.xlogy": lambda h: torch.xlogy(h[:, :3], positive(h[:, 3:])),
    "torch.lerp": lambda h: torch.lerp(h[:, :2], h[:, 2:4], h[:, 4:]),
    "torch.addcmul": lambda h: torch.addcmul(h[:, :2], h[:, 2:4], h[:, 4:], value=0.7),
    "torch.addcdiv": lambda h: torch.addcdiv(h[:, :2], h[:, 2:4], positive(h[:, 4:]), value=0.7),
    "torch.maximum": lambda h: torch.maximum(h[:, :3], h[:, 3:]),
    "torch.fmin": lambda h: torch.fmin(h[:, :3], h[:, 3:]),
    "torch.fmod": lambda h: torch.fmod(h, 0.7),
    "torch.remainder": lambda h: torch.remainder(h, 0.7),
    "torch.copysign": lambda h: torch.copysign(h[:, :3], h[:, 3:]),
    "torch.ldexp": lambda h: torch.ldexp(h[:, :3], h[:, 3:]),
    "torch.where": lambda h: torch.where(h > 0, h.square(), h.sin()),
    "torch.heaviside": lambda h: torch.heaviside(h.detach(), h.new_zeros(())) * h.square(),
    "torch.masked_fill": lambda h: torch.masked_fill(h.square(), h > 0, 0.2),
    "torch.special.entr": lambda h: torch.special.entr(positive(h)),
    **each(torch.special, "torch.special", "erfcx expit i0e i1 i1e log_ndtr ndtr"),
    "torch.special.ndtri": lambda h: torch.special.ndtri(unit(h)),
    "torch.special.xlog1py": lambda h: torch.special.xlog1py(h[:, :3], positive(h[:, 3:])),
    "torch.special.zeta": lambda h: torch.special.zeta(h.new_full((), 2.5), positive(h) + 1),
    "torch.special.gammainc": lambda h: torch.special.gammainc(h.new_full((), 1.5), positive(h)),
}

REDUCTIONS = {
    **each(torch, "torch", "amax amin logsumexp mean nanmean nansum prod std sum var", lambda f, h: f(grid(h), 2)),
    **each(torch, "torch", "max median min mode std_mean", lambda f, h: f(grid(h), 2)[0]),
    "torch.aminmax": lambda h: torch.cat(list(torch.aminmax(grid(h), dim=2)), 1),
    "torch.var_mean": lambda h: torch.var_mean(grid(h), 2)[0],
    "torch.kthvalue": lambda h: torch.kthvalue(h, 3, 1)[0],
    "torch.quantile": lambda h: torch.quantile(h, 0.3, dim=1, keepdim=True),
    "torch.topk": lambda h: torch.topk(h, 3, 1)[0],
    "torch.sort": lambda h: torch.sort(h, 1)[0],
    "torch.msort": lambda h: torch.msort(h.T).T,
    "torch.cumsum": lambda h: torch.cumsum(h, 1),
    "torch.cumprod": lambda h: torch.cumprod(h, 1),
    "torch.cummax": lambda h: torch.cummax(h, 1)[0],
    "torch.cummin": lambda h: torch.cummin(h, 1)[0],
    "torch.logcumsumexp": lambda h: torch.logcumsumexp(h, 1),
    "torch.trapezoid": lambda h: torch.trapezoid(grid(h), dim=2),
    "torch.diff": lambda h: torch.diff(h, dim=1),
    "torch.norm": lambda h: torch.norm(grid(h), dim=2),
    "torch.norm, padding": masked(lambda h: torch.norm(grid(h), dim=2)),
    "Tensor.norm, padding": masked(lambda h: grid(h).norm(dim=2)),
    "Tensor.norm, p=3, padding": masked(lambda h: grid(h).norm(3, dim=2)),
    "Tensor.norm, whole": rows_of(lambda row: row.norm()[None]),
    "torch.linalg.norm, padding": masked(lambda h: torch.linalg.norm(grid(h), dim=2)),
    "torch.linalg.vector_norm, padding": masked(lambda h: torch.linalg.vector_norm(grid(h), dim=2)),
    "torch.linalg.vector_norm, inf": lambda h: torch.linalg.vector_norm(grid(h), math.inf, dim=2),
    "torch.linalg.vector_norm, 1": lambda h: torch.linalg.vector_norm(grid(h), 1, dim=2),
    "torch.linalg.matrix_norm, padding": masked(lambda h: torch.linalg.matrix_norm(grid(h), keepdim=True)[..., 0]),
    "torch.renorm": lambda h: torch.renorm(h, 2, 0, 0.8),
    "torch.segment_reduce": lambda h: (
        torch.segment_reduce(h.T.contiguous(), "sum", lengths=torch.tensor([2, 1, 3]), axis=0).T
    ),
    "torch.count and scatter": lambda h: torch.zeros(len(h), 3, dtype=h.dtype).scatter_add(
        1, torch.tensor([[0, 1, 2, 0, 1, 2]]).expand(len(h), -1), h.square()
    ),
    "torch.scatter_reduce, prod": lambda h: torch.ones(len(h), 3, dtype=h.dtype).scatter_reduce(
        1, torch.tensor([[0, 1, 2, 0, 1, 2]]).expand(len(h), -1), h, "prod"
    ),
    "torch.scatter_reduce, amax": lambda h: torch.zeros(len(h), 3, dtype=h.dtype).scatter_reduce(
        1, torch.tensor([[0, 1, 2, 0, 1, 2]]).expand(len(h), -1), h.square(), "amax"
    ),
    "torch.index_reduce, mean": lambda h: torch.zeros(len(h), 2, dtype=h.dtype).index_reduce(
        1, torch.tensor([0, 1, 0, 1, 1, 0]), h, "mean"
    ),
}

PAIRS = {
    "torch.matmul": lambda h: grid(h) @ grid(h).mT,
    "torch.bmm": lambda h: torch.bmm(grid(h), grid(h).mT),
    "torch.einsum": lambda h: torch.einsum("nij,nik->njk", grid(h), grid(h)),
    "torch.baddbmm": lambda h: torch.baddbmm(grid(h)[:, :, :2], grid(h), grid(h).mT),
    "torch.tensordot": lambda h: torch.tensordot(h, at(3, 6, 4), 1),
    "torch.outer": rows_of(lambda row: torch.outer(row[:3], row[3:])),
    "torch.kron": rows_of(lambda row: torch.kron(row[:3], row[3:])),
    "torch.dot": rows_of(lambda row: torch.dot(row[:3], row[3:])[None]),
    "torch.cross": lambda h: torch.linalg.cross(h[:, :3], h[:, 3:]),
    "torch.cov": rows_of(lambda row: torch.cov(row.reshape(2, 3))),
    "torch.corrcoef": rows_of(lambda row: torch.corrcoef(row.reshape(2, 3))),
    "torch.cdist": lambda h: torch.cdist(grid(h), at(4, 4, 3)),
    "torch.cdist, p=1": lambda h: torch.cdist(grid(h), at(4, 4, 3), p=1.0),
    "torch.cdist, no mm": lambda h: torch.cdist(grid(h), at(4, 4, 3), compute_mode="donot_use_mm_for_euclid_dist"),
    "torch.cdist, itself": lambda h: torch.cdist(grid(h), grid(h)),
    "F.pdist": rows_of(lambda row: F.pdist(row.reshape(3, 2))),
    "F.pairwise_distance": lambda h: F.pairwise_distance(h[:, :3], h[:, 3:], keepdim=True),
    "F.cosine_similarity": lambda h: F.cosine_similarity(grid(h), at(5, 3), dim=2),
    "F.cosine_similarity, padding": masked(lambda h: F.cosine_similarity(grid(h), at(5, 3), dim=2)),
    "F.bilinear": lambda h: F.bilinear(h[:, :3], h[:, 3:], at(6, 4, 3, 3)),
    "F.scaled_dot_product_attention": lambda h: F.scaled_dot_product_attention(*(grid(h)[:, None],) * 3),
    "F.scaled_dot_product_attention, causal": lambda h: F.scaled_dot_product_attention(
        *(grid(h)[:, None],) * 3, is_causal=True
    ),
}

LINALG = {
    "torch.linalg.inv": lambda h: torch.linalg.inv(square(h)),
    "torch.linalg.pinv": lambda h: torch.linalg.pinv(square(h)),
    "torch.linalg.det": lambda h: torch.linalg.det(square(h))[:, None],
    "torch.linalg.slogdet": lambda h: torch.linalg.slogdet(square(h))[1][:, None],
    "torch.logdet": lambda h: torch.logdet(symmetric(h))[:, None],
    "torch.linalg.solve": lambda h: torch.linalg.solve(square(h), h[:, :3]),
    "torch.linalg.solve_triangular": lambda h: torch.linalg.solve_triangular(
        square(h).triu(), h[:, :3, None], upper=True
    ),
    "torch.linalg.lstsq": lambda h: torch.linalg.lstsq(square(h), h[:, :3, None]).solution,
    "torch.linalg.cholesky": lambda h: torch.linalg.cholesky(symmetric(h)),
    "torch.cholesky_solve": lambda h: torch.cholesky_solve(h[:, :3, None], torch.linalg.cholesky(symmetric(h))),
    "torch.cholesky_inverse": lambda h: torch.cholesky_inverse(torch.linalg.cholesky(symmetric(h))),
    "torch.linalg.qr": lambda h: torch.linalg.qr(square(h))[1],
    "torch.linalg.eigh": lambda h: torch.linalg.eigh(symmetric(h))[0],
    "torch.linalg.eigvalsh": lambda h: torch.linalg.eigvalsh(symmetric(h)),
    "torch.linalg.eigvals": lambda h: torch.linalg.eigvals(symmetric(h)).real,
    "torch.linalg.svd": lambda h: torch.linalg.svd(square(h))[1],
    "torch.linalg.svdvals": lambda h: torch.linalg.svdvals(square(h)),
    "torch.linalg.matrix_exp": lambda h: torch.linalg.matrix_exp(square(h) * 0.2),
    "torch.linalg.matrix_power": lambda h: torch.linalg.matrix_power(square(h), 3),
    "torch.linalg.matrix_norm, nuc": lambda h: torch.linalg.matrix_norm(square(h), "nuc")[:, None],
    "torch.linalg.cond": lambda h: torch.linalg.cond(square(h))[:, None],
    "torch.linalg.multi_dot": rows_of(
        lambda row: torch.linalg.multi_dot([row.reshape(2, 3), row.reshape(3, 2), row.reshape(2, 3)])
    ),
    "torch.linalg.lu": lambda h: torch.linalg.lu(square(h))[2],
    "torch.linalg.lu_solve": lambda h: torch.linalg.lu_solve(*torch.linalg.lu_factor(square(h)), h[:, :3, None]),
    "torch.linalg.householder_product": lambda h: torch.linalg.householder_product(square(h).tril(-1), h[:, :3]),
    "torch.linalg.tensorinv": rows_of(lambda row: torch.linalg.tensorinv(square(row[None])[0], ind=1)),
    "torch.linalg.vander": lambda h: torch.linalg.vander(h[:, :3]),
    "torch.trace": rows_of(lambda row: torch.trace(row.reshape(2, 3) @ row.reshape(3, 2))[None]),
}

OPERATIONS = {**POINTWISE, **REDUCTIONS, **PAIRS, **LINALG}
