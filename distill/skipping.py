"""Steps whose loss or gradients are not finite: they change nothing, are counted, and end the run when they do not cease.

Decides when it ends and what is said; that such a step changes no parameter, moment or count of updates is the
optimizer's part. Weights that are not finite are never written into a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from distill.config import Config
from distill.failures import RunFailed
from distill.metrics import RunLog
from distill.rounds import Progress
from parallel.checkpoint import complete_checkpoints
from parallel.collectives import all_reduce_
from parallel.mesh import Mesh
from parallel.optimizer import StageOptimizer


def check_skipped(
    progress: Progress, settings: Config, log: RunLog, checkpoints: Path, *, settle: Callable[[], None]
) -> None:
    """Say that the step just taken was skipped, if it was.

    Args:
        settings: of the round.
        checkpoints: the run's folder of them.
        settle: waits for a checkpoint under way, so that it counts as kept.
    Raises:
        RunFailed: it was one too many, on every rank alike.
    """
    in_a_row, most = progress.skipped_in_a_row, settings.train.max_skipped_steps
    if not in_a_row:
        return
    log.say(
        f"step {progress.step} changes nothing: its loss or gradients are not finite ({in_a_row} in a row, "
        f"train.max_skipped_steps={most})"
    )
    if in_a_row >= most:
        settle()
        raise RunFailed(
            f"{in_a_row} steps in a row up to step {progress.step} had a loss or gradients that are not finite "
            f"(train.max_skipped_steps={most}); {_kept(checkpoints)}; a lower optimizer.lr may help, or other rows"
        )


def refuse_not_finite(optimizer: StageOptimizer, mesh: Mesh, progress: Progress) -> None:
    """Refuse weights or moments that are not finite, before they are saved.

    Raises:
        RunFailed: there are some, on every rank alike.
    Collectives: an all-reduce over the world.
    """
    parts = [part for _, its in optimizer.state() for part in its.values()]
    sums = []
    for part in parts:
        # A sum reads all values once and fast; what is finite may still add up to what is not.
        sums.append(part.read().sum().float().to(mesh.device))
        mesh.activity.mark()
    is_sound = bool(torch.stack(sums).isfinite().all())
    is_sound = is_sound or all(bool(part.read().isfinite().all()) for part in parts)
    bad = torch.tensor(not is_sound, dtype=torch.int32, device=mesh.device)
    all_reduce_(bad, mesh.world, op="max")
    if bad:
        raise RunFailed(
            f"weights or moments are not finite after step {progress.step}, so they are not saved; the checkpoint before "
            "is kept; a lower optimizer.lr may help"
        )


def _kept(checkpoints: Path) -> str:
    try:
        found = complete_checkpoints(checkpoints)
    except OSError as error:
        return f"{checkpoints} cannot be read ({error.strerror})"
    return (
        f"the checkpoint of step {int(found[-1].name[5:])} is kept" if found else "there is no checkpoint yet"
    )
