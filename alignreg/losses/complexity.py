"""Penalize the size of the tangent features."""

from __future__ import annotations

from typing import ClassVar, final

from torch import Tensor

from alignreg import estimators
from alignreg.losses.probes import Probed, ProbeLoss


@final
class ComplexityPenalty(ProbeLoss):
    r"""Penalize weight · tr K_c / (n·c), the mean squared norm of the (centered) tangent features.

    In the complexity measure Σ_t ‖δw_t‖‖Φ_t‖_F of Baratin et al. ("Implicit Regularization via Neural Feature
    Alignment", AISTATS 2021, section 4), a step of given length adds in proportion to ‖Φ‖_F = √(tr K); the penalty
    makes the path less complex. The unbiased estimate is the mean of ‖Φᵀω_a‖² over m centered Gaussian probes ω_a,
    from one forward pass and m backward passes, themselves differentiated. Neither ``every_n_steps`` nor ``examples``
    changes the expectation: s of n examples are centered by their own mean, which the factor (n−1)/n · s/(s−1)
    compensates.

    By default ``weight`` is 0.01 and ``probes`` is 1. :class:`.ProbeLoss` and :class:`.TangentLoss` describe all
    options and errors.

    Warning:
        The default weight is meant for noisy labels. With clean labels it reduced the accuracy of some networks by
        more than .02, and that of a Transformer by .10 (docs/losses.md). Begin with a tenth of it.

    Example:
        >>> import torch
        >>> from alignreg.losses import ComplexityPenalty
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        >>> reg = ComplexityPenalty(net, weight=0.01)
        >>> x, y = torch.randn(20, 4), torch.randint(3, (20,))
        >>> loss = torch.nn.functional.cross_entropy(net(x), y) + reg(x)
        >>> loss.backward()
    """

    default_weight: ClassVar[float] = 0.01
    caution: ClassVar[str] = (
        "is meant for noisy labels. With clean labels it reduced the accuracy of five networks of eleven by more than "
        ".02; begin with a tenth of it there."
    )
    default_probes: ClassVar[int] = 1
    least_probes: ClassVar[int] = 1

    def _of_kernel(self, seen: Probed) -> Tensor:
        # max(1, ...): a single example, centered, is zero.
        rows = max(1, seen.n - 1) * seen.drawn_from / max(1, seen.drawn_from - 1) if self.centered else seen.n
        return estimators.trace(seen.gram) / (rows * seen.c)
