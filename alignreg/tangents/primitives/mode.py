"""The table of torch functions that are replaced for second derivatives. A new replacement is a row here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, final

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from alignreg.tangents.primitives import activations, at_zero, distances, embeddings, normalization, norms

Function = Callable[..., Any]


@final
class Primitives(TorchFunctionMode):
    """A mode that computes functions whose second derivatives torch lacks or gets wrong from primitives.

    There are three kinds of such functions:

    - functions whose backward pass has no derivative (``hardsigmoid``, ``cdist``, ``embedding_bag``, ...), or a wrong
      one (weight normalization);
    - functions whose backward pass has a derivative that is NaN at zeros (norms of padding);
    - normalizations. The fused kernels pass mean and scale to their derivative formulas as constants. A first
      derivative, and the derivative of a plain backward pass, are correct; the derivative *of* a vectorized backward
      pass silently misses the terms through mean and scale.

    The mode does not see calls inside scripted modules. It leaves functions in checkpointed modules unchanged, since
    these run again in backward passes outside of the block, and must then compute the same.

    Args:
        backward_only: keep fused normalizations, which suffice for derivatives of plain backward passes.
    """

    def __init__(self, *, backward_only: bool = False) -> None:
        super().__init__()
        self._replacements = _TWICE if backward_only else {**_TWICE, **_NORMALIZATIONS}

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        replacement = self._replacements.get(func)
        if replacement is None or kwargs.get("out") is not None or is_checkpointed():
            return func(*args, **kwargs)
        return replacement(*args, **{name: value for name, value in kwargs.items() if name != "out"})


@final
class Checkpoints(TorchFunctionMode):
    """A mode that records whether a checkpointed module runs inside the block."""

    any = False

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.any = self.any or is_checkpointed()
        return func(*args, **(kwargs or {}))


def is_checkpointed() -> bool:
    """Return whether the caller runs inside a checkpointed module, which will run again."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_filename != _CHECKPOINT:
        frame = frame.f_back
    return frame is not None


_CHECKPOINT = checkpoint.__code__.co_filename
_aten = torch.ops.aten  # called by exported modules
_TWICE: dict[Function, Function] = {
    torch._weight_norm: normalization.weight_norm,  # noqa: SLF001 - called by both weight_norm in torch.nn.utils
    F.hardsigmoid: activations.hardsigmoid,
    _aten.hardsigmoid.default: activations.hardsigmoid,
    **dict.fromkeys((torch.logcumsumexp, torch.Tensor.logcumsumexp), activations.logcumsumexp),
    F.multi_margin_loss: activations.multi_margin_loss,
    F.embedding: embeddings.embedding,
    F.embedding_bag: embeddings.embedding_bag,
    torch.cdist: distances.cdist,
    F.pdist: distances.pdist,
    torch.dist: distances.dist,
    F.pairwise_distance: distances.pairwise_distance,
    F.cosine_similarity: distances.cosine_similarity,
    _aten.cosine_similarity.default: distances.cosine_similarity,
    F.normalize: norms.normalize,
    torch.norm: norms.norm,
    torch.Tensor.norm: norms.norm,
    torch.linalg.norm: norms.linalg_norm,
    **dict.fromkeys((torch.linalg.vector_norm, _aten.linalg_vector_norm.default), norms.vector_norm),
    torch.linalg.matrix_norm: norms.matrix_norm,
    **dict.fromkeys((torch.renorm, torch.Tensor.renorm), norms.renorm),
    F.lp_pool1d: norms.lp_pool(F.avg_pool1d, 1),
    F.lp_pool2d: norms.lp_pool(F.avg_pool2d, 2),
    F.lp_pool3d: norms.lp_pool(F.avg_pool3d, 3),
    **dict.fromkeys((torch.std, torch.Tensor.std), at_zero.std),
    torch.std_mean: at_zero.std_mean,
    **dict.fromkeys((torch.atan2, torch.arctan2, torch.Tensor.atan2, torch.Tensor.arctan2), at_zero.atan2),
    **dict.fromkeys((torch.copysign, torch.Tensor.copysign), at_zero.copysign),
    **dict.fromkeys((torch.sinc, torch.special.sinc, torch.Tensor.sinc), at_zero.sinc),
}
_NORMALIZATIONS: dict[Function, Function] = {
    F.layer_norm: normalization.layer_norm,
    F.rms_norm: normalization.rms_norm,
    F.group_norm: normalization.group_norm,
    F.batch_norm: normalization.batch_norm,
    F.instance_norm: normalization.instance_norm,
    **dict.fromkeys((torch.layer_norm, _aten.layer_norm.default), normalization.layer_norm),
    **dict.fromkeys((torch.rms_norm, _aten.rms_norm.default), normalization.rms_norm),
    **dict.fromkeys((torch.group_norm, _aten.group_norm.default), normalization.group_norm),
    **dict.fromkeys((torch.batch_norm, _aten.batch_norm.default), normalization.torch_order(normalization.batch_norm)),
    **dict.fromkeys(
        (torch.instance_norm, _aten.instance_norm.default), normalization.torch_order(normalization.instance_norm)
    ),
}
