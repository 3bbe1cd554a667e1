"""What all ranks agree on after a step, and the line of the log that comes of it."""

from __future__ import annotations

import resource
import sys

import torch

from distill.planning import Planner
from distill.rounds import Progress
from distill.step_metrics import StepMetrics
from distill.step_stats import StepStats
from distill.stop import Stop
from parallel.collectives import all_reduce_
from parallel.mesh import Mesh


def agree(mesh: Mesh, stop: Stop) -> tuple[bool, int]:
    """Return whether any rank was asked to stop, and the largest peak of memory. Collectives: one all-reduce."""
    if mesh.device.type == "cuda":
        peak_bytes = torch.cuda.max_memory_allocated(mesh.device)
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    report = torch.tensor([int(stop.requested), peak_bytes], dtype=torch.int64, device=mesh.device)
    all_reduce_(report, mesh.world, op="max")
    stopping, peak = report.tolist()
    return bool(stopping), peak


def step_metrics(progress: Progress, stats: StepStats, planner: Planner, peak_bytes: int) -> StepMetrics:
    """Return the numbers of the step that `progress` has just taken in."""
    planned = planner.planned
    return StepMetrics(
        step=progress.step,
        round=progress.round,
        tokens=progress.tokens,
        loss_total=stats.total,
        loss_hard=stats.hard,
        loss_soft=stats.soft,
        loss_hidden=stats.hidden,
        loss_temperature=stats.temperature,
        loss_alpha=stats.alpha,
        grad_norm=stats.grad_norm,
        lr=stats.learning_rate,
        skipped_steps=progress.skipped,
        step_s=stats.step_s,
        tokens_per_s=stats.num_valid_tokens / stats.step_s,
        bubble_fraction=stats.bubble_fraction,
        planned_bubble_fraction=None if planned is None else planned.bubble_fraction,
        planned_step_s=None if planned is None else planned.step_s,
        peak_bytes=peak_bytes,
    )
