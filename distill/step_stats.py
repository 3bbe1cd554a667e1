"""What one optimizer step reports."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class StepStats:
    """What one step reports, equal on every rank but for `step_s`."""

    hard: float
    """Cross-entropy, nats per valid token."""
    soft: float
    """T^2 times the divergence, nats per valid token; 0 where alpha is 1."""
    hidden: float
    """Distance of the hidden states; 0 where it has no weight."""
    total: float
    temperature: float
    alpha: float
    """Of this step."""
    grad_norm: float
    learning_rate: float
    num_valid_tokens: int
    step_s: float
    bubble_fraction: float
    """Idle share of the step, mean over all ranks: time in which it neither computed nor stepped."""

    @property
    def skipped(self) -> bool:
        """Whether the step changed nothing because a loss or a gradient is not finite; equal on every rank."""
        return not math.isfinite(self.grad_norm)
