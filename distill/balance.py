"""Which layers of student and teacher each pipeline stage holds, so that every rank has the same work.

Decides the estimate: multiply-adds of a token, counted from the parameters of the families' own modules, forward and
backward for the student, forward for the teacher; both heads count on the last stage, in the student's backward, where
they run. A measured profile takes its place. The split itself is `parallel.pipeline.partition`'s. A list that the user
gives wins, and what is left open is evened out around it. Equal on all ranks, because it depends on the arguments alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from distill.config import Config, ConfigError
from distill.costs import MOST_SLICES, Profile, Split, choose_slices, stage_costs, stage_sums
from distill.hidden_map import mapped_layers
from distill.planning import make_step_plan
from parallel.model import build_meta_model, stage_names
from parallel.pipeline.partition import Layers, Partition, partition

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def split_models(
    config: Config,
    teacher_config: PretrainedConfig,
    student_config: PretrainedConfig,
    *,
    profile: Profile | None = None,
) -> Split:
    """Return the layers of both models on each stage, and the number of slices of the teacher.

    Args:
        config: `mesh.dp` filled in.
        profile: what the parts of the models cost; None counts multiply-adds.
    Raises:
        ConfigError: a list of the user's that does not fit the model, or fewer layers than stages.
    """
    work = profile or count_work(config, teacher_config, student_config)
    num_ranks, wanted = config.mesh.pp, config.pipeline
    virtual_stages = wanted.virtual_stages
    student = _pinned(
        "student", work.student, wanted.student_layers, num_ranks=num_ranks, virtual_stages=virtual_stages
    )
    teacher = _pinned("teacher", work.teacher, wanted.teacher_layers, num_ranks=num_ranks)
    try:
        best = _partition(config, student, teacher)
    except ValueError as error:
        raise ConfigError(
            f"mesh.pp={num_ranks} x pipeline.virtual_stages={virtual_stages}: {error}; use fewer stages"
        ) from error
    split = Split(
        _ranges(wanted.student_layers or best.student), _ranges(wanted.teacher_layers or best.teacher)
    )
    return replace(split, num_slices=_num_slices(config, work, split))


def count_work(config: Config, teacher_config: PretrainedConfig, student_config: PretrainedConfig) -> Profile:
    """Return the multiply-adds of a token in each part of both models.

    forward = parameters + attention      attention = 2 * seq_len * heads * head width
    gradient of the input = parameters + 2 * attention, and what is computed again
    gradient of the weights = parameters
    a layer whose hidden states are compared: its projection twice and once more
    """
    parameters, attention, head = count_layers(student_config, seq_len=config.data.seq_len)
    teacher_parameters, teacher_attention, teacher_head = count_layers(
        teacher_config, seq_len=config.data.seq_len
    )
    again = {
        "none": [0.0] * len(parameters),
        "selective": attention,
        "full": _add(parameters, attention),
    }[config.train.recompute]
    # A mapped layer's projection runs forward and twice backward, all of it in the student's backward.
    projection = [0.0] * len(parameters)
    hidden = config.loss.hidden
    if hidden.is_on and hidden.projection == "learned":
        for layer in mapped_layers(hidden, len(parameters)):
            projection[layer] = float(student_config.hidden_size * teacher_config.hidden_size)
    # The student's head runs forward and twice backward, the teacher's once, and not at all without a soft loss.
    heads = 3 * head + (teacher_head if config.needs_teacher else 0)
    return Profile(
        forward=Layers(_add(parameters, attention)),
        backward_input=Layers(
            _add(parameters, attention, attention, again, projection, projection), last_s=heads
        ),
        backward_weight=Layers(_add(parameters, projection)),
        teacher=Layers(_add(teacher_parameters, teacher_attention)),
        step=Layers([0.0] * len(parameters)),
    )


def count_layers(config: PretrainedConfig, *, seq_len: int) -> tuple[list[float], list[float], float]:
    """Return parameters and attention's multiply-adds of a token in each layer, and the head's parameters."""
    model = build_meta_model(config)
    names = stage_names(model)
    layers = getattr(getattr(model, names.base), names.layers)
    parameters = [float(sum(each.numel() for each in layer.parameters())) for layer in layers]
    attention = []
    for index in range(len(layers)):
        # Layers may differ in width, and their common config then refuses to tell one.
        own = config.get_text_config().per_layer_config[index]
        head_dim = getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads
        attention.append(2.0 * seq_len * own.num_attention_heads * head_dim)
    return parameters, attention, float(model.get_submodule(names.head).weight.numel())


def _add(*columns: Sequence[float]) -> list[float]:
    return [sum(each) for each in zip(*columns, strict=True)]


def _partition(config: Config, student: Layers, teacher: Layers) -> Partition:
    """Return the best counts of both models for the way in which the settings run the teacher."""
    num_ranks, virtual_stages = config.mesh.pp, config.pipeline.virtual_stages
    if config.needs_teacher:
        # Only in the bubbles is the teacher free, so that a slow stage of the student can cost more than a busy rank.
        in_bubbles = config.pipeline.teacher == "fill"
        return partition(
            student,
            teacher,
            num_ranks=num_ranks,
            virtual_stages=virtual_stages,
            num_microbatches=config.num_microbatches if in_bubbles else None,
        )
    # A teacher that only judges takes no time in a step, but it still takes memory.
    alone = partition(student, None, num_ranks=num_ranks, virtual_stages=virtual_stages)
    return alone._replace(teacher=partition(teacher, None, num_ranks=num_ranks).student)


def _pinned(
    who: str, layers: Layers, counts: Sequence[int] | None, *, num_ranks: int, virtual_stages: int = 1
) -> Layers:
    """Return a model as one unbreakable layer a stage when the user says which layers a stage has."""
    if counts is None:
        return layers
    num_stages = num_ranks * virtual_stages
    if len(counts) != num_stages or sum(counts) != len(layers.layer_s) or min(counts) < 0:
        size = f"mesh.pp={num_ranks}"
        if virtual_stages > 1:
            size += f" x pipeline.virtual_stages={virtual_stages} = {num_stages}"
        raise ConfigError(
            f"pipeline.{who}_layers={list(counts)} must have {size} entries that add up to the {who}'s "
            f"{len(layers.layer_s)} layers"
        )
    return Layers(stage_sums(layers, _ranges(counts)))


def _ranges(counts: Sequence[int]) -> tuple[range, ...]:
    return tuple(range(start, stop) for start, stop in pairwise(accumulate(counts, initial=0)))


def _num_slices(config: Config, work: Profile, split: Split) -> int:
    """Return the user's number of slices, or the one to fill with."""
    pipeline = config.pipeline
    longest = max(len(layers) for layers in split.teacher)
    if pipeline.slices is not None:
        return min(pipeline.slices, longest)
    if pipeline.teacher != "fill" or config.mesh.pp == 1 or not config.needs_teacher:
        return 1
    student = make_step_plan(config, teacher=None, num_slices=1)
    most = min(MOST_SLICES, longest)
    return choose_slices(
        student, lambda number: stage_costs(work, replace(split, num_slices=number)), most=most
    )
