"""Reward alignment of the tangent kernel with the targets."""

from __future__ import annotations

from typing import ClassVar, final

import torch
from torch import Tensor

from alignreg import estimators
from alignreg.losses.base import Sample, TangentLoss
from alignreg.targets import encode


@final
class AlignmentLoss(TangentLoss):
    r"""−weight · log A, A = yᵀK_c y / (‖K_c‖_F ‖y − ȳ‖²) the alignment of the tangent kernel with the targets.

    It makes explicit what training does implicitly (Baratin et al., "Implicit Regularization via Neural Feature
    Alignment", AISTATS 2021, section 3.3; A is :func:`alignreg.functional.alignment`). From one forward pass and
    m + 1 backward passes, themselves differentiated:

    - the numerator yᵀK_c y = ‖Φᵀ(y − ȳ)‖² is exact;
    - ‖K_c‖_F² is estimated from m probes by Σ_{a≠b} (g_a·g_b)² / (m(m−1)), g_a = Φᵀω_a with Gaussian ω_a, centred,
      unbiased. Its logarithm is not: the loss lies below −log A, by about a quarter of the estimate's relative
      variance. So that the gradient stays bounded the estimate is raised to (mean ‖g_a‖²)² / rows, below which no
      kernel of that many rows can be.

    Alignment depends on the number of examples. With ``examples`` the loss is that of the smaller set, whose alignment
    is larger; only the stride leaves the expectation as it is.

    Targets that are constant over the examples, or tangent features that vanish, leave alignment undefined: the loss is
    then an exact zero, with one warning.

    Args:
        model: the model, possibly wrapped (DDP, ``torch.compile``, Accelerate); never registered, copied or changed.
        weight: factor, ≥ 0.
        examples: how many examples of a batch to use; all by default.
        every_n_steps: apply at every n-th step, with n times the weight.
        probes: m ≥ 4; 8 by default.
        seed: of probes and examples.
        centered: centre the kernel over the examples. Targets are always centred.
        params: glob pattern or patterns of parameter names.
        forward_fn: ``(model, x) -> (n, c)`` for models with another output.

    Raises:
        TypeError: if the model is sharded (FSDP).
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

    default_probes: ClassVar[int] = 8
    least_probes: ClassVar[int] = 4

    def _estimate(self, sample: Sample, *, create_graph: bool) -> Tensor | None:
        if sample.y is None:
            raise ValueError("target: expected the targets of the inputs, got none. Call reg(x, y).")
        _, n, c = sample.probes.shape
        y = encode(sample.y, c, n)
        if bool((y == y[0]).all()):
            self._warn("All examples of a batch have the same target: alignment is undefined, the loss is zero there.")
            return None
        y = y - y.mean(0)
        direction = (y / torch.linalg.vector_norm(y)).to(sample.probes)
        cotangents = torch.cat([direction[None], sample.probes])
        gram = estimators.gram(self._features.pullback(sample.x, cotangents, create_graph=create_graph))
        numerator, probed = gram[0, 0], gram[1:, 1:]
        rows = (n - 1) * c if self.centered else n * c
        norm2 = torch.maximum(estimators.frobenius2(probed), estimators.trace(probed).square() / rows)
        if not bool((numerator > 0) & (norm2 > 0)):
            self._warn("The tangent features have nothing along the targets: alignment is zero, and so is the loss.")
            return None
        return norm2.log() / 2 - numerator.log()
