"""The training loop: round after round, step after step, judged, logged, saved, and exported.

Read top to bottom. A round opens a session of its own, because its student, and with it the split over the stages and the plan, may
be another; what it takes from the round before comes from that round's exported student and its last checkpoint, so that a run
which was killed in between goes on to the same bits. A request to stop is agreed on by all ranks between steps, in one small
all-reduce (with the peak of memory) beside those that a step makes for its tokens and losses. Steps are counted from 1 in
everything a user sees.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from distill.companions import companions
from distill.config import Config
from distill.evaluate import num_parameters
from distill.health import Health, watched
from distill.loading import Models, find_models, first_rank_does
from distill.metrics import RunLog
from distill.results import export_round, run_summary
from distill.resume import Start, bring_student, find_checkpoint, leave_other_ways, take_over
from distill.round_checks import check_later_rounds
from distill.round_judging import judge_start, judge_student
from distill.rounds import STUDENT_FOLDER, lineage_of, round_folder, rounds_of, verdict
from distill.rows import tell_text
from distill.runfolder import drop_summary, read_summary, write_config
from distill.running import Running
from distill.session import Session, open_session
from distill.skipping import check_skipped, refuse_not_finite
from distill.step_report import agree, step_metrics
from distill.stop import Stop
from distill.timeline import write_timeline
from parallel import checkpoint
from parallel.collectives import broadcast_object
from parallel.mesh import Mesh

COMPILING_STEPS = 3
"""Steps in which torch.compile may compile."""


def run(config: Config, mesh: Mesh, stop: Stop) -> dict[str, Any]:
    """Prune, distil, judge and export, round by round, or go on with a run that was interrupted.

    Args:
        config: checked settings; `run.dir` has been accepted.
        mesh: all ranks.
        stop: read between steps.
    Returns:
        The summary; `finished` says whether all steps were done.
    Raises:
        ConfigError: a mistake that only the models, the corpus or the checkpoint show.
    """
    with watched(config, mesh.activity, serves=mesh.world.is_first) as health:
        return _run(config, mesh, stop, health)


def _run(config: Config, mesh: Mesh, stop: Stop, health: Health) -> dict[str, Any]:
    rounds = rounds_of(config)
    ended = broadcast_object(read_summary(Path(config.run.dir)), mesh.world)
    if ended and ended.get("finished") and ended.get("round_steps") == [each.train.steps for each in rounds]:
        return ended
    start = find_checkpoint(config, mesh)
    running = Running(config, rounds, mesh, stop, start.progress, health, newest=start.found)
    # Whatever the settings and the models' configs show is refused before anything is changed.
    models = _find_models(running)
    check_later_rounds(rounds, mesh, after=start.progress.round)
    first_rank_does(mesh, lambda: _take_folder(start, config, rounds))
    session: Session | None = _open(running, models)
    if mesh.world.is_first:
        tell_text(session.corpus, running.settings.data)
    with RunLog(config, writes=mesh.world.is_first, done_steps=start.progress.step, health=health) as log:
        stop.call_before_kill(log.save_buffers)
        running.log = log
        while (what := _round(running, session)) == "next":
            session = None
            # The models of a round are in cycles, and the next one's need their memory.
            gc.collect()
            if agree(mesh, stop)[0]:
                what = "stopped"
                break
            session = _open(running, _find_models(running))
        if what == "stopped":
            step = running.progress.step
            log.say(
                f"stopped after step {step} of {running.total_steps}; the same command goes on from there"
            )
            return log.finish({"finished": False})
        if what == "unsaved":
            where = "anew" if running.newest is None else f"from {running.newest}"
            return log.finish(
                {"finished": False, "failure": f"{running.unsaved}; the same command begins {where}"}
            )
        summary = {}
        if mesh.world.is_first:
            summary = run_summary(log, config, rounds, running.progress, sparsity=running.sparsity)
        return broadcast_object(log.finish(summary), mesh.world)


def _take_folder(start: Start, config: Config, rounds: Sequence[Config]) -> None:
    """Make the run's folder that of this run; on one rank."""
    leave_other_ways(start, rounds)
    # Before anything is made: a student pruned by a run that is then killed belongs to these settings.
    write_config(config)
    drop_summary(Path(config.run.dir))


def _find_models(running: Running) -> Models:
    """Find the round's models. Collectives: those of `find_models`."""
    running.health.begin("finding the models")
    with running.mesh.activity.doing(f"{running.words}finding the models", computes=True):
        lineage = lineage_of(running.rounds, running.progress.round)
        return find_models(running.settings, running.mesh, lineage)


def _open(running: Running, models: Models) -> Session:
    """Return the round's session, with what it takes over from the checkpoint that it goes on from."""
    settings, mesh, progress = running.settings, running.mesh, running.progress
    lineage = lineage_of(running.rounds, progress.round)
    # Where a round begins, the checkpoint is that of the round before, or of its own training before.
    begins = progress.round_step == 0 and progress.step > 0
    with mesh.activity.doing(f"{running.words}loading", computes=True):
        if running.newest is not None and not begins:
            bring_student(running.newest, settings, lineage, mesh)
        session = open_session(
            settings,
            mesh,
            models,
            lineage,
            judging=running.config,
            read=progress.read,
            begins=running.health.begin,
        )
    running.progress = progress.after_pruning(session.prune_s)
    if running.newest is not None:
        recut = lineage.made_in == progress.round and not progress.attempt
        take_over(running.newest, settings, session, begins=begins, recut=recut)
    if session.sparsifier is not None:
        session.sparsifier.begin()
    return session


def _round(running: Running, session: Session) -> str:
    """Train a round once, from where it is; return `stopped`, `end`, `next` when there is more to train, or `unsaved`."""
    config, settings, mesh, progress = running.config, running.settings, running.mesh, running.progress
    _say_start(running, session)
    with checkpoint.Saver(
        running.checkpoints,
        session.step.optimizer,
        mesh,
        keep=config.checkpoint.keep,
        companions=companions(settings, session.models.student_folder) if mesh.world.is_first else None,
    ) as saver:
        judge_start(running, session)
        finished = _train(running, session, saver)
        figures = judge_student(running, session, with_choices=True) if finished else {}
        _settle(mesh, saver)
    running.tell(saver)
    if not finished:
        session.step.close()
        return "stopped" if running.unsaved is None else "unsaved"
    following = _follows(running, figures["eval/loss"])
    if session.planner.typical is not None:
        write_timeline(running.folder, mesh, *session.planner.typical, session.planner.costs)
    if following != "again":
        last = following == "end"
        running.health.begin("exporting the student")
        target = running.folder / STUDENT_FOLDER if last else round_folder(running.folder, progress.round)
        running.sparsity = _sparsity(settings, session)
        sparsity = running.sparsity
        with mesh.activity.doing(f"{running.words}export", computes=True):
            export_round(
                running.log, config, settings, mesh, session, target, running.progress, sparsity=sparsity
            )
    session.close()
    if running.unsaved is not None:
        return "unsaved"
    read = session.text.read(running.progress.round_step * settings.train.global_batch_size)
    if following == "again":
        running.progress = running.progress.again(read)
    elif following == "next":
        running.progress = running.progress.next_round(read)
    return "end" if following == "end" else "next"


def _follows(running: Running, loss: float) -> str:
    """Return what follows the round: `again`, `next` or `end`; say why where it is not plain. Equal on every rank."""
    progress = running.progress
    teacher = broadcast_object(running.log.level("teacher"), running.mesh.world)
    what, why = verdict(running.settings.gate, gap=loss - teacher, attempt=progress.attempt)
    if why:
        running.log.say(f"{running.words}{why}")
    if what == "again":
        return "again"
    return "end" if what == "stop" or progress.round + 1 == len(running.rounds) else "next"


def _train(running: Running, session: Session, saver: checkpoint.Saver) -> bool:
    """Take the round's steps that are left; return whether all are done, or else saved when a stop was asked for."""
    config, settings, mesh, log = running.config, running.settings, running.mesh, running.log
    if running.progress.round_step < settings.train.steps and agree(mesh, running.stop)[0]:
        # Asked while models were loaded or judged; what there is to save is saved.
        return False
    while running.progress.round_step < settings.train.steps:
        stopping = _take_step(running, session)
        progress = running.progress
        check_skipped(progress, settings, log, running.checkpoints, settle=partial(_settle, mesh, saver))
        done = progress.round_step == settings.train.steps
        if _is_due(config.evaluate.every, progress.step) and not done:
            session.step.settle()
            judge_student(running, session, with_choices=False)
        # While steps change nothing the checkpoints before stay: what is wrong may be in the weights.
        due = _is_due(config.checkpoint.every, progress.step) and not progress.skipped_in_a_row
        if done or stopping or due:
            _save(running, session, saver)
        for failure in saver.check():
            log.say(f"warning: {failure}; training goes on, the next one is tried as usual")
        if stopping and not done:
            return False
    return True


def _save(running: Running, session: Session, saver: checkpoint.Saver) -> None:
    """Begin to write a checkpoint, after the one under way. Collectives: those of settling and of `refuse_not_finite`."""
    progress, mesh = running.progress, running.mesh
    with mesh.activity.doing(f"{running.words}saving after step {progress.step}"):
        # A run that goes on from this checkpoint must find the lines up to it.
        running.log.flush()
        session.step.settle()
        refuse_not_finite(session.step.optimizer, mesh, progress)
        _settle(mesh, saver)
        saver.save(progress.step, asdict(progress))
    running.health.saving()


def _settle(mesh: Mesh, saver: checkpoint.Saver) -> None:
    """Wait for the checkpoint under way."""
    waiting = mesh.activity.waiting("its checkpoint", thread=checkpoint.THREAD, computes=True)
    with mesh.activity.doing("saving"), waiting:
        saver.wait()


def _take_step(running: Running, session: Session) -> bool:
    """Take a step and log it; return whether any rank was asked to stop."""
    settings, mesh, log = running.settings, running.mesh, running.log
    round_step = running.progress.round_step
    name = f"{running.words}step {running.progress.step + 1}"
    # Compilers make no marks of progress; they run where a kind of micro-batch is met first.
    with mesh.activity.doing(name, computes=settings.train.compile and round_step < COMPILING_STEPS):
        try:
            # A mask that moves sets parameters to zero.
            stats = session.step(round_step, carries=session.sparsifier is None)
        except Exception as error:
            error.add_note(
                f"This was step {running.progress.step + 1} of {running.total_steps}, counted from 1."
            )
            raise
        if session.sparsifier is not None:
            session.sparsifier.advance(round_step)
        running.progress = progress = running.progress.after_step(
            tokens=stats.num_valid_tokens, skipped=stats.skipped
        )
        stopping, peak_bytes = agree(mesh, running.stop)
    log.step(step_metrics(progress, stats, session.planner, peak_bytes), total_steps=running.total_steps)
    plan, events = session.step.last_plan, session.step.last_events
    for line in session.planner.observe(plan, events, step=progress.step):
        log.say(line)
    return stopping


def _sparsity(settings: Config, session: Session) -> dict[str, Any] | None:
    """Return what is held at zero. Collectives: an all-reduce over pp x tp where something is."""
    if session.sparsifier is None:
        return None
    return {"pattern": settings.student.sparsity.pattern, "share": session.sparsifier.share()}


def _is_due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _device(mesh: Mesh) -> str:
    name = f", {torch.cuda.get_device_name(mesh.device)}" if mesh.device.type == "cuda" else ""
    return mesh.device.type + name


def _say_start(running: Running, session: Session) -> None:
    """Say what is trained from what, on what. Collectives: those of `num_parameters`, twice."""
    config, progress = running.settings, running.progress
    size = running.mesh.world.size
    teacher, student = (
        f"{num_parameters(stages, running.mesh) / 1e6:.4g} M parameters"
        for stages in ([session.teacher], session.students)
    )
    running.log.say(
        f"{running.words}{config.teacher.model}: {session.models.teacher_config.num_hidden_layers} layers, {teacher}; student: "
        f"{session.student_config.num_hidden_layers} layers, {student}; {session.corpus.train.num_rows:,} rows of {config.data.seq_len} "
        f"tokens to train on, {session.num_held_out:,} held out; on {size} process{'es' if size > 1 else ''} "
        f"({_device(running.mesh)})"
    )
    if progress.round_step:
        running.log.say(f"going on after step {progress.step} of {running.total_steps}")
