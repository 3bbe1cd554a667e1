"""The teacher's slices of coming micro-batches, placed into the time in which the student's pipeline is idle.

Decides: where in each rank's list the teacher's slices stand, and how far the teacher runs ahead (over the end of the
step), so that a step takes max(m(F + B + K), (m + p - 1)(F + B) + E) instead of (m + p - 1)(F + B + K) + E. The plan is
a cycle: every step runs the same lists and leaves the look-ahead that it found. Gradients are those of the plain
schedule; only when the teacher runs changes, never what it computes.

How. A frozen teacher's work for later micro-batches is always at hand, so each rank may fill its own idle time without
asking the others: whenever the student's next action is not ready, run slices, up to a look-ahead, and run them first
where the student has caught up with the teacher. Repeated over steps this settles into a cycle within a few rounds.
Its order is frozen; how far each rank must be ahead when a step begins then follows from the times, from the last rank
(its outputs must be there for the loss) to the first (its tensors must be there for the next rank). Two things are
searched: the look-ahead (the smallest that loses no time) and by how much of a slice the student may be held up.

Assumes costs that are the same for every micro-batch; a plan made from measured costs holds under changes of some 15 %
(tests/parallel/pipeline/test_fill.py). Does not choose the number of slices.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from parallel.pipeline.actions import Action, Kind, Plan, Shape
from parallel.pipeline.cycle import Cycle, Student
from parallel.pipeline.schedules import TRAINING
from parallel.pipeline.simulate import Costs

_OVERRUNS = (1.0, 0.75, 0.5, 0.25, 0.1, 0.0)
_TINY = 1e-9


@dataclass(frozen=True)
class Limits:
    """What the look-ahead may cost.

    Args:
        teacher_outputs: teacher outputs that may wait on the last rank; None for as many as save time.
        tolerance: the share of the step time that may be given away for a shorter look-ahead.
        margin: slices by which every rank is further ahead than the planned times need, against times that vary.
            A message then need not arrive at the very moment it is wanted.
    """

    teacher_outputs: int | None = None
    tolerance: float = 0.001
    margin: int = 1


def fill_teacher(plan: Plan, costs: Costs, *, num_slices: int, limits: Limits | None = None) -> Plan:
    """Return the steady cycle in which the teacher runs in the student's idle time.

    Args:
        plan: the student's step, without teacher and without messages.
        costs: seconds; `teacher_slice` is one of `num_slices`. Slices of about one F or less reach the bound.
        num_slices: pieces of the teacher's forward on a rank and micro-batch.
    Returns:
        A plan without messages. `carried` is the look-ahead it starts with and leaves: `prologue` makes it before the
        first step, `truncate` stops it at the end of the data.
    Raises:
        ValueError: the plan has a teacher or messages already, a limit is out of range, or nothing costs any time.
    """
    limits = limits or Limits()
    if plan.teacher != "none" or plan.lowered or plan.schedule not in TRAINING:
        raise ValueError(
            f"filling needs a training plan without teacher and messages, not {plan.schedule}/{plan.teacher}"
        )
    if num_slices < 1 or (limits.teacher_outputs is not None and limits.teacher_outputs < 1):
        raise ValueError(
            f"num_slices={num_slices}, teacher_outputs={limits.teacher_outputs} must be at least 1"
        )
    shape = replace(plan.shape, num_slices=num_slices)
    student = Student(plan, costs, num_slices=num_slices)
    if student.bound_s <= 0:
        raise ValueError("all costs are zero, so there is no idle time to fill")
    cycle = _search(student, limits)
    ahead = _look_ahead(student, cycle, costs.latency, limits.margin)
    ranks = [list[Action]() for _ in range(shape.num_ranks)]
    streams = [_Stream(shape, rank, ahead[rank]) for rank in range(shape.num_ranks)]
    for operation, count in zip(student.operations, cycle.counts, strict=True):
        ranks[operation.rank] += [*streams[operation.rank].take(count), *operation.actions]
    carried = frozenset(
        action for rank, count in enumerate(ahead) for action in _Stream(shape, rank, 0).take(count)
    )
    return Plan(shape, plan.schedule, "fill", tuple(map(tuple, ranks)), carried)


def prologue(plan: Plan) -> Plan:
    """Return the plan to run before the first step: the teacher alone makes the look-ahead of a steady cycle."""
    ranks = [list[Action]() for _ in range(plan.shape.num_ranks)]
    for action in sorted(plan.carried, key=lambda each: (each.microbatch, each.slice or 0)):
        ranks[action.stage].append(
            action._replace(microbatch=action.microbatch + plan.shape.num_microbatches)
        )
    return Plan(plan.shape, "none", "fill", tuple(map(tuple, ranks)))


def truncate(plan: Plan, num_steps_left: int) -> Plan:
    """Return the plan without the teacher's work for micro-batches that will not come.

    Args:
        plan: a steady cycle or its prologue, without messages.
        num_steps_left: steps until the end of the data, with this one (for the prologue: with the prologue). A cycle of
            which one step is left drains the look-ahead and leaves none.
    """
    stop = plan.shape.num_microbatches * num_steps_left
    ranks = [
        [action for action in actions if action.kind is not Kind.K or action.microbatch < stop]
        for actions in plan.ranks
    ]
    carried = frozenset(action for action in plan.carried if action.microbatch < stop)
    return replace(plan, ranks=tuple(map(tuple, ranks)), carried=carried)


def bound_s(plan: Plan, costs: Costs, *, num_slices: int) -> float:
    """Return the least step time that any order of the teacher's slices could reach.

    It is the larger of the busiest rank's work and the step time of the student alone:

        max(m * (F + B + K), student)

    Args:
        plan: the student's step, without teacher and without messages.
    """
    return Student(plan, costs, num_slices=num_slices).bound_s


class _Stream:
    """The teacher's actions of one rank in their only order, from a given slice on."""

    def __init__(self, shape: Shape, rank: int, position: int) -> None:
        self._shape, self._rank, self._position = shape, rank, position

    def take(self, count: int) -> list[Action]:
        slices = self._shape.slices
        positions = range(self._position, self._position + count)
        self._position += count
        return [
            Action(self._rank, Kind.K, each // len(slices), slices[each % len(slices)]) for each in positions
        ]


def _search(student: Student, limits: Limits) -> Cycle:
    """The fastest cycle, then the shortest look-ahead that is about as fast."""
    widest = student.num_microbatches + 1
    if limits.teacher_outputs is not None:
        widest = min(widest, limits.teacher_outputs)
    best, chosen = None, 0.0
    for overrun in _OVERRUNS:
        cycle = student.settle(look_ahead=widest * student.num_slices, overrun=overrun)
        if best is None or cycle.step_s < best.step_s * (1 - 1e-6):
            best, chosen = cycle, overrun
        if best.step_s <= student.bound_s * (1 + 1e-6):
            break
    low, allowed_s = 1, best.step_s * (1 + limits.tolerance)
    while low < widest:
        middle = (low + widest) // 2
        cycle = student.settle(look_ahead=middle * student.num_slices, overrun=chosen)
        if cycle.step_s <= allowed_s:
            best, widest = cycle, middle
        else:
            low = middle + 1
    return best


def _look_ahead(student: Student, cycle: Cycle, latency: float, margin: int) -> list[int]:
    """The slices each rank must have done when a step begins, so that none of them is late."""
    num_slices, last = student.num_slices, student.num_ranks - 1
    begins: list[list[float]] = [[] for _ in range(student.num_ranks)]
    ahead = [0] * student.num_ranks
    outputs = 0
    for operation, count, free_s in zip(student.operations, cycle.counts, cycle.free_s, strict=True):
        slice_s = student.slice_s[operation.rank]
        begins[operation.rank] += [free_s + each * slice_s for each in range(count)]
        if operation.rank == last and operation.consumes:
            outputs += num_slices
            ahead[last] = max(ahead[last], outputs - len(begins[last]))
    ahead[last] += margin
    for rank in reversed(range(last)):
        ends = [begin + student.slice_s[rank] for begin in begins[rank]]
        needed = -(-ahead[rank + 1] // num_slices) * num_slices
        for place, begin in enumerate(begins[rank + 1]):
            microbatch, piece = divmod(place + ahead[rank + 1], num_slices)
            if piece == 0:
                done = _count_until(ends, begin - latency, cycle.step_s)
                needed = max(needed, (microbatch + 1) * num_slices - done)
        ahead[rank] = needed + margin
    return ahead


def _count_until(ends: Sequence[float], time_s: float, step_s: float) -> int:
    """How many slices of a cycle have ended by a time, counted from the cycle's first; negative before it."""
    time_s += _TINY * step_s
    cycles = int((time_s - ends[0]) // step_s)
    return cycles * len(ends) + bisect_right(ends, time_s - cycles * step_s)
