"""The precision in which kernels of torch compute what they are given."""

from __future__ import annotations

import torch
from torch import Tensor


def widened(x: Tensor) -> Tensor:
    """Return ``x`` in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rounds_products(device: torch.device) -> bool:
    """Say whether products of float32 tensors there may be made in TF32, of ten bits: convolutions are, by default."""
    if device.type != "cuda":
        return False
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(cudnn, "conv"):  # newer settings, by operation; the older ones cannot be read where these were made
        return "tf32" in (matmul.fp32_precision, cudnn.conv.fp32_precision)
    return bool(matmul.allow_tf32 or cudnn.allow_tf32)
