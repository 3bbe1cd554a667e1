"""What a stage's layers forget after the forward pass and compute again in backward.

    none        keep every activation
    selective   keep each layer's input and the outputs of its linears; compute the rest again: norms, activations, rotary
                embeddings, attention. No matrix product of a weight and no tensor-parallel sum of one runs twice.
    full        keep each layer's input only; its whole forward runs again, collectives included

Decides how the linears take part: `torch.utils.checkpoint` runs a layer's forward a second time, and in it each linear
returns what it returned the first time. That works for every family whose layers transformers can checkpoint.
Source: Korthikanti et al. 2022 (selective activation recomputation), turned around: what is cheap is named by exclusion.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

from torch import Tensor

Recompute = Literal["none", "selective", "full"]


class OutputCache:
    """Where a linear asks for its output. This one always computes; `LinearOutputs` remembers."""

    def output(self, compute: Callable[[], Tensor]) -> Tensor:
        """Return the output that `compute` makes."""
        return compute()


class LinearOutputs(OutputCache):
    """Outputs of the linears inside a checkpointed layer: kept in its forward, given out again in its recomputation."""

    def __init__(self) -> None:
        self._kept: deque[tuple[Tensor, int]] | None = None
        self._replays = False

    def output(self, compute: Callable[[], Tensor]) -> Tensor:
        """Return `compute()`, or in a recomputation what it returned the first time."""
        if self._kept is None:
            return compute()
        if self._replays:
            kept, version = self._kept.popleft()
            assert kept._version == version, "a linear's output was modified in place after it was kept"
            return kept
        result = compute()
        # Detached, or the kept tensor would hold the graph that holds it.
        kept = result.detach()
        self._kept.append((kept, kept._version))
        return result

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the contexts of one layer's forward and of its recomputation (checkpoint's `context_fn`)."""
        kept: deque[tuple[Tensor, int]] = deque()
        return self._during(kept, replays=False), self._during(kept, replays=True)

    @contextmanager
    def _during(self, kept: deque[tuple[Tensor, int]], *, replays: bool) -> Iterator[None]:
        before = self._kept, self._replays
        self._kept, self._replays = kept, replays
        try:
            yield
        finally:
            self._kept, self._replays = before
