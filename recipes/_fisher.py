"""Penalise the trace of the Fisher information: a close relative of the complexity penalty, to compare with."""

from __future__ import annotations

from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from alignreg.distributed.wrappers import rank
from alignreg.losses.base import TangentLoss
from alignreg.losses.sample import Sample


@final
class FisherPenalty(TangentLoss):
    r"""weight · tr F, F the Fisher information of a classifier: the mean over x of E_{ŷ∼p(x)} ‖∇ log p(ŷ|x)‖².

    With Φ the tangent features this is the mean of E_ŷ ‖Φᵀ(p − e_ŷ)‖²: the complexity penalty measures Φ evenly, this
    one in the metric of the model's own predictions. Estimated without bias from one drawn label an example: scores
    have mean zero, so n·‖∇ mean_i ℓ(x_i, ŷ_i)‖² has the mean of the squares alone (Jastrzębski et al., "Catastrophic
    Fisher Explosion", arXiv 2012.14193, which takes the squared norm without the factor n).
    """

    default_weight: ClassVar[float] = 0.01

    def _estimate(self, sample: Sample, *, create_graph: bool) -> Tensor | None:
        model: Any = self._features.model
        with torch.enable_grad():
            # Normalizations write to copies of their running statistics.
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            logits = functional_call(model, buffers, (sample.x,))
            seed = ((self.seed * 10**9 + sample.draw) << 16) + rank()
            generator = torch.Generator().manual_seed(seed % 2**63)
            chances = logits.detach().double().softmax(1).cpu()
            drawn = torch.multinomial(chances, 1, generator=generator)[:, 0].to(logits.device)
            gradients = torch.autograd.grad(
                cross_entropy(logits, drawn), list(self._features.parameters.values()), create_graph=create_graph
            )
        return len(logits) * torch.stack([gradient.square().sum() for gradient in gradients]).sum()
