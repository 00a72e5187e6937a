"""Penalize how many directions the tangent features take."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor

from alignreg import estimators
from alignreg.losses.probes import Probed, ProbeLoss


@final
class ParticipationRatioLoss(ProbeLoss):
    r"""weight · log R, R = (tr K_c)² / ‖K_c‖_F² the participation ratio of the (centered) tangent kernel.

    R, between 1 and the number of rows n·c, counts the directions that the tangent features take
    (:func:`alignreg.functional.participation_ratio`); a low one is the compression that Baratin et al. ("Implicit
    Regularization via Neural Feature Alignment", AISTATS 2021, section 3.2) observe in training. Subtract the loss to
    reward many directions. From m probes ω_a, with g_a = Φᵀω_a, ω_a Gaussian and centered:

    - (tr K)² is estimated by Σ_{a≠b} ‖g_a‖²‖g_b‖² / (m(m−1)), ‖K‖_F² by Σ_{a≠b} (g_a·g_b)² / (m(m−1)), both unbiased;
      the difference of their logarithms is not, by about half the relative variance of the latter.
    - So that the gradient stays bounded, R is kept in its range.

    R grows with the number of examples. With ``examples`` the loss is that of the smaller set. Tangent features that
    vanish have no R: the loss is then an exact zero, with one warning.

    Warning:
        No setting is known in which it raises the accuracy. At a tenth, its earlier default weight, it ruined networks:
        a CNN on clean digits ended at chance (docs/losses.md). Watch the accuracy when you use it.

    Args:
        model: the model, possibly wrapped (DDP, ``fully_shard``, ``torch.compile``, Accelerate).
        weight: factor, ≥ 0, or a function of the optimizer step; 0.01 by default.
        probes: m ≥ 4; 8 by default.
        per_layer: use the mean of the losses of the layers' own kernels, without those whose tangent features vanish.

    The other options are those of :class:`.ProbeLoss` and :class:`.TangentLoss`.

    Raises:
        TypeError: if the model is sharded otherwise than by ``fully_shard``.
        ValueError: if an argument is out of range, or nothing is trainable.

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
        "cost two networks of eleven more than .02 of their accuracy, one of them a third of it. Begin with a tenth of "
        "it."
    )
    default_probes: ClassVar[int] = 8
    least_probes: ClassVar[int] = 4
    undefined: ClassVar[str] = "The tangent features vanish: they have no participation ratio, and the loss is zero."

    def _of_kernel(self, seen: Probed) -> Tensor:
        trace2 = estimators.trace2(seen.gram)
        norm2 = self._norm2(seen).minimum(trace2)
        defined = trace2 > 0
        # Not of zero, whose logarithm has no gradient to be multiplied by nothing.
        trace2, norm2 = (value.masked_fill(~defined, 1.0) for value in (trace2, norm2))
        return (trace2.log() - norm2.log()).masked_fill(~defined, torch.nan)
