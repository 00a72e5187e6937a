"""The memory that a call may use on a device, in addition to the unavoidable."""

from __future__ import annotations

import torch

WORKING_MEMORY = 2 * 2**30
"""Bytes that a call may use on a CPU, in addition to one forward and backward pass of its batch and its result."""
SHARE = 0.5
"""The part of the free memory of a GPU that a call may use."""


def budget(device: torch.device, *, alike: bool = False) -> int:
    """Return the bytes of working memory that a call may use on a device.

    On a GPU this is half of the memory that is free or reserved by torch's allocator. It is rounded down to a power of
    two, so that the same call does the same steps, with the same rounding errors, if about as much memory is free.
    If ``alike``, all ranks must do the same steps, and the result is that for a CPU.
    """
    if device.type != "cuda" or alike or torch.cuda.is_current_stream_capturing():
        return WORKING_MEMORY
    free, _ = torch.cuda.mem_get_info(device)
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return 1 << max(1, int(SHARE * (free + reserve))).bit_length() - 1
