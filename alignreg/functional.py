r"""Functions of an exact tangent kernel K ``(n, c, n, c)``: alignment, spectrum, ranks.

All are differentiable with respect to K. Alignment centers K by default; the rank functions use K as it is, so pass
``center(K)`` for a centered spectrum.

K must be a kernel: a real tensor ``(n, c, n, c)`` of finite numbers, symmetric and positive semi-definite up to
rounding errors of one percent. Half precision is computed in float32. Targets y are class indices ``(n,)`` or values
``(n, c)`` (:func:`alignreg.targets.encode`), and are always centered over the examples, per output.

All functions raise ``TypeError`` if K or y is not a real tensor, and ``ValueError`` if K is not a kernel or the shapes
do not match. References: Baratin et al., "Implicit Regularization via Neural Feature Alignment", AISTATS 2021.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alignreg import checks, formulas
from alignreg.targets import ConstantTargetError, encode

ROUNDING = 0.01
"""The relative error above which a tensor is rejected as a kernel; the errors of bfloat16 stay below it."""
_INDEFINITE = (
    "K: expected a positive semi-definite kernel, of products of features, got one with negative eigenvalues. If "
    "centering leaves only rounding errors, compute the kernel in float64."
)


def center(K: Tensor) -> Tensor:
    r"""Center a kernel per output over the examples: K_c = (C_n ⊗ I_c) K (C_n ⊗ I_c), C_n = I − 11ᵀ/n.

    This is the kernel of the tangent features minus, output by output, their mean over the examples.

    Example:
        >>> import torch
        >>> from alignreg.functional import center
        >>> center(torch.eye(2).reshape(2, 1, 2, 1)).reshape(2, 2)
        tensor([[ 0.5000, -0.5000],
                [-0.5000,  0.5000]])
    """
    K = _kernel(K)
    rest = K - K.mean(0, keepdim=True)
    rest.sub_(rest.mean(2, keepdim=True))  # in place: no step needs these values for its gradient
    # Return exact zeros for a kernel that is constant over the examples, instead of its rounding errors.
    left, whole = (torch.linalg.vector_norm(values.detach()) for values in (rest, K))
    return rest.masked_fill_(left < 10 * torch.finfo(K.dtype).eps * whole, 0.0)


def alignment(K: Tensor, y: Tensor, centered: bool = True, *, unbiased: bool = False) -> Tensor:
    r"""Return the alignment of a kernel with the targets, A = yᵀK_c y / (‖K_c‖_F ‖y‖²), in [0, 1].

    This is the centered kernel alignment CKA(K, yyᵀ) (Baratin et al., section 3.3; Cortes et al. 2012). A is invariant
    to the scale of K and y, to the order of the examples, and to an orthogonal mixing of the outputs of both. Its sums
    are in float64 and need no copy of K.

    Args:
        K: kernel ``(n, c, n, c)``.
        y: class indices ``(n,)`` or values ``(n, c)``.
        centered: center K as well; ``False`` uses K as it is.
        unbiased: estimate the alignment of the population that these examples are sampled from, using only pairs of
            different examples (:mod:`alignreg.population`). The estimate may lie outside [0, 1].

    Returns:
        A scalar. It is NaN if (centered) K is zero. With ``unbiased``, it is NaN if the estimate of a squared norm is
        not positive, and for fewer than four examples.

    Raises:
        ConstantTargetError: if y is constant, because alignment is then undefined.
        ValueError: if ``unbiased`` is combined with ``centered=False``.

    Example:
        >>> import torch
        >>> from alignreg.functional import alignment
        >>> y = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
        >>> alignment(torch.einsum("ik,jl->ikjl", y, y), y)
        tensor(1.)
    """
    K = _kernel(K)
    if checks.flag("unbiased", unbiased) and not checks.flag("centered", centered):
        raise ValueError("unbiased: expected the centered kernel, got centered=False. Omit one of the two options.")
    checks.flag("centered", centered)
    targets = _centered_targets(K, y)
    if unbiased:
        return formulas.unbiased_alignment(K, targets)
    return formulas.alignment(K, targets, centered=centered).to(K.dtype)


def spectrum(K: Tensor) -> Tensor:
    """Return all n·c eigenvalues of a kernel, descending and ≥ 0.

    Example:
        >>> import torch
        >>> from alignreg.functional import spectrum
        >>> spectrum(torch.diag(torch.tensor([1.0, 3.0])).reshape(2, 1, 2, 1))
        tensor([3., 1.])
    """
    return _semidefinite(formulas.eigenvalues(_kernel(K))).clamp(min=0)


def effective_rank(K: Tensor) -> Tensor:
    r"""Return the effective rank exp(−Σ_j μ_j log μ_j), μ_j = λ_j / Σλ (Roy & Vetterli 2007; Baratin et al., Eq. 5).

    0·log 0 counts as 0. The effective rank lies between 1 and n·c, and is 0 for the zero kernel. It differs from the
    :func:`participation_ratio`.

    Example:
        >>> import torch
        >>> from alignreg.functional import effective_rank
        >>> effective_rank(torch.eye(6).reshape(3, 2, 3, 2))
        tensor(6.0000)
    """
    return formulas.effective_rank(spectrum(K))


def participation_ratio(K: Tensor) -> Tensor:
    r"""Return the participation ratio (tr K)² / ‖K‖_F² = (Σλ)² / Σλ², a rank that needs no eigenvalues.

    It lies between 1 and n·c, is at most the :func:`effective_rank`, and is 0 for the zero kernel.

    Example:
        >>> import torch
        >>> from alignreg.functional import participation_ratio
        >>> participation_ratio(torch.eye(6).reshape(3, 2, 3, 2))
        tensor(6.)
    """
    return formulas.participation_ratio(_kernel(K))


def trace_ratio(K: Tensor, k: int) -> Tensor:
    r"""Return the trace ratio T_k = Σ_{j≤k} λ_j / Σ_j λ_j, the share of the k largest (Baratin et al., Eq. 6).

    Args:
        K: kernel ``(n, c, n, c)``.
        k: the number of eigenvalues, at least 1; all of them if there are fewer.

    Returns:
        A scalar in [0, 1]; NaN for the zero kernel.

    Example:
        >>> import torch
        >>> from alignreg.functional import trace_ratio
        >>> trace_ratio(torch.diag(torch.tensor([1.0, 3.0])).reshape(2, 1, 2, 1), 1)
        tensor(0.7500)
    """
    k = checks.count("k", k)
    return _trace_ratio(spectrum(K), k)


def summary(eigenvalues: Tensor, k: Sequence[int] = ()) -> dict[str, Tensor]:
    r"""Return a summary of a spectrum.

    Args:
        eigenvalues: the descending eigenvalues of a kernel, as :func:`spectrum` returns them.
        k: the numbers k of the trace ratios.

    Returns:
        ``effective_rank``, ``participation_ratio`` and ``trace_ratio_k`` for each k, as the functions of these names
        compute them; ``largest_eigenvalue``, ``mean_eigenvalue``, and ``median_eigenvalue`` (the mean of the middle two
        for an even number).

    Raises:
        TypeError: if the eigenvalues are not a real tensor.
        ValueError: if there are none, if they are not finite, not descending or negative, or if a ``k`` is not a
            positive integer.

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
            "eigenvalues: expected descending values of at least 0, got others. Compute them with spectrum(K)."
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
    r"""Return the share (u_jᵀy)² / ‖y‖² of the targets in each of the k leading eigenvectors u_j.

    The sum Σ_j λ_j (u_jᵀy)² / ‖y‖² over all eigenvectors is yᵀKy / ‖y‖², the numerator of :func:`alignment`, so the
    shares show where the alignment comes from (Baratin et al., section 3.2 and Figure 1, plot the leading eigenvectors
    themselves). For equal eigenvalues only the sum of the shares has a meaning.

    Args:
        K: kernel ``(n, c, n, c)``.
        y: class indices ``(n,)`` or values ``(n, c)``.
        k: the number of eigenvectors; by default all n·c, whose shares sum to 1.
        centered: center K as well.

    Returns:
        Shares ``(k,)``, in the order of descending eigenvalues.

    Raises:
        ConstantTargetError: if y is constant.

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
    r"""Return the kernel alignment risk estimate (KARE) of ridge regression with K.

    KARE = [yᵀ(K/N + ρI)⁻²y / N] / [tr (K/N + ρI)⁻¹ / N]², N = n·c (Jacot et al. 2020, arXiv 2006.09796), estimates the
    risk of kernel regression from training data only. K is used as it is.

    Args:
        K: kernel ``(n, c, n, c)``.
        y: class indices ``(n,)`` or values ``(n, c)``.
        ridge: ρ > 0.

    Raises:
        ValueError: if ``ridge`` is not positive, or K has an eigenvalue of −N·ρ or below.

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
            f"K: expected a positive semi-definite kernel, up to errors below ridge = {ridge:g} in K/{N}, got another. "
            "If these are rounding errors of a large kernel, increase ridge or compute the kernel in float64."
        ),
    )
    inverse = torch.cholesky_inverse(factor)
    return (inverse @ targets).square().sum() / N / (inverse.diagonal().sum() / N).square()


def _kernel(K: Tensor, ridge: float = 0.0) -> Tensor:
    """Return a kernel in float32 at least; with a ridge, tolerate rounding errors below it."""
    K = checks.real("K", K)
    if K.ndim != 4 or K.shape[:2] != K.shape[2:] or K.numel() == 0:
        raise ValueError(f"K: expected a kernel (n, c, n, c), got shape {tuple(K.shape)}.")
    checks.finite("K", K)
    slack = ROUNDING * ridge * K.shape[0] * K.shape[1]
    checks.require(
        K,
        lambda v: (v - v.permute(2, 3, 0, 1)).abs_().amax() <= ROUNDING * _largest(v) + slack,
        lambda: ValueError(
            "K: expected a symmetric kernel, got another tensor. Compute the kernel of one batch with itself; if "
            "centering leaves only rounding errors, compute the kernel in float64."
        ),
    )
    if not ridge:
        checks.require(K, _may_be_semidefinite, lambda: ValueError(_INDEFINITE))
    return K


def _largest(K: Tensor) -> Tensor:
    """Return max |K_ikjl|, without a copy of K."""
    largest: Tensor = torch.linalg.vector_norm(K, torch.inf)
    return largest


def _may_be_semidefinite(K: Tensor) -> Tensor:
    """Return whether no entry is larger than the largest on the diagonal, and no diagonal entry is negative."""
    diagonal, largest = formulas.matrix(K).diagonal(), _largest(K)
    return (diagonal.amin() >= -ROUNDING * largest) & (largest <= (1 + ROUNDING) * diagonal.amax().clamp(min=0))


def _semidefinite(eigenvalues: Tensor) -> Tensor:
    """Return descending eigenvalues after checking that none is negative beyond rounding errors."""
    checks.require(eigenvalues, lambda v: v[-1] >= -ROUNDING * v[0], lambda: ValueError(_INDEFINITE))
    return eigenvalues


def _centered_targets(K: Tensor, y: Tensor) -> Tensor:
    targets = encode(y, K.shape[1], len(K), name="y")
    if bool((targets == targets[0]).all()):
        raise ConstantTargetError("y")
    return (targets - targets.mean(0)).to(K)


def _trace_ratio(eigenvalues: Tensor, k: int) -> Tensor:
    return eigenvalues[:k].sum() / eigenvalues.sum()
