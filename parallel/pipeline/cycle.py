"""The student's step timed over and over, with slices of the teacher before its actions, until it repeats.

Decides: how a rank fills its idle time when it may (`Student.settle`), and how long a step with given slices takes when
it is repeated (`Student.replay`). A slice is taken to be at hand whenever a rank wants one: a frozen teacher's work for
later micro-batches depends on nothing the student does, and `fill` starts each rank far enough ahead. The rules of
time are those of `simulate`, on whole operations instead of actions, so that thousands of steps can be tried.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from parallel.pipeline.actions import RECVS, SENDS, STEP_END, Action, Kind, Plan, dependencies
from parallel.pipeline.lower import add_communication
from parallel.pipeline.order import walk
from parallel.pipeline.simulate import OCCUPYING, Costs

_MAX_REPETITIONS = 24
_TINY = 1e-9


class Operation(NamedTuple):
    """An action of the student, or a whole backward, before which slices of the teacher may stand.

    Args:
        needs: operations of this step, by index, and the delay of their message.
        parameters: the GATHER that this operation needs from the step before, or -1.
        idle_until: the operation up to whose end slices may fill the time before a NORM, or -1.
        consumes: takes a teacher output on the last rank, and gives the pace on the others.
    """

    rank: int
    actions: tuple[Action, ...]
    duration_s: float
    holds_rank: bool
    needs: tuple[tuple[int, float], ...]
    parameters: int
    idle_until: int
    consumes: bool


class Cycle(NamedTuple):
    """A step that repeats itself.

    Args:
        step_s: the time from step to step.
        counts: slices before each operation.
        free_s: when the rank turns to the slices before each operation, in one repetition.
        start_s: when each operation starts, in the same repetition.
    """

    step_s: float
    counts: list[int]
    free_s: list[float]
    start_s: list[float]


class Student:
    """A student's step as operations; `bound_s` is the least step time with the teacher, in any order of its slices."""

    def __init__(self, plan: Plan, costs: Costs, *, num_slices: int) -> None:
        table = costs.table(plan.shape)
        self.num_ranks, self.num_microbatches = plan.shape.num_ranks, plan.shape.num_microbatches
        self.num_slices, self.slice_s = num_slices, table[Kind.K]
        self.quota = self.num_microbatches * num_slices
        self.operations = _operations(plan, table, costs.latency)
        work_s = [self.quota * each for each in self.slice_s]
        for operation in self.operations:
            work_s[operation.rank] += operation.duration_s if operation.holds_rank else 0.0
        self.bound_s = max(*work_s, self.replay([0] * len(self.operations)).step_s)

    def settle(self, *, look_ahead: int, overrun: float) -> Cycle:
        """Return the step to which greedy filling settles.

        Args:
            look_ahead: slices that a rank may be ahead of its own backwards, at least `num_slices`.
            overrun: the share of a slice by which its end may lie behind the moment the student could go on.
        """
        clock = _Clock(self)
        counts: list[int] = []
        for _ in range(_MAX_REPETITIONS):
            previous, counts = counts, clock.run(clock.greedy(look_ahead, overrun)).counts
            if counts == previous and not any(self._surplus(counts)):
                break
        return self.replay(self._closed(counts))

    def replay(self, counts: list[int]) -> Cycle:
        """Return the step with fixed slices once it takes the same time again and again."""
        clock = _Clock(self)
        gathers = [index for index, each in enumerate(self.operations) if each.actions[0].kind is Kind.GATHER]
        ends: list[list[float]] = []
        for _ in range(_MAX_REPETITIONS):
            times = clock.run(lambda index, operation, idle_s: counts[index])
            ends.append([times.end_s[index] for index in gathers])
            if len(ends) > 2:
                shifts = [third - second for second, third in zip(*ends[-2:], strict=True)]
                shifts += [second - first for first, second in zip(*ends[-3:-1], strict=True)]
                if max(shifts) - min(shifts) < _TINY * max(shifts):
                    break
        else:
            half = len(ends) // 2
            shifts = [(max(ends[-1]) - max(ends[half])) / (len(ends) - 1 - half)]
        return Cycle(max(shifts), counts, times.free_s, times.start_s)

    def _surplus(self, counts: Sequence[int]) -> list[int]:
        """Slices of each rank beyond what a step consumes."""
        surplus = [-self.quota] * self.num_ranks
        for operation, count in zip(self.operations, counts, strict=True):
            surplus[operation.rank] += count
        return surplus

    def _closed(self, counts: Sequence[int]) -> list[int]:
        """The same with as many slices as a step consumes: taken from the end of the step, or added before STEP."""
        closed, surplus = list(counts), self._surplus(counts)
        for index in reversed(range(len(closed))):
            rank = self.operations[index].rank
            if surplus[rank] < 0 and self.operations[index].actions[0].kind is Kind.STEP:
                closed[index] -= surplus[rank]
                surplus[rank] = 0
            removed = max(0, min(surplus[rank], closed[index]))
            closed[index] -= removed
            surplus[rank] -= removed
        return closed


Choice = Callable[[int, Operation, float], int]


class _Times(NamedTuple):
    """One repetition: slices before each operation, when the rank turns to them, start and end of the operation."""

    counts: list[int]
    free_s: list[float]
    start_s: list[float]
    end_s: list[float]


class _Clock:
    """Runs repetitions of a student's step, one right after the other."""

    def __init__(self, student: Student) -> None:
        self._student = student
        self._free = [0.0] * student.num_ranks
        self._earlier = [0.0] * len(student.operations)
        self._queue = [0] * student.num_ranks

    def greedy(self, look_ahead: int, overrun: float) -> Choice:
        """Return the choice of slices that fills idle time, and makes the student wait where the teacher is behind."""
        queue, num_slices, slice_s = self._queue, self._student.num_slices, self._student.slice_s

        def choose(index: int, operation: Operation, idle_s: float) -> int:
            rank, count = operation.rank, 0
            if idle_s > 0 and slice_s[rank] > 0:
                number = idle_s / slice_s[rank] + 1e-6
                count = int(number)
                rest = number - count
                count = max(0, min(count + (2e-6 < rest >= 1 - overrun), look_ahead - queue[rank]))
            if operation.consumes:
                count = max(count, num_slices - queue[rank])
                queue[rank] -= num_slices
            queue[rank] += count
            return count

        return choose

    def run(self, choose: Choice) -> _Times:
        """Time one repetition."""
        # Planning is mostly this loop, which therefore spares lookups and calls.
        free, earlier, slice_s = self._free, self._earlier, self._student.slice_s
        counts: list[int] = []
        free_s: list[float] = []
        starts: list[float] = []
        ends: list[float] = []
        for index, operation in enumerate(self._student.operations):
            rank, _, duration_s, holds_rank, needs, parameters, idle_until, _ = operation
            ready = earlier[parameters] if parameters >= 0 else 0.0
            for need, delay in needs:
                arrival = ends[need] + delay
                if arrival > ready:  # noqa: PLR1730
                    ready = arrival
            start, count = free[rank], 0
            free_s.append(start)
            if holds_rank or idle_until >= 0:
                count = choose(index, operation, (ends[idle_until] if idle_until >= 0 else ready) - start)
                if count:
                    start = free[rank] = start + count * slice_s[rank]
            if ready > start:  # noqa: PLR1730
                start = ready
            counts.append(count)
            starts.append(start)
            ends.append(start + duration_s)
            if holds_rank:
                free[rank] = start + duration_s
        self._earlier = ends
        return _Times(counts, free_s, starts, ends)


def _operations(plan: Plan, table: dict[Kind, tuple[float, ...]], latency: float) -> list[Operation]:
    """The student's actions in an order in which they can run, whole backwards as one."""
    shape = plan.shape
    first_pacing_stage = shape.num_stages - shape.num_ranks
    result: list[Operation] = []
    index: dict[Action, int] = {}
    latest = [-1] * shape.num_ranks
    awaited: list[list[tuple[int, float]]] = [[] for _ in range(shape.num_ranks)]
    for rank, _, action in walk(add_communication(plan)):
        stage, kind = action[:2]
        if kind in SENDS:
            index[action] = index[dependencies(action, shape)[0]]
        elif kind in RECVS:
            awaited[rank].append((index[dependencies(action, shape)[0]], latency))
        elif kind is Kind.W and index[action._replace(kind=Kind.B)] == latest[rank]:
            index[action] = latest[rank]
            backward = result[latest[rank]]
            duration_s = backward.duration_s + table[kind][stage]
            result[latest[rank]] = backward._replace(
                actions=(*backward.actions, action), duration_s=duration_s
            )
        else:
            if kind in STEP_END[1:]:
                awaited[rank] = [(index[need], 0.0) for need in dependencies(action, shape)]
            operation = Operation(
                rank=rank,
                actions=(action,),
                duration_s=table[kind][stage],
                holds_rank=kind in OCCUPYING,
                needs=tuple(awaited[rank]),
                parameters=-1,
                idle_until=index[Action(stage, Kind.REDUCE)] if kind is Kind.NORM else -1,
                consumes=kind is Kind.B and stage >= first_pacing_stage,
            )
            awaited[rank] = []
            index[action] = latest[rank] = len(result)
            result.append(operation)
    for place, operation in enumerate(result):
        if operation.actions[0].kind is Kind.F:
            gather = index[Action(operation.actions[0].stage, Kind.GATHER)]
            result[place] = operation._replace(parameters=gather)
    return result
