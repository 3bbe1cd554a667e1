"""Where the student comes from: a ready folder, or a cut of the teacher scored on the teacher's own distributed stages."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from transformers import PretrainedConfig

from distill.candidates import best_shape
from distill.checks import not_finite
from distill.config import Config
from distill.data import IGNORE, MicroBatch
from distill.forward import run_forward
from distill.importance import ActivationRecorder, gather_scores, weight_scores
from distill.loading import shapes_of
from distill.prune import choose, prune_checkpoint
from distill.scores import Scores
from distill.structure import Sizes
from parallel.collectives import barrier, broadcast_object
from parallel.mesh import Mesh
from parallel.model import StageModel
from parallel.pipeline.p2p import Links

SCORES_FILE = "scores.safetensors"


def score_teacher(
    teacher: StageModel, mesh: Mesh, links: Links, microbatches: Sequence[MicroBatch], *, method: str
) -> Scores:
    """Score every unit of the teacher, on the stages and shards as they stand.

    Args:
        links: channels for K.
        microbatches: this replica's calibration text; not used by `l1`.
        method: `activation` or `l1`.
    Returns:
        The whole model's scores, on every rank.
    Collectives: a forward pass over the text, then gathers over tp, dp and pp.
    """
    sizes = Sizes.of(teacher.config)
    if method == "l1":
        return gather_scores(weight_scores(teacher.layers, sizes), mesh)
    with ActivationRecorder(teacher.layers, sizes) as recorder:
        run_forward(
            mesh,
            links,
            microbatches,
            teacher=teacher,
            before=lambda batch: recorder.expect(batch.labels_BS != IGNORE),
        )
    return gather_scores(recorder.measured, mesh)


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
) -> float:
    """Write the pruned student to `target`, with the scores and kept indices; a folder that is there is kept.

    Args:
        links: channels for K.
        microbatches: this replica's calibration text.
        judging: this replica's held-out text, for choosing among the shapes of a budget.
    Returns:
        Seconds it took (0 for a folder that was there).
    Raises:
        ConfigError: the shape asked for cannot be had.
    Collectives: a broadcast over the world, those of `score_teacher` and of `best_shape`, a barrier over the world.
    """
    start_s = time.perf_counter()
    # Rank 0 looks for all: what the others see of a shared folder may lag behind.
    if broadcast_object(target.exists() if mesh.world.is_first else None, mesh.world):
        return 0.0
    prune = config.student.prune
    candidates = shapes_of(config, teacher_config)
    if mesh.world.is_first:
        text = "" if prune.method == "l1" else f" on {prune.calibration_rows} rows of text"
        print(f"scoring {config.teacher.model}{text}, to cut the student out of it ...", flush=True)
    try:
        scores = score_teacher(teacher, mesh, links, microbatches, method=prune.method)
    except ValueError as error:
        raise not_finite(config, "teacher.model", str(error)) from error
    shape = candidates[0].shape
    if prune.target_params is not None:
        if mesh.world.is_first:
            target.parent.mkdir(parents=True, exist_ok=True)
        shape = best_shape(
            config,
            mesh,
            candidates,
            scores,
            teacher_config=teacher_config,
            teacher_folder=teacher_folder,
            judging=judging,
            folder=target.parent,
        )
    if mesh.world.is_first:
        kept = choose(scores, teacher_config, shape)
        target.parent.mkdir(parents=True, exist_ok=True)
        scores.save(target.parent / SCORES_FILE)
        provenance = {"teacher": config.teacher.model, "prune": asdict(prune)}
        prune_checkpoint(teacher_folder, target, teacher_config, kept, provenance=provenance)
    barrier(mesh.world)
    return time.perf_counter() - start_s
