"""What one stage does with a micro-batch: forward that keeps a graph, backward in one or two parts, forward that keeps nothing.

Everything is keyed by micro-batch, so the order is the plan's business. Knows no loss: the last stage's backward is given
the gradient of its output like every other's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from parallel.model import StageModel


class TrainStage:
    """Forward and backward of a trainable stage; holds activations between a micro-batch's `F` and its last backward."""

    def __init__(self, model: StageModel) -> None:
        self.model = model
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._weight_work: dict[int, list[Callable[[], None]]] = {}

    @property
    def num_kept(self) -> int:
        """Micro-batches whose activations are held."""
        return len(self._kept)

    def forward(self, microbatch: int, x: Tensor, position_ids_BS: Tensor) -> Tensor:
        """Run the stage on ids [B, S] or a received hidden state [B, S, D]; return the detached output [B, S, D]."""
        assert microbatch not in self._kept, f"micro-batch {microbatch} is already in flight"
        if x.is_floating_point():
            x = x.detach().requires_grad_()
        output = self.model(x, position_ids_BS)
        self._kept[microbatch] = (x, output)
        return output.detach()

    def backward(self, microbatch: int, grad_BSD: Tensor) -> Tensor | None:
        """Run the whole backward; return the input's gradient, or None on the first stage."""
        x, output = self._kept.pop(microbatch)
        torch.autograd.backward(output, grad_BSD)
        return x.grad

    def backward_input(self, microbatch: int, grad_BSD: Tensor) -> Tensor | None:
        """Run the backward but hold the weight gradients of the parallel layers for `backward_weight`."""
        with self.model.weight_gradients.hold() as work:
            grad = self.backward(microbatch, grad_BSD)
        self._weight_work[microbatch] = work
        return grad

    @torch.no_grad()
    def backward_weight(self, microbatch: int) -> None:
        """Compute the weight gradients that `backward_input` held."""
        for work in self._weight_work.pop(microbatch):
            work()


class ForwardStage:
    """Forward without gradients, in slices; keeps only the hidden state between a micro-batch's slices."""

    def __init__(self, model: StageModel) -> None:
        self.model = model
        self._between: dict[int, Tensor] = {}

    @torch.no_grad()
    def forward(
        self, microbatch: int, x: Tensor | None, position_ids_BS: Tensor, *, part: int = 0
    ) -> Tensor | None:
        """Run slice `part`; `x` is needed by slice 0 only. Returns the stage's output after its last slice, else None."""
        if part > 0:
            x = self._between.pop(microbatch)
        hidden = self.model(x, position_ids_BS, part=part)
        if part == self.model.num_slices - 1:
            return hidden
        self._between[microbatch] = hidden
        return None
