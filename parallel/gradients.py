"""Where weight gradients go, and when they are computed.

Decides that a weight gradient is a piece of work of its own: computed at once, or held back for a `W` action, and
accumulated directly into `parameter.main_grad` where an optimizer has given one, else into `parameter.grad`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightGradients:
    """Runs weight-gradient work at once, or holds it back for a `W` action (zero-bubble schedules)."""

    def __init__(self) -> None:
        self._held: list[Callable[[], None]] | None = None

    def submit(self, work: Callable[[], None]) -> None:
        """Run `work` now, or keep it when inside `hold()`."""
        if self._held is None:
            work()
        else:
            self._held.append(work)

    @contextmanager
    def hold(self) -> Iterator[list[Callable[[], None]]]:
        """Collect the work submitted inside the block; the caller runs it later, in order."""
        assert self._held is None, "weight gradients are already held"
        self._held = []
        try:
            yield self._held
        finally:
            self._held = None


def main_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which gradients of parameters are summed and masters are kept: float32 at least."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def grad_target(parameter: nn.Parameter) -> Tensor:
    """Return the tensor that gradients of `parameter` are accumulated into: `main_grad`, else `grad` (made if absent)."""
    main_grad = getattr(parameter, "main_grad", None)
    if main_grad is not None:
        return main_grad
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
    return parameter.grad


def accumulate_outer_(target: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left.T @ right to `target`, in one fused call when the dtypes agree."""
    if target.dtype == left.dtype:
        target.addmm_(left.t(), right)
    else:
        target.add_(left.t() @ right)
