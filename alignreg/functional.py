r"""Functions of an exact tangent kernel K ``(n, c, n, c)``: alignment, spectrum, ranks.

All are differentiable with respect to K. Alignment centers K by default; the rank functions take K as it is, so pass
``center(K)`` for a centered spectrum.

All expect a kernel: a real tensor ``(n, c, n, c)`` of finite numbers, symmetric and positive semi-definite up to
rounding errors of a hundredth. Half precision is computed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alignreg import checks, formulas
from alignreg.targets import ConstantTargetError, encode

ROUNDING = 0.01
"""The relative error beyond which a tensor is no kernel; the errors of bfloat16 stay below it."""
_INDEFINITE = (
    "K: expected a positive semi-definite kernel, of products of features, got one with negative eigenvalues. Where "
    "only rounding errors are left of a centered one, compute it in float64."
)


def center(K: Tensor) -> Tensor:
    r"""Center a kernel per output over the examples: K_c = (C_n ⊗ I_c) K (C_n ⊗ I_c), C_n = I − 11ᵀ/n.

    This is the kernel of the tangent features minus, output by output, their mean over the examples.

    Args:
        K: kernel ``(n, c, n, c)``.

    Raises:
        TypeError: if K is no real tensor.
        ValueError: if K is no kernel.

    Example:
        >>> import torch
        >>> from alignreg.functional import center
        >>> center(torch.eye(2).reshape(2, 1, 2, 1)).reshape(2, 2)
        tensor([[ 0.5000, -0.5000],
                [-0.5000,  0.5000]])
    """
    K = _kernel(K)
    rest = K - K.mean(0, keepdim=True)
    rest = rest - rest.mean(2, keepdim=True)
    # What rounding leaves of a kernel that is constant over the examples is none.
    left, whole = (torch.linalg.vector_norm(values.detach()) for values in (rest, K))
    return torch.where(left < 10 * torch.finfo(K.dtype).eps * whole, torch.zeros_like(rest), rest)


def alignment(K: Tensor, y: Tensor, centered: bool = True, *, unbiased: bool = False) -> Tensor:
    r"""Alignment of a kernel with the targets, A = yᵀK_c y / (‖K_c‖_F ‖y‖²), in [0, 1].

    It is the centered kernel alignment CKA(K, yyᵀ) (Baratin et al. 2021, section 3.3; Cortes et al. 2012). y is
    always centered over the examples, per output. A is invariant to the scale of K and y, to the order of the examples
    and to an orthogonal mixing of the outputs of both.

    Args:
        K: kernel ``(n, c, n, c)``.
        y: class indices ``(n,)`` or values ``(n, c)``; see :func:`alignreg.targets.encode`.
        centered: center K as well; ``False`` leaves K as it is.
        unbiased: estimate the alignment of the population, of which these examples are a sample, from pairs of
            different ones alone (:mod:`alignreg.population`); it may lie outside [0, 1].

    Returns:
        A scalar; NaN if (centered) K is zero, which has no direction to be aligned. Unbiased, NaN where the estimate of
        a squared norm is not positive, and for fewer than four examples.

    Raises:
        TypeError: if K or y is no real tensor.
        ConstantTargetError: if y is constant: alignment is then undefined.
        ValueError: if K is no kernel, the shapes do not fit, or ``unbiased`` comes with ``centered=False``.

    Example:
        >>> import torch
        >>> from alignreg.functional import alignment
        >>> y = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
        >>> alignment(torch.einsum("ik,jl->ikjl", y, y), y)
        tensor(1.)
    """
    K = _kernel(K)
    if checks.flag("unbiased", unbiased) and not checks.flag("centered", centered):
        raise ValueError("unbiased: expected the centered kernel with it. Leave centered out, or unbiased.")
    checks.flag("centered", centered)
    targets = _centered_targets(K, y)
    if unbiased:
        return formulas.unbiased_alignment(K, targets)
    if centered:
        K = center(K)
    numerator: Tensor = torch.einsum("ik,ikjl,jl->", targets, K, targets)
    norm: Tensor = torch.linalg.vector_norm(K)
    return numerator / (norm * targets.square().sum())


def spectrum(K: Tensor) -> Tensor:
    """Return all n·c eigenvalues of a kernel, descending and ≥ 0.

    Args:
        K: kernel ``(n, c, n, c)``.

    Raises:
        TypeError: if K is no real tensor.
        ValueError: if K is no kernel.

    Example:
        >>> import torch
        >>> from alignreg.functional import spectrum
        >>> spectrum(torch.diag(torch.tensor([1.0, 3.0])).reshape(2, 1, 2, 1))
        tensor([3., 1.])
    """
    return _semidefinite(formulas.eigenvalues(_kernel(K))).clamp(min=0)


def effective_rank(K: Tensor) -> Tensor:
    r"""Effective rank exp(−Σ_j μ_j log μ_j), μ_j = λ_j / Σλ (Roy & Vetterli 2007; Baratin et al. 2021, Eq. 5).

    0·log 0 counts as 0. It lies between 1 and n·c; the zero kernel has rank 0. Not the same as
    :func:`participation_ratio`.

    Args:
        K: kernel ``(n, c, n, c)``, taken as it is.

    Raises:
        TypeError: if K is no real tensor.
        ValueError: if K is no kernel.

    Example:
        >>> import torch
        >>> from alignreg.functional import effective_rank
        >>> effective_rank(torch.eye(6).reshape(3, 2, 3, 2))
        tensor(6.0000)
    """
    return formulas.effective_rank(spectrum(K))


def participation_ratio(K: Tensor) -> Tensor:
    r"""Participation ratio (tr K)² / ‖K‖_F² = (Σλ)² / Σλ²: a second rank, without eigenvalues.

    It lies between 1 and n·c, at most the :func:`effective_rank`; the zero kernel has 0.

    Args:
        K: kernel ``(n, c, n, c)``, taken as it is.

    Raises:
        TypeError: if K is no real tensor.
        ValueError: if K is no kernel.

    Example:
        >>> import torch
        >>> from alignreg.functional import participation_ratio
        >>> participation_ratio(torch.eye(6).reshape(3, 2, 3, 2))
        tensor(6.)
    """
    return formulas.participation_ratio(_kernel(K))


def trace_ratio(K: Tensor, k: int) -> Tensor:
    r"""Trace ratio T_k = Σ_{j≤k} λ_j / Σ_j λ_j: the share of the k largest (Baratin et al. 2021, Eq. 6).

    Args:
        K: kernel ``(n, c, n, c)``, taken as it is.
        k: how many eigenvalues, at least 1; all of them if there are fewer.

    Returns:
        A scalar in [0, 1]; NaN for the zero kernel.

    Raises:
        ValueError: if K is no kernel, or ``k`` is no positive integer.

    Example:
        >>> import torch
        >>> from alignreg.functional import trace_ratio
        >>> trace_ratio(torch.diag(torch.tensor([1.0, 3.0])).reshape(2, 1, 2, 1), 1)
        tensor(0.7500)
    """
    k = checks.count("k", k)
    return _trace_ratio(spectrum(K), k)


def summary(eigenvalues: Tensor, k: Sequence[int] = ()) -> dict[str, Tensor]:
    r"""What a spectrum comes to, from one eigenvalue decomposition.

    Args:
        eigenvalues: of a kernel, descending, as :func:`spectrum` gives them.
        k: for which trace ratios.

    Returns:
        ``effective_rank``, ``participation_ratio`` and ``trace_ratio_k`` for each k, as the functions of these names;
        ``largest_eigenvalue``, ``mean_eigenvalue``, ``median_eigenvalue`` (the mean of the two in the middle).

    Raises:
        TypeError: if they are no real tensor.
        ValueError: if there are none, they are not finite, not descending or negative, or a ``k`` is no positive
            integer.

    Example:
        >>> import torch
        >>> from alignreg.functional import summary
        >>> summary(torch.tensor([3.0, 1.0]), k=[1])["trace_ratio_1"]
        tensor(0.7500)
    """
    eigenvalues = checks.real("eigenvalues", eigenvalues)
    if eigenvalues.ndim != 1 or len(eigenvalues) == 0:
        raise ValueError(f"eigenvalues: expected (n·c,), got shape {tuple(eigenvalues.shape)}.")
    checks.finite("eigenvalues", eigenvalues)
    checks.require(
        eigenvalues,
        lambda v: (v.diff() <= 0).all() & (v[-1] >= 0),
        lambda: ValueError(
            "eigenvalues: expected descending ones, none below 0, as spectrum(K) gives them, got others."
        ),
    )
    ratios = [checks.count("k", value) for value in checks.each(k)]
    total, squares = eigenvalues.sum(), eigenvalues.square().sum()
    middle = len(eigenvalues) // 2
    return {
        "effective_rank": formulas.effective_rank(eigenvalues),
        "participation_ratio": formulas.ratio(total, squares),
        **{f"trace_ratio_{value}": _trace_ratio(eigenvalues, value) for value in ratios},
        "largest_eigenvalue": eigenvalues[0],
        "mean_eigenvalue": eigenvalues.mean(),
        "median_eigenvalue": (eigenvalues[middle] + eigenvalues[-1 - middle]) / 2,
    }


def eigenvector_alignment(K: Tensor, y: Tensor, k: int | None = None, centered: bool = True) -> Tensor:
    r"""How much of the targets each leading eigenvector carries: (u_jᵀy)² / ‖y‖² for the k largest eigenvalues.

    Σ_j λ_j (u_jᵀy)² / ‖y‖² over all of them is yᵀKy / ‖y‖², the numerator of :func:`alignment`: this is where it comes
    from (Baratin et al. 2021, section 3.2, Figure 1, looks at the leading eigenvectors themselves). y is always
    centered over the examples, per output. Within equal eigenvalues only the sum has a meaning.

    Args:
        K: kernel ``(n, c, n, c)``.
        y: class indices ``(n,)`` or values ``(n, c)``; see :func:`alignreg.targets.encode`.
        k: how many eigenvectors; all n·c by default, whose shares sum to 1.
        centered: center K as well.

    Returns:
        Shares ``(k,)``, in the order of descending eigenvalues.

    Raises:
        TypeError: if K or y is no real tensor.
        ConstantTargetError: if y is constant.
        ValueError: if K is no kernel, the shapes do not fit, or ``k`` is no positive integer.

    Example:
        >>> import torch
        >>> from alignreg.functional import eigenvector_alignment
        >>> y = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
        >>> eigenvector_alignment(torch.einsum("ik,jl->ikjl", y, y), y, k=1)
        tensor([1.])
    """
    K = _kernel(K)
    k = None if k is None else checks.count("k", k)
    centered = checks.flag("centered", centered)
    targets = _centered_targets(K, y).flatten()
    values, vectors = torch.linalg.eigh(formulas.symmetric(center(K) if centered else K))
    _semidefinite(values.flip(0))
    vectors = vectors.flip(1)[:, :k]
    shares: Tensor = (vectors.T @ targets).square() / targets.square().sum()
    return shares


def kare(K: Tensor, y: Tensor, ridge: float) -> Tensor:
    r"""Kernel alignment risk estimate of ridge regression with K.

    KARE = [yᵀ(K/N + ρI)⁻²y / N] / [tr (K/N + ρI)⁻¹ / N]², N = n·c (Jacot et al. 2020, arXiv 2006.09796): an
    estimate, from training data alone, of the risk of kernel regression. y is centered over the examples, K is taken
    as it is.

    Args:
        K: kernel ``(n, c, n, c)``.
        y: class indices ``(n,)`` or values ``(n, c)``; see :func:`alignreg.targets.encode`.
        ridge: ρ > 0.

    Raises:
        TypeError: if K or y is no real tensor.
        ValueError: if K is no kernel, the shapes do not fit, ``ridge`` is not positive, or K has an eigenvalue of
            −N·ρ or below.

    Example:
        >>> import torch
        >>> from alignreg.functional import kare
        >>> y = torch.tensor([1.0, -1.0])
        >>> kare(torch.zeros(2, 1, 2, 1), y, ridge=0.5)  # no features: the variance of y
        tensor(1.)
    """
    ridge = checks.positive("ridge", ridge)
    K = _kernel(K, ridge)
    targets = encode(y, K.shape[1], len(K), name="y")
    targets = (targets - targets.mean(0)).flatten().to(K)
    N = len(targets)
    regularized = formulas.matrix(K) / N + ridge * torch.eye(N, dtype=K.dtype, device=K.device)
    factor, info = torch.linalg.cholesky_ex(regularized)
    checks.require(
        info,
        lambda failed: failed == 0,
        lambda: ValueError(
            f"K: expected a positive semi-definite kernel, up to errors below ridge = {ridge:g} in K/{N}, got one that "
            "is not. Where rounding of a large kernel is to blame, raise ridge or compute the kernel in float64."
        ),
    )
    inverse = torch.cholesky_inverse(factor)
    return (inverse @ targets).square().sum() / N / (inverse.diagonal().sum() / N).square()


def _kernel(K: Tensor, ridge: float = 0.0) -> Tensor:
    """Return a kernel in float32 at least; with a ridge, rounding errors below it do not count."""
    K = checks.real("K", K)
    if K.ndim != 4 or K.shape[:2] != K.shape[2:] or K.numel() == 0:
        raise ValueError(f"K: expected a kernel (n, c, n, c), got shape {tuple(K.shape)}.")
    checks.finite("K", K)
    slack = ROUNDING * ridge * K.shape[0] * K.shape[1]
    checks.require(
        K,
        lambda v: (v - v.permute(2, 3, 0, 1)).abs_().amax() <= ROUNDING * v.abs().amax() + slack,
        lambda: ValueError(
            "K: expected a symmetric kernel, got another tensor. Take the kernel of one batch with itself; where only "
            "rounding errors are left of a centered one, compute it in float64."
        ),
    )
    if not ridge:
        checks.require(K, _may_be_semidefinite, lambda: ValueError(_INDEFINITE))
    return K


def _may_be_semidefinite(K: Tensor) -> Tensor:
    """Say whether no entry is larger than the largest on the diagonal, and none there is negative."""
    diagonal, largest = formulas.matrix(K).diagonal(), K.abs().amax()
    return (diagonal.amin() >= -ROUNDING * largest) & (largest <= (1 + ROUNDING) * diagonal.amax().clamp(min=0))


def _semidefinite(eigenvalues: Tensor) -> Tensor:
    """Return eigenvalues, descending, of which none is negative beyond rounding errors."""
    checks.require(eigenvalues, lambda v: v[-1] >= -ROUNDING * v[0], lambda: ValueError(_INDEFINITE))
    return eigenvalues


def _centered_targets(K: Tensor, y: Tensor) -> Tensor:
    targets = encode(y, K.shape[1], len(K), name="y")
    if bool((targets == targets[0]).all()):
        raise ConstantTargetError("y")
    return (targets - targets.mean(0)).to(K)


def _trace_ratio(eigenvalues: Tensor, k: int) -> Tensor:
    return eigenvalues[:k].sum() / eigenvalues.sum()
