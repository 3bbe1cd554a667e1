"""What one stage does with a micro-batch: forward that keeps a graph, backward in one or two parts, forward that keeps nothing.

Everything is keyed by micro-batch, so the order is the plan's business. Knows no loss: the last stage's backward is given
the gradient of its output like every other's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from parallel.model import StageModel


@dataclass
class _Kept:
    """What is held between a micro-batch's `F` and its last backward."""

    x: Tensor
    output: Tensor
    entered: dict[int, Node] = field(default_factory=dict)
    """Layer -> what made its input. Autograd comes there after all that the layer did, weight gradients included: of
    the nodes that are ready it takes the one made last, and gradients of parameters before all others."""


class TrainStage:
    """Forward and backward of a trainable stage; holds activations between a micro-batch's `F` and its last backward."""

    def __init__(self, model: StageModel) -> None:
        self.model = model
        self.running: int | None = None
        """The micro-batch whose forward runs, for hooks on the model; None when a backward recomputes a layer, too."""
        self._kept: dict[int, _Kept] = {}
        self._entered: dict[int, Node] | None = None
        self._weight_work: dict[int, list[Callable[[], None]]] = {}
        for layer, module in model.layers.items():
            module.register_forward_pre_hook(partial(self._enter, layer), with_kwargs=True)

    @torch.compiler.disable
    def _enter(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # None outside `forward`: when a backward recomputes the layer, or somebody else calls the model.
        if self._entered is not None:
            hidden = args[0] if args else kwargs["hidden_states"]
            if hidden.grad_fn is not None:
                self._entered[layer] = hidden.grad_fn

    @property
    def num_kept(self) -> int:
        """Micro-batches whose activations are held."""
        return len(self._kept)

    def forward(self, microbatch: int, x: Tensor, position_ids_BS: Tensor) -> Tensor:
        """Run the stage on ids [B, S] or a received hidden state [B, S, D]; return the detached output [B, S, D]."""
        assert microbatch not in self._kept, f"micro-batch {microbatch} is already in flight"
        enters = x
        if x.is_floating_point():
            x = x.detach().requires_grad_()
            # A node of its own: autograd treats a leaf like a parameter, and would not come to it last.
            enters = x.view_as(x)
        self._entered, self.running = {}, microbatch
        try:
            output = self.model(enters, position_ids_BS)
            self._kept[microbatch] = _Kept(x, output, self._entered)
        finally:
            self._entered = self.running = None
        return output.detach()

    def backward(
        self, microbatch: int, grad_BSD: Tensor, *, layer_done: Callable[[int], None] | None = None
    ) -> Tensor | None:
        """Run the whole backward; return the input's gradient, or None on the first stage.

        Args:
            grad_BSD: gradient of the output.
            layer_done: called with each decoder layer's global index, last layer first, once this micro-batch has
                added everything to the gradients of the layer and of what follows it. On a GPU, called from
                autograd's thread.
        """
        kept = self._kept.pop(microbatch)
        if layer_done is not None:
            for layer, node in kept.entered.items():
                node.register_prehook(partial(_call, layer_done, layer))
        torch.autograd.backward(kept.output, grad_BSD)
        return kept.x.grad

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


def _call(layer_done: Callable[[int], None], layer: int, grads: tuple[Tensor | None, ...]) -> None:
    layer_done(layer)


class ForwardStage:
    """Forward without gradients, in slices; keeps only the hidden state between a micro-batch's slices."""

    def __init__(self, model: StageModel) -> None:
        self.model = model
        self.running: int | None = None
        """The micro-batch whose forward runs, for hooks on the model; None when somebody else calls it."""
        self._between: dict[int, Tensor] = {}

    @torch.no_grad()
    def forward(
        self, microbatch: int, x: Tensor | None, position_ids_BS: Tensor, *, part: int = 0
    ) -> Tensor | None:
        """Run slice `part`; `x` is needed by slice 0 only. Returns the stage's output after its last slice, else None."""
        if part > 0:
            x = self._between.pop(microbatch)
        self.running = microbatch
        try:
            hidden = self.model(x, position_ids_BS, part=part)
        finally:
            self.running = None
        if part == self.model.num_slices - 1:
            return hidden
        self._between[microbatch] = hidden
        return None
