"""Reward alignment of the tangent kernel with the targets."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor

from alignreg.losses.probes import Probed, ProbeLoss


@final
class AlignmentLoss(ProbeLoss):
    r"""Reward alignment: −weight · log A, A = yᵀK_c y / (‖K_c‖_F ‖y − ȳ‖²), of the tangent kernel with the targets.

    The loss makes explicit the alignment that training brings about implicitly (Baratin et al., "Implicit
    Regularization via Neural Feature Alignment", AISTATS 2021, section 3.3; A is
    :func:`alignreg.functional.alignment`). One forward pass and m + 1 backward passes, themselves differentiated, give

    - the exact numerator p = uᵀK_c u = ‖g_u‖², where u = (y − ȳ)/‖y − ȳ‖ and g_u = Φᵀu, and
    - the unbiased estimate p² + 2 mean_a (g_u·g_a)² + N of ‖K_c‖_F², where g_a = Φᵀω_a for m centered Gaussian probes
      ω_a orthogonal to u, and N is their :func:`.gaussian_frobenius2`. Its logarithm is biased: on average the loss is
      below −log A by about a quarter of the relative variance of the estimate. To bound the gradient, the estimate is
      raised to (p + mean_a ‖g_a‖²)² / rows, the least ‖K_c‖_F² of a kernel with that trace and that many rows.

    Alignment depends on the number of examples. With ``examples`` the loss is that of the smaller set, whose alignment
    is larger. ``every_n_steps`` does not change the expectation.

    If the targets are constant over the examples, or nothing of the tangent features lies along them, alignment is
    undefined. The loss is then exactly zero, and warns once.

    By default ``weight`` is 0.1 and ``probes`` is 7 (at least 4). :class:`.ProbeLoss` and :class:`.TangentLoss`
    describe all options and errors.

    Warning:
        The default weight reduced the accuracy of a ResNet with BatchNorm on clean labels by .024, and three times
        that weight reduced that of six networks of eleven by more than .02 (docs/losses.md). Begin with a tenth of it.

    Example:
        >>> import torch
        >>> from alignreg.losses import AlignmentLoss
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        >>> reg = AlignmentLoss(net, weight=0.1)
        >>> x, y = torch.randn(20, 4), torch.randint(3, (20,))
        >>> loss = torch.nn.functional.cross_entropy(net(x), y) + reg(x, y)
        >>> loss.backward()
    """

    default_weight: ClassVar[float] = 0.1
    caution: ClassVar[str] = "cost a ResNet with BatchNorm .024 of its accuracy on clean labels; a tenth of it did not."
    default_probes: ClassVar[int] = 7
    least_probes: ClassVar[int] = 4
    needs_targets: ClassVar[bool] = True
    undefined: ClassVar[str] = (
        "The tangent features have nothing along the targets, so alignment is zero and the loss is set to zero."
    )

    def _of_kernel(self, seen: Probed) -> Tensor:
        projection, norm2 = seen.projection, self._norm2(seen)
        defined = (projection > 0) & (norm2 > 0)
        # Avoid log 0: its infinite gradient times zero would be NaN.
        projection, norm2 = (value.masked_fill(~defined, 1.0) for value in (projection, norm2))
        return (norm2.log() / 2 - projection.log()).masked_fill(~defined, torch.nan)
