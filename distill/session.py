"""Everything a run needs before its first step: models, rows, student, optimizer, plan and links.

Decides the order: the teacher is loaded first, because the student is cut from it where it stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from distill.config import Config
from distill.data import Batches, MicroBatch
from distill.evaluate import evaluate, num_parameters
from distill.loading import Corpus, Models, find_models, load_corpus, load_student, load_teacher
from distill.step import DistillationStep, messages
from distill.student import prune_teacher
from parallel.mesh import Mesh
from parallel.model import StageModel
from parallel.optimizer import AdamWOptions, LearningRate, StageOptimizer
from parallel.pipeline.actions import Kind, Plan
from parallel.pipeline.lower import add_communication
from parallel.pipeline.p2p import Links
from parallel.pipeline.schedules import make_plan
from parallel.pipeline.validate import check_deadlock, validate


def make_training_plan(config: Config) -> Plan:
    """Return the lowered plan of one step, proven: dependencies, bounds, no deadlock."""
    pipeline = config.pipeline
    plan = make_plan(
        schedule=pipeline.schedule,
        teacher=pipeline.teacher if needs_teacher(config) else None,
        num_ranks=config.mesh.pp,
        num_microbatches=config.num_microbatches,
        num_slices=pipeline.slices,
        virtual_stages=pipeline.virtual_stages,
    )
    lowered = add_communication(plan)
    validate(lowered)
    check_deadlock(lowered)
    return lowered


def needs_teacher(config: Config) -> bool:
    """Whether the loss looks at the teacher at all."""
    return config.loss.alpha < 1.0


@dataclass
class Session:
    """The objects of a run on this rank."""

    models: Models
    corpus: Corpus
    batches: Batches
    teacher: StageModel
    student: StageModel
    student_config: PretrainedConfig
    optimizer: StageOptimizer
    plan: Plan
    links: Links
    step: DistillationStep
    judging: Sequence[MicroBatch]
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
    student, student_config = load_student(config, mesh, models, trainable=True)
    optimizer = StageOptimizer.of_stage(student, mesh, _adamw(config), _learning_rate(config))
    plan = make_training_plan(config)
    rows, seq_len = config.train.microbatch_size, config.data.seq_len
    links = Links(mesh, messages(student, teacher, rows=rows, seq_len=seq_len))
    step = DistillationStep(
        mesh=mesh,
        student=student,
        teacher=teacher if needs_teacher(config) else None,
        optimizer=optimizer,
        plan=plan,
        loss=config.loss,
        links=links,
    )
    judging = corpus.judging(config, mesh)
    return Session(
        models,
        corpus,
        batches,
        teacher,
        student,
        student_config,
        optimizer,
        plan,
        links,
        step,
        judging,
        prune_s,
    )


def prune_for(config: Config, mesh: Mesh, models: Models, corpus: Corpus, teacher: StageModel) -> float:
    """Cut the student out of the loaded teacher into `models.student_folder`; return the seconds it took."""
    traffic = messages(None, teacher, rows=config.train.microbatch_size, seq_len=config.data.seq_len)
    return prune_teacher(
        config,
        mesh,
        teacher=teacher,
        teacher_config=models.teacher_config,
        teacher_folder=models.teacher_folder,
        links=Links(mesh, {Kind.K: traffic[Kind.K]}),
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
    student, _ = load_student(config, mesh, models, trainable=False)
    traffic = messages(student, teacher, rows=config.train.microbatch_size, seq_len=config.data.seq_len)
    links = Links(mesh, {kind: traffic[kind] for kind in (Kind.F, Kind.K)})
    judging = corpus.judging(config, mesh)
    judged = {
        "teacher": evaluate(mesh, links, judging, teacher=teacher),
        "student": evaluate(mesh, links, judging, student=student, teacher=teacher),
    }
    sizes = {"teacher": num_parameters(teacher, mesh), "student": num_parameters(student, mesh)}
    return [
        {
            "model": who,
            "parameters": sizes[who],
            **{name.removeprefix("eval/"): value for name, value in quality.named().items()},
        }
        for who, quality in judged.items()
    ]
