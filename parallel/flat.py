"""Parameters and gradients of one rank's stages in flat buffers.

Decides that all trainable parameters of a rank are views into one flat buffer, and that their gradients are accumulated
into a second one (`parameter.main_grad`), in float32 at least: a gradient summed over many micro-batches in bf16 would
lose the small ones. `parallel.buckets` says where each lies; who updates them is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from parallel.buckets import Bucket, Chunk, Slot
from parallel.gradients import main_dtype


class FlatBuffers:
    """The flat buffers of a layout; a step allocates nothing.

    Args:
        chunks: the layout. Its parameters become views into `self.flat`.
        device: where they are.
    """

    @torch.no_grad()
    def __init__(self, chunks: Sequence[Chunk], device: torch.device) -> None:
        self.chunks = chunks
        self.slots = [slot for chunk in chunks for slot in chunk.slots]
        self.buckets: list[Bucket] = [bucket for chunk in chunks for bucket in chunk.buckets]
        dtype = self.slots[0].entry.parameter.dtype
        self.main_dtype = main_dtype(dtype)
        """Of gradients, masters and moments."""
        self.flat = torch.zeros(self.buckets[-1].stop, dtype=dtype, device=device)
        self.flat_grad = torch.zeros_like(self.flat, dtype=self.main_dtype)
        for slot in self.slots:
            slot.view(self.flat).copy_(slot.entry.parameter)
            slot.entry.parameter.main_grad = slot.view(self.flat_grad)
            slot.entry.parameter.register_post_accumulate_grad_hook(_move_grad)
            slot.entry.parameter.data = slot.view(self.flat)

    def move(self, place: Callable[[Slot], Tensor]) -> None:
        """Make each parameter a view of other memory that has its values, 1-D, and let go of `flat`."""
        for slot in self.slots:
            parameter = slot.entry.parameter
            parameter.data = place(slot).view(parameter.shape)
        self.flat = self.flat.new_empty(0)


def _move_grad(parameter: nn.Parameter) -> None:
    """Add what autograd left in `grad` to the flat buffer (norms and whatever is no parallel layer)."""
    # Parallel layers give autograd no gradient for their weights, but the hook runs all the same.
    if parameter.grad is not None:
        parameter.main_grad.add_(parameter.grad)
        parameter.grad = None
