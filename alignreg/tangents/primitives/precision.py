"""The precision in which torch's kernels compute."""

from __future__ import annotations

import torch
from torch import Tensor


def widened(x: Tensor) -> Tensor:
    """Return ``x`` in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rounds_products(device: torch.device) -> bool:
    """Return whether products of float32 tensors may use TF32, with ten bits, as convolutions do by default."""
    if device.type != "cuda":
        return False
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(cudnn, "conv"):  # newer settings, by operation; once set, the older ones cannot be read
        return "tf32" in (matmul.fp32_precision, cudnn.conv.fp32_precision)
    return bool(matmul.allow_tf32 or cudnn.allow_tf32)
