"""How much memory a call may take on a device, beyond what it cannot do without."""

from __future__ import annotations

import torch

WORKING_MEMORY = 2 * 2**30
"""Bytes that a call may use beyond one forward and backward pass of its batch and its result, where nothing else is
known of the device: on a CPU."""
SHARE = 0.5
"""Which part of what is free on a GPU a call may use."""


def budget(device: torch.device, *, alike: bool = False) -> int:
    """Return the bytes of working memory that a call may use on a device.

    On a GPU that is half of what is free there: with the driver, or held in reserve by torch's allocator. It is rounded
    down to a power of two, so that the same call takes the same steps, and rounds alike, whenever about as much is
    free.

    Args:
        device: where the call computes.
        alike: ranks must take the same steps, however much each has free: then it is what a CPU may use.
    """
    if device.type != "cuda" or alike or torch.cuda.is_current_stream_capturing():
        return WORKING_MEMORY
    free, _ = torch.cuda.mem_get_info(device)
    reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return 1 << max(1, int(SHARE * (free + reserve))).bit_length() - 1
