"""What commands do with models without training them: write a student, judge a teacher and a student.

The work is what a run does before and between its steps (`distill.session`, `distill.judging`). A student that is only pruned
is written by the cut itself, in the teacher's dtypes; one that is factored or made sparse besides is loaded, and exported as a
run exports it, in `train.dtype`.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from distill.config import Config
from distill.corpus import skipped_line
from distill.deploy.export import export_student, model_card
from distill.evaluate import num_parameters
from distill.judging import Judge, load_tasks
from distill.loading import DTYPES, Models, find_models, first_rank_does, load_student, load_teacher
from distill.rounds import STUDENT_FOLDER, Lineage, lineage_of, rounds_of
from distill.rows import Corpus, load_corpus, load_held_out
from distill.session import links_of, measure_inputs, shape_student
from distill.sparsity import sparsify
from parallel.mesh import Mesh
from parallel.model import StageModel
from parallel.optimizer import LearningRate, StageOptimizer
from parallel.update_rules import OptimizerOptions


def make_student(config: Config, mesh: Mesh) -> Path:
    """Write the first round's student to `run.dir`/student as its training would begin with it; return the folder.

    Pruned, factored where `student.low_rank` asks for it (merged or not, as `export.low_rank` says), and with the zeros of
    `student.sparsity`, all of them at once. Beside it are the scores, and of a budget the candidates.

    Raises:
        ConfigError: a mistake in the settings, the teacher or the corpus.
    Collectives: those of loading and scoring the teacher, and of exporting the student.
    """
    config = rounds_of(config)[0]
    target = Path(config.run.dir) / STUDENT_FOLDER
    lineage = lineage_of([config], 0)
    models = find_models(config, mesh, lineage)
    if not config.student.low_rank.is_asked and config.student.sparsity.method is None:
        _shape(config, mesh, replace(models, student_folder=target), lineage)
        return target
    with _temporary(target, mesh) as (cut, factored):
        lineage = replace(lineage, factored=factored)
        models, corpus = _shape(config, mesh, replace(models, student_folder=cut), lineage)
        _finish(config, mesh, models, corpus, lineage, target)
    return target


def _shape(config: Config, mesh: Mesh, models: Models, lineage: Lineage) -> tuple[Models, Corpus]:
    """Cut and factor the student; return where it is, and the text that it was scored on."""
    corpus = load_corpus(config, mesh, models.teacher_folder)
    teacher = load_teacher(config, mesh, models)
    models, _ = shape_student(config, mesh, models, corpus, teacher, lineage)
    return models, corpus


@contextmanager
def _temporary(target: Path, mesh: Mesh) -> Iterator[tuple[Path, Path]]:
    """Give two folders beside the student's that are not there, and remove what is in them by the end."""
    folders = tuple(target.with_name(f".{name}-{target.name}") for name in ("cut", "factored"))

    def remove() -> None:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)

    # One that was killed may have left some.
    first_rank_does(mesh, remove)
    try:
        yield folders
    finally:
        if mesh.world.is_first:
            remove()


def _finish(
    config: Config, mesh: Mesh, models: Models, corpus: Corpus, lineage: Lineage, target: Path
) -> None:
    """Export the student that is in `models.student_folder`, with its zeros. Collectives: those of `export_student`."""
    students, student_config = load_student(config, mesh, models, trainable=True)
    summary: dict[str, Any] = {"tokens": 0}
    share = _hold_at_zero(config, mesh, models, corpus, students, lineage)
    if share is not None:
        summary["sparsity"] = {"pattern": config.student.sparsity.pattern, "share": share}
    export_student(
        students,
        mesh,
        target,
        source=models.student_folder,
        model_config=student_config,
        card=model_card(
            config,
            summary,
            origin=models.origin,
            model_config=student_config,
        ),
        dtype=DTYPES[config.train.dtype],
        merge_factors=config.export.low_rank == "merged",
    )


def _hold_at_zero(
    config: Config,
    mesh: Mesh,
    models: Models,
    corpus: Corpus,
    students: list[StageModel],
    lineage: Lineage,
) -> float | None:
    """Set the weights to zero that the settings choose; return their share, None where nothing is asked for.

    Collectives: those of `sparsify`, `Sparsifier.begin` and `Sparsifier.share`.
    """
    if config.student.sparsity.method is None:
        return None
    at_once = replace(config.student.sparsity, schedule="at_once")
    # Masks belong to an optimizer, which has the masters; the rule without state never steps.
    optimizer = StageOptimizer.of_stages(
        students, mesh, OptimizerOptions(name="sgd"), LearningRate(peak=0.0, warmup_steps=0, total_steps=1)
    )
    sparsifier = sparsify(
        replace(config, student=replace(config.student, sparsity=at_once)),
        stages=students,
        optimizer=optimizer,
        measure=partial(measure_inputs, config, mesh, models, corpus, students, lineage),
    )
    assert sparsifier is not None
    sparsifier.begin()
    return sparsifier.share()


def judge_models(config: Config, mesh: Mesh) -> list[dict[str, Any]]:
    """Judge the teacher, and the ready student against it, by text and questions.

    Args:
        config: `student.model` null judges the teacher alone.
    Returns:
        One row for each model: its name, its size, and its figures without the logs' `eval/`.
    Raises:
        ConfigError: a mistake in the settings, the models, the questions or the corpus.
    Collectives: those of loading and judging the models.
    """
    alone = config.student.model is None
    if alone:
        # The layout is checked and the layers are split for a pair; the teacher's own twin fits wherever it does.
        config = replace(config, student=replace(config.student, model=config.teacher.model))
    models = find_models(config, mesh)
    tasks = load_tasks(config, mesh, models.teacher_folder)
    held_out = load_held_out(config, mesh, models.teacher_folder)
    if mesh.world.is_first and (line := skipped_line(config.data)):
        print(line, flush=True)
    teacher = load_teacher(config, mesh, models)
    students = [] if alone else load_student(config, mesh, models, trainable=False)[0]
    links = links_of(config, mesh, models, students, teacher)
    judge = Judge.create(config, mesh, models, held_out, tasks, links)
    level, known = judge.teacher(teacher)
    if known and mesh.world.is_first:
        print(f"teacher, judged before: its figures are those in {judge.levels.folder}", flush=True)
    rows = [{"model": "teacher", "parameters": num_parameters([teacher], mesh), **level}]
    if not alone:
        figures = judge.student(students, teacher, with_choices=True)
        rows.append({"model": "student", "parameters": num_parameters(students, mesh), **figures})
    return [{name.removeprefix("eval/"): value for name, value in row.items()} for row in rows]
