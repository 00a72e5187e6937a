"""Linear models in the eigenbasis of their kernel: their base class, gradient descent, and SuperNat."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from torch import Tensor

from alignreg import checks
from alignreg.linear.metric import optimal_metric, relative_limit, vector


class _Loss(NamedTuple):
    value: Callable[[Tensor, Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]  # n·∇_f L
    curvature: float  # the largest second derivative of n·L with respect to an output


_LOSSES = {
    "squared": _Loss(lambda f, y: (f - y).square().mean() / 2, lambda f, y: f - y, 1.0),
    "logistic": _Loss(lambda f, y: F.softplus(-y * f).mean(), lambda f, y: -y * torch.sigmoid(-y * f), 0.25),
}
_GAUGES = ("max", "trace", "mean")


class LinearModel(ABC):
    r"""A model f = Φw with one output per example, trained from w = 0 on all examples at once; see the subclasses.

    Args:
        features: Φ, ``(n, P)``. Modes with √λ_j ≤ max(n, P)·ε·√λ_max are rounding errors and are dropped; ε is that of
            the dtype of Φ, or of float32 if that is smaller.
        targets: y ``(n,)``: any values for the squared loss, 0/1 or ±1 for the logistic loss.
        lr: η. The default, n/λ_max or 4n/λ_max for the logistic loss, is one over the largest curvature at the start.
        loss: "squared", L = ‖f − y‖²/2n, or "logistic", L = mean log(1 + exp(−yf)).

    Raises:
        TypeError: if features or targets are no real tensor.
        ValueError: if a shape, a value or an option is not as described, or all features are 0.
    """

    def __init__(self, features: Tensor, targets: Tensor, lr: float | None = None, loss: str = "squared") -> None:
        features = _matrix(features)
        targets = checks.real("targets", targets, integers=True)
        if targets.shape != features.shape[:1]:
            raise ValueError(f"targets: expected ({len(features)},) to fit features, got shape {tuple(targets.shape)}.")
        targets = vector("targets", targets)
        checks.choice("loss", loss, tuple(_LOSSES))
        lr = None if lr is None else checks.positive("lr", lr)
        self._n, self._num_features = features.shape
        self._loss = _LOSSES[loss]
        self._y = targets.detach().to(features.device, torch.float64)
        if loss == "logistic":
            self._y = _signs(self._y)
        U, S, Vh = torch.linalg.svd(features.detach().double(), full_matrices=False)
        dtype = torch.promote_types(features.dtype, torch.float32)
        kept = S / S[0] > max(features.shape) * torch.finfo(dtype).eps  # False for the NaN of S = 0
        if not bool(kept.any()):
            raise ValueError("features: expected some that are not 0, got only zeros, from which nothing is learned.")
        self._U, self._S, self._Vh = U[:, kept], S[kept], Vh[kept]
        self.lr = float(self._n / (S[0].square() * self._loss.curvature)) if lr is None else lr
        # Logarithms, since every step may stretch one mode by 1/eps relative to another.
        self._log_eigenvalues = 2 * self._S.log()
        # Weights in the parametrization of the given features, which no reparametrization changes.
        self._w = torch.zeros_like(self._S)
        self._complexity = torch.zeros((), dtype=torch.float64, device=features.device)

    @abstractmethod
    def _reparametrize(self, log_eigenvalues: Tensor, correlations: Tensor) -> Tensor:
        """Return log λ of the next step."""

    def step(self) -> None:
        """Do one step of gradient descent in the current parametrization, then choose the next parametrization.

        Raises:
            RuntimeError: if the step diverges; the model then stays unchanged.
        """
        eigenvalues = self.eigenvalues
        change = -self.lr * eigenvalues.sqrt() * self.correlations
        w = self._w + change * eigenvalues.sqrt() / self._S
        complexity = self._complexity + torch.linalg.vector_norm(change) * eigenvalues.sum().sqrt() / self._n
        correlations = self._correlations(w)
        finite = bool(torch.isfinite(correlations).all()) and bool(torch.isfinite(complexity))
        new = self._reparametrize(self._log_eigenvalues, correlations) if finite else self._log_eigenvalues
        if not finite or not bool(torch.isfinite(new.exp()).all()):
            raise RuntimeError(
                f"step: expected finite outputs and eigenvalues, got others with lr={self.lr:g}. Lower lr, or use "
                "SuperNat's gauge 'max', the only one that never raises the largest eigenvalue."
            )
        self._w, self._complexity, self._log_eigenvalues = w, complexity, new

    def predict(self, features: Tensor) -> Tensor:
        """Return f ``(m,)`` at new points, from their features ``(m, P)`` in the parametrization at the start.

        Raises:
            TypeError: if ``features`` is no real tensor.
            ValueError: if it is not finite, or has another shape.
        """
        f: Tensor = _matrix(features, self._num_features).detach().to(self._w) @ self.weights
        return f

    @property
    def weights(self) -> Tensor:
        """Weights w ``(P,)`` in the parametrization at the start, so that f = Φw for the given features."""
        w: Tensor = self._w @ self._Vh
        return w

    @property
    def outputs(self) -> Tensor:
        """Outputs f ``(n,)`` on the training examples."""
        return self._outputs(self._w)

    @property
    def correlations(self) -> Tensor:
        """Correlations a_j = u_jᵀ∇_f L ``(r,)`` of the modes with the gradient."""
        return self._correlations(self._w)

    @property
    def loss_value(self) -> Tensor:
        """Loss on the training examples, a scalar."""
        value: Tensor = self._loss.value(self.outputs, self._y)
        return value

    @property
    def eigenvalues(self) -> Tensor:
        """Eigenvalues λ ``(r,)`` of the kernel in the current parametrization, in their order at the start."""
        eigenvalues: Tensor = self._log_eigenvalues.exp()
        return eigenvalues

    @property
    def complexity(self) -> Tensor:
        """Complexity Σ_t ‖δw_t‖ ‖Φ_t‖_F / n of the steps so far, each in its own parametrization, a scalar."""
        return self._complexity.clone()

    def _outputs(self, w: Tensor) -> Tensor:
        f: Tensor = self._U @ (self._S * w)
        return f

    def _correlations(self, w: Tensor) -> Tensor:
        a: Tensor = self._U.T @ self._loss.gradient(self._outputs(w), self._y) / self._n
        return a


@final
class GradientDescent(LinearModel):
    """Plain gradient descent, with a constant parametrization.

    :class:`LinearModel` describes the arguments and errors.

    Example:
        >>> import torch
        >>> from alignreg.linear import GradientDescent
        >>> model = GradientDescent(torch.diag(torch.tensor([2.0, 1.0])), torch.tensor([1.0, 1.0]))
        >>> model.step()
        >>> model.outputs
        tensor([1.0000, 0.2500], dtype=torch.float64)
    """

    def _reparametrize(self, log_eigenvalues: Tensor, correlations: Tensor) -> Tensor:  # noqa: ARG002
        return log_eigenvalues


@final
class SuperNat(LinearModel):
    r"""Gradient descent that reparametrizes after each step with the metric that minimizes the complexity of the next.

    After a step, λ_j ← λ_j/ν_j with ν_j = κ/\|a_j| at the new f (our reading of the SuperNat algorithm in Baratin et
    al. 2021). Modes that correlate with the residual are stretched, and the others shrink. This does not change f, not
    even at new points. If eigenvalues are equal, their u_j are arbitrary, and the result of SuperNat depends on them.

    Args:
        features: as in :class:`LinearModel`, like ``targets``, ``lr``, ``loss`` and the errors.
        gauge: κ, which is not determined by the bound and acts as a learning rate: "max" keeps the largest eigenvalue,
            "trace" keeps the sum of the eigenvalues, "mean" is κ = mean \|a_j|, and a number is κ itself. With a
            number, training freezes once all \|a_j| are below it. All but "max" let eigenvalues grow, so that the
            default ``lr`` may diverge.
        eps: as in :func:`optimal_metric`.

    Example:
        >>> import torch
        >>> from alignreg.linear import SuperNat
        >>> model = SuperNat(torch.diag(torch.tensor([2.0, 1.0])), torch.tensor([1.0, 1.0]), lr=0.25)
        >>> model.step()
        >>> model.outputs, model.eigenvalues  # λ_j|a_j| were as 4/2 to 7/8: 4 to 7/4
        (tensor([0.5000, 0.1250], dtype=torch.float64), tensor([4.0000, 1.7500], dtype=torch.float64))
    """

    def __init__(
        self,
        features: Tensor,
        targets: Tensor,
        lr: float | None = None,
        loss: str = "squared",
        gauge: str | float = "max",
        eps: float = 1e-12,
    ) -> None:
        if not isinstance(gauge, str):
            gauge = checks.positive("gauge", gauge, " Or use 'max', 'trace' or 'mean'.")
        elif gauge not in _GAUGES:
            raise ValueError(f"gauge: expected 'max', 'trace', 'mean' or a positive number, got {gauge!r}.")
        eps = relative_limit(eps)
        super().__init__(features, targets, lr, loss)
        self._gauge, self._eps = gauge, eps

    def _reparametrize(self, log_eigenvalues: Tensor, correlations: Tensor) -> Tensor:
        if not bool(correlations.any()):
            return log_eigenvalues
        stretched = log_eigenvalues - optimal_metric(correlations, eps=self._eps).log()
        return stretched - _log_kappa(log_eigenvalues, stretched, correlations, self._gauge)


def _matrix(features: Tensor, width: int | None = None) -> Tensor:
    matrix = checks.real("features", features, integers=True)
    if matrix.ndim != 2 or matrix.numel() == 0 or width not in {None, matrix.shape[1]}:
        wanted = "(n, P)" if width is None else f"(m, {width})"
        raise ValueError(f"features: expected a matrix {wanted}, got shape {tuple(matrix.shape)}.")
    return checks.finite("features", matrix)


def _log_kappa(old: Tensor, new: Tensor, correlations: Tensor, gauge: str | float) -> Tensor:
    if gauge == "max":
        return new.max() - old.max()
    if gauge == "trace":
        return new.logsumexp(0) - old.logsumexp(0)
    return correlations.abs().mean().log() if gauge == "mean" else old.new_tensor(math.log(float(gauge)))


def _signs(y: Tensor) -> Tensor:
    for values in ((0.0, 1.0), (-1.0, 1.0)):
        if bool(((y == values[0]) | (y == values[1])).all()):
            return torch.where(y == 1, 1.0, -1.0).to(y)
    raise ValueError(
        f"targets: expected 0 and 1, or -1 and 1, for the logistic loss, got {sorted(set(y.tolist()))[:5]}."
    )
