"""State of an optimizer that lies in flat buffers: what a rank holds of each parameter's, to read and to write.

Decides that whoever saves, loads or cuts state sees plain numbers, however they are stored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Store(Protocol):
    """A flat buffer of numbers."""

    def read(self, where: slice) -> Tensor:
        """Return the numbers of a range, 1-D; not to be written to."""

    def write(self, where: slice, values: Tensor) -> None:
        """Replace the numbers of a range."""

    def zero_(self) -> None:
        """Set everything to 0."""

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""


@dataclass(frozen=True)
class PlainStore:
    """A tensor that is its own numbers."""

    flat: Tensor

    def read(self, where: slice) -> Tensor:
        """Return a view."""
        return self.flat[where]

    @torch.no_grad()
    def write(self, where: slice, values: Tensor) -> None:
        """Replace the numbers of a range."""
        self.flat[where].copy_(values)

    @torch.no_grad()
    def zero_(self) -> None:
        """Set everything to 0."""
        self.flat.zero_()

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.flat.nbytes


@dataclass(frozen=True)
class Part:
    """What a rank holds of one kind of a parameter's state."""

    start: int
    stop: int
    """Which entries of this rank's shard of the parameter, flattened."""
    store: Store
    at: int
    """Where they begin in the store."""

    def read(self) -> Tensor:
        """Return the numbers, 1-D; not to be written to."""
        return self.store.read(slice(self.at, self.at + self.stop - self.start))

    def write(self, values: Tensor) -> None:
        """Replace the numbers by those of a tensor of any shape."""
        self.store.write(slice(self.at, self.at + self.stop - self.start), values.reshape(-1))

    def change(self, function: Callable[[Tensor], Tensor]) -> None:
        """Replace the numbers by what `function` makes of them."""
        self.write(function(self.read()))

    def inside(self, start: int, stop: int) -> Part | None:
        """Return what of it is among the entries [start, stop), or None."""
        begin, end = max(self.start, start), min(self.stop, stop)
        return Part(begin, end, self.store, self.at + begin - self.start) if begin < end else None
