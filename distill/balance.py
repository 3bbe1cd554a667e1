"""Which layers of student and teacher each pipeline stage holds, so that every rank has the same work.

Decides the estimate: floating-point operations of a micro-batch's tokens, counted from the parameters of the families'
own modules, forward and backward for the student, forward for the teacher; both heads count on the last stage. The split
itself is `parallel.pipeline.partition`'s. A list that the user gives wins. Equal on all ranks, because it depends on the
settings and the configs alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from distill.config import Config, ConfigError
from parallel.model import build_meta_model, stage_names
from parallel.pipeline.partition import Layers, partition

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PretrainedConfig

_FORWARD, _FORWARD_AND_BACKWARD, _WITH_RECOMPUTE = 1.0, 3.0, 4.0


@dataclass(frozen=True)
class Split:
    """The layers of each stage."""

    student: tuple[range, ...]
    teacher: tuple[range, ...]


def split_models(config: Config, teacher_config: PretrainedConfig, student_config: PretrainedConfig) -> Split:
    """Return the layers of both models on each stage.

    Raises:
        ConfigError: a list of the user's that does not fit the model.
    """
    backward = _WITH_RECOMPUTE if config.train.recompute == "full" else _FORWARD_AND_BACKWARD
    student = _work(student_config, seq_len=config.data.seq_len, passes=backward)
    teacher = _work(teacher_config, seq_len=config.data.seq_len, passes=_FORWARD)
    best = partition(student, teacher, num_ranks=config.mesh.pp, num_microbatches=config.num_microbatches)
    pipeline = config.pipeline
    return Split(
        student=_ranges("student", pipeline.student_layers, best.student, config.mesh.pp),
        teacher=_ranges("teacher", pipeline.teacher_layers, best.teacher, config.mesh.pp),
    )


def _work(config: PretrainedConfig, *, seq_len: int, passes: float) -> Layers:
    """Return the multiply-adds of a model's layers and head for a token, times the passes over them."""
    model = build_meta_model(config)
    names = stage_names(model)
    layers = getattr(getattr(model, names.base), names.layers)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = 2 * seq_len * heads * head_dim
    layer_s = [
        passes * (attention + sum(parameter.numel() for parameter in layer.parameters())) for layer in layers
    ]
    # The head is never computed again.
    head_passes = min(passes, _FORWARD_AND_BACKWARD)
    return Layers(layer_s=layer_s, last_s=head_passes * model.get_submodule(names.head).weight.numel())


def _ranges(
    who: str, wanted: Sequence[int] | None, best: Sequence[int], num_stages: int
) -> tuple[range, ...]:
    counts = best if wanted is None else wanted
    if len(counts) != num_stages or sum(counts) != sum(best):
        raise ConfigError(
            f"pipeline.{who}_layers={list(counts)} must have mesh.pp={num_stages} entries that add up to the {who}'s "
            f"{sum(best)} layers"
        )
    return tuple(range(start, stop) for start, stop in pairwise(accumulate(counts, initial=0)))
