"""Memory for messages, allocated once and used again.

Decides: a buffer that was given back serves the next message of its size, so that after the first steps no message
needs memory of its own. Buffers start at multiples of 64 bytes (a cache line, and the widest vector of a CPU).
Assumes that whoever gives a buffer back does not look at it any more.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

ALIGNMENT_BYTES = 64


class BufferPool:
    """Buffers of a few shapes on one device; `num_allocated` counts those ever made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._free: defaultdict[tuple[tuple[int, ...], torch.dtype], list[Tensor]] = defaultdict(list)
        self.num_allocated = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a contiguous buffer with arbitrary content."""
        free = self._free[shape, dtype]
        if free:
            return free.pop()
        self.num_allocated += 1
        return aligned_empty(shape, dtype, self._device)

    def give(self, buffer: Tensor) -> None:
        """Take a buffer back."""
        self._free[tuple(buffer.shape), buffer.dtype].append(buffer)


def aligned_empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised contiguous tensor whose first element lies at a multiple of `ALIGNMENT_BYTES`."""
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    memory = torch.empty(num_bytes + ALIGNMENT_BYTES, dtype=torch.uint8, device=device)
    start = -memory.data_ptr() % ALIGNMENT_BYTES
    return memory[start : start + num_bytes].view(dtype).view(shape)
