r"""Functions of an exact tangent kernel K ``(n, c, n, c)``: alignment, spectrum, ranks.

All are differentiable with respect to K. Alignment centres K by default; the rank functions take K as it is, so pass
``center(K)`` for a centred spectrum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alignreg.targets import ConstantTargetError, encode


def center(K: Tensor) -> Tensor:
    r"""Centre a kernel per output over the examples: K_c = (C_n ⊗ I_c) K (C_n ⊗ I_c), C_n = I − 11ᵀ/n.

    This is the kernel of the tangent features minus, output by output, their mean over the examples.

    Args:
        K: kernel ``(n, c, n, c)``.

    Raises:
        ValueError: if K does not have that shape.

    Example:
        >>> import torch
        >>> from alignreg.functional import center
        >>> center(torch.eye(2).reshape(2, 1, 2, 1)).reshape(2, 2)
        tensor([[ 0.5000, -0.5000],
                [-0.5000,  0.5000]])
    """
    _check_kernel(K)
    K = K - K.mean(0, keepdim=True)
    return K - K.mean(2, keepdim=True)


def alignment(K: Tensor, y: Tensor, centered: bool = True) -> Tensor:
    r"""Alignment of a kernel with the targets, A = yᵀK_c y / (‖K_c‖_F ‖y‖²), in [0, 1].

    It is the centred kernel alignment CKA(K, yyᵀ) (Baratin et al. 2021, section 3.3; Cortes et al. 2012). y is
    always centred over the examples, per output. A is invariant to the scale of K and y, to the order of the examples
    and to an orthogonal mixing of the outputs of both.

    Args:
        K: kernel ``(n, c, n, c)``.
        y: class indices ``(n,)`` or values ``(n, c)``; see :func:`alignreg.targets.encode`.
        centered: centre K as well; ``False`` leaves K as it is.

    Returns:
        A scalar; NaN if (centred) K is zero, which has no direction to be aligned.

    Raises:
        TypeError: if y is no real tensor.
        ConstantTargetError: if y is constant: alignment is then undefined.
        ValueError: if the shapes do not fit.

    Example:
        >>> import torch
        >>> from alignreg.functional import alignment
        >>> y = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
        >>> alignment(torch.einsum("ik,jl->ikjl", y, y), y)
        tensor(1.)
    """
    n, c = _check_kernel(K)
    targets = encode(y, c, n)
    if bool((targets == targets[0]).all()):
        raise ConstantTargetError
    targets = (targets - targets.mean(0)).to(K)
    if centered:
        K = center(K)
    numerator: Tensor = torch.einsum("ik,ikjl,jl->", targets, K, targets)
    norm: Tensor = torch.linalg.vector_norm(K)
    return numerator / (norm * targets.square().sum())


def spectrum(K: Tensor) -> Tensor:
    """Return all n·c eigenvalues of a kernel, descending and ≥ 0.

    Args:
        K: kernel ``(n, c, n, c)``; half precision is computed in float32.

    Raises:
        ValueError: if K does not have that shape.

    Example:
        >>> import torch
        >>> from alignreg.functional import spectrum
        >>> spectrum(torch.diag(torch.tensor([1.0, 3.0])).reshape(2, 1, 2, 1))
        tensor([3., 1.])
    """
    n, c = _check_kernel(K)
    matrix = K.reshape(n * c, n * c)
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    eigenvalues: Tensor = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
    return eigenvalues.flip(0).clamp(min=0)


def effective_rank(K: Tensor) -> Tensor:
    r"""Effective rank exp(−Σ_j μ_j log μ_j), μ_j = λ_j / Σλ (Roy & Vetterli 2007; Baratin et al. 2021, Eq. 5).

    0·log 0 counts as 0. It lies between 1 and n·c; the zero kernel has rank 0. Not the same as
    :func:`participation_ratio`.

    Args:
        K: kernel ``(n, c, n, c)``, taken as it is.

    Raises:
        ValueError: if K does not have that shape.

    Example:
        >>> import torch
        >>> from alignreg.functional import effective_rank
        >>> effective_rank(torch.eye(6).reshape(3, 2, 3, 2))
        tensor(6.0000)
    """
    eigenvalues = spectrum(K)
    eigenvalues = eigenvalues[eigenvalues > 0]
    if len(eigenvalues) == 0:
        return eigenvalues.sum()
    entropy: Tensor = torch.special.entr(eigenvalues / eigenvalues.sum()).sum()
    return entropy.exp()


def participation_ratio(K: Tensor) -> Tensor:
    r"""Participation ratio (tr K)² / ‖K‖_F² = (Σλ)² / Σλ²: a second rank, without eigenvalues.

    It lies between 1 and n·c, at most the :func:`effective_rank`; the zero kernel has 0.

    Args:
        K: kernel ``(n, c, n, c)``, taken as it is.

    Raises:
        ValueError: if K does not have that shape.

    Example:
        >>> import torch
        >>> from alignreg.functional import participation_ratio
        >>> participation_ratio(torch.eye(6).reshape(3, 2, 3, 2))
        tensor(6.)
    """
    n, c = _check_kernel(K)
    matrix = K.reshape(n * c, n * c)
    trace, squares = matrix.diagonal().sum(), matrix.square().sum()
    return trace.square() / torch.where(squares > 0, squares, torch.ones_like(squares))


def trace_ratio(K: Tensor, k: int) -> Tensor:
    r"""Trace ratio T_k = Σ_{j≤k} λ_j / Σ_j λ_j: the share of the k largest (Baratin et al. 2021, Eq. 6).

    Args:
        K: kernel ``(n, c, n, c)``, taken as it is.
        k: how many eigenvalues, at least 1; all of them if there are fewer.

    Returns:
        A scalar in [0, 1]; NaN for the zero kernel.

    Raises:
        ValueError: if K does not have that shape, or ``k`` is no positive integer.

    Example:
        >>> import torch
        >>> from alignreg.functional import trace_ratio
        >>> trace_ratio(torch.diag(torch.tensor([1.0, 3.0])).reshape(2, 1, 2, 1), 1)
        tensor(0.7500)
    """
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k: expected a positive number of eigenvalues, got {k!r}.")
    eigenvalues = spectrum(K)
    return eigenvalues[:k].sum() / eigenvalues.sum()


def kare(K: Tensor, y: Tensor, ridge: float) -> Tensor:
    r"""Kernel alignment risk estimate of ridge regression with K.

    KARE = [yᵀ(K/N + ρI)⁻²y / N] / [tr (K/N + ρI)⁻¹ / N]², N = n·c (Jacot et al. 2020, arXiv 2006.09796): an
    estimate, from training data alone, of the risk of kernel regression. y is centred over the examples, K is taken
    as it is.

    Args:
        K: kernel ``(n, c, n, c)``.
        y: class indices ``(n,)`` or values ``(n, c)``; see :func:`alignreg.targets.encode`.
        ridge: ρ > 0.

    Raises:
        TypeError: if y is no real tensor.
        ValueError: if the shapes do not fit, or ``ridge`` is not positive.

    Example:
        >>> import torch
        >>> from alignreg.functional import kare
        >>> y = torch.tensor([1.0, -1.0])
        >>> kare(torch.zeros(2, 1, 2, 1), y, ridge=0.5)  # no features: the variance of y
        tensor(1.)
    """
    n, c = _check_kernel(K)
    if not ridge > 0:
        raise ValueError(f"ridge: expected a positive number, got {ridge!r}.")
    targets = encode(y, c, n)
    targets = (targets - targets.mean(0)).flatten().to(K)
    N = n * c
    regularised = K.reshape(N, N) / N + ridge * torch.eye(N, dtype=K.dtype, device=K.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(regularised))
    return (inverse @ targets).square().sum() / N / (inverse.diagonal().sum() / N).square()


def _check_kernel(K: Tensor) -> tuple[int, int]:
    if K.ndim != 4 or K.shape[:2] != K.shape[2:] or K.numel() == 0:
        raise ValueError(f"K: expected a kernel (n, c, n, c), got shape {tuple(K.shape)}.")
    return K.shape[0], K.shape[1]
