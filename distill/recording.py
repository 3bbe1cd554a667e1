"""Recorders: what looks at a model's activations while a text runs through it.

Decides which positions count, and that hooks are gone when the context is left, however that was.

Legend: B sequences, S positions, T positions that count, K channels.
"""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from distill.data import IGNORE, MicroBatch


class Recorder:
    """What all recorders share; one of them registers its hooks in `__enter__`, in `_hooks`."""

    def __init__(self) -> None:
        self._valid_BS: Tensor | None = None
        self._hooks: list[RemovableHandle] = []

    def look_at(self, batch: MicroBatch) -> None:
        """Count the positions of the coming micro-batch that have a label."""
        self.expect(batch.labels_BS != IGNORE)

    def expect(self, valid_BS: Tensor) -> None:
        """Set which positions of the coming micro-batch count. Args: valid_BS: bool [B, S]."""
        assert valid_BS.dtype == torch.bool and valid_BS.dim() == 2, (valid_BS.dtype, valid_BS.shape)
        self._valid_BS = valid_BS

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _rows(self, x: Tensor) -> Tensor:
        """Return the activations [T, K] at the positions that count, float32 at least."""
        valid = self._valid_BS
        assert valid is not None, "expect(valid_BS) was not called before the forward"
        assert x.shape[:-1] == valid.shape, (tuple(x.shape), tuple(valid.shape))
        return x.detach()[valid.to(x.device)].to(torch.promote_types(x.dtype, torch.float32))
