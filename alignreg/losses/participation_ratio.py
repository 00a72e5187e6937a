"""Penalize the participation ratio of the tangent kernel."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor

from alignreg import estimators
from alignreg.losses.probes import Probed, ProbeLoss


@final
class ParticipationRatioLoss(ProbeLoss):
    r"""Penalize weight · log R, R = (tr K_c)² / ‖K_c‖_F² the participation ratio of the (centered) tangent kernel.

    R, between 1 and the number of rows n·c, counts the directions that the tangent features span effectively
    (:func:`alignreg.functional.participation_ratio`). A low R is the compression that Baratin et al. ("Implicit
    Regularization via Neural Feature Alignment", AISTATS 2021, section 3.2) observe in training. Subtract the loss to
    reward many directions. For m centered Gaussian probes ω_a and g_a = Φᵀω_a,

    - (tr K)² and ‖K‖_F² are estimated by :func:`.gaussian_trace2` and :func:`.gaussian_frobenius2` of the products
      g_a·g_b. Both are unbiased; the difference of their logarithms has a bias of about half the relative variance of
      the latter.
    - R is clamped to its range, to bound the gradient.

    R grows with the number of examples. With ``examples`` the loss is that of the smaller set. If the tangent features
    vanish, R is undefined. The loss is then exactly zero, and warns once.

    By default ``weight`` is 0.01 and ``probes`` is 8 (at least 4). :class:`.ProbeLoss` and :class:`.TangentLoss`
    describe all options and errors.

    Warning:
        No setting is known in which this loss raises the accuracy. A weight of 0.1, its earlier default, ruined
        networks: a CNN on clean digits ended at chance (docs/losses.md). Watch the accuracy when you use it.

    Example:
        >>> import torch
        >>> from alignreg.losses import ParticipationRatioLoss
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
        >>> reg = ParticipationRatioLoss(net, weight=0.1)
        >>> x, y = torch.randn(20, 4), torch.randint(3, (20,))
        >>> loss = torch.nn.functional.cross_entropy(net(x), y) + reg(x)
        >>> loss.backward()
    """

    default_weight: ClassVar[float] = 0.01
    caution: ClassVar[str] = (
        "reduced the accuracy of two networks of eleven by more than .02, one of them by a third. Begin with a tenth "
        "of it."
    )
    default_probes: ClassVar[int] = 8
    least_probes: ClassVar[int] = 4
    undefined: ClassVar[str] = "The tangent features vanish, so they have no participation ratio and the loss is zero."

    def _of_kernel(self, seen: Probed) -> Tensor:
        trace2 = estimators.gaussian_trace2(seen.gram)
        norm2 = self._norm2(seen).minimum(trace2)
        defined = trace2 > 0
        # Avoid log 0: its infinite gradient times zero would be NaN.
        trace2, norm2 = (value.masked_fill(~defined, 1.0) for value in (trace2, norm2))
        return (trace2.log() - norm2.log()).masked_fill(~defined, torch.nan)
