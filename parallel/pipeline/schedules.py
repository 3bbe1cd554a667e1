"""The orders in which ranks run a step: which forward, backward and teacher slice comes when.

Decides: the list of compute actions of each rank, for a student's schedule (`SCHEDULES`) and a way to run the teacher
(`inline`, `batch`; look-ahead into idle time is `fill`). Each order is a pure function of the shape and the rank.
Adds no communication (`lower`), knows no durations (`simulate`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import NamedTuple

from parallel.pipeline.actions import STEP_END, Action, Kind, Plan, Shape


def _forward_order(shape: Shape, rank: int) -> list[Action]:
    """Student forwards of a rank: a group of micro-batches through all its stages, then the next group."""
    groups = _groups(shape)
    return [
        Action(stage, Kind.F, each) for group in groups for stage in shape.stages_of(rank) for each in group
    ]


def _backward_order(shape: Shape, rank: int) -> list[Action]:
    """Student backwards of a rank, group by group like the forwards, last stage first."""
    groups = _groups(shape)
    return [
        Action(stage, Kind.B, each)
        for group in groups
        for stage in shape.stages_of(rank)[::-1]
        for each in group
    ]


def _groups(shape: Shape) -> list[range]:
    """Micro-batches in groups of num_ranks or a little more, as even as possible; fewer than num_ranks are one group."""
    num_groups = max(1, shape.num_microbatches // shape.num_ranks)
    base, longer = divmod(shape.num_microbatches, num_groups)
    starts = [index * base + min(index, longer) for index in range(num_groups + 1)]
    return [range(start, stop) for start, stop in pairwise(starts)]


def _whole(backwards: Iterable[Action]) -> list[Action]:
    """Each B directly followed by its own W: one whole backward."""
    return [action for b in backwards for action in (b, b._replace(kind=Kind.W))]


def _alternate(forwards: list[Action], backwards: list[Action], warmup: int) -> list[Action]:
    """`warmup` forwards, then a forward and a whole backward in turn, then the backwards that are left."""
    actions = forwards[:warmup]
    for index, backward in enumerate(backwards):
        actions += forwards[warmup + index : warmup + index + 1]
        actions += _whole([backward])
    return actions


def gpipe(shape: Shape, rank: int) -> list[Action]:
    """Return all forwards, then all backwards. Source: Huang et al. 2019, arXiv 1811.06965."""
    return _forward_order(shape, rank) + _whole(_backward_order(shape, rank))


def one_f_one_b(shape: Shape, rank: int) -> list[Action]:
    """Return one forward, one backward in turn, num_ranks - rank in flight. Source: Narayanan et al. 2019 (PipeDream)."""
    warmup = min(shape.num_microbatches, shape.num_ranks - 1 - rank)
    return _alternate(_forward_order(shape, rank), _backward_order(shape, rank), warmup)


def interleaved(shape: Shape, rank: int) -> list[Action]:
    """Return 1F1B over several stages a rank, which divides the bubble by their number.

    The number of micro-batches need not be a multiple of num_ranks: the groups are then a little longer. With one stage
    a rank this is 1F1B.
    Source: Narayanan et al. 2021, arXiv 2104.04473, section 2.2.
    """
    forwards = _forward_order(shape, rank)
    warmup = min(_interleaved_in_flight(shape, rank) - 1, len(forwards))
    return _alternate(forwards, _backward_order(shape, rank), warmup)


def zero_bubble(shape: Shape, rank: int) -> list[Action]:
    """Return 1F1B with the weight gradients `rank` backwards late (ZB-H1), which closes two thirds of the bubble.

    Source: Qi et al. 2023, arXiv 2401.10241, section 2.
    """
    warmup = min(shape.num_microbatches, shape.num_ranks - 1 - rank)
    forwards, backwards = _forward_order(shape, rank), _backward_order(shape, rank)
    weights = [backward._replace(kind=Kind.W) for backward in backwards]
    actions = forwards[:warmup]
    for index, backward in enumerate(backwards):
        actions += [*forwards[warmup + index : warmup + index + 1], backward]
        if index >= rank:
            actions.append(weights[index - rank])
    return actions + weights[max(0, len(weights) - rank) :]


class Schedule(NamedTuple):
    """An order, and the most micro-batches a rank then holds between their F and their W, over all its stages."""

    order: Callable[[Shape, int], list[Action]]
    max_in_flight: Callable[[Shape, int], int]
    takes_virtual_stages: bool = False


def _all_in_flight(shape: Shape, rank: int) -> int:
    return shape.num_microbatches * len(shape.stages_of(rank))


def _interleaved_in_flight(shape: Shape, rank: int) -> int:
    hops = shape.num_ranks - 1 - rank
    virtual_stages = len(shape.stages_of(rank))
    return 1 + hops if virtual_stages == 1 else 1 + 2 * hops + (virtual_stages - 1) * len(_groups(shape)[0])


SCHEDULES = {
    "gpipe": Schedule(gpipe, _all_in_flight, takes_virtual_stages=True),
    "1f1b": Schedule(one_f_one_b, lambda shape, rank: shape.num_ranks - rank),
    "interleaved": Schedule(interleaved, _interleaved_in_flight, takes_virtual_stages=True),
    "zero_bubble": Schedule(zero_bubble, lambda shape, rank: shape.num_ranks),
    "forward": Schedule(_forward_order, lambda shape, rank: 0, takes_virtual_stages=True),
    "none": Schedule(lambda shape, rank: [], lambda shape, rank: 0, takes_virtual_stages=True),
}
TRAINING = ("gpipe", "1f1b", "interleaved", "zero_bubble")
TEACHER = ("inline", "batch")


def make_plan(
    *,
    schedule: str,
    teacher: str | None,
    num_ranks: int,
    num_microbatches: int,
    num_slices: int = 1,
    virtual_stages: int = 1,
) -> Plan:
    """Return the plan of one training step, without communication.

    Args:
        schedule: `gpipe`, `1f1b`, `interleaved` or `zero_bubble`.
        teacher: `inline` (the teacher's forward of a micro-batch right before the student's, one slot for both),
            `batch` (the whole batch first, without a barrier), or None.
        num_ranks: pipeline ranks, at least 1.
        num_microbatches: at least 1; may be fewer than ranks.
        num_slices: pieces of the teacher's forward on a rank and micro-batch; ignored without a teacher.
        virtual_stages: student stages a rank.
    Raises:
        ValueError: an unknown name, or a size the schedule cannot have.
    """
    if schedule not in TRAINING:
        raise ValueError(f"schedule={schedule!r} is not known; use one of {', '.join(TRAINING)}")
    if teacher is not None and teacher not in TEACHER:
        raise ValueError(f"teacher={teacher!r} is not known; use one of {', '.join(TEACHER)}, or None")
    if virtual_stages > 1 and not SCHEDULES[schedule].takes_virtual_stages:
        raise ValueError(
            f"virtual_stages={virtual_stages} does not go with schedule={schedule!r}; use 1, or interleaved or gpipe"
        )
    if teacher is not None and num_slices < 1:
        raise ValueError(f"num_slices={num_slices} must be at least 1")
    shape = Shape(num_ranks, num_ranks * virtual_stages, num_microbatches, num_slices if teacher else 0)
    ranks = []
    for rank in range(num_ranks):
        student = SCHEDULES[schedule].order(shape, rank)
        ranks.append(tuple(_add_step_end(shape, rank, _add_teacher(shape, rank, student, teacher))))
    return Plan(shape, schedule, teacher or "none", tuple(ranks))


def forward_only(
    *,
    num_ranks: int,
    num_microbatches: int,
    student: bool,
    teacher: bool,
    num_slices: int = 1,
    virtual_stages: int = 1,
) -> Plan:
    """Return a plan of forwards alone, for evaluation (both models, or one) and for measuring.

    With both models the teacher's forward of a micro-batch comes right before the student's on every rank, so that the
    last rank holds the teacher's output when it runs the student's last stage.

    Raises:
        ValueError: neither model is asked for, or a size is out of range.
    """
    if not (student or teacher):
        raise ValueError("student=False, teacher=False leaves nothing to run")
    if teacher and num_slices < 1:
        raise ValueError(f"num_slices={num_slices} must be at least 1")
    shape = Shape(num_ranks, num_ranks * virtual_stages, num_microbatches, num_slices if teacher else 0)
    schedule = "forward" if student else "none"
    mode = None if not teacher else "inline" if student else "batch"
    orders = [SCHEDULES[schedule].order(shape, rank) for rank in range(num_ranks)]
    ranks = [tuple(_add_teacher(shape, rank, order, mode)) for rank, order in enumerate(orders)]
    return Plan(shape, schedule, mode or "none", tuple(ranks))


def _add_step_end(shape: Shape, rank: int, actions: list[Action]) -> list[Action]:
    """The order with each stage's REDUCE right after its last W, then NORM, STEP and GATHER."""
    last = shape.num_microbatches - 1
    ended: list[Action] = []
    for action in actions:
        ended.append(action)
        if action.kind is Kind.W and action.microbatch == last:
            ended.append(Action(action.stage, Kind.REDUCE))
    return ended + [Action(stage, kind) for kind in STEP_END[1:] for stage in shape.stages_of(rank)]


def _add_teacher(shape: Shape, rank: int, student: list[Action], teacher: str | None) -> list[Action]:
    """The student's order with the teacher's slices before all of it, or before each F of the rank's first stage."""
    if teacher is None:
        return student
    if teacher == "batch":
        pieces = [piece for each in range(shape.num_microbatches) for piece in shape.teacher(rank, each)]
        return pieces + student
    actions: list[Action] = []
    for action in student:
        if action.kind is Kind.F and action.stage == rank:
            actions += shape.teacher(rank, action.microbatch)
        actions.append(action)
    return actions
