"""Rule for embeddings, in which each token uses its own row of the weight."""

from __future__ import annotations

from torch import Tensor

from alignreg.tangents.kernel.calls import Lookups


def embedding(
    input: Tensor,  # noqa: A002 - torch's name
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,  # noqa: ARG001
    scale_grad_by_freq: bool = False,
    sparse: bool = False,  # noqa: ARG001
) -> Lookups | None:
    """Return the lookup of the row of every token; ``None`` if rows are rescaled or gradients depend on counts."""
    if max_norm is not None or scale_grad_by_freq:
        return None
    tokens = input
    if padding_idx is not None:
        tokens = input.masked_fill(input == padding_idx % weight.shape[0], -1)
    return Lookups(lead=input.ndim, tokens=tokens, rows=weight.shape[0])
