"""Reward alignment of the tangent kernel with the targets."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor

from alignreg.losses.probes import Probed, ProbeLoss


@final
class AlignmentLoss(ProbeLoss):
    r"""−weight · log A, A = yᵀK_c y / (‖K_c‖_F ‖y − ȳ‖²) the alignment of the tangent kernel with the targets.

    It makes explicit what training does implicitly (Baratin et al., "Implicit Regularization via Neural Feature
    Alignment", AISTATS 2021, section 3.3; A is :func:`alignreg.functional.alignment`). From one forward pass and
    m + 1 backward passes, themselves differentiated:

    - the numerator yᵀK_c y = ‖Φᵀ(y − ȳ)‖² is exact;
    - ‖K_c‖_F² is estimated from m probes by Σ_{a≠b} (g_a·g_b)² / (m(m−1)), g_a = Φᵀω_a with Gaussian ω_a, centered,
      unbiased. Its logarithm is not: the loss lies below −log A, by about a quarter of the estimate's relative
      variance. So that the gradient stays bounded the estimate is raised to (mean ‖g_a‖²)² / rows, below which no
      kernel of that many rows can be.

    Alignment depends on the number of examples. With ``examples`` the loss is that of the smaller set, whose alignment
    is larger; only the stride leaves the expectation as it is.

    Targets that are constant over the examples, or tangent features that vanish, leave alignment undefined: the loss is
    then an exact zero, with one warning.

    Warning:
        The default weight cost a ResNet with BatchNorm .024 of its accuracy on clean labels, and three times it cost
        six networks of eleven more than .02 (docs/losses.md). Begin with a tenth of it.

    Args:
        model: the model, possibly wrapped (DDP, ``fully_shard``, ``torch.compile``, Accelerate).
        weight: factor, ≥ 0, or a function of the optimizer step; 0.1 by default.
        probes: m ≥ 4; 8 by default.
        centered: center the kernel over the examples. Targets are always centered.
        per_layer: use the mean of the losses of the layers' own kernels, without those that have nothing along the
            targets.

    The other options are those of :class:`.ProbeLoss` and :class:`.TangentLoss`.

    Raises:
        TypeError: if the model is sharded otherwise than by ``fully_shard``.
        ValueError: if an argument is out of range, or nothing is trainable.

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
    default_probes: ClassVar[int] = 8
    least_probes: ClassVar[int] = 4
    needs_targets: ClassVar[bool] = True
    undefined: ClassVar[str] = (
        "The tangent features have nothing along the targets: alignment is zero, and so is the loss."
    )

    def _of_kernel(self, seen: Probed) -> Tensor:
        assert seen.projection is not None
        projection, norm2 = seen.projection, self._norm2(seen)
        defined = (projection > 0) & (norm2 > 0)
        # Not of zero, whose logarithm has no gradient to be multiplied by nothing.
        projection, norm2 = (value.masked_fill(~defined, 1.0) for value in (projection, norm2))
        return (norm2.log() / 2 - projection.log()).masked_fill(~defined, torch.nan)
