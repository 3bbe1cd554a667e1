"""What a run reads of its models: where they are, and this rank's stages of them.

Decides that rank 0 fetches while the others wait, that a mistake it finds is raised on every rank, and that
what configs alone can show is refused before weights are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PretrainedConfig

from distill.balance import Split, split_models
from distill.config import Config, ConfigError
from distill.failures import RunFailed
from distill.hidden_map import check_widths, shared_with, was_cut
from distill.model_checks import check_models
from distill.planned_student import checked_student, without_padding
from distill.pretrained import check_ids, check_tokenizers, load_config, resolve_model
from distill.rounds import Lineage, lineage_of
from parallel.collectives import broadcast_object
from parallel.mesh import Axis, Mesh
from parallel.model import StageModel, build_stage
from parallel.plan import UnsupportedModel
from parallel.weights import WeightsError, load_weights

T = TypeVar("T")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def first_rank_does(mesh: Mesh, work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and return its picklable result on every rank; its ConfigError or RunFailed is raised on all.

    Collectives: one broadcast over the world.
    """
    value, failure = None, None
    if mesh.world.is_first:
        try:
            with mesh.activity.doing("what the first rank does for all", computes=True):
                value = work()
        except (ConfigError, RunFailed) as error:
            failure = error
    value, failure = broadcast_object((value, failure), mesh.world)
    if failure is not None:
        raise failure
    return value


def is_there(folder: Path, mesh: Mesh) -> bool:
    """Return whether a folder is there, as rank 0 sees it: what the others see of a shared one may lag behind.

    Collectives: one broadcast over the world.
    """
    return broadcast_object(folder.exists() if mesh.world.is_first else None, mesh.world)


@dataclass(frozen=True)
class Models:
    """Where the models are and what they look like."""

    teacher_folder: Path
    teacher_config: PretrainedConfig
    """Without the ids that are padding to the student (`without_padding`)."""
    teacher_is_padded: bool
    """Whether there are such."""
    origin: str
    """The model that all cuts of the run refer to, as the settings name it: the first round's teacher."""
    origin_folder: Path
    origin_config: PretrainedConfig
    student_folder: Path
    """For a student that is still to be cut: where it will be."""
    previous_folder: Path | None
    """The student of the round before."""
    needs_cut: bool
    split: Split
    """For a student that is still to be pruned: of the one planned; `with_pruned_student` follows the one that is cut."""


def find_models(config: Config, mesh: Mesh, lineage: Lineage | None = None) -> Models:
    """Fetch what is named, and check everything that configs alone can show.

    Args:
        lineage: where the student comes from; None: as in a run of one round.
    Raises:
        ConfigError: a model that is not there or does not fit.
    Collectives: broadcasts over the world.
    """
    cache = Path(config.data.cache_dir)
    trust = config.teacher.trust_remote_code

    def fetch(name: str, key: str) -> Path:
        return first_rank_does(
            mesh, lambda: resolve_model(name, cache_dir=cache, trust_remote_code=trust, key=key)
        )

    lineage = lineage or lineage_of([config], 0)
    teacher_folder = fetch(config.teacher.model, "teacher.model")
    teacher_config = load_config(teacher_folder, trust_remote_code=trust)
    origin_folder, origin_config = teacher_folder, teacher_config
    if lineage.origin != config.teacher.model:
        origin_folder = fetch(lineage.origin, "teacher.model")
        origin_config = load_config(origin_folder, trust_remote_code=trust)
    student_folder, ready = lineage.begins, None
    if student_folder is None:
        student_folder = fetch(config.student.model, "student.model")
        ready = load_config(student_folder, trust_remote_code=trust, key="student.model")
    alike = partial(check_tokenizers, trust_remote_code=trust)
    if ready is not None:
        first_rank_does(mesh, lambda: alike(student_folder, teacher_folder, key="student.model"))
    if origin_folder != teacher_folder:
        first_rank_does(mesh, lambda: alike(teacher_folder, origin_folder, key="teacher.model"))
    student_config = checked_student(config, teacher_config, ready, origin_config=origin_config)
    vocab_size = student_config.get_text_config().vocab_size
    if teacher_config.get_text_config().vocab_size > vocab_size:
        first_rank_does(mesh, lambda: check_ids(teacher_folder, vocab_size, trust_remote_code=trust))
    whole_config, teacher_config = teacher_config, without_padding(teacher_config, vocab_size)
    check_widths(
        config,
        student_width=student_config.hidden_size,
        teacher_width=teacher_config.hidden_size,
        shares_channels=first_rank_does(
            mesh,
            # Of one that is still to be cut it shows when it is.
            lambda: (
                origin_folder == teacher_folder or was_cut(teacher_folder, lineage.origin)
                if ready is None
                else shared_with(student_folder, teacher_folder, config.teacher.model).channels is not None
            ),
        ),
    )
    return Models(
        teacher_folder=teacher_folder,
        teacher_config=teacher_config,
        teacher_is_padded=teacher_config is not whole_config,
        origin=lineage.origin,
        origin_folder=origin_folder,
        origin_config=origin_config,
        student_folder=student_folder,
        previous_folder=lineage.previous,
        needs_cut=ready is None,
        split=split_models(config, teacher_config, student_config),
    )


def with_pruned_student(config: Config, models: Models) -> Models:
    """Return the models split for the student as it was cut, which scores and an evaluation have shaped by now.

    Raises:
        ConfigError: as `find_models`.
    """
    student_config = load_config(models.student_folder, key="student.model")
    check_models(config, models.teacher_config, student_config)
    return replace(models, split=split_models(config, models.teacher_config, student_config))


def load_stage(
    folder: Path,
    model_config: PretrainedConfig,
    config: Config,
    mesh: Mesh,
    *,
    trainable: bool,
    key: str,
    layers: Sequence[range],
    stage: int,
    num_slices: int = 1,
    may_be_padded: bool = False,
) -> StageModel:
    """Build one of this rank's stages of a model and read its weights.

    Args:
        key: the setting that names the model, for messages.
        layers: of each stage of the model.
        stage: which one.
        num_slices: pieces it can be run in.
        may_be_padded: whether the folder may hold more ids than `model_config` says, which are left there.
    Raises:
        ConfigError: the family or the files do not fit.
    """
    try:
        model = build_stage(
            model_config,
            pp=Axis("stage", size=len(layers), rank=stage),
            tp=mesh.tp,
            owned=layers[stage],
            device=mesh.device,
            dtype=DTYPES[config.train.dtype],
            trainable=trainable,
            num_slices=num_slices,
            recompute=config.train.recompute,
            compile_layers=config.train.compile,
        )
        load_weights(model, folder, may_be_padded=may_be_padded)
    except (UnsupportedModel, WeightsError) as error:
        raise ConfigError(f"{key}={folder}: {error}") from error
    return model


def load_stages(
    folder: Path,
    model_config: PretrainedConfig,
    config: Config,
    mesh: Mesh,
    *,
    trainable: bool,
    key: str,
    layers: Sequence[range],
) -> list[StageModel]:
    """Load all stages of a model that are this rank's, in ascending order; arguments and errors as `load_stage`."""
    return [
        load_stage(
            folder, model_config, config, mesh, trainable=trainable, key=key, layers=layers, stage=stage
        )
        for stage in range(mesh.pp.rank, len(layers), mesh.pp.size)
    ]


def load_teacher(config: Config, mesh: Mesh, models: Models) -> StageModel:
    """Load this rank's stage of the teacher, frozen.

    Raises:
        ConfigError: the family or the files do not fit.
    """
    return load_stage(
        models.teacher_folder,
        models.teacher_config,
        config,
        mesh,
        trainable=False,
        key="teacher.model",
        layers=models.split.teacher,
        stage=mesh.pp.rank,
        num_slices=models.split.num_slices,
        may_be_padded=models.teacher_is_padded,
    )


def load_origin(config: Config, mesh: Mesh, models: Models) -> StageModel:
    """Load this rank's stage of the model that cuts refer to, frozen, to score it.

    Raises:
        ConfigError: the family or the files do not fit.
    """
    even = replace(config, pipeline=replace(config.pipeline, student_layers=None, teacher_layers=None))
    split = split_models(even, models.origin_config, models.origin_config)
    return load_stage(
        models.origin_folder,
        models.origin_config,
        config,
        mesh,
        trainable=False,
        key="teacher.model",
        layers=split.teacher,
        stage=mesh.pp.rank,
    )


def load_student(
    config: Config, mesh: Mesh, models: Models, *, trainable: bool
) -> tuple[list[StageModel], PretrainedConfig]:
    """Load this rank's stages of the student, which is there by now; return them with the whole model's config.

    Raises:
        ConfigError: the family or the files do not fit.
    """
    student_config = load_config(models.student_folder, key="student.model")
    check_models(config, models.teacher_config, student_config)
    stages = load_stages(
        models.student_folder,
        student_config,
        config,
        mesh,
        trainable=trainable,
        key="student.model",
        layers=models.split.student,
    )
    return stages, student_config
