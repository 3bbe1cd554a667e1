"""Models and micro-batches for benchmarks that train: whatever is not named is random.

Decides the shape of the models: SmolLM2-135M, and for the student the same with 0.6 of the FFN channels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from distill.config import Config, Data, Loss, MeshShape, Optimizer, Pipeline, Teacher, Train
from distill.data import IGNORE, MicroBatch
from distill.loading import find_models, load_student, load_teacher
from distill.planning import Planner
from distill.pretrained import EMBEDDED, resolve_model
from distill.session import bind_step
from distill.step import DistillationStep
from distill.student_config import Student
from parallel.mesh import Mesh

_KEPT_CHANNELS, _MULTIPLE = 0.6, 32
_LOSS_TOLERANCE = 1e-3
_CACHE = Path("cache")
BETAS, CLIP = (0.9, 0.95), 1.0
"""AdamW's decay rates and the largest gradient norm, of all sides."""


def model_folders(teacher: str, student: str, folder: Path) -> tuple[str, str]:
    """Return the folders of both models; those that were not named are written.

    Args:
        teacher: a folder, `embedded`, or "".
        student: a folder or "", which is the teacher's shape with fewer FFN channels.
        folder: where to write.
    """
    if teacher == EMBEDDED:
        teacher = str(resolve_model(EMBEDDED, cache_dir=_CACHE, trust_remote_code=False, key="teacher"))
    elif not teacher:
        teacher = _write(_smollm2(), folder / "teacher", seed=0)
    if not student:
        pruned = AutoConfig.from_pretrained(teacher)
        channels = _KEPT_CHANNELS * pruned.intermediate_size
        pruned.intermediate_size = max(1, round(channels / _MULTIPLE)) * _MULTIPLE
        student = _write(pruned, folder / "student", seed=1)
    return teacher, student


def _smollm2() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        max_position_embeddings=8192,
    )


def _write(config: PretrainedConfig, folder: Path, *, seed: int) -> str:
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


def microbatches(input_ids_RS: Tensor, microbatch_size: int) -> list[MicroBatch]:
    """Return rows [R, S] as micro-batches; the last token of a row has nothing to predict."""
    labels_RS = input_ids_RS.roll(-1, dims=1)
    labels_RS[:, -1] = IGNORE
    positions_RS = torch.arange(input_ids_RS.shape[1]).expand_as(input_ids_RS)
    pieces = (part.split(microbatch_size) for part in (input_ids_RS, positions_RS, labels_RS))
    return [MicroBatch(*piece) for piece in zip(*pieces, strict=True)]


def soft_config(
    teacher: str,
    student: str,
    *,
    temperature: float,
    seq_len: int,
    train: Train,
    lr: float,
    pipeline: Pipeline,
    pp: int = 1,
) -> Config:
    """Return the settings of a training on the soft loss alone, at a constant learning rate and clipped to norm 1."""
    return Config(
        teacher=Teacher(model=teacher),
        student=Student(model=student),
        loss=Loss(temperature=temperature, alpha=0.0),
        mesh=MeshShape(pp=pp, dp=1, tp=1),
        pipeline=pipeline,
        data=Data(seq_len=seq_len),
        train=train,
        optimizer=Optimizer(lr=lr, betas=BETAS, clip=CLIP, schedule="constant"),
    )


def load_step(
    config: Config, mesh: Mesh, batches: Callable[[int], Sequence[MicroBatch]]
) -> tuple[DistillationStep, Planner]:
    """Return the step and the planner of a training by these settings, on micro-batches given."""
    models = find_models(config, mesh)
    teacher = load_teacher(config, mesh, models)
    students, _ = load_student(config, mesh, models, trainable=True)
    return bind_step(config, mesh, models, teacher=teacher, students=students, batches=batches)


def check_losses(losses: Mapping[str, Sequence[float]]) -> None:
    """Raise AssertionError unless all sides, by name, computed the same losses."""
    first = next(iter(losses.values()), ())
    for side, found in losses.items():
        for ours, theirs in zip(first, found, strict=True):
            assert abs(theirs - ours) <= _LOSS_TOLERANCE * abs(ours), (side, losses)
