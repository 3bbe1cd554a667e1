"""What commands do with models without training them: write a pruned student, judge a teacher and a student.

The work is what a run does before and between its steps (`distill.session`, `distill.judging`).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from distill.config import Config
from distill.evaluate import num_parameters
from distill.judging import Judge, load_tasks
from distill.loading import find_models, load_student, load_teacher
from distill.rounds import lineage_of, rounds_of
from distill.rows import load_corpus, tell_share
from distill.session import links_of, shape_student
from parallel.mesh import Mesh


def make_student(config: Config, mesh: Mesh) -> Path:
    """Write the first round's student to `run.dir`/student and nothing else, or a factored one beside it; return the folder.

    Raises:
        ConfigError: a mistake in the settings, the teacher or the corpus.
    Collectives: those of loading and scoring the teacher.
    """
    config = rounds_of(config)[0]
    lineage = lineage_of([config], 0)
    models = replace(find_models(config, mesh, lineage), student_folder=Path(config.run.dir) / "student")
    corpus = load_corpus(config, mesh, models.teacher_folder)
    teacher = load_teacher(config, mesh, models)
    models, _ = shape_student(config, mesh, models, corpus, teacher, lineage)
    return models.student_folder


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
    corpus = load_corpus(config, mesh, models.teacher_folder)
    if mesh.world.is_first:
        tell_share(corpus, config.data)
    teacher = load_teacher(config, mesh, models)
    students = [] if alone else load_student(config, mesh, models, trainable=False)[0]
    links = links_of(config, mesh, models, students, teacher)
    judge = Judge.create(config, mesh, models, corpus, tasks, links)
    level, known = judge.teacher(teacher)
    if known and mesh.world.is_first:
        print(f"teacher, judged before: its figures are those in {judge.levels.folder}", flush=True)
    rows = [{"model": "teacher", "parameters": num_parameters([teacher], mesh), **level}]
    if not alone:
        figures = judge.student(students, teacher, with_choices=True)
        rows.append({"model": "student", "parameters": num_parameters(students, mesh), **figures})
    return [{name.removeprefix("eval/"): value for name, value in row.items()} for row in rows]
