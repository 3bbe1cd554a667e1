"""The training loop: one step after the other, judged, logged, saved, and exported at the end.

Read top to bottom. A request to stop is agreed on by all ranks between steps; what a step costs beyond the plan is one
small all-reduce (the request and the peak of memory). Steps are counted from 1 in everything a user sees.
"""

from __future__ import annotations

import math
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distill.checks import not_finite
from distill.config import Config, ConfigError
from distill.deploy.export import export_student, model_card
from distill.evaluate import Quality, evaluate, num_parameters
from distill.loading import DTYPES
from distill.metrics import RunLog, StepMetrics
from distill.planning import Planner
from distill.runfolder import read_summary, write_config
from distill.session import Session, open_session
from distill.step import StepStats
from distill.stop import Stop
from distill.timeline import write_timeline
from parallel import checkpoint
from parallel.collectives import all_reduce_, broadcast_object
from parallel.factored import ranks_of
from parallel.mesh import Mesh

STUDENT_FOLDER = "student"


@dataclass
class _State:
    """What a checkpoint holds beside the optimizer."""

    step: int = 0
    tokens: int = 0
    prune_s: float = 0.0


def run(config: Config, mesh: Mesh, stop: Stop) -> dict[str, Any]:
    """Prune, distil, judge and export, or go on with a run that was interrupted.

    Args:
        config: checked settings; `run.dir` has been accepted.
        mesh: all ranks.
        stop: read between steps.
    Returns:
        The summary; `finished` says whether all steps were done.
    Raises:
        ConfigError: a mistake that only the models, the corpus or the checkpoint show.
    """
    folder = Path(config.run.dir)
    ended = broadcast_object(read_summary(folder), mesh.world)
    if ended and ended.get("finished") and ended["metrics"].get("step") == config.train.steps:
        return ended
    if mesh.world.is_first:
        # Before anything is made: a student pruned by a run that is then killed belongs to these settings.
        write_config(config)
    session = open_session(config, mesh)
    state = _resume(config, mesh, session, folder)
    total_steps = config.train.steps
    saver = checkpoint.Saver(
        folder / "checkpoints", session.step.optimizer, mesh, keep=config.checkpoint.keep
    )
    with RunLog(config, writes=mesh.world.is_first, done_steps=state.step) as log, saver:
        stop.call_before_kill(log.save_buffers)
        _say_start(log, config, session, state)
        # A run that goes on from another run's checkpoint has judged nothing either.
        if state.step == 0 or not broadcast_object(bool(log.evaluations), mesh.world):
            for who in ("teacher", "student"):
                _check_finite(config, who, _judge(log, mesh, session, step=state.step, who=who))
        if not _train(config, mesh, stop, session, state, log, saver):
            log.say(f"stopped after step {state.step} of {total_steps}; the same command goes on from there")
            return log.finish({"finished": False})
        _judge(log, mesh, session, step=total_steps, who="student")
        if session.planner.typical is not None:
            write_timeline(folder, mesh, *session.planner.typical, session.planner.costs)
        session.step.close()
        saver.wait()
        return _finish(log, config, mesh, session, state, folder)


def _train(
    config: Config,
    mesh: Mesh,
    stop: Stop,
    session: Session,
    state: _State,
    log: RunLog,
    saver: checkpoint.Saver,
) -> bool:
    """Take the steps that are left; return whether all are done, or else saved when a stop was asked for."""
    total_steps = config.train.steps
    while state.step < total_steps:
        try:
            stats = session.step(state.step)
        except Exception as error:
            error.add_note(f"This was step {state.step + 1} of {total_steps}, counted from 1.")
            raise
        state.step += 1
        state.tokens += stats.num_valid_tokens
        stopping, peak_bytes = _agree(mesh, stop)
        log.step(_metrics(state, stats, session.planner, peak_bytes), total_steps=total_steps)
        planned = session.planner.observe(session.step.last_plan, session.step.last_events)
        if planned is not None:
            log.say(planned)
        if _is_due(config.evaluate.every, state.step) and state.step < total_steps:
            _judge(log, mesh, session, step=state.step, who="student")
        done = state.step == total_steps
        if done or stopping or _is_due(config.checkpoint.every, state.step):
            # A run that goes on from this checkpoint must find the lines up to it.
            log.flush()
            saver.save(state.step, {"tokens": state.tokens, "prune_s": state.prune_s})
        saver.check()
        if stopping and not done:
            saver.wait()
            return False
    return True


def _is_due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _resume(config: Config, mesh: Mesh, session: Session, folder: Path) -> _State:
    """Load the checkpoint that `checkpoint.resume` names, if there is one."""
    choice, root = config.checkpoint.resume, folder / "checkpoints"
    if choice == "none":
        found = None
    elif choice == "auto" or Path(choice).resolve().parent != root.resolve():
        # With another run's checkpoint this run only begins: the same command goes on from its own, once it has one.
        found = checkpoint.latest(root, mesh) or (None if choice == "auto" else Path(choice))
    else:
        found = Path(choice)
    if found is None:
        return _State(prune_s=session.prune_s)
    try:
        manifest = checkpoint.restore(found, session.step.optimizer, mesh)
    except checkpoint.CheckpointError as error:
        raise ConfigError(f"checkpoint.resume={choice}: {error}") from error
    checkpoint.drop_after(root, manifest.step, mesh)
    return _State(step=manifest.step, tokens=manifest.extras["tokens"], prune_s=manifest.extras["prune_s"])


def _agree(mesh: Mesh, stop: Stop) -> tuple[bool, int]:
    """Return whether any rank was asked to stop, and the largest peak of memory. Collectives: one all-reduce."""
    if mesh.device.type == "cuda":
        peak_bytes = torch.cuda.max_memory_allocated(mesh.device)
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    report = torch.tensor([int(stop.requested), peak_bytes], dtype=torch.int64, device=mesh.device)
    all_reduce_(report, mesh.world, op="max")
    stopping, peak = report.tolist()
    return bool(stopping), peak


def _metrics(state: _State, stats: StepStats, planner: Planner, peak_bytes: int) -> StepMetrics:
    planned = planner.planned
    return StepMetrics(
        step=state.step,
        round=0,
        tokens=state.tokens,
        loss_total=stats.total,
        loss_hard=stats.hard,
        loss_soft=stats.soft,
        grad_norm=stats.grad_norm,
        lr=stats.learning_rate,
        step_s=stats.step_s,
        tokens_per_s=stats.num_valid_tokens / stats.step_s,
        bubble_fraction=stats.bubble_fraction,
        planned_bubble_fraction=None if planned is None else planned.bubble_fraction,
        planned_step_s=None if planned is None else planned.step_s,
        peak_bytes=peak_bytes,
    )


def _judge(log: RunLog, mesh: Mesh, session: Session, *, step: int, who: str) -> Quality:
    """Judge the teacher alone or the student against it, and log it."""
    students = session.students if who == "student" else ()
    links = session.judging_links
    quality = evaluate(mesh, links, session.judging, students=students, teacher=session.teacher)
    log.evaluation(step=step, round=0, model=who, values=quality.named())
    return quality


def _check_finite(config: Config, who: str, quality: Quality) -> None:
    """Refuse a model that gives no finite loss before its first step; every rank sees the same."""
    if math.isfinite(quality.loss) and math.isfinite(quality.kl):
        return
    key = "student.model" if who == "student" and config.student.model is not None else "teacher.model"
    raise not_finite(
        config, key, f"the {who}'s loss on the held-out text is {quality.loss}, its KL {quality.kl}"
    )


def _say_start(log: RunLog, config: Config, session: Session, state: _State) -> None:
    rows = len(session.corpus.train)
    log.say(
        f"{config.teacher.model}: {session.models.teacher_config.num_hidden_layers} layers; student: "
        f"{session.student_config.num_hidden_layers} layers; {rows:,} rows of {config.data.seq_len} tokens to train on, "
        f"{len(session.corpus.held_out):,} held out"
    )
    if state.step:
        log.say(f"going on after step {state.step} of {config.train.steps}")


def _finish(
    log: RunLog, config: Config, mesh: Mesh, session: Session, state: _State, folder: Path
) -> dict[str, Any]:
    """Export the student and write the summary with the result table."""
    sizes = [num_parameters(stages, mesh) for stages in ([session.teacher], session.students)]
    summary: dict[str, Any] = {}
    if mesh.world.is_first:
        tokens = log.steps[-1]["tokens"] if log.steps else 0
        summary = {"finished": True, "tokens": tokens, "table": _table(log, config, sizes, state.prune_s)}
        summary |= {
            "student": str(folder / STUDENT_FOLDER),
            "parameters": dict(zip(("teacher", "student"), sizes)),
        }
    factored = bool(ranks_of(session.student_config))
    card = model_card(config, summary, factored=factored) if mesh.world.is_first else ""
    export_student(
        session.students,
        mesh,
        folder / STUDENT_FOLDER,
        source=session.models.student_folder,
        model_config=session.student_config,
        card=card,
        dtype=DTYPES[config.train.dtype],
        merge_factors=config.export.low_rank == "merged",
    )
    return broadcast_object(log.finish(summary), mesh.world)


def _table(log: RunLog, config: Config, sizes: list[int], prune_s: float) -> list[dict[str, Any]]:
    """Return the rows teacher, student as it started, student as it ended.

    The middle one is left out when this folder's run did not begin at the first step.
    """
    judged = log.evaluations
    teacher = next(line for line in judged if line["model"] == "teacher")
    students = [line for line in judged if line["model"] == "student"]
    start = "pruned" if config.student.model is None else "student"
    named = [("teacher", teacher, 0.0), (f"{start} + distilled", students[-1], prune_s)]
    if students[0]["step"] == 0:
        named.insert(1, (start, students[0], prune_s))
    return [
        {
            "model": name,
            "parameters": sizes[0] if name == "teacher" else sizes[1],
            "perplexity": line["eval/perplexity"],
            "agreement": line["eval/agreement"],
            "loss": line["eval/loss"],
            "kl": line["eval/kl"],
            "seconds": seconds + (log.trained_s if line is students[-1] else 0.0),
        }
        for name, line, seconds in named
    ]
