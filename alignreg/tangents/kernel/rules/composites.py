"""Torch functions without a rule, in terms of functions with rules."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Compute attention with a bias, which is added to the scores; return ``NotImplemented`` without one."""
    if attn_mask is None or not attn_mask.is_floating_point() or is_causal:
        return NotImplemented
    if enable_gqa:
        times = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)
    scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    return F.dropout((scores + attn_mask).softmax(-1), dropout_p) @ value


def grouped_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    *,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """Compute one product for each group of rows; return ``NotImplemented`` for other layouts."""
    if mat_a.ndim != 2 or mat_b.ndim != 3 or offs is None or bias is not None:
        return NotImplemented
    ends = offs.tolist()
    parts = [mat_a[start:end] @ mat_b[i] for i, (start, end) in enumerate(zip([0, *ends], ends, strict=False))]
    parts.append(mat_a.new_zeros(len(mat_a) - ends[-1], mat_b.shape[2]))
    return torch.cat(parts).to(out_dtype or mat_a.dtype)
