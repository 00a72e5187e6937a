"""Regularizers for the task: the losses of alignreg, and a close relative to compare them with."""

from __future__ import annotations

from typing import Any, ClassVar, final

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from alignreg import TangentFeatures
from alignreg.distributed.wrappers import rank
from alignreg.losses import AlignmentLoss, ComplexityPenalty, KARELoss, ParticipationRatioLoss
from alignreg.losses.base import TangentLoss
from alignreg.losses.sample import Sample


@final
class FisherPenalty(TangentLoss):
    r"""weight · tr F for the Fisher information F of a classifier, the mean over x of E_{ŷ∼p(x)} ‖∇ log p(ŷ|x)‖².

    In terms of the tangent features Φ this is the mean of E_ŷ ‖Φᵀ(p − e_ŷ)‖²: the complexity penalty weights all
    outputs evenly, this penalty weights them by the model's own predictions. The estimate draws one label per example
    and is unbiased: scores have mean zero, so cross terms vanish in the mean of n·‖∇ mean_i ℓ(x_i, ŷ_i)‖² (Jastrzębski
    et al., "Catastrophic Fisher Explosion", arXiv 2012.14193, who use the squared norm without the factor n).
    """

    default_weight: ClassVar[float] = 0.01

    def _estimate(self, sample: Sample, *, create_graph: bool) -> Tensor | None:
        model: Any = self._features.model
        with torch.enable_grad():
            # Normalization layers update copies of their running statistics.
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


LOSSES = {
    "alignment": AlignmentLoss,
    "complexity": ComplexityPenalty,
    "participation_ratio": ParticipationRatioLoss,
    "kare": KARELoss,
    "fisher": FisherPenalty,
}
LAYERS = {"all": slice(None), "hidden": slice(-1), "last": slice(-1, None)}


def make(config: Any, accelerator: Accelerator, model: nn.Module) -> nn.Module | None:
    """Return the loss that the flags ask for, or None; ``model`` is the one that Accelerate wrapped."""
    if config.regularizer == "none":
        return None
    first, last = config.reg_from * config.steps, config.reg_until * config.steps
    layers = list(TangentFeatures(accelerator.unwrap_model(model)).layers.values())
    options = {"probes": config.reg_probes} if config.reg_probes else {}
    return LOSSES[config.regularizer](
        model,
        weight=lambda step: config.weight if first <= step < last else 0.0,
        examples=config.reg_examples,
        every_n_steps=config.reg_every,
        seed=config.seed,
        centered=config.reg_centered,
        per_layer=config.reg_per_layer,
        clip=config.reg_clip or None,
        params=[name for names in layers[LAYERS[config.reg_layers]] for name in names],
        **options,
    ).to(accelerator.device)
