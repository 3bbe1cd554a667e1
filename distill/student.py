"""Where the student comes from: a ready folder, or a cut of the teacher scored on the teacher's own distributed stages."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from transformers import PretrainedConfig

from distill.candidates import best_shape
from distill.config import Config
from distill.data import MicroBatch
from distill.loading import is_there
from distill.model_checks import not_finite
from distill.planned_student import shapes_of
from distill.prune import choose, load_kept, prune_checkpoint
from distill.recut import recut_checkpoint
from distill.scores import NotFinite
from distill.scoring import cached_scores
from distill.shape import Shape
from parallel.collectives import barrier
from parallel.mesh import Mesh
from parallel.model import StageModel
from parallel.pipeline.p2p import Links

SCORES_FILE = "scores.safetensors"


def prune_teacher(
    config: Config,
    mesh: Mesh,
    *,
    teacher: StageModel,
    teacher_config: PretrainedConfig,
    teacher_folder: Path,
    links: Links,
    microbatches: Sequence[MicroBatch],
    judging: Sequence[MicroBatch] = (),
    target: Path,
    previous: Path | None = None,
) -> float:
    """Write the pruned student to `target`, with the scores and kept indices; a folder that is there is kept.

    Args:
        teacher: this rank's stage of the model whose units are scored and kept.
        links: channels for K.
        microbatches: this replica's calibration text.
        judging: this replica's held-out text, for choosing among the shapes of a budget.
        previous: a trained student of it, whose weights the new one takes as far as it has them.
    Returns:
        Seconds it took (0 for a folder that was there).
    Raises:
        ConfigError: the shape asked for cannot be had.
    Collectives: a broadcast over the world, those of `cached_scores` and of `best_shape`, a barrier over the world.
    """
    start_s = time.perf_counter()
    if is_there(target, mesh):
        return 0.0
    prune = config.student.prune
    candidates = shapes_of(config, teacher_config)
    try:
        scores, depends = cached_scores(
            config,
            mesh,
            teacher=teacher,
            teacher_folder=teacher_folder,
            links=links,
            microbatches=microbatches,
        )
    except NotFinite as error:
        raise not_finite(config, "teacher.model", str(error)) from error
    shape = candidates[0].shape

    def write(folder: Path, shape: Shape) -> None:
        kept = choose(scores, teacher_config, shape)
        provenance = {"teacher": config.teacher.model, "prune": asdict(prune)}
        if previous is None:
            prune_checkpoint(teacher_folder, folder, teacher_config, kept, provenance=provenance)
        else:
            old, _ = load_kept(previous)
            recut_checkpoint(
                teacher_folder, previous, folder, teacher_config, old, kept, provenance=provenance
            )

    if mesh.world.is_first:
        target.parent.mkdir(parents=True, exist_ok=True)
    if prune.target_params is not None:
        shape = best_shape(
            config,
            mesh,
            candidates,
            write=write,
            teacher_config=teacher_config,
            judging=judging,
            record=target.with_name(f"candidates{_suffix(target)}.json"),
        )
    if mesh.world.is_first:
        scores.save(target.parent / SCORES_FILE, depends)
        write(target, shape)
    barrier(mesh.world)
    return time.perf_counter() - start_s


def _suffix(target: Path) -> str:
    """Return what tells a later round's cut from the first one's, such as `-1`."""
    found = re.search(r"-\d+$", target.name)
    return found[0] if found else ""
