"""Everything a round needs before its first step: models, rows, student, optimizer, planner and links.

Decides the order: the teacher is loaded first, because the student is cut from it where it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

from transformers import PretrainedConfig

from distill.balance import split_models
from distill.candidates import JUDGED_ROWS
from distill.config import Config
from distill.data import Batches, MicroBatch
from distill.forward import forward_links
from distill.hidden_loss import open_hidden
from distill.judging import Judge, load_tasks
from distill.loading import (
    Models,
    is_there,
    load_origin,
    load_student,
    load_teacher,
    with_pruned_student,
)
from distill.lowrank import factorise_student
from distill.planning import Planner
from distill.pretrained import load_config
from distill.rounds import Lineage
from distill.rows import Corpus, load_corpus, load_held_out
from distill.sparsity import InputNorms, Sparsifier, input_norms, sparsify
from distill.step import DistillationStep, messages
from distill.stream import Stream
from distill.student import prune_teacher
from parallel.mesh import Mesh
from parallel.model import StageModel
from parallel.optimizer import LearningRate, StageOptimizer
from parallel.pipeline.p2p import Links
from parallel.update_rules import OptimizerOptions


@dataclass
class Session:
    """The objects of a round on this rank."""

    models: Models
    corpus: Corpus
    text: Stream
    """The round's rows, from where the trainings before have stopped."""
    teacher: StageModel
    students: list[StageModel]
    """This rank's stages, in ascending order."""
    student_config: PretrainedConfig
    planner: Planner
    step: DistillationStep
    judge: Judge
    num_held_out: int
    """Rows of the text that models are judged by."""
    prune_s: float
    """Seconds that making the student took; 0 when it was there."""
    sparsifier: Sparsifier | None
    """Chooses which weights are held at zero; None where none are."""

    def close(self) -> None:
        """End the threads and let go of the process groups. Collectives: those of `DistillationStep.close`."""
        self.step.close()
        self.step.links.close()
        self.judge.links.close()


def open_session(
    config: Config,
    mesh: Mesh,
    models: Models,
    lineage: Lineage,
    *,
    judging: Config,
    read: Mapping[str, int],
    begins: Callable[[str], None] = lambda phase: None,
) -> Session:
    """Load, cut if needed, and bind everything for training a round.

    Args:
        config: settings of the round.
        models: what `find_models` has found for it.
        lineage: where its student comes from.
        judging: settings of the run, whose held-out text all rounds are judged by.
        read: tokens of rows that trainings before this one have read, by source (`Progress.read`).
        begins: told of each phase as it begins.
    Raises:
        ConfigError: a mistake that the corpus or the weights show.
    Collectives: many, over all axes.
    """
    begins("reading the text")
    tasks = load_tasks(judging, mesh, models.teacher_folder)
    corpus = load_corpus(config, mesh, models.teacher_folder)
    text = corpus.train.after(read)
    batches = Batches(
        text,
        global_batch_size=config.train.global_batch_size,
        microbatch_size=config.train.microbatch_size,
        dp_rank=mesh.dp.rank,
        dp_size=mesh.dp.size,
    )
    begins("loading the teacher")
    teacher = load_teacher(config, mesh, models)
    planned = models.split
    begins("making the student")
    models, prune_s = shape_student(config, mesh, models, corpus, teacher, lineage)
    if (planned.teacher, planned.num_slices) != (models.split.teacher, models.split.num_slices):
        # Scores shaped the student otherwise than planned, and the teacher's layers balance it.
        del teacher
        teacher = load_teacher(config, mesh, models)
    begins("loading the student")
    students, student_config = load_student(config, mesh, models, trainable=True)
    step, planner = bind_step(config, mesh, models, teacher=teacher, students=students, batches=batches.step)
    same_text = judging.data == config.data
    held_out = corpus.held_out if same_text else load_held_out(judging, mesh, models.teacher_folder)
    judging_links = links_of(judging, mesh, models, students, teacher)
    sparsifier = sparsify(
        config,
        stages=students,
        optimizer=step.optimizer,
        measure=partial(measure_inputs, config, mesh, models, corpus, students, lineage),
    )
    return Session(
        models=models,
        corpus=corpus,
        text=text,
        teacher=teacher,
        students=students,
        student_config=student_config,
        planner=planner,
        step=step,
        num_held_out=len(held_out.rows),
        judge=Judge.create(judging, mesh, models, held_out, tasks, judging_links),
        prune_s=prune_s,
        sparsifier=sparsifier,
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
    Raises:
        ConfigError: the hidden states of these models cannot be compared as the settings say.
    Collectives: those of `open_hidden`, of `StageOptimizer`, and of making and timing `Links`.
    """
    hidden = open_hidden(config, mesh, models, teacher=teacher, students=students)
    optimizer = StageOptimizer.of_stages(
        students,
        mesh,
        optimizer_options(config),
        _learning_rate(config),
        beside=None if hidden is None else hidden.entries,
    )
    rows, seq_len = config.train.microbatch_size, config.data.seq_len
    traffic = messages(students[0], teacher, rows=rows, seq_len=seq_len)
    links = Links(mesh, traffic, num_stages=len(models.split.student))
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
        hidden=hidden,
    )
    return step, planner


def links_of(
    config: Config, mesh: Mesh, models: Models, students: Sequence[StageModel], teacher: StageModel | None
) -> Links:
    """Return channels for forward passes of these stages. Collectives: those of making `Links`."""
    return forward_links(config, mesh, students, teacher, num_stages=len(models.split.student))


def measure_inputs(
    config: Config,
    mesh: Mesh,
    models: Models,
    corpus: Corpus,
    students: Sequence[StageModel],
    lineage: Lineage,
) -> InputNorms:
    """Measure the inputs of the student that the round begins with: its folder has it, also when a run goes on.

    Collectives: those of loading, of making the channels, and of `input_norms`.
    """
    if lineage.continued is not None:
        begins = replace(models, student_folder=lineage.continued)
        students, _ = load_student(config, mesh, begins, trainable=False)
    with closing(links_of(config, mesh, models, students, None)) as links:
        return input_norms(students, mesh, links, corpus.calibration(config, mesh))


def shape_student(
    config: Config, mesh: Mesh, models: Models, corpus: Corpus, teacher: StageModel, lineage: Lineage
) -> tuple[Models, float]:
    """Cut and factor the student as far as that is asked for and not done; return the models split for it, and the seconds.

    Collectives: those of `prune_for` and `factorise_for`.
    """
    seconds = 0.0
    if models.needs_cut:
        with mesh.activity.doing("pruning", computes=True):
            seconds = prune_for(config, mesh, models, corpus, teacher)
        models = with_pruned_student(config, models)
    if config.student.low_rank.is_asked:
        with mesh.activity.doing("factoring", computes=True):
            models, low_rank_s = factorise_for(config, mesh, models, corpus, lineage)
        seconds += low_rank_s
    return models, seconds


def prune_for(config: Config, mesh: Mesh, models: Models, corpus: Corpus, teacher: StageModel) -> float:
    """Cut the student into `models.student_folder`, if it is not there; return the seconds it took.

    Args:
        teacher: this rank's stage of the round's teacher.
    Collectives: a broadcast over the world; those of loading and scoring the model that is cut.
    """
    if is_there(models.student_folder, mesh):
        return 0.0
    origin = teacher if models.origin_folder == models.teacher_folder else load_origin(config, mesh, models)
    with closing(links_of(config, mesh, models, (), origin)) as links:
        return prune_teacher(
            # What is scored, cut and remembered is the origin, whoever teaches the round.
            replace(config, teacher=replace(config.teacher, model=models.origin)),
            mesh,
            teacher=origin,
            teacher_config=models.origin_config,
            teacher_folder=models.origin_folder,
            links=links,
            microbatches=corpus.calibration(config, mesh),
            judging=corpus.held_out.microbatches(config, mesh, most=JUDGED_ROWS),
            target=models.student_folder,
            previous=models.previous_folder,
        )


def factorise_for(
    config: Config, mesh: Mesh, models: Models, corpus: Corpus, lineage: Lineage
) -> tuple[Models, float]:
    """Factor the dense student of `models.student_folder` into `lineage.factored`; return where it is now, and the seconds.

    The student's layers are split anew, for they cost less; the teacher's stay where they have been loaded.

    Raises:
        ConfigError: linears that cannot be factored as asked.
    Collectives: a broadcast over the world; those of `load_student` and `factorise_student`.
    """
    folder, seconds = lineage.factored, 0.0
    if not is_there(folder, mesh):
        students, student_config = load_student(config, mesh, models, trainable=False)
        with closing(links_of(config, mesh, models, students, None)) as links:
            seconds = factorise_student(
                config,
                mesh,
                students=students,
                student_config=student_config,
                source=models.student_folder,
                links=links,
                microbatches=corpus.calibration(config, mesh),
                target=folder,
            )
    layers = tuple(len(owned) for owned in models.split.teacher)
    pinned = replace(config.pipeline, teacher_layers=layers, slices=models.split.num_slices)
    split = split_models(replace(config, pipeline=pinned), models.teacher_config, load_config(folder))
    return replace(models, student_folder=folder, split=split), seconds


def optimizer_options(config: Config) -> OptimizerOptions:
    """Return the settings of the optimizer as it takes them."""
    options = config.optimizer
    return OptimizerOptions(
        name=options.name,
        betas=options.betas,
        eps=options.eps,
        weight_decay=options.weight_decay,
        momentum=options.momentum,
        clip=options.clip or 0.0,
        engine=options.engine,
        zero_stage=options.zero_stage,
        offload=options.offload,
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
