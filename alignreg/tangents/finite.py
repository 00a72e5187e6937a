"""Errors for outputs and gradients that are not finite, and the check of gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from alignreg.checks import deferred


@final
class NonFiniteOutputError(ValueError):
    """The model's outputs contain NaN or inf."""

    def __init__(self, num_outputs: int) -> None:
        self.num_outputs = num_outputs
        super().__init__(
            "the model's outputs contain NaN or inf, so they have no tangent features. "
            "Look for a diverged training run or for missing values in the inputs."
        )


@final
class NonFiniteGradientError(ValueError):
    """The gradients of finite outputs contain NaN or inf."""

    def __init__(self) -> None:
        super().__init__(
            "the gradients of the model's outputs contain NaN or inf, though the outputs are finite. Look for the root "
            "or the norm of zeros (a padded row), or a division of two tiny numbers, and add a small constant there."
        )


def require_finite(gradients: Iterable[Tensor]) -> Tensor:
    """Return the norm of gradients, or raise :class:`NonFiniteGradientError` if they are not finite.

    The norm may overflow to inf.
    """
    given = [gradient.detach() for gradient in gradients]

    def error() -> NonFiniteGradientError | None:
        finite = all(bool(torch.isfinite(gradient).all()) for gradient in given)
        return None if finite else NonFiniteGradientError()

    norm = get_total_norm(given)
    deferred.require(torch.isfinite(norm), error)
    return norm
