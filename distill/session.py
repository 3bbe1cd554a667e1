"""Everything a run needs before its first step: models, rows, student, optimizer, planner and links.

Decides the order: the teacher is loaded first, because the student is cut from it where it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from distill.config import Config
from distill.data import Batches, MicroBatch
from distill.evaluate import evaluate, num_parameters
from distill.loading import Corpus, Models, find_models, load_corpus, load_student, load_teacher
from distill.planning import Planner
from distill.step import DistillationStep, messages
from distill.student import prune_teacher
from parallel.mesh import Mesh
from parallel.model import StageModel
from parallel.optimizer import AdamWOptions, LearningRate, StageOptimizer
from parallel.pipeline.actions import Kind
from parallel.pipeline.p2p import Links, Message


@dataclass
class Session:
    """The objects of a run on this rank."""

    models: Models
    corpus: Corpus
    teacher: StageModel
    students: list[StageModel]
    """This rank's stages, in ascending order."""
    student_config: PretrainedConfig
    planner: Planner
    step: DistillationStep
    judging: Sequence[MicroBatch]
    judging_links: Links
    """Channels of their own: a teacher that is ahead has messages under way on the training's."""
    prune_s: float
    """Seconds that making the student took; 0 when it was there."""


def open_session(config: Config, mesh: Mesh) -> Session:
    """Load, prune if needed, and bind everything for training.

    Raises:
        ConfigError: a mistake in the settings, the models or the corpus.
    Collectives: many, over all axes.
    """
    models = find_models(config, mesh)
    corpus = load_corpus(config, mesh, models.teacher_folder)
    batches = Batches(
        corpus.train,
        global_batch_size=config.train.global_batch_size,
        microbatch_size=config.train.microbatch_size,
        seed=config.train.seed,
        dp_rank=mesh.dp.rank,
        dp_size=mesh.dp.size,
    )
    teacher = load_teacher(config, mesh, models)
    prune_s = prune_for(config, mesh, models, corpus, teacher) if models.needs_pruning else 0.0
    students, student_config = load_student(config, mesh, models, trainable=True)
    step, planner = bind_step(config, mesh, models, teacher=teacher, students=students, batches=batches.step)
    return Session(
        models=models,
        corpus=corpus,
        teacher=teacher,
        students=students,
        student_config=student_config,
        planner=planner,
        step=step,
        judging=corpus.judging(config, mesh),
        judging_links=_forward_links(config, mesh, models, students, teacher),
        prune_s=prune_s,
    )


def bind_step(
    config: Config,
    mesh: Mesh,
    models: Models,
    *,
    teacher: StageModel,
    students: Sequence[StageModel],
    batches: Callable[[int], Sequence[MicroBatch]],
) -> tuple[DistillationStep, Planner]:
    """Return this rank's step over loaded models, and the planner that keeps its course.

    Args:
        teacher, students: this rank's stages.
        batches: step -> this replica's micro-batches.
    Collectives: those of making and timing `Links`, and of `StageOptimizer`.
    """
    optimizer = StageOptimizer.of_stages(students, mesh, _adamw(config), _learning_rate(config))
    links = Links(mesh, _traffic(config, students, teacher), num_stages=len(models.split.student))
    latency_s = links.measure_latency()
    planner = Planner(config, mesh, num_slices=models.split.num_slices, latency=latency_s)
    step = DistillationStep(
        mesh=mesh,
        students=students,
        teacher=teacher if config.needs_teacher else None,
        optimizer=optimizer,
        course=planner.course,
        loss=partial(config.loss.at, num_steps=config.train.steps),
        links=links,
        batches=batches,
    )
    return step, planner


def _traffic(
    config: Config, students: Sequence[StageModel], teacher: StageModel | None
) -> dict[Kind, Message]:
    student = students[0] if students else None
    return messages(student, teacher, rows=config.train.microbatch_size, seq_len=config.data.seq_len)


def _forward_links(
    config: Config, mesh: Mesh, models: Models, students: Sequence[StageModel], teacher: StageModel
) -> Links:
    """Return channels for forward passes alone. Collectives: those of making `Links`."""
    traffic = _traffic(config, students, teacher)
    forward = {kind: message for kind, message in traffic.items() if kind is not Kind.B}
    return Links(mesh, forward, num_stages=len(models.split.student))


def prune_for(config: Config, mesh: Mesh, models: Models, corpus: Corpus, teacher: StageModel) -> float:
    """Cut the student out of the loaded teacher into `models.student_folder`; return the seconds it took."""
    return prune_teacher(
        config,
        mesh,
        teacher=teacher,
        teacher_config=models.teacher_config,
        teacher_folder=models.teacher_folder,
        links=_forward_links(config, mesh, models, (), teacher),
        microbatches=corpus.calibration(config, mesh),
        target=models.student_folder,
    )


def _adamw(config: Config) -> AdamWOptions:
    options = config.optimizer
    return AdamWOptions(
        betas=options.betas, eps=options.eps, weight_decay=options.weight_decay, clip=options.clip or 0.0
    )


def _learning_rate(config: Config) -> LearningRate:
    options = config.optimizer
    return LearningRate(
        peak=options.lr,
        warmup_steps=options.warmup_steps,
        total_steps=config.train.steps,
        schedule=options.schedule,
        min_ratio=options.min_lr_ratio,
    )


def make_student(config: Config, mesh: Mesh) -> Path:
    """Write the pruned student to `run.dir`/student and nothing else; return the folder.

    Raises:
        ConfigError: a mistake in the settings, the teacher or the corpus.
    Collectives: those of loading and scoring the teacher.
    """
    models = replace(find_models(config, mesh), student_folder=Path(config.run.dir) / "student")
    corpus = load_corpus(config, mesh, models.teacher_folder)
    teacher = load_teacher(config, mesh, models)
    prune_for(config, mesh, models, corpus, teacher)
    return models.student_folder


def judge_models(config: Config, mesh: Mesh) -> list[dict[str, Any]]:
    """Judge the teacher, and the ready student against it, on the held-out text; return one row for each.

    Raises:
        ConfigError: a mistake in the settings, the models or the corpus.
    Collectives: those of loading and evaluating both models.
    """
    models = find_models(config, mesh)
    corpus = load_corpus(config, mesh, models.teacher_folder)
    teacher = load_teacher(config, mesh, models)
    students, _ = load_student(config, mesh, models, trainable=False)
    links = _forward_links(config, mesh, models, students, teacher)
    judging = corpus.judging(config, mesh)
    judged = {
        "teacher": evaluate(mesh, links, judging, teacher=teacher),
        "student": evaluate(mesh, links, judging, students=students, teacher=teacher),
    }
    sizes = {"teacher": num_parameters([teacher], mesh), "student": num_parameters(students, mesh)}
    return [
        {
            "model": who,
            "parameters": sizes[who],
            **{name.removeprefix("eval/"): value for name, value in quality.whole().items()},
        }
        for who, quality in judged.items()
    ]
