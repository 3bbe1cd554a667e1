"""What the student will look like before there is one, and whether both models fit the settings, as far as configs show it.

Decides that every shape which a budget may come to is checked before one is cut, and that ids which are padding to the student
are none of the teacher's. The sentences about sizes are those of `distill.model_checks`. Reads no weights.
"""

from __future__ import annotations

import copy

from transformers import PretrainedConfig

from distill.balance import split_models
from distill.config import Config, ConfigError
from distill.model_checks import check_models
from distill.ranks import find_targets
from distill.search import Candidate, candidate_shapes
from distill.shape import planned_config
from distill.sparsity_checks import check_sparse
from parallel.model import build_meta_model, stage_names
from parallel.plan import UnsupportedModel


def without_padding(teacher_config: PretrainedConfig, vocab_size: int) -> PretrainedConfig:
    """Return the config of a teacher that has no id which its student does not have.

    Sizes of one family pad the ids of one tokenizer to different widths (Qwen2.5: 151,936 and 152,064). What is beyond the
    student's takes no part in any softmax.
    """
    if teacher_config.get_text_config().vocab_size <= vocab_size:
        return teacher_config
    trimmed = copy.deepcopy(teacher_config)
    trimmed.get_text_config().vocab_size = vocab_size
    return trimmed


def checked_student(
    config: Config,
    teacher_config: PretrainedConfig,
    ready: PretrainedConfig | None,
    *,
    origin_config: PretrainedConfig | None = None,
) -> PretrainedConfig:
    """Return the student's config, which both models and the settings fit.

    Args:
        ready: of a student that is there; None plans the one that would be pruned, or of a budget every candidate, of which
            the first is returned.
        origin_config: of the model that it would be pruned out of; None: the teacher.
    Raises:
        ConfigError: what does not fit, or a shape that cannot be had.
    """
    _check_family(config, "teacher.model", teacher_config)
    possible = [ready]
    if ready is None:
        origin_config = origin_config or teacher_config
        check_models(config, teacher_config, origin_config)
        possible = planned_configs(config, origin_config)
    else:
        _check_family(config, "student.model", ready)
    for student_config in possible:
        _check_student(config, teacher_config, student_config)
    return possible[0]


def planned_configs(config: Config, origin_config: PretrainedConfig) -> list[PretrainedConfig]:
    """Return what the student may look like that is pruned out of a model: of a budget every candidate.

    Raises:
        ConfigError: a shape or a budget that cannot be had.
    """
    shapes = shapes_of(config, origin_config)
    return [planned_config(origin_config, candidate.shape) for candidate in shapes]


def _check_family(config: Config, key: str, model_config: PretrainedConfig) -> None:
    """Raise ConfigError unless a model of this family can be cut into stages."""
    try:
        stage_names(build_meta_model(model_config))
    except UnsupportedModel as error:
        name = config.teacher.model if key == "teacher.model" else config.student.model
        raise ConfigError(f"{key}={name}: {error}") from error


def _check_student(
    config: Config, teacher_config: PretrainedConfig, student_config: PretrainedConfig
) -> None:
    check_models(config, teacher_config, student_config)
    check_sparse(config.student.sparsity, student_config)
    if config.pipeline.student_layers is not None or config.pipeline.teacher_layers is not None:
        split_models(config, teacher_config, student_config)
    if not config.student.low_rank.is_asked:
        return
    find_targets(config.student.low_rank, student_config, tp=config.mesh.tp)
    differ = student_config.is_heterogeneous or config.student.prune.per_layer
    if config.export.low_rank == "factored" and differ:
        raise ConfigError(
            "export.low_rank=factored does not go with layers of different widths (student.prune.per_layer, or the "
            "student's own); use merged"
        )


def shapes_of(config: Config, teacher_config: PretrainedConfig) -> list[Candidate]:
    """Return the shape that the settings ask for, or those that meet the budget they set.

    Raises:
        ConfigError: a shape or a budget that cannot be had.
    """
    stages = config.mesh.pp * config.pipeline.virtual_stages
    return candidate_shapes(teacher_config, config.student.prune, tp=config.mesh.tp, fewest_layers=stages)
