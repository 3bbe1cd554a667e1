"""Everything a run needs before its first step: models, rows, student, optimizer, plan and links.

Decides the order: what can be refused from configs alone is refused before weights are read; rank 0 fetches and
tokenises while the others wait; the teacher is loaded first, because the student is cut from it where it stands.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PretrainedConfig

from distill.checks import check_models
from distill.config import Config, ConfigError
from distill.data import Batches, MicroBatch, Rows, load_rows, sequential_microbatches
from distill.evaluate import evaluate, num_parameters
from distill.pretrained import load_config, load_tokenizer, resolve_model
from distill.shape import resolve_shape
from distill.step import DistillationStep, messages
from distill.student import prune_teacher
from parallel.collectives import broadcast_object
from parallel.mesh import Mesh
from parallel.model import StageModel, build_stage
from parallel.optimizer import AdamWOptions, LearningRate, StageOptimizer
from parallel.pipeline.actions import Kind, Plan
from parallel.pipeline.lower import add_communication
from parallel.pipeline.p2p import Links
from parallel.pipeline.schedules import make_plan
from parallel.pipeline.validate import check_deadlock, validate
from parallel.plan import UnsupportedModel
from parallel.weights import WeightsError, load_weights

T = TypeVar("T")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def first_rank_does(mesh: Mesh, work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and return its picklable result on every rank; its ConfigError is raised on every rank.

    Collectives: one broadcast over the world.
    """
    outcome: tuple[bool, T | str] | None = None
    if mesh.world.is_first:
        try:
            outcome = (True, work())
        except ConfigError as error:
            outcome = (False, str(error))
    ok, value = broadcast_object(outcome, mesh.world)
    if not ok:
        raise ConfigError(value)
    return value


@dataclass(frozen=True)
class Models:
    """Where the models are and what they look like, before weights are read."""

    teacher_folder: Path
    teacher_config: PretrainedConfig
    student_folder: Path
    """For a student that is still to be pruned: where it will be."""
    needs_pruning: bool


def find_models(config: Config, mesh: Mesh) -> Models:
    """Fetch what is named, and check everything that configs alone can show.

    Raises:
        ConfigError: a model that is not there or does not fit.
    Collectives: broadcasts over the world.
    """
    cache = Path(config.data.cache_dir) / "models"
    trust = config.teacher.trust_remote_code

    def fetch(name: str, key: str) -> Path:
        return first_rank_does(
            mesh, lambda: resolve_model(name, cache_dir=cache, trust_remote_code=trust, key=key)
        )

    teacher_folder = fetch(config.teacher.model, "teacher.model")
    teacher_config = load_config(teacher_folder, trust_remote_code=trust)
    if config.student.model is not None:
        student_folder = fetch(config.student.model, "student.model")
        student_config = load_config(student_folder, trust_remote_code=trust, key="student.model")
        check_models(config, teacher_config, student_config)
        return Models(teacher_folder, teacher_config, student_folder, needs_pruning=False)
    check_models(config, teacher_config, teacher_config)
    shape = resolve_shape(teacher_config, config.student.prune, tp=mesh.tp.size)
    planned = copy.deepcopy(teacher_config)
    planned.num_hidden_layers = shape.num_layers
    check_models(config, teacher_config, planned)
    return Models(teacher_folder, teacher_config, Path(config.run.dir) / "pruned", needs_pruning=True)


def load_stage(
    folder: Path, model_config: PretrainedConfig, config: Config, mesh: Mesh, *, trainable: bool, key: str
) -> StageModel:
    """Build this rank's stage of a model and read its weights.

    Raises:
        ConfigError: the family or the files do not fit.
    """
    try:
        stage = build_stage(
            model_config,
            pp=mesh.pp,
            tp=mesh.tp,
            device=mesh.device,
            dtype=DTYPES[config.train.dtype],
            trainable=trainable,
            num_slices=1 if trainable else config.pipeline.slices,
            recompute=trainable and config.train.recompute,
        )
        load_weights(stage, folder)
    except (UnsupportedModel, WeightsError) as error:
        raise ConfigError(f"{key}={folder}: {error}") from error
    return stage


@dataclass(frozen=True)
class Corpus:
    """The rows to train on, calibrate with and judge by."""

    train: Rows
    held_out: Rows

    def calibration(self, config: Config, mesh: Mesh) -> list[MicroBatch]:
        """Return this replica's calibration micro-batches."""
        return self._sequence(self.train, config.student.prune.calibration_rows, config, mesh)

    def judging(self, config: Config, mesh: Mesh) -> list[MicroBatch]:
        """Return this replica's held-out micro-batches."""
        return self._sequence(self.held_out, config.evaluate.rows, config, mesh)

    @staticmethod
    def _sequence(rows: Rows, num_rows: int, config: Config, mesh: Mesh) -> list[MicroBatch]:
        batches = sequential_microbatches(
            rows,
            microbatch_size=config.train.microbatch_size,
            num_rows=min(num_rows, len(rows)),
            dp_rank=mesh.dp.rank,
            dp_size=mesh.dp.size,
        )
        return [batch.to(mesh.device) for batch in batches]


def load_corpus(config: Config, mesh: Mesh, tokenizer_folder: Path) -> Corpus:
    """Tokenise the corpus on rank 0 (or find it in the cache) and open it on every rank.

    Raises:
        ConfigError: no usable text.
    Collectives: broadcasts over the world.
    """
    tokenizer = load_tokenizer(tokenizer_folder, trust_remote_code=config.teacher.trust_remote_code)

    def rows(part: str, *, show_progress: bool) -> Rows:
        cache = Path(config.data.cache_dir) / "corpora"
        return load_rows(
            config.data,
            tokenizer,
            part=part,
            seed=config.train.seed,
            cache_dir=cache,
            show_progress=show_progress,
        )

    parts = ("train", "held_out")
    first_rank_does(mesh, lambda: [len(rows(part, show_progress=True)) for part in parts])
    return Corpus(*(rows(part, show_progress=False) for part in parts))


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
    teacher = load_stage(
        models.teacher_folder, models.teacher_config, config, mesh, trainable=False, key="teacher.model"
    )
    prune_s = prune_for(config, mesh, models, corpus, teacher) if models.needs_pruning else 0.0
    student_config = load_config(models.student_folder, key="student.model")
    check_models(config, models.teacher_config, student_config)
    student = load_stage(
        models.student_folder, student_config, config, mesh, trainable=True, key="student.model"
    )
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
    teacher = load_stage(
        models.teacher_folder, models.teacher_config, config, mesh, trainable=False, key="teacher.model"
    )
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
    student_config = load_config(models.student_folder, key="student.model")
    teacher = load_stage(
        models.teacher_folder, models.teacher_config, config, mesh, trainable=False, key="teacher.model"
    )
    student = load_stage(
        models.student_folder, student_config, config, mesh, trainable=False, key="student.model"
    )
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
