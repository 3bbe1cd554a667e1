"""When a run judges its models, and what it logs of that: the teacher where the run starts, the student where a round does and later.

Decides that models without finite losses are refused before the first step, and that the share of the gap is counted from the
round's start. How models are judged is `distill.judging`.
"""

from __future__ import annotations

import math

from distill.config import Config
from distill.evaluate import num_parameters
from distill.judging import gap_closed
from distill.levels import Figures
from distill.model_checks import not_finite
from distill.running import Running
from distill.session import Session
from parallel.collectives import broadcast_object


def judge_start(running: Running, session: Session) -> None:
    """Judge the teacher where a run starts and the student where a round does; refuse models without finite losses."""
    progress, log = running.progress, running.log
    # A run that goes on from another run's checkpoint has judged nothing either.
    first = progress.step == 0 or not broadcast_object(bool(log.evaluations), running.mesh.world)
    if first:
        running.health.begin("judging the teacher")
        with running.mesh.activity.doing(f"{running.words}judging the teacher"):
            figures, known = session.judge.teacher(session.teacher)
        parameters = num_parameters([session.teacher], running.mesh)
        log.evaluation(
            step=progress.step,
            round=progress.round,
            model="teacher",
            parameters=parameters,
            values=figures,
            known=known,
        )
        _check_finite(running.settings, "teacher", figures)
    if first or (progress.round_step == 0 and not progress.attempt):
        _check_finite(running.settings, "student", judge_student(running, session, with_choices=True))


def judge_student(running: Running, session: Session, *, with_choices: bool) -> Figures:
    """Judge the student against the round's teacher, and log it."""
    progress, log = running.progress, running.log
    running.health.begin("judging the student")
    with running.mesh.activity.doing(f"{running.words}judging the student after step {progress.step}"):
        figures = session.judge.student(session.students, session.teacher, with_choices=with_choices)
    if progress.round_step or progress.attempt:
        # The rank that writes has the lines of the start, also when another process has judged it.
        closed = gap_closed(log.evaluations, figures["eval/loss"], round=progress.round)
        figures = {**figures, "eval/gap_closed": closed}
    parameters = num_parameters(session.students, running.mesh)
    log.evaluation(
        step=progress.step, round=progress.round, model="student", parameters=parameters, values=figures
    )
    return figures


def _check_finite(config: Config, who: str, figures: Figures) -> None:
    """Refuse a model that gives no finite loss before its first step; every rank sees the same."""
    loss, kl = figures["eval/loss"], figures["eval/kl"]
    if math.isfinite(loss) and math.isfinite(kl):
        return
    key = "student.model" if who == "student" and config.student.model is not None else "teacher.model"
    raise not_finite(config, key, f"the {who}'s loss on the held-out text is {loss}, its KL {kl}")
