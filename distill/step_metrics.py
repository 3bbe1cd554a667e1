"""The numbers of one optimizer step, and their names in `metrics.jsonl` and wandb."""

from __future__ import annotations

import math
from dataclasses import dataclass

_NAMES = {
    "step": "step",
    "round": "round",
    "tokens": "tokens",
    "loss_total": "loss/total",
    "loss_hard": "loss/hard",
    "loss_soft": "loss/soft",
    "loss_hidden": "loss/hidden",
    "loss_temperature": "loss/temperature",
    "loss_alpha": "loss/alpha",
    "grad_norm": "optim/grad_norm",
    "lr": "optim/lr",
    "skipped_steps": "optim/skipped_steps",
    "step_s": "time/step_s",
    "tokens_per_s": "throughput/tokens_per_s",
    "bubble_fraction": "pipeline/bubble_fraction",
    "planned_bubble_fraction": "pipeline/planned_bubble_fraction",
    "planned_step_s": "pipeline/planned_step_s",
    "peak_bytes": "memory/peak_bytes",
}


@dataclass(frozen=True)
class StepMetrics:
    """The numbers of one optimizer step, equal on every rank."""

    step: int
    """Optimizer steps done, this one included, over all rounds."""
    round: int
    """Index of the round, from 0."""
    tokens: int
    """Valid tokens trained on so far, this step included."""
    loss_total: float
    loss_hard: float
    loss_soft: float
    """Nats per valid token; the soft loss with its T^2."""
    loss_hidden: float
    """Distance of the hidden states, a mean over layers and valid tokens; 0 where it has no weight."""
    loss_temperature: float
    loss_alpha: float
    """Of this step."""
    grad_norm: float
    """Before clipping."""
    lr: float
    skipped_steps: int
    """Steps so far that changed nothing because a number was not finite."""
    step_s: float
    tokens_per_s: float
    bubble_fraction: float
    """Measured idle share of the step over all stages."""
    planned_bubble_fraction: float | None
    planned_step_s: float | None
    """What the plan in force promises in the steady state; None until the costs have been measured."""
    peak_bytes: int
    """Largest of all ranks."""

    def named(self) -> dict[str, float | None]:
        """Return the numbers under the names of `metrics.jsonl` and wandb; what is not finite becomes null."""
        return {name: finite_or_none(getattr(self, field)) for field, name in _NAMES.items()}


def finite_or_none(value: float | None) -> float | None:
    """Return the number, or None for what JSON cannot hold."""
    return value if value is not None and math.isfinite(value) else None
