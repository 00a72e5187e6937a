"""Penalize the size of the tangent features."""

from __future__ import annotations

from typing import ClassVar, final

from torch import Tensor

from alignreg import estimators
from alignreg.losses.probes import Probed, ProbeLoss


@final
class ComplexityPenalty(ProbeLoss):
    r"""weight · tr K_c / (n·c): the mean squared norm of the (centered) tangent features.

    ‖Φ‖_F² = tr K is what a step of given length costs in the complexity measure Σ_t ‖δw_t‖‖Φ_t‖_F of Baratin et al.
    ("Implicit Regularization via Neural Feature Alignment", AISTATS 2021, section 4); penalizing it makes the path
    less complex. Estimated without bias by the mean of ‖Φᵀω_a‖² over m Gaussian probes ω_a, centered: one forward
    pass and m backward passes, themselves differentiated. Neither ``every_n_steps`` nor ``examples`` changes the
    expectation: s of n examples are centered by their own mean, which the factor (n−1)/n · s/(s−1) makes good.

    Warning:
        The default weight is meant for noisy labels. With clean ones it cost some networks more than .02 of their
        accuracy, a Transformer .10 (docs/losses.md): begin with a tenth of it.

    Args:
        model: the model, possibly wrapped (DDP, ``fully_shard``, ``torch.compile``, Accelerate).
        weight: factor, ≥ 0, or a function of the optimizer step; 0.01 by default.
        probes: m ≥ 1; 1 by default.

    The other options are those of :class:`.ProbeLoss` and :class:`.TangentLoss`.

    Raises:
        TypeError: if the model is sharded otherwise than by ``fully_shard``.
        ValueError: if an argument is out of range, or nothing is trainable.

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
        "is meant for noisy labels: with clean ones it cost five networks of eleven more than .02 of their accuracy. "
        "There, begin with a tenth of it."
    )
    default_probes: ClassVar[int] = 1
    least_probes: ClassVar[int] = 1

    def _of_kernel(self, seen: Probed) -> Tensor:
        # One example, centered, is zero.
        rows = max(1, seen.n - 1) * seen.drawn_from / max(1, seen.drawn_from - 1) if self.centered else seen.n
        return estimators.trace(seen.gram) / (rows * seen.c)
