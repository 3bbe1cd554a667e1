"""How many layers of the student and of the teacher each stage holds, so that all ranks have the same work.

Decides: the split that minimises the step time, exactly. The embedding stands before the first layer, head and loss
behind the last one. The teacher's split is ballast: it evens out what the student's cannot, since its layers keep
nothing for a backward and may stand anywhere.

How. A step time is possible when some split keeps every rank's work, and every stage's student, under the caps that
follow from it. Whether there is one is asked by dynamic programming over stages: for each number of student layers
placed so far, which numbers of teacher layers can have been placed. The least possible time is then found by bisection.
Assumes nothing about layers being alike. Lists that a user gives are measured by `rank_seconds`, not changed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import inf
from typing import NamedTuple

_EXACT = 1e-12


@dataclass(frozen=True)
class Layers:
    """Seconds of a model for one micro-batch; the student's are forward plus backward.

    Args:
        layer_s: each layer's.
        first_s: what comes before the first layer: the embedding.
        last_s: what comes behind the last layer: the head, and on one of the models the loss.
    """

    layer_s: Sequence[float]
    first_s: float = 0.0
    last_s: float = 0.0


class Partition(NamedTuple):
    """Layers of the student on each stage and of the teacher on each rank, and each rank's seconds a micro-batch."""

    student: tuple[int, ...]
    teacher: tuple[int, ...]
    rank_s: tuple[float, ...]


def partition(
    student: Layers,
    teacher: Layers | None,
    *,
    num_ranks: int,
    virtual_stages: int = 1,
    num_microbatches: int | None = None,
    min_teacher_layers: int = 1,
) -> Partition:
    """Return the best split of both models over the ranks of a pipeline.

    Minimises max(m * busiest rank, student alone) with student alone = all stages + (m - 1) * slowest stage: the step
    time with the teacher in the bubbles. Of the splits that reach it, the one with the fastest slowest student stage.

    Args:
        teacher: None without one.
        virtual_stages: student stages a rank. With more than one the student is split evenly first, and the teacher
            then evens out the ranks.
        num_microbatches: m; None minimises the busiest rank alone, as is right when the teacher is not in the bubbles.
        min_teacher_layers: least number of teacher layers on a rank; student stages have at least one.
    Raises:
        ValueError: fewer layers than stages.
    """
    num_stages = num_ranks * virtual_stages
    for name, layers, least in (
        ("student", student, num_stages),
        ("teacher", teacher, num_ranks * min_teacher_layers),
    ):
        if layers is not None and len(layers.layer_s) < least:
            raise ValueError(
                f"{len(layers.layer_s)} layers of the {name} do not fill {num_ranks} ranks, which need {least}"
            )
    teacher_rows = _rows(teacher, num_ranks)
    min_teacher = min_teacher_layers if teacher is not None else 0
    if virtual_stages == 1:
        problem = _Problem(_rows(student, num_ranks), teacher_rows, 1, min_teacher, num_microbatches)
        student_counts, teacher_counts = problem.solve()
    else:
        nothing = _rows(None, num_stages)
        student_counts, _ = _Problem(_rows(student, num_stages), nothing, 1, 0, None).solve()
        loads = rank_seconds(student, None, student_counts, (), num_ranks=num_ranks)
        fixed = replace(_rows(None, num_ranks), extra_s=loads)
        _, teacher_counts = _Problem(fixed, teacher_rows, 0, min_teacher, None).solve()
    if teacher is None:
        teacher_counts = ()
    rank_s = rank_seconds(student, teacher, student_counts, teacher_counts, num_ranks=num_ranks)
    return Partition(student_counts, teacher_counts, rank_s)


def rank_seconds(
    student: Layers,
    teacher: Layers | None,
    student_counts: Sequence[int],
    teacher_counts: Sequence[int],
    *,
    num_ranks: int,
) -> tuple[float, ...]:
    """Return each rank's seconds a micro-batch under a given split.

    Args:
        student_counts: layers on each stage, a multiple of `num_ranks` entries; stage s is on rank s % num_ranks.
        teacher_counts: layers on each rank; empty without a teacher.
    Raises:
        ValueError: the counts do not add up to the model's layers, or there are not as many as stages.
    """
    total_s = [0.0] * num_ranks
    for name, layers, counts in (("student", student, student_counts), ("teacher", teacher, teacher_counts)):
        if layers is None:
            continue
        if sum(counts) != len(layers.layer_s) or min(counts, default=0) < 0:
            raise ValueError(
                f"{list(counts)} layers of the {name} do not add up to its {len(layers.layer_s)}"
            )
        if not counts or len(counts) % num_ranks:
            raise ValueError(
                f"{list(counts)} of the {name} has {len(counts)} entries for num_ranks={num_ranks}"
            )
        rows = _rows(layers, len(counts))
        start = 0
        for stage, count in enumerate(counts):
            seconds = rows.until_s[start + count] - rows.until_s[start] + rows.extra_s[stage]
            total_s[stage % num_ranks] += seconds
            start += count
    return tuple(total_s)


@dataclass(frozen=True)
class _Rows:
    """Running sums of a model's layers, and what each stage has besides layers."""

    until_s: tuple[float, ...]
    extra_s: tuple[float, ...]


def _rows(layers: Layers | None, num_stages: int) -> _Rows:
    extra_s = [0.0] * num_stages
    if layers is None:
        return _Rows((0.0,), tuple(extra_s))
    extra_s[0] += layers.first_s
    extra_s[-1] += layers.last_s
    return _Rows((0.0, *accumulate(layers.layer_s)), tuple(extra_s))


Counts = tuple[tuple[int, ...], tuple[int, ...]]
Intervals = list[tuple[int, int]]


class _Problem:
    """Two models over one row of stages."""

    def __init__(
        self, student: _Rows, teacher: _Rows, min_student: int, min_teacher: int, num_microbatches: int | None
    ) -> None:
        self._student, self._teacher = student, teacher
        self._min_student, self._min_teacher = min_student, min_teacher
        self._num_stages = len(student.extra_s)
        self._num_student, self._num_teacher = len(student.until_s) - 1, len(teacher.until_s) - 1
        self._num_microbatches = num_microbatches
        sums = teacher.until_s
        windows = zip(sums, sums[min_teacher:], strict=False)
        self._worst_window_s = max(later - earlier for earlier, later in windows)

    def solve(self) -> Counts:
        """Return the best counts of both models."""
        counts = self._fit(inf, inf)
        counts = self._least(counts, self._time_s, lambda time_s: self._fit(*self._caps(time_s)))
        cap_s, _ = self._caps(self._time_s(counts))
        return self._least(
            counts, lambda each: max(self._loads(each)[1]), lambda slowest_s: self._fit(cap_s, slowest_s)
        )

    def _least(
        self, counts: Counts, value: Callable[[Counts], float], fit: Callable[[float], Counts | None]
    ) -> Counts:
        """Bisect for the counts of least value, given some counts and a test for a value."""
        low, high = 0.0, value(counts)
        while high - low > 1e-9 * high:
            middle = (low + high) / 2
            found = fit(middle)
            if found is None:
                low = middle
            else:
                counts, high = found, min(value(found), middle)
        return counts

    def _loads(self, counts: Counts) -> tuple[list[float], list[float]]:
        """Seconds of both models, and of the student alone, on each stage."""
        both, alone, student, teacher = [], [], 0, 0
        for stage, (num_student, num_teacher) in enumerate(zip(*counts, strict=True)):
            alone.append(self._student_s(stage, student, student + num_student))
            both.append(alone[-1] + self._teacher.extra_s[stage])
            both[-1] += self._teacher.until_s[teacher + num_teacher] - self._teacher.until_s[teacher]
            student, teacher = student + num_student, teacher + num_teacher
        return both, alone

    def _time_s(self, counts: Counts) -> float:
        both, alone = self._loads(counts)
        if self._num_microbatches is None:
            return max(both)
        return max(self._num_microbatches * max(both), sum(alone) + (self._num_microbatches - 1) * max(alone))

    def _caps(self, time_s: float) -> tuple[float, float]:
        """The most a rank, and a stage's student, may take in a step of this time."""
        if self._num_microbatches is None:
            return time_s, inf
        whole_s = self._student.until_s[-1] + sum(self._student.extra_s)
        rest = self._num_microbatches - 1
        slowest_s = (time_s - whole_s) / rest if rest else (inf if time_s >= whole_s else -1.0)
        return time_s / self._num_microbatches, slowest_s

    def _student_s(self, stage: int, start: int, stop: int) -> float:
        return self._student.until_s[stop] - self._student.until_s[start] + self._student.extra_s[stage]

    def _fit(self, cap_s: float, slowest_s: float) -> Counts | None:
        """Return counts with every rank under `cap_s` and every stage's student under `slowest_s`, or None."""
        cap_s, slowest_s = cap_s * (1 + _EXACT), slowest_s * (1 + _EXACT)
        reached: list[dict[int, Intervals]] = [{0: [(0, 0)]}]
        for stage in range(self._num_stages):
            stages_left = self._num_stages - stage - 1
            most = self._num_student - stages_left * self._min_student
            following: dict[int, Intervals] = {}
            for start, intervals in reached[-1].items():
                for stop in range(start + self._min_student if stages_left else self._num_student, most + 1):
                    seconds = self._student_s(stage, start, stop)
                    budget_s = cap_s - seconds - self._teacher.extra_s[stage]
                    if seconds > slowest_s or budget_s < 0:
                        break
                    for interval in intervals:
                        following.setdefault(stop, []).extend(self._extend(interval, budget_s, stages_left))
            reached.append({stop: merged for stop, each in following.items() if (merged := _merge(each))})
        last = reached[-1].get(self._num_student, [])
        if not any(low <= self._num_teacher <= high for low, high in last):
            return None
        return self._trace(reached, cap_s, slowest_s)

    def _extend(self, interval: tuple[int, int], budget_s: float, stages_left: int) -> Intervals:
        """Teacher layers that can have been placed after one more stage, from any number in an interval."""
        sums, least = self._teacher.until_s, self._min_teacher
        most = self._num_teacher - stages_left * least
        low, high = interval[0], min(interval[1], most - least)
        if low > high:
            return []

        def limit(placed: int) -> int:
            return min(most, bisect_right(sums, sums[placed] + budget_s) - 1)

        if self._worst_window_s <= budget_s:
            return [(low + least, limit(high))]
        each = [(placed + least, limit(placed)) for placed in range(low, high + 1)]
        return [(first, last) for first, last in each if first <= last]

    def _trace(self, reached: list[dict[int, Intervals]], cap_s: float, slowest_s: float) -> Counts:
        """Walk back from the last stage, each time to what is nearest to an even share."""
        student, teacher = self._num_student, self._num_teacher
        counts: list[tuple[int, int]] = []
        for stage in reversed(range(self._num_stages)):
            options = []
            for start, intervals in reached[stage].items():
                if start > student - self._min_student:
                    continue
                seconds = self._student_s(stage, start, student)
                budget_s = cap_s - seconds - self._teacher.extra_s[stage]
                if seconds > slowest_s:
                    continue
                for low, high in intervals:
                    for placed in range(low, min(high, teacher - self._min_teacher) + 1):
                        if self._teacher.until_s[teacher] - self._teacher.until_s[placed] <= budget_s:
                            uneven = abs(start * (stage + 1) - student * stage)
                            options.append(
                                (uneven, abs(placed * (stage + 1) - teacher * stage), start, placed)
                            )
            _, _, start, placed = min(options)
            counts.append((student - start, teacher - placed))
            student, teacher = start, placed
        student_counts, teacher_counts = zip(*reversed(counts), strict=True)
        return student_counts, teacher_counts


def _merge(intervals: Intervals) -> Intervals:
    """The same numbers in as few intervals as possible."""
    merged: Intervals = []
    for low, high in sorted(intervals):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = merged[-1][0], max(merged[-1][1], high)
        else:
            merged.append((low, high))
    return merged
